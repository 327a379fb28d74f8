"""Killed at any moment, the tool leaves the whole output or none, and nothing beside it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_lrsd
from onnx_lrsd import whole_files
from onnx_lrsd.work_dir import ENTRY_SUFFIX, MARK

KILLS = 10
"""Of a whole run, and as many of the write alone."""
DRIVER = """
import os, sys
from pathlib import Path
import onnx_lrsd
from onnx_lrsd.facts import LoadCost

sys.modules["onnx_lrsd.commands.optimize"].opening_cost = lambda model: LoadCost(0.1, 1)
what, folder = sys.argv[1], Path(sys.argv[2])
output = folder / "out" / "out.onnx"


def run():
    options = {"target": "size", "ratio": 3, "samples": 40, "work_dir": folder / "work"}
    onnx_lrsd.optimize(folder / "model.onnx", str(folder / "calib.npz"), output=output, **options)


def write():
    model = onnx_lrsd.load(folder / "model.onnx")
    while True:
        output.unlink(missing_ok=True)
        onnx_lrsd.save(model, output)


for line in sys.stdin:  # importing takes longest: each run is a fork of one process that has done so
    child = os.fork()
    if not child:
        {"run": run, "write": write}[what]()
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


def small_model() -> onnx.ModelProto:
    weight = np.random.default_rng(0).standard_normal((64, 64)) * 0.8 ** np.arange(64)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="one")],
        "small",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


needs_unnamed_files = pytest.mark.skipif(
    not whole_files._UNNAMED, reason="this system has no files without a name"
)


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Callable[[str, float], float]]:
    """Runs something in a folder and kills it after so many seconds; gives the seconds that it lived."""
    (tmp_path / "out").mkdir()
    onnx.save(small_model(), tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 8)) @ rng.standard_normal((8, 64))
    np.savez(tmp_path / "calib.npz", x=x.astype(np.float32))
    started: dict[str, subprocess.Popen[str]] = {}

    def kill(what: str, seconds: float) -> float:
        if what not in started:
            command = [sys.executable, "-c", DRIVER, what, str(tmp_path)]
            root = Path(__file__).parents[1]
            pipe, environment = subprocess.PIPE, {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
            environment["PYTHONPATH"] = str(root)
            started[what] = subprocess.Popen(
                command, cwd=root, stdin=pipe, stdout=pipe, text=True, env=environment
            )
        process = started[what]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        child, start = int(process.stdout.readline()), time.monotonic()
        if seconds < float("inf"):
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):  # it was faster this time
                os.kill(child, signal.SIGKILL)
        assert process.stdout.readline() == "gone\n"
        return time.monotonic() - start

    yield kill
    for process in started.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def whole(path: Path) -> bool:
    """Whether the output is there; it is whole then."""
    if path.exists():
        onnx.checker.check_model(onnx_lrsd.load(path).proto)
    return path.exists()


@needs_unnamed_files
@pytest.mark.slow
def test_a_run_that_is_killed_leaves_all_or_nothing_and_goes_on(
    tmp_path: Path, killed: Callable[[str, float], float]
) -> None:
    rng, output = np.random.default_rng(0), tmp_path / "out" / "out.onnx"
    lasted = killed("run", float("inf"))
    assert whole(output)
    expected = output.read_bytes()
    for _ in range(KILLS):
        output.unlink(missing_ok=True)
        for path in (tmp_path / "work").glob(f"*{ENTRY_SUFFIX}"):
            if rng.random() < 0.5:
                path.unlink()
        killed("run", lasted * rng.random())
        assert [path.name for path in output.parent.iterdir()] in ([], ["out.onnx"])
        whole(output)
        names = [path.name for path in (tmp_path / "work").iterdir()]
        assert all(name == MARK or name.endswith(ENTRY_SUFFIX) for name in names)
    output.unlink(missing_ok=True)
    killed("run", float("inf"))
    assert output.read_bytes() == expected


@needs_unnamed_files
@pytest.mark.slow
def test_a_write_that_is_killed_leaves_all_or_nothing(
    tmp_path: Path, killed: Callable[[str, float], float]
) -> None:
    rng, output = np.random.default_rng(0), tmp_path / "out" / "out.onnx"
    for _ in range(KILLS):
        killed("write", 0.3 + 0.1 * rng.random())
        assert [path.name for path in output.parent.iterdir()] in ([], ["out.onnx"])
        whole(output)


def test_a_system_without_unnamed_files_writes_whole_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_files, "_UNNAMED", 0)
    whole_files.try_folder(tmp_path)
    onnx_lrsd.save(onnx_lrsd.load(small_model()), tmp_path / "out.onnx")
    assert whole(tmp_path / "out.onnx") and len(list(tmp_path.iterdir())) == 1
