"""Work that is shared out gives what one process gives, whatever happens to the workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper
from threadpoolctl import threadpool_info, threadpool_limits

import onnx_lrsd
from onnx_lrsd.cli import main
from onnx_lrsd.errors import DeviceError, LrsdError, OptionError
from onnx_lrsd.workers import IN_PROCESS, Workers, workers_for

TASKS = """
import os, signal, time

def square(x):
    return x * x

def deadly(given):
    value, main = given
    if os.getpid() != main and value == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return value * value

def slow(x):
    time.sleep(0.3)
    return x * x
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that other processes can import."""
    (tmp_path / "tasks_of_a_test.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])]))
    import tasks_of_a_test  # type: ignore[import-not-found]

    yield tasks_of_a_test
    del sys.modules["tasks_of_a_test"]


class Failing(Executor):
    """Breaks its first tasks, so many of them."""

    def __init__(self, failures: int, at_submit: bool = False) -> None:
        self.failures, self.at_submit, self.tasks = failures, at_submit, 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        self.tasks += 1
        future: Future[Any] = Future()
        if self.failures > 0:
            self.failures -= 1
            if self.at_submit:
                raise BrokenProcessPool("gone")
            future.set_exception(BrokenProcessPool("gone"))
        else:
            future.set_result(fn(*args))
        return future


def square(x: int) -> int:
    return x * x


@pytest.mark.parametrize("at_submit", [True, False])
@pytest.mark.parametrize("failures", [0, 1, 3, 1000])
def test_tasks_of_lost_workers_are_done_again_and_then_here(failures: int, at_submit: bool) -> None:
    said, counts = list[str](), list[int]()
    workers = Workers(Failing(failures, at_submit), 2, 1, None, said.append)
    assert workers.map(square, lambda index: index, 7, counts.append) == [x * x for x in range(7)]
    assert counts == list(range(1, 8)) and len(said) == min(failures, 1)


def test_the_error_of_a_task_is_raised_as_it_is() -> None:
    def fail(x: int) -> int:
        raise LrsdError("its own: say so.")

    for workers in (IN_PROCESS, Workers(ThreadPoolExecutor(2), 2, 1)):
        with pytest.raises(LrsdError, match="its own"):
            workers.map(fail, lambda index: index, 3)


def test_threads_of_this_process_share_its_cores_and_fail_at_once() -> None:
    def threads_of_blas(index: int) -> int:
        return max(int(one["num_threads"]) for one in threadpool_info())

    def fail(index: int) -> None:
        tried.append(index)
        raise LrsdError("its own: say so.")

    tried, said = list[int](), list[str]()
    with ThreadPoolExecutor(2) as pool:
        workers = Workers(pool, 2, 2, None, said.append, here=True)
        assert workers.map(threads_of_blas, lambda index: index, 4) == [1] * 4
        with pytest.raises(LrsdError, match="its own"):
            workers.map(fail, lambda index: index, 2)
    assert len(tried) <= 2 and not said


def test_nothing_is_begun_any_more_once_who_watches_gives_up() -> None:
    def done(count: int) -> None:
        raise LrsdError("out of time: stop.")

    def slowly(index: int) -> None:
        begun.append(index)
        time.sleep(0.05)

    begun = list[int]()
    with ThreadPoolExecutor(1) as pool, pytest.raises(LrsdError, match="out of time"):
        Workers(pool, 2, 1, here=True).map(slowly, lambda index: index, 20, done)
    assert len(begun) <= 3


def test_few_arguments_are_made_ahead() -> None:
    made, most = list[int](), list[int]()

    def given(index: int) -> int:
        made.append(index)
        return index

    workers = Workers(ThreadPoolExecutor(2), 2, 1)
    workers.map(square, given, 20, lambda done: most.append(len(made) - done))
    assert max(most) <= 4


@pytest.mark.slow
def test_a_process_that_is_killed_has_its_task_done_by_others(tasks: Any) -> None:
    said = list[str]()
    with workers_for(2, warn=said.append) as workers:
        done = workers.map(tasks.deadly, lambda index: (index, os.getpid()), 5)
        again = workers.map(tasks.square, lambda index: index, 4)
    assert done == [0, 1, 4, 9, 16] and again == [0, 1, 4, 9] and len(said) == 1


# The whole tool


def a_model() -> onnx.ModelProto:
    """A chain of layers, some behind a Relu, with channels that may be cut."""
    rng = np.random.default_rng(0)
    sizes = [64, 96, 96, 64, 48]
    nodes, weights, last = [], [], "x"
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        values = rng.standard_normal((inputs, outputs)) * 0.9 ** np.arange(outputs) / np.sqrt(inputs)
        weights.append(numpy_helper.from_array(values.astype(np.float32), f"w{index}"))
        name = "y" if index == len(sizes) - 2 else f"h{index}"
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [name], name=f"layer{index}"))
        if name != "y":
            nodes.append(helper.make_node("Relu", [name], [f"r{index}"]))
        last = f"r{index}"
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size])
        for name, size in (("x", sizes[0]), ("y", sizes[-1]))
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def optimised(**options: Any) -> tuple[bytes, onnx_lrsd.Report]:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((150, 20)) @ rng.standard_normal((20, 64))).astype(np.float32)
    with threadpool_limits(1):
        found = onnx_lrsd.optimize(a_model(), {"x": x}, target="tensorrt", ratio=1.5, **options)
    return bytes(found.model.proto.SerializeToString(deterministic=True)), found.report


@pytest.fixture(scope="module")
def alone() -> bytes:
    return optimised()[0]


def test_an_executor_gives_what_one_process_gives(alone: bytes) -> None:
    with ThreadPoolExecutor(os.cpu_count() or 1) as executor:
        assert optimised(executor=executor)[0] == alone


def test_broken_executors_cost_time_and_nothing_else(alone: bytes) -> None:
    executor = Failing(3)
    written, report = optimised(executor=executor)
    assert written == alone and executor.tasks > 3
    assert sum("worker was lost" in warning for warning in report.warnings) == 1


@pytest.mark.slow
def test_processes_give_what_one_process_gives(alone: bytes) -> None:
    assert optimised(jobs=os.cpu_count() or 1)[0] == alone


@pytest.mark.slow
def test_workers_of_dask_of_which_one_is_killed_give_what_one_process_gives(alone: bytes, tasks: Any) -> None:
    distributed = pytest.importorskip("distributed", reason="Dask (distributed) is not installed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        address = cluster.scheduler_address
        victim = next(iter(cluster.workers.values())).pid
        threading.Timer(0.7, os.kill, (victim, signal.SIGKILL)).start()
        with workers_for(1, scheduler=address) as workers:
            assert workers.map(tasks.slow, lambda index: index, 8) == [x * x for x in range(8)]
        assert optimised(dask=address)[0] == alone


def test_a_scheduler_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="Dask (distributed) is not installed")
    monkeypatch.setattr("onnx_lrsd.workers.CONNECT_SECONDS", 0.5)
    with pytest.raises(DeviceError, match="no scheduler of Dask"):
        optimised(dask="tcp://127.0.0.1:1")


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(DeviceError, match=r"pip install onnx-lrsd\[dask\]"):
        optimised(dask="tcp://127.0.0.1:1")


def test_one_way_of_sharing_out_at_a_time() -> None:
    for options in ({"jobs": 2, "dask": "tcp://h:1"}, {"jobs": 2, "executor": Failing(0)}):
        with pytest.raises(OptionError, match="give one"):
            optimised(**options)
    with pytest.raises(OptionError, match="jobs=0 is not a whole number"):
        optimised(jobs=0)
    result = CliRunner().invoke(main, ["optimize", "m.onnx", "--jobs", "2", "--dask", "tcp://h:1"])
    assert result.exit_code == 2 and "--dask and --jobs exclude each other" in result.stderr


@pytest.mark.slow
def test_threads_are_divided_between_processes() -> None:
    code = (
        "from onnx_lrsd.workers import workers_for\n"
        "from threadpoolctl import threadpool_info\n"
        "import numpy\n"
        "if __name__ == '__main__':\n"
        "    with workers_for(2) as workers:\n"
        "        infos = workers.map(eval, lambda index: "
        "'__import__(\"threadpoolctl\").threadpool_info()', 2)\n"
        "    blas = [i for info in infos for i in info if i['user_api'] == 'blas']\n"
        "    print(workers.cores // 2 or 1, [i['num_threads'] for i in blas])\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stderr, time.monotonic() - start)
    threads, _, used = done.stdout.partition(" ")
    assert eval(used) and set(eval(used)) == {int(threads)}
