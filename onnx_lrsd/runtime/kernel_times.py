"""How long each kernel of a model runs, as ONNX Runtime records it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx

from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.runtime.timing import busy_clock
from onnx_lrsd.types import Feed

BLOCKED = "_nchwc"
"""Suffix that ONNX Runtime adds to the name of a node that it moves to its blocked layout."""
FASTEST_WITHIN, RESOLUTION = 1.1, 1e-6
"""Runs count as fastest up to this factor and these seconds above the 10 % quantile; microseconds are
recorded."""


class Kernel(NamedTuple):
    """One node as ONNX Runtime ran it: its name, operator, and the seconds of its kernel in one run.

    ``seconds`` are those of quiet runs, less the share in which other work had the processor; ``fastest``
    those of the fastest runs by the clock on the wall, right for short kernels on a busy machine. Both hold
    what recording takes, about a microsecond.
    """

    name: str
    op: str
    seconds: float
    fastest: float


def kernels(
    proto: onnx.ModelProto, feed: Feed, *, folder: Path | None = None, runs: int = 10
) -> list[Kernel]:
    """Every node of the optimised graph in one thread, in its order.

    A convolution in the blocked layout is named after its output, any other node as in ``proto`` where it
    was not fused.
    """
    with tempfile.TemporaryDirectory() as place:
        session = open_session(proto, folder=folder, threads=1, record=Path(place) / "run")
        shares = [_busy_share(partial(session.run, feed)) for _ in range(runs + 1)]
        events = json.loads(session.end_record().read_text(encoding="utf-8"))
    seen: dict[str, tuple[str, list[float]]] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name != event["name"]:
            seen.setdefault(name, (event["args"]["op_name"], []))[1].append(event["dur"] * 1e-6)
    quiet = 1 + np.argsort(shares[1:])[runs // 2 :]  # the first run is for warming up
    share = np.array(shares)[quiet]
    found = []
    for name, (op, times) in seen.items():
        busy, every = np.array(times)[quiet] * share, np.array(times[1:])
        fastest = every[every <= FASTEST_WITHIN * np.quantile(every, 0.1) + RESOLUTION]
        found.append(Kernel(name.removesuffix(BLOCKED), op, float(busy.mean()), float(fastest.mean())))
    return found


def _busy_share(run: Callable[[], object]) -> float:
    """The share of the run's time in which this thread had the processor."""
    busy, start = busy_clock(), time.perf_counter()
    before = busy()
    run()
    return min((busy() - before) / (time.perf_counter() - start), 1.0)
