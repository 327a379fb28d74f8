"""The memory that a run may take: what is held at once, and what lies in a file meanwhile.

One layer is worked on at a time, and takes what ``working_bytes`` says. What is kept of all layers (sampled
rows, moments, factors, new weights) stays in memory where it fits beside that, otherwise it goes to a scratch
file. A model whose weights are more than a share of the memory is run part by part.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from onnx_lrsd.types import Progress, few_rows

BASE_BYTES = 256 << 20
"""What Python, its packages and a batch of samples take beside all that is counted (results/scale.md)."""
SESSION_SHARE = 0.125
"""Share of the memory that the weights of one session of ONNX Runtime may take, which maps them and packs
them anew, and that activations kept between two runs may take."""
OF_WEIGHT, OF_SECOND, OF_OUTPUTS = 10, 6, 5
"""Arrays in double precision of the sizes of W (n, m), of the moment (m, m) and of the metric of the outputs
(n, n) that are there at once while a layer is fitted, measured with tracemalloc (results/scale.md)."""
OF_ROWS = 5
"""The same of single precision for its sampled rows, (count, n + m)."""
METRIC_UP_TO = 4096
"""Outputs of a layer, at most, whose errors are weighted by its readers: the metric of outputs is (n, n)."""


class Need(NamedTuple):
    """What a layer takes: by the name that people know, while it is ``worked`` on, and ``kept`` of it."""

    name: str
    worked: int
    kept: int


def working_bytes(n: int, m: int, rows: int) -> int:
    """Bytes that are there at once while a layer (n, m) is fitted to so many ``rows``."""
    second = 0 if few_rows(m, rows) else m * m
    outputs = n * n if n <= METRIC_UP_TO else 0
    fitted = 8 * (OF_WEIGHT * n * m + OF_SECOND * second + OF_OUTPUTS * outputs)
    return fitted + 4 * OF_ROWS * rows * (n + m)


def kept_bytes(n: int, m: int, rows: int) -> int:
    """Bytes that are kept of a layer: rows, its moment, and factors, which are written twice.

    Rows are those of its inputs and, to be on the safe side, as many of its outputs.
    """
    return 4 * rows * (n + m) + 4 * m * min(m, rows) + 16 * n * m


class MemoryLimit:
    """At most so many ``bytes``, beside what ONNX Runtime takes; inf is no limit.

    ``aside`` notes that what is kept of all layers lies in a file.
    """

    def __init__(self, limit: float = inf) -> None:
        self.bytes = limit
        self.aside = False

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self.bytes < inf

    @property
    def session_bytes(self) -> int | None:
        """Bytes of weights that one session may hold; None for all of them."""
        return max(round(SESSION_SHARE * self.bytes), 1) if self.limited else None

    def least_for(self, needs: Iterable[Need], jobs: int) -> tuple[int, str]:
        """The least limit that so many layers at a time fit in, and the name of the largest layer."""
        worked, name = max(((need.worked, need.name) for need in needs), default=(0, ""))
        return BASE_BYTES + jobs * worked, name

    def spills(self, needs: Iterable[Need], jobs: int, loaded: int) -> bool:
        """Whether what is kept of all layers does not fit beside those worked on and what is ``loaded``."""
        known = list(needs)
        return sum(need.kept for need in known) + self.least_for(known, jobs)[0] + loaded > self.bytes

    def at_once(self, needs: Iterable[Need], loaded: int) -> int:
        """How many layers may be worked on at a time, one at least."""
        known = list(needs)
        held = 0 if self.aside else sum(need.kept for need in known)
        room = self.bytes - BASE_BYTES - loaded - held
        return max(int(room // max(need.worked for need in known)), 1) if known else 1

    def watching(self, progress: Progress | None) -> Progress | None:
        """``progress``, which gives memory that is free back to the system, where there is a limit."""
        if not self.limited:
            return progress

        def watched(stage: str, done: int, total: int) -> None:
            give_back()
            if progress is not None:
                progress(stage, done, total)

        return watched


def give_back() -> None:
    """Have the C library give free memory back to the system, which it keeps for later; glibc alone can."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return None


def resident_bytes() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):  # not Linux
        return 0
    import resource

    return pages * resource.getpagesize()
