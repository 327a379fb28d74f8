"""ONNX Runtime gives any tensor of a model, leaves the model alone, and fails in one sentence."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from gpu_stand_in import DoesNotLoad, FallsBack, OnTheGpu, runtime_with_cuda
from onnx import TensorProto, helper, numpy_helper

import onnx_lrsd
from onnx_lrsd.commands import doctor
from onnx_lrsd.errors import DataError, DeviceError, ModelError
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure import layer_times, speedup
from onnx_lrsd.runtime import session as runtime
from onnx_lrsd.runtime import timing
from onnx_lrsd.types import InputSpec

value = helper.make_tensor_value_info
OPSET = helper.make_opsetid("", 17)


def network(seed: int = 0) -> onnx.ModelProto:
    """x (N, 3, 8, 8) -> Conv, Relu -> Flatten -> Gemm; one initializer is an optional input, one unused."""
    rng = np.random.default_rng(seed)
    weights = {
        "k": rng.standard_normal((4, 3, 3, 3)),
        "w": rng.standard_normal((4 * 36, 5)),
        "b": rng.standard_normal(5),
        "unused": np.zeros(3),
    }
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [value("x", TensorProto.FLOAT, ["N", 3, 8, 8]), value("b", TensorProto.FLOAT, [5])],
        [value("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[OPSET], ir_version=8)


def chain(dtype: int = TensorProto.FLOAT, shape: Sequence[str | int | None] = ("N", 4)) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "chain",
        [value("x", dtype, shape)],
        [value("y", dtype, None)],
    )
    return helper.make_model(graph, opset_imports=[OPSET], ir_version=8)


def weight(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name))


X = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)


def test_any_tensor_can_be_watched_and_the_model_is_not_changed() -> None:
    proto = network()
    before = proto.SerializeToString(deterministic=True)
    session = runtime.open_session(proto, outputs=["c", "r", "f", "x", "k", "y"])
    got = session.run({"x": X})
    assert np.array_equal(got["r"], np.maximum(got["c"], 0))
    assert np.array_equal(got["f"], got["r"].reshape(2, -1))
    assert np.allclose(got["y"], got["f"] @ weight(proto, "w") + weight(proto, "b"), atol=1e-4)
    assert np.array_equal(got["x"], X)
    assert np.array_equal(got["k"], weight(proto, "k"))
    assert proto.SerializeToString(deterministic=True) == before


def test_nodes_that_nobody_asked_for_do_not_run() -> None:
    proto = network()
    proto.graph.node[3].op_type = "NoSuchOperator"
    assert runtime.open_session(proto, outputs=["r"]).run({"x": X})["r"].shape == (2, 4, 6, 6)
    with pytest.raises(ValueError, match="nothing is no tensor"):
        runtime.open_session(proto, outputs=["nothing"])


def test_tensors_used_only_inside_a_subgraph_are_kept() -> None:
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["h", "w"], ["z"])], "then", [], [value("z", TensorProto.FLOAT, None)]
    )
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["h"]),
            helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch),
        ],
        "branches",
        [value("x", TensorProto.FLOAT, ["N", 4]), value("flag", TensorProto.BOOL, [])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )
    proto = helper.make_model(graph, opset_imports=[OPSET], ir_version=8)
    feed = {"x": np.ones((2, 4), np.float32), "flag": np.array(True)}
    assert runtime.open_session(proto, outputs=["y"]).run(feed)["y"].sum() == 8


@pytest.mark.parametrize("stored", ["raw", "typed", "external"])
def test_large_weights_give_the_same_answer_however_they_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str
) -> None:
    proto, folder = network(), None
    expected = runtime.open_session(proto).run({"x": X})["y"]
    monkeypatch.setattr(runtime, "SHARED_BYTES", 1)
    if stored == "typed":
        for tensor in proto.graph.initializer:
            values = numpy_helper.to_array(tensor).ravel().tolist()
            tensor.ClearField("raw_data")
            tensor.float_data.extend(values)
    if stored == "external":
        onnx.save(
            network(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
        )
        proto, folder = onnx.load(tmp_path / "m.onnx", load_external_data=False), tmp_path
    assert np.array_equal(runtime.open_session(proto, folder=folder).run({"x": X})["y"], expected)
    assert runtime.shapes(proto, {"x": X}, ["c", "w"], folder) == {"c": (2, 4, 6, 6), "w": (144, 5)}


def test_without_optimisation_or_with_other_threads_the_answer_is_the_same() -> None:
    expected = runtime.open_session(network()).run({"x": X})["y"]
    plain = runtime.open_session(network(), optimise=False, threads=1, spinning=True)
    assert np.allclose(plain.run({"x": X})["y"], expected, atol=1e-4)


def test_a_session_says_what_it_takes() -> None:
    proto = network()
    session = runtime.open_session(proto)
    assert session.inputs == (InputSpec("x", "float32", ("N", 3, 8, 8)),)
    assert session.outputs == ("y",)
    shifted = session.run({"x": X, "b": weight(proto, "b") + 1})["y"]  # the default may be overridden
    assert np.allclose(shifted, session.run({"x": X})["y"] + 1, atol=1e-4)


def test_inputs_are_read_with_their_dimensions() -> None:
    dims = chain(shape=["N", None, 3])
    assert inputs_of(dims) == [InputSpec("x", "float32", ("N", None, 3))]
    unranked = chain(dtype=TensorProto.FLOAT16)
    unranked.graph.input[0].type.tensor_type.ClearField("shape")
    assert inputs_of(unranked) == [InputSpec("x", "float16", (), ranked=False)]
    assert inputs_of(chain(dtype=TensorProto.STRING))[0].dtype == "object"
    sequence = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None)
    del dims.graph.input[:]
    dims.graph.input.append(sequence)
    with pytest.raises(ModelError, match=r"^Input x is a sequence.*: export the model with tensors"):
        inputs_of(dims)


def test_shapes_are_those_of_the_run() -> None:
    found = runtime.shapes(network(), {"x": X}, ["x", "k", "c", "f", "y", "c"])
    assert found == {"x": (2, 3, 8, 8), "k": (4, 3, 3, 3), "c": (2, 4, 6, 6), "f": (2, 144), "y": (2, 5)}


def test_shapes_need_no_standard_opset_in_the_model() -> None:
    node = helper.make_node("Normalizer", ["x"], ["y"], domain="ai.onnx.ml", norm="MAX")
    graph = helper.make_graph(
        [node], "ml", [value("x", TensorProto.FLOAT, [1, 3])], [value("y", TensorProto.FLOAT, None)]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("ai.onnx.ml", 1)], ir_version=8)
    assert runtime.shapes(proto, {"x": np.ones((1, 3), np.float32)}, ["y"]) == {"y": (1, 3)}


@pytest.mark.parametrize(
    ("feed", "says"),
    [
        ({"x": np.ones((2, 5), np.float32)}, "invalid dimensions for input: x .* Got: 5 Expected: 4"),
        ({"x": np.ones((2, 4))}, "Unexpected input data type"),
        ({}, "Required inputs"),
    ],
)
def test_samples_that_do_not_fit_are_the_datas_fault(
    feed: dict[str, np.ndarray], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=says) as caught:
        runtime.open_session(chain()).run(feed)
    assert str(caught.value).endswith(": give each input as it wants it.")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_node_that_fails_is_the_models_fault(capfd: pytest.CaptureFixture[str]) -> None:
    proto = network()
    proto.graph.node[2].CopyFrom(helper.make_node("Reshape", ["r", "seven"], ["f"]))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([7, 144]), "seven"))
    with pytest.raises(ModelError) as caught:
        runtime.open_session(proto).run({"x": X})
    said = str(caught.value)
    assert "cannot be reshaped to the requested shape" in said
    assert "onnxruntime_src" not in said
    assert said.endswith(": check that they are what the model expects.")
    proto.graph.node[2].op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match=r"does not open the model \(.*NoSuchOperator.*\): it must run"):
        runtime.open_session(proto)
    assert capfd.readouterr() == ("", "")


def test_what_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    if "CUDAExecutionProvider" not in runtime.onnxruntime().get_available_providers():
        with pytest.raises(DeviceError, match=r"has no CUDA: pip install onnx-lrsd\[gpu\]"):
            runtime.open_session(chain(), device="cuda")

    def missing(name: str) -> object:
        raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DeviceError, match=r"not installed: pip install onnx-lrsd\[cpu\]"):
        runtime.open_session(chain())


def test_what_is_installed_but_does_not_load_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise ImportError("a library it needs is not there")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(DeviceError, match=r"does not load \(a library it needs is not there\)"):
        runtime.open_session(chain())


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def task(self, seconds: float) -> Callable[[], None]:
        """Something that takes these seconds."""

        def run() -> None:
            self.now += seconds

        return run


def test_latency_is_the_median_of_paired_ratios() -> None:
    clock = Clock()
    before, after, ratio, (low, high) = timing.pair_latency(
        clock.task(0.3), clock.task(0.1), seconds=0, clock=clock
    )
    assert (before, after, ratio) == pytest.approx((300, 100, 3))
    assert low == pytest.approx(3) == pytest.approx(high)


def test_a_machine_that_slows_down_steadily_does_not_tilt_the_ratio() -> None:
    clock = Clock()
    speed = iter(1 + 0.01 * i for i in range(10**6))

    def run() -> None:
        clock.now += next(speed)

    ratio = timing.pair_latency(run, run, min_rounds=20, seconds=0, clock=clock)[2]
    assert ratio == pytest.approx(1)


def test_runs_too_short_for_the_clock_are_repeated() -> None:
    clock = Clock()
    short = clock.task(timing.SHORTEST_TIMING / 100)
    before, *_ = timing.pair_latency(short, short, seconds=0, clock=clock)
    assert clock.now > 4 * timing.FEWEST_ROUNDS * timing.SHORTEST_TIMING
    assert before == pytest.approx(timing.SHORTEST_TIMING * 10)


@pytest.mark.parametrize("count", [1, 5, 6, 8, 9, 30, 101])
def test_the_interval_is_the_narrowest_that_holds_95_percent(count: int) -> None:
    skipped = timing._below_median(count)

    def tail(k: int) -> float:
        return float(sum(math.comb(count, i) for i in range(k + 1)) / 2**count)

    assert skipped == 0 or tail(skipped) <= 0.025
    assert skipped + 1 > (count - 1) // 2 or tail(skipped + 1) > 0.025


def test_the_interval_of_thousands_of_rounds_is_that_of_the_normal_law() -> None:
    assert timing._below_median(5000) == pytest.approx(2500 - 0.98 * 5000**0.5, abs=2)


def test_doctor_finds_this_installation_fit() -> None:
    findings = {finding.name: finding for finding in doctor.examine()}
    assert {"python", "numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "cupy"} <= set(findings)
    assert findings["onnxruntime"].good
    assert "CPUExecutionProvider" in findings["onnxruntime"].said
    assert all(finding.said.endswith(".") for finding in findings.values())


def test_doctor_finds_two_runtimes_that_overwrite_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        def __init__(self, name: str) -> None:
            self.metadata = {"Name": name}

    names = "onnxruntime", "onnxruntime_gpu", "onnxruntime-extensions", "onnx", "numpy", "cupy-cuda12x"
    monkeypatch.setattr(doctor, "distributions", lambda: [Installed(name) for name in names])
    finding = next(f for f in doctor.examine() if f.name == "onnxruntime")
    assert finding.good is False
    assert "pip uninstall onnxruntime onnxruntime-gpu," in finding.said


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], ModuleType]:
    """ONNX Runtime as one for CUDA 13 that lists the provider, with a session of the given class."""
    return partial(runtime_with_cuda, monkeypatch)


def test_cuda_that_falls_back_to_the_cpu_is_an_error_with_the_remedy(
    with_cuda: Callable[[type], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    with_cuda(FallsBack)
    with pytest.raises(DeviceError, match="cannot use the GPU here: run `onnx-lrsd doctor`"):
        runtime.open_session(chain(), device="cuda")
    assert capsys.readouterr().out == ""  # what ONNX Runtime prints would spoil a report


def test_cuda_that_does_not_load_is_an_error_in_one_sentence(
    with_cuda: Callable[[type], ModuleType],
) -> None:
    with_cuda(DoesNotLoad)
    with pytest.raises(DeviceError, match=r"Failed to load library.*run `onnx-lrsd doctor`") as caught:
        runtime.open_session(chain(), device="cuda")
    assert "\n" not in str(caught.value)


def test_where_there_is_a_gpu_models_run_and_are_timed_there(
    with_cuda: Callable[[type], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = onnx_lrsd.optimize(*linear_model(), ratio=1.5, forms=("channel",), device="cpu")
    with_cuda(OnTheGpu)
    for place in (layer_times, speedup):
        monkeypatch.delattr(place, "kernels")  # records when a kernel is launched
    found = onnx_lrsd.optimize(*linear_model(), ratio=1.5, forms=("channel",), device="auto")
    assert found.report.verification is not None and found.report.verification.device == "cuda"
    assert "latency (GPU)" in onnx_lrsd.report_table(found.report)
    assert OnTheGpu.placed  # what is timed copies nothing
    assert found.model.proto == plain.model.proto
    assert plain.report.verification is not None and plain.report.verification.device == "cpu"


def test_auto_takes_the_cpu_where_the_gpu_does_not_work(with_cuda: Callable[[type], ModuleType]) -> None:
    with_cuda(FallsBack)
    assert runtime.inference_device("auto") == "cpu"
    with pytest.raises(DeviceError, match="run `onnx-lrsd doctor`"):
        runtime.inference_device("cuda")


def test_doctor_says_for_which_cuda_the_runtime_is_and_what_is_missing(
    with_cuda: Callable[[type], ModuleType],
) -> None:
    with_cuda(FallsBack)
    findings = {finding.name: finding for finding in doctor._runtime()}
    assert findings["onnxruntime CUDA"].good is False
    assert "CUDA 13" in findings["onnxruntime CUDA"].said
    assert "onnxruntime-gpu[cuda,cudnn]" in findings["onnxruntime CUDA"].said


@pytest.mark.parametrize(("cupy", "good"), [("cupy-cuda13x", True), ("cupy-cuda12x", False)])
def test_doctor_compares_the_cuda_of_both_packages(
    with_cuda: Callable[[type], ModuleType], monkeypatch: pytest.MonkeyPatch, cupy: str, good: bool
) -> None:
    with_cuda(FallsBack)
    monkeypatch.setattr(doctor, "_distributions", lambda name: [cupy])
    (finding,) = doctor._cuda()
    assert finding.good is good
    assert "CUDA 13" in finding.said
    assert good or ("CUDA 12" in finding.said and "pip install onnx-lrsd[gpu]" in finding.said)


def linear_model() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """One product whose weight has half the rank it could have, and samples for it."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((128, 24)) @ rng.standard_normal((24, 128)) / 24
    graph = onnx.parser.parse_graph("g (float[n, 128] x) => (float[n, 128] y) { y = MatMul (x, w) }")
    graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "w"))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return proto, {"x": rng.standard_normal((300, 128)).astype(np.float32)}


def test_timing_ends_early_where_the_ratio_is_known() -> None:
    clock = iter(range(0, 10**9, 1000))

    def steady() -> float:
        return float(next(clock))

    runs: list[int] = []
    timing.pair_latency(lambda: runs.append(0), lambda: None, seconds=60, enough=0.01, clock=steady)
    assert len(runs) < 100
