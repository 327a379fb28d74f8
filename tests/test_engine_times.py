"""Where TensorRT and a GPU are present both engines are timed; what fails there costs no result."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tensorrt_stand_in import (
    CARD,
    CLASSES,
    ENUMERATIONS,
    NAME,
    Builder,
    ICudaEngine,
    OnnxParser,
    with_tensorrt,
)

import onnx_lrsd
from onnx_lrsd.targets.trtexec import BATCH, NOT_TIMED

NO_ENGINE = "tensorrt-rtx-cu12 is not installed: pip install -e '.[tensorrt]'"


def optimised(**options: Any) -> Any:
    """Two products of 256 channels with a Relu between, in fewer MACs for TensorRT."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((256, 256)).astype(np.float32) / 16 for name in "ab"}
    text = "g (float[n, 256] x) => (float[n, 256] y) { h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) }"
    graph = onnx.parser.parse_graph(text)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in tensors.items())
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    samples = {"x": rng.standard_normal((60, 256)).astype(np.float32)}
    given = {"target": "tensorrt", "ratio": 1.2, "forms": ("width",), "device": "cpu", **options}
    return onnx_lrsd.optimize(proto, samples, **given)


def test_engines_of_both_models_are_timed_in_one_batch_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_tensorrt(monkeypatch)
    report = optimised().report
    assert report.engine is not None and report.engine.times is not None and report.verification is not None
    times, seen = report.engine.times, report.verification
    assert times.ratio == pytest.approx(seen.before.parameters / seen.after.parameters, rel=1e-3)
    assert times.before_ms == pytest.approx(seen.before.parameters * 1e-6, rel=1e-3)
    assert times.interval == pytest.approx((times.ratio, times.ratio))
    assert (times.gpu, times.version, times.shapes) == (NAME, "11.4.0.106", {"x": (BATCH, 256)})
    assert NOT_TIMED not in report.engine.notes
    one, two = (values for values in CARD.placed.values() if values.shape == (BATCH, 256))
    np.testing.assert_array_equal(one, two)  # both read the same batch
    said = " ".join(onnx_lrsd.report_table(report).split())
    assert f"Engines of TensorRT 11.4.0.106 on {NAME}, x 16x256:" in said
    found = json.loads(onnx_lrsd.report_to_json(report))["tensorrt"]["latency"]
    assert found["median"] == pytest.approx(times.ratio) and found["device"] == NAME


def test_what_tensorrt_refuses_is_a_note_and_costs_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    with_tensorrt(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(OnnxParser, "parse_from_file", lambda self, model: False)
        found = optimised()
    assert found.report.engine.times is None
    assert "TensorRT does not parse the model (No importer registered" in found.report.engine.notes[-1]
    assert found.report.verification.after.macs < found.report.verification.before.macs

    def fails(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(OnnxParser, "parse_from_file", fails)
        said = optimised().report.engine.notes[-1]
    assert said.endswith("not timed (CUDA out of memory): see what the command above says of it.")
    monkeypatch.setattr(Builder, "build_serialized_network", lambda self, network, config: None)
    assert "does not build an engine" in optimised().report.engine.notes[-1]


@pytest.mark.parametrize("name", ["x", "y"])
def test_shapes_that_tensorrt_wants_in_host_memory_lie_there(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with_tensorrt(monkeypatch)
    monkeypatch.setattr(ICudaEngine, "on_host", frozenset({name}))
    assert optimised().report.engine.times is not None


def test_nothing_is_built_where_time_is_short_or_tensorrt_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert NOT_TIMED in optimised().report.engine.notes
    with_tensorrt(monkeypatch)
    report = optimised(time="10min").report
    assert NOT_TIMED in report.engine.notes and report.engine.times is None and not CARD.placed


@pytest.mark.parametrize("stand_in", CLASSES, ids=lambda one: one.__name__)
def test_the_stand_in_has_the_arguments_of_tensorrt(stand_in: type) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason=NO_ENGINE)
    real = getattr(trt, stand_in.__name__)
    constructed = stand_in.__name__ in ("Builder", "Logger", "OnnxParser", "Runtime")
    for name, member in vars(stand_in).items():
        if isinstance(member, property):
            assert isinstance(getattr(real, name), property)
        elif inspect.isfunction(member) and (name != "__init__" or constructed):
            taken = list(inspect.signature(member).parameters)[1:]
            assert any(_takes(taken, overload) for overload in _overloads(name, real)), (name, taken)
    for enumeration in ENUMERATIONS:
        for value in (name for name in vars(enumeration) if name.isupper()):
            assert hasattr(getattr(trt, enumeration.__name__), value)
    assert hasattr(trt.Logger, "INTERNAL_ERROR")


def _overloads(name: str, real: Any) -> list[list[str]]:
    """The arguments of each signature in the documentation of a method, 'name' or 'name=' with a default."""
    said = getattr(real, name).__doc__
    lines = [line for line in said.splitlines() if re.match(rf"(\d+\. )?{name}\(self: ", line)]
    found = [
        re.findall(r"[(,] ?(\w+): [^,)]*?( = |(?=[,)]))", line.split(") -> ")[0] + ")") for line in lines
    ]
    return [[argument + default.strip() for argument, default in one[1:]] for one in found]


def _takes(taken: list[str], overload: list[str]) -> bool:
    """Whether a call with the arguments ``taken`` fits: those that are left out have defaults."""
    names = [argument.removesuffix("=") for argument in overload]
    return names[: len(taken)] == taken and all(one.endswith("=") for one in overload[len(taken) :])
