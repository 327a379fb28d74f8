"""onnx-lrsd as a step of other tools, from their own front ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import onnx_lrsd

ROOT = Path(__file__).parents[1]


def small_model() -> onnx.ModelProto:
    """Two products with a Relu between, weights of rank 4."""
    rng = np.random.default_rng(0)
    graph = onnx.parser.parse_graph(
        "g (float[n, 512] x) => (float[n, 512] y) { a = MatMul (x, w1)  b = Relu (a)  y = MatMul (b, w2) }"
    )
    for name in ("w1", "w2"):
        weight = rng.standard_normal((512, 4)) @ rng.standard_normal((4, 512)) / 10
        graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), name))
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(small_model(), tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=samples())
    return tmp_path


def samples() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((60, 512)).astype(np.float32)


def outputs(path: Path) -> np.ndarray:
    return np.asarray(onnxruntime.InferenceSession(str(path)).run(None, {"x": samples()})[0])


def assert_smaller_and_alike(path: Path, folder: Path) -> None:
    before = outputs(folder / "model.onnx")
    assert np.abs(outputs(path) - before).max() < 0.05 * before.std()
    assert path.stat().st_size < (folder / "model.onnx").stat().st_size / 1.5


def test_a_pass_of_onnx_ir_gives_a_new_model_and_leaves_the_old_one(folder: Path) -> None:
    onnx_ir = pytest.importorskip("onnx_ir", reason="the extra onnx-ir is not installed")
    from onnx_ir.passes.common import CheckerPass

    from onnx_lrsd.integrations.onnx_ir import LrsdPass

    model = onnx_ir.load(folder / "model.onnx")
    smaller = LrsdPass({"x": samples()}, ratio=4, forms=("channel",))
    result = onnx_ir.passes.Sequential(smaller, CheckerPass())(model)
    assert result.modified
    assert smaller.report is not None and smaller.report.promise is not None and smaller.report.promise.kept
    onnx_ir.save(result.model, folder / "smaller.onnx")
    assert_smaller_and_alike(folder / "smaller.onnx", folder)
    onnx_ir.save(model, folder / "before.onnx")
    assert np.array_equal(outputs(folder / "before.onnx"), outputs(folder / "model.onnx"))


def test_a_pass_of_onnx_ir_that_gains_nothing_says_that_it_changed_nothing(folder: Path) -> None:
    onnx_ir = pytest.importorskip("onnx_ir", reason="the extra onnx-ir is not installed")
    from onnx_lrsd.integrations.onnx_ir import LrsdPass

    result = LrsdPass({"x": samples()}, ratio=1000, forms=("channel",))(onnx_ir.load(folder / "model.onnx"))
    assert not result.modified
    onnx_ir.save(result.model, folder / "same.onnx")
    assert np.array_equal(outputs(folder / "same.onnx"), outputs(folder / "model.onnx"))


def test_a_pass_of_onnx_ir_is_refused_with_wrong_options_before_any_work() -> None:
    pytest.importorskip("onnx_ir", reason="the extra onnx-ir is not installed")
    from onnx_lrsd.integrations.onnx_ir import LrsdPass

    with pytest.raises(onnx_lrsd.OptionError, match="max_drop needs labelled samples"):
        LrsdPass(max_drop=1)


@pytest.mark.slow
def test_olive_runs_the_pass_from_its_json(folder: Path) -> None:
    pytest.importorskip("olive.passes", reason="the extra olive is not installed")
    workflow = {
        "input_model": {"type": "ONNXModel", "model_path": "model.onnx"},
        "passes": {"smaller": {"type": "Lrsd", "calibration": "calib.npz", "ratio": 4}},
        "output_dir": "out",
    }
    (folder / "workflow.json").write_text(json.dumps(workflow))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OLIVE_DISABLE_TELEMETRY": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    (folder / "packages.json").write_text(run(sys.executable, "-m", "onnx_lrsd.integrations.olive"))
    run("olive", "run", "--config", "workflow.json", "--package-config", "packages.json")
    assert_smaller_and_alike(folder / "out" / "model.onnx", folder)
    report = json.loads((folder / "out" / "lrsd_report.json").read_text())
    assert report["promise"]["kept"] and report["promise"]["asked"] == 4
