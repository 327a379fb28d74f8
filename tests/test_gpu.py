"""A GPU has a table of times of its own, measured where the nodes run, and the report says whose it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from click.testing import CliRunner
from gpu_stand_in import FallsBack, OnTheGpu, runtime_with_cuda

from onnx_lrsd import cli
from onnx_lrsd.cli import upkeep
from onnx_lrsd.commands import profile
from onnx_lrsd.errors import DeviceError
from onnx_lrsd.run import Options, start
from onnx_lrsd.targets import Machine, built_in, machine
from onnx_lrsd.targets.machine import NODES, from_json, to_json

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
