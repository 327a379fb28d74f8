"""A GPU has a table of times of its own, measured where the nodes run, and the report says whose it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from gpu_stand_in import FallsBack, OnTheGpu, runtime_with_cuda
from plain_layers import linear

import onnx_lrsd
from onnx_lrsd import arrays, cli
from onnx_lrsd.cli import upkeep
from onnx_lrsd.commands import profile
from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.errors import DeviceError
from onnx_lrsd.fit.calibrate import calibrate, recalibrate
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.run import Options, start
from onnx_lrsd.solver import moments
from onnx_lrsd.targets import Machine, built_in, machine
from onnx_lrsd.targets.machine import NODES, from_json, to_json
from onnx_lrsd.types import Moments

NAME = "NVIDIA Stand-in 80GB (HBM3)"
TABLE = replace(built_in(), processor=NAME, runtime=machine.runtime(), node=0.25, device="cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU for ONNX Runtime, and for CuPy as far as its name goes."""
    runtime_with_cuda(monkeypatch, OnTheGpu)
    monkeypatch.setattr(machine, "gpu_name", lambda: NAME)
    monkeypatch.setattr(OnTheGpu, "placed", [])
    monkeypatch.setattr(OnTheGpu, "asked", [])


def stored(table: Machine) -> None:
    path = machine.stored_at("cuda")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(table), encoding="utf-8")


@pytest.mark.usefixtures("gpu")
def test_measuring_a_gpu_fills_the_whole_table_by_runs_that_copy_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, small in (
        *(("SIDES", (7, 14)), ("_CHANNELS", (8,)), ("TIMED_PASSES", 1), ("_SECONDS_ON_A_GPU", 0.002)),
        *(("MATRIX_ROWS", (1,)), ("MATRIX_INPUTS", (16,)), ("MATRIX_OUTPUTS", (16, 64))),
    ):
        monkeypatch.setattr(profile, name, small)
    monkeypatch.delattr(profile, "kernels")  # records when a kernel is launched
    told: list[tuple[str, int, int]] = []
    found = profile.measure(lambda *said: told.append(said), "cuda")
    assert (found.device, found.processor) == ("cuda", NAME) and set(found.rates) == set(NODES)
    assert from_json(to_json(found)).device == "cuda"  # no gap, all positive
    assert told[-1] == ("profile", 3, 3)
    assert set(OnTheGpu.asked) == {"CUDAExecutionProvider"}
    assert len(OnTheGpu.placed) == len(OnTheGpu.asked)


@pytest.mark.usefixtures("gpu")
def test_the_table_of_a_gpu_lies_beside_that_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "measure", lambda progress, device: replace(TABLE, device=device))
    result = CliRunner().invoke(cli.main, ["profile", "--device", "cuda"])
    assert result.exit_code == 0, result.stderr
    assert machine.stored_at("cuda").name == "machine-nvidia-stand-in-80gb-hbm3.json"
    assert machine.stored_at("cuda").parent == machine.stored_at().parent
    assert f"Written to {machine.stored_at('cuda')}." in result.stderr and "on the GPU" in result.stderr
    run = start(Options(device="cuda"))
    assert run.machine is not None and run.machine.node == 0.25 and not run.journal.warnings
    assert run.table == f"measured on this machine: {NAME} (GPU), ONNX Runtime {machine.runtime()}"
    assert start(Options(device="cpu")).machine == built_in()


@pytest.mark.usefixtures("gpu")
def test_a_gpu_without_a_table_of_its_own_is_one_sentence_with_the_remedy() -> None:
    run = start(Options(device="cuda"))
    assert run.machine == built_in() and "(GPU)" not in run.table
    assert run.journal.warnings == [
        f"Times were predicted with a table measured on {built_in().processor}: "
        "run `onnx-lrsd profile --device cuda` once for a better plan on this machine."
    ]
    stored(replace(TABLE, runtime="another"))
    (said,) = start(Options(device="cuda")).journal.warnings
    assert said.endswith("and was not used: run `onnx-lrsd profile --device cuda` again.")
    stored(replace(TABLE, device="cpu"))
    assert start(Options(device="cuda")).machine == built_in()


def test_profile_of_a_gpu_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime_with_cuda(monkeypatch, FallsBack)
    result = CliRunner().invoke(cli.main, ["profile", "--device", "cuda"])
    assert result.exit_code == 1 and "run `onnx-lrsd doctor`" in result.stderr
    runtime_with_cuda(monkeypatch, OnTheGpu)
    monkeypatch.setattr(machine, "gpu_name", lambda: "")
    with pytest.raises(DeviceError, match="pip install onnx-lrsd"):
        profile.ensure_profiled("cuda")


def test_a_table_of_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device"):
        from_json(to_json(replace(TABLE, device="abacus")))


def strict(x: np.ndarray) -> Any:
    """``x`` where NumPy cannot see it, in a library that has nothing beyond the array API standard."""
    import array_api_strict

    return array_api_strict.asarray(np.array(x), device=array_api_strict.Device("device1"))


def on_card(x: np.ndarray) -> Any:
    module = arrays.cupy()
    if module is None:
        pytest.skip("CuPy finds no GPU")
    return module.asarray(x)


def host(x: Any) -> np.ndarray:
    if type(x).__module__.startswith("array_api_strict"):
        import array_api_strict

        x = x.to_device(array_api_strict.Device("CPU_DEVICE"))
    return arrays.to_numpy(x)


def summed(layer_inputs: int, expected: int, paired: bool, device: str) -> Moments:
    """Moments of 300 rows that come in chunks of 70, with targets where they are ``paired``."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, layer_inputs)).astype(np.float32) + 5
    targets = rng.standard_normal((300, 12)).astype(np.float32) - 2
    accumulator = moments.MomentAccumulator(linear(12, layer_inputs), expected, device)
    for start_at in range(0, 300, 70):
        here = slice(start_at, start_at + 70)
        accumulator.add(rows[here], targets[here] if paired else None)
    return accumulator.result()


@pytest.mark.parametrize("library", [strict, on_card])
@pytest.mark.parametrize("layer_inputs", [40, 700])
@pytest.mark.parametrize("paired", [False, True])
def test_moments_that_are_summed_on_a_device_are_those_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, library: Callable[[np.ndarray], Any], layer_inputs: int, paired: bool
) -> None:
    monkeypatch.setattr(moments.MomentAccumulator, "CHUNK", 130 if layer_inputs == 40 else 300)
    plain = summed(layer_inputs, 300, paired, "cpu")
    monkeypatch.setattr(moments, "to_device", lambda x, device: library(x))
    monkeypatch.setattr(moments, "to_numpy", host)
    found = summed(layer_inputs, 300, paired, "auto")
    for one in fields(Moments):
        before, after = getattr(plain, one.name), getattr(found, one.name)
        if isinstance(before, np.ndarray):
            assert isinstance(after, np.ndarray) and after.dtype == before.dtype
            np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
        else:
            assert after == pytest.approx(before) if isinstance(before, float) else after == before


@pytest.mark.usefixtures("gpu")
def test_sums_are_taken_where_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    graph = onnx.parser.parse_graph("g (float[n, 64] x) => (float[n, 64] y) { y = MatMul (x, w) }")
    weight = rng.standard_normal((64, 64)).astype(np.float32)
    graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx_lrsd.load(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8))
    working = model.graph()
    layers, _ = onnx_lrsd.find_layers(working)
    weight_of = partial(onnx_lrsd.read_weight, working)
    images = {"x": rng.standard_normal((200, 64)).astype(np.float32)}
    samples = read_samples(images, inputs_of(model.proto))
    asked: list[str] = []

    def to_device(x: np.ndarray, device: str) -> np.ndarray:
        asked.append(device)
        return x

    monkeypatch.setattr(moments, "to_device", to_device)
    found = []
    for device in ("cpu", "cuda"):
        asked.clear()
        known = calibrate(replace(model, device=device), layers, samples, weight_of)
        again, _ = recalibrate(replace(model, device=device), known.layers, known, weight_of)
        found.append([known.moments["y"].second, again["y"].second, again["y"].cross])
        assert len(asked) >= 3 and set(asked) == {"cpu" if device == "cpu" else "auto"}
    for on_cpu, on_gpu in zip(*found, strict=True):
        np.testing.assert_array_equal(on_cpu, on_gpu)
