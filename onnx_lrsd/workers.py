"""Work that is shared out to threads, or to other processes on this machine or on others.

Layers are many and most are small: BLAS threads that share one small matrix wait for each other longer than
they work, and keep ONNX Runtime's threads from their cores. So several tasks are done at once, each with a
share of the cores for BLAS (results/time.md).

A task is a function of a module and one argument, which can be pickled where it goes to another process.
There one that fails, most often as its worker died, is done again, and if it fails there too by the main
process, where an error of its own is raised. Results depend on the number of BLAS threads in the last digits,
so a task has as many of them wherever it is done.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, TypeVar

from threadpoolctl import threadpool_info, threadpool_limits

from onnx_lrsd.errors import DeviceError

AHEAD = 2
"""Tasks handed out for each worker of another process, so that none waits for its next one.

Threads of this process have one each: arguments may be large, and are made in a moment here.
"""
MOST_AT_ONCE = 4
"""Tasks done at once by threads of this process: each has matrices of its own, which may be large."""
CONNECT_SECONDS = 10
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
"""What libraries read once, as they are loaded, of how many threads they may have."""

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")
_Item = TypeVar("_Item")


@dataclass(eq=False)
class Workers:
    """Does tasks in ``executor``, ``count`` at a time, or one by one in this process where it is None.

    Tasks done at once share ``cores`` for BLAS. ``renew`` makes another executor where one is broken; None
    where it came from outside. ``warn`` is told once of a worker that died. ``here``: the executor is threads
    of this process, of which none is lost, so that what fails fails for good. ``at_once`` bounds the tasks
    whose arguments are held, None for twice as many as are done at a time.
    """

    executor: Executor | None = None
    count: int = 1
    cores: int = 1
    renew: Callable[[], Executor] | None = None
    warn: Callable[[str], None] = lambda said: None
    here: bool = False
    at_once: int | None = None
    _warned: bool = field(default=False, init=False)

    def map(
        self,
        task: Callable[[_Argument], _Result],
        given: Callable[[int], _Argument],
        count: int,
        done: Callable[[int], None] = lambda count: None,
        store: Callable[[_Result], _Result] = lambda result: result,
    ) -> list[_Result]:
        """``task`` of ``given(0)`` to ``given(count - 1)``, in this order; ``done`` is told how many are.

        Each result is what ``store`` makes of it, in this thread.
        """
        if self.executor is None or (self.here and count == 1):
            found = []
            for index in range(count):
                found.append(store(task(given(index))))
                done(len(found))
            return found
        threads = max(self.cores // max(min(count, self.count), 1), 1)
        made: dict[int, _Result] = {}
        with threadpool_limits(threads) if self.here else nullcontext():
            for _ in range(2):
                missing = [index for index in range(count) if index not in made]
                for index, value in self._handed_out(task, given, missing, threads):
                    made[index] = store(value)
                    done(len(made))
                if len(made) == count:
                    break
                self._note(count - len(made))
        with threadpool_limits(threads):
            for index in range(count):
                if index not in made:
                    made[index] = store(task(given(index)))
                    done(len(made))
        return [made[index] for index in range(count)]

    def _handed_out(
        self,
        task: Callable[[_Argument], _Result],
        given: Callable[[int], _Argument],
        missing: Sequence[int],
        threads: int,
    ) -> Iterator[tuple[int, _Result]]:
        """What workers made of those ``missing``, as far as they did."""
        assert self.executor is not None
        upcoming, waiting = deque(missing), deque[tuple[int, Future[_Result]]]()
        most = self.at_once or self.count * (1 if self.here else AHEAD)
        try:
            while upcoming or waiting:
                while upcoming and len(waiting) < most:
                    index = upcoming.popleft()
                    argument = given(index)
                    try:
                        future = self.executor.submit(_limited, os.getpid(), threads, task, argument)
                    except Exception:  # a broken pool, a client without its scheduler: each has its own
                        upcoming.clear()
                        break
                    waiting.append((index, future))
                if waiting:
                    index, future = waiting.popleft()
                    # Of a lost worker the main process does it then, and raises what is the task's own.
                    with nullcontext() if self.here else suppress(Exception):
                        yield index, future.result()
        finally:  # where who watches has given up, nothing more is begun
            for _, future in waiting:
                future.cancel()

    def _note(self, count: int) -> None:
        if not self._warned:
            self.warn(f"A worker was lost or failed: {count} of its tasks were done again.")
            self._warned = True
        if self.renew is not None and self.executor is not None:
            self.executor.shutdown(wait=False, cancel_futures=True)
            self.executor = self.renew()


IN_PROCESS = Workers()


def one_ahead(items: Iterator[_Item]) -> Generator[_Item]:
    """``items`` in their order, the next one being made in another thread while one is worked on.

    Half of the cores are left to BLAS then: its idle threads wait in a busy loop, which the other thread's,
    most often ONNX Runtime's, would pay for (results/time.md).
    """
    with threadpool_limits(max(_cores() // 2, 1)), ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def _limited(parent: int, threads: int, task: Callable[[Any], Any], given: Any) -> Any:
    """``task(given)`` with so many threads; those of the process itself are for it to limit."""
    if os.getpid() == parent:
        return task(given)
    with threadpool_limits(threads):
        return task(given)


@contextmanager
def workers_for(
    jobs: int | None,
    executor: Executor | None = None,
    scheduler: str | None = None,
    warn: Callable[[str], None] = lambda said: None,
    *,
    on_gpu: bool = False,
) -> Iterator[Workers]:
    """So many processes, or ``executor``, or the workers of Dask's ``scheduler``; none of them: threads here.

    ``on_gpu``: tasks share one GPU, which does one at a time. Raises DeviceError for a scheduler that is not
    there.
    """
    with ExitStack() as stack:
        if scheduler is not None:
            client = stack.enter_context(_client(scheduler))
            count = max(sum(client.nthreads().values()), 1)
            yield Workers(client.get_executor(pure=False, retries=1), count, 1, None, warn)
            return
        cores = _cores()
        if executor is not None:
            count = int(getattr(executor, "_max_workers", cores))
            stack.enter_context(threadpool_limits(max(cores // count, 1)))  # for an executor of threads
            yield Workers(executor, count, cores, None, warn)
            return
        if jobs is None or jobs == 1:
            count = 1 if on_gpu else min(cores, MOST_AT_ONCE)
            pool = stack.enter_context(ThreadPoolExecutor(count)) if count > 1 else None
            yield Workers(pool, count, cores, None, warn, here=True)
            return
        stack.enter_context(_environment(max(cores // jobs, 1)))

        def processes() -> ProcessPoolExecutor:
            return ProcessPoolExecutor(jobs, get_context("spawn"))

        workers = Workers(processes(), jobs, cores, processes, warn)
        try:
            yield workers
        finally:
            if workers.executor is not None:
                workers.executor.shutdown(cancel_futures=True)


def _cores() -> int:
    """The cores that this process may use for BLAS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *(int(library["num_threads"]) for library in threadpool_info())])


def _client(scheduler: str) -> Any:
    """A client of the scheduler at this address. Raises DeviceError."""
    try:
        from distributed import Client
    except ImportError:
        raise DeviceError("Dask is not installed: pip install onnx-lrsd[dask], or use --jobs.") from None
    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TimeoutError):
        raise DeviceError(
            f"There is no scheduler of Dask at {scheduler}: check the address, or leave it out."
        ) from None
    return client


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """For processes that start within: so many threads for their libraries."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
