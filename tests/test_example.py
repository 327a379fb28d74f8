"""The README's example is true: half the MACs, the same accuracy, on the model that ships."""

import re
from math import prod
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import onnx_lrsd

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models"


def _accuracy(path: Path) -> float:
    data = np.load(MODELS / "digits_eval.npz")
    scores = onnxruntime.InferenceSession(str(path)).run(None, {"image": data["image"]})[0]
    return float(np.mean(scores.argmax(axis=1) == data["labels"]))


def _macs(path: Path) -> int:
    """Counted apart from the tool: every output value of a Conv or Gemm costs one row of its weight."""
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    values = [*model.graph.value_info, *model.graph.output]
    shapes = {v.name: [d.dim_value or 1 for d in v.type.tensor_type.shape.dim] for v in values}
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    total = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            total += prod(shapes[node.output[0]]) * prod(weights[node.input[1]][1:])
        elif node.op_type in ("Gemm", "MatMul"):
            total += prod(weights[node.input[1]])
    return total


def test_the_example_is_small_and_accurate() -> None:
    written = MODELS / "digits.lrsd.onnx"  # by the README's first command
    files = [path for path in MODELS.glob("digits*") if path != written]
    assert sum(path.stat().st_size for path in files) < 5_000_000
    assert _accuracy(MODELS / "digits.onnx") >= 0.97
    assert "labels" not in np.load(MODELS / "digits_calib.npz").files


def test_calibration_and_evaluation_samples_are_apart() -> None:
    calibration, evaluation = (np.load(MODELS / f"digits_{part}.npz")["image"] for part in ("calib", "eval"))
    assert not {image.tobytes() for image in calibration} & {image.tobytes() for image in evaluation}


def _python_of(document: str) -> list[CodeType]:
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return [compile(code, document, "exec") for code in blocks]


@pytest.mark.slow
def test_the_python_of_the_readme_halves_the_macs_and_keeps_the_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (main_job,) = _python_of("README.md")
    (tmp_path / "models").symlink_to(MODELS)
    monkeypatch.chdir(tmp_path)
    exec(main_job, {})
    written = tmp_path / "digits.lrsd.onnx"
    assert _macs(MODELS / "digits.onnx") >= 2 * _macs(written)
    assert _accuracy(written) >= _accuracy(MODELS / "digits.onnx") - 0.01
    assert "2 x fewer MACs asked" in capsys.readouterr().out


def test_the_python_of_the_mathematics_decomposes_one_layer() -> None:
    (one_layer,) = _python_of("docs/mathematics.md")
    rng = np.random.default_rng(0)
    weight, inputs = rng.standard_normal((100, 300)), rng.standard_normal((1000, 300))
    names: dict[str, Any] = {"weight": weight, "second": inputs.T @ inputs / 1000, "damping": 1e-3}
    exec(one_layer, names)
    assert np.count_nonzero(names["found"].sparse) == 10_000
    assert np.linalg.norm(names["approximation"] - weight) < 0.7 * np.linalg.norm(weight)


@pytest.mark.slow
def test_a_ratio_out_of_reach_hands_back_the_original_and_says_so() -> None:
    result = onnx_lrsd.optimize(MODELS / "digits.onnx", MODELS / "digits_calib.npz", ratio=1000, samples=40)
    promise = result.report.promise
    assert promise is not None and not promise.kept and promise.got == 1
    assert "at most" in result.report.warnings[0]
    assert result.model.proto == onnx_lrsd.load(MODELS / "digits.onnx").proto
    assert all(layer.form == "dense" and layer.reason for layer in result.report.layers)
