"""The example of fine-tuning: it runs the written model in PyTorch, learns, and puts the weights back."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator

import onnx_lrsd
from onnx_lrsd import cli
from onnx_lrsd.graph.subgraph import inputs_of

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
pytest.importorskip("safetensors", reason="safetensors is not installed")
ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("fine_tuning", ROOT / "examples" / "fine_tuning.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of digits.onnx at a ratio that hurts, and its factors."""
    found = tmp_path_factory.mktemp("tuning")
    plan = {
        "conv2": {"kind": "channel", "rank": 8},
        "conv3": {"kind": "spatial", "rank": 6},
        "conv4": {"kind": "spatial", "rank": 6},
        "conv5": {"kind": "tucker", "rank": 12, "outer": 12},
    }
    text = json.dumps({"schema": 1, "target": "onnxruntime", "cost": "macs", "layers": plan})
    (found / "plan.json").write_text(text)
    asked = (
        "optimize",
        MODELS / "digits.onnx",
        "--calib",
        MODELS / "digits_calib.npz",
        "--samples",
        60,
        "-q",
    )
    written = (
        "--plan",
        found / "plan.json",
        "-o",
        found / "small.onnx",
        "--export-factors",
        found / "factors",
    )
    result = CliRunner().invoke(cli.main, [str(argument) for argument in (*asked, *written)])
    assert result.exit_code == 0, result.stderr
    return found


def test_a_few_steps_bring_the_outputs_nearer_to_the_original(folder: Path) -> None:
    module = example()
    torch.manual_seed(0)
    model, small = (onnx.load(path) for path in (MODELS / "digits.onnx", folder / "small.onnx"))
    found = module.load_file(folder / "factors" / "factors.safetensors")
    learned = {name: values for name, values in found.items() if values.is_floating_point()}
    network, original = module.Network(small, learned), module.Network(model, {})
    images = np.load(MODELS / "digits_calib.npz")["image"]
    held = np.load(MODELS / "digits_eval.npz")["image"][:60]

    before = onnx_lrsd.load(folder / "small.onnx")
    session: Any = ReferenceEvaluator(small)
    with torch.no_grad():
        np.testing.assert_allclose(
            network(torch.from_numpy(held[:4])), session.run(None, {"image": held[:4]})[0], atol=1e-3
        )
    errors = module.tune(
        network, original, torch.from_numpy(images[:240]), steps=40, size=32, rate=3e-4, moved=False
    )
    assert np.mean(errors[-5:]) < 0.8 * np.mean(errors[:3])
    module.put_back(network, small)
    samples = onnx_lrsd.read_samples({"image": held}, inputs_of(model))
    first = onnx_lrsd.compare(onnx_lrsd.load(model), before, samples, latency=False)
    tuned = onnx_lrsd.compare(onnx_lrsd.load(model), onnx_lrsd.load(small), samples, latency=False)
    assert tuned.error < first.error


def test_a_pruned_start_has_as_many_numbers_as_were_asked_for() -> None:
    network, masks = example().pruned(onnx.load(MODELS / "digits.onnx"), 1000)
    assert sum(int(mask.sum()) for mask in masks) == 1000
    assert sum(int((weight != 0).sum()) for weight in network.learned) == 1000
