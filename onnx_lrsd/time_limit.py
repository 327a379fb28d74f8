"""The time that a run may take, shared out between its stages, and what they left out to keep to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from math import inf, isfinite
from time import perf_counter

from onnx_lrsd.errors import LrsdError
from onnx_lrsd.types import Progress

TIME_UNITS = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|min|h|)")

ORDERED, TRIED, WIDENED, WEIGHED, PLANNED, FITTED = 0.2, 0.35, 0.42, 0.55, 0.65, 0.8
"""Shares of the time after which a stage leaves out what it has not done: pairs to cut, forms of layers,
forms of narrower layers, sensitivities, trials, and fits of the model."""
PASSES = 30.0
"""Runs of the original for each calibration sample, as far as time goes: moments and fits take so long."""
CHECKS = 50.0
"""The same for each sample that results are measured on; both are shares of the whole time."""
LAST = 0.88
"""Share of the time after which what is under way is given up; the rest is for checks and writing."""
CHECKED = 0.04
"""Share of the time in which the final model is timed."""
INTERRUPTIBLE = ("calibrate", "channels", "curves", "widths", "sensitivity", "trial", "decompose")
"""Stages that may be given up."""


class OutOfTime(LrsdError):
    """The time of a run is used up."""


def seconds_of(text: str | float) -> float | None:
    """How many seconds ``text`` names: 90s, 10min, 1.5h, or a number; None for what is no time.

    >>> seconds_of("90s"), seconds_of("1.5 h"), seconds_of(20), seconds_of("long"), seconds_of(0)
    (90.0, 5400.0, 20.0, None, None)
    """
    if isinstance(text, bool):
        return None
    found = _DURATION.fullmatch(str(text).strip())
    seconds = float(found[1]) * TIME_UNITS[found[2]] if found else 0.0
    return seconds if isfinite(seconds) and seconds > 0 else None


class TimeLimit:
    """At most so many ``seconds`` from now on, by ``clock``; inf is no limit.

    Stages ask whether a share of the time has ``passed`` and note in ``left_out`` what they then leave out.
    """

    def __init__(self, seconds: float = inf, clock: Callable[[], float] = perf_counter) -> None:
        self.seconds, self.clock = seconds, clock
        self.left_out: list[str] = []
        self._start = clock()

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self.seconds < inf

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return self.clock() - self._start

    def passed(self, share: float) -> bool:
        """Whether this share of the time has passed."""
        return self.spent >= share * self.seconds

    def room(self, seconds: float) -> bool:
        """Whether another fit that takes so many ``seconds`` leaves time to check what was found."""
        return self.spent + seconds <= FITTED * self.seconds

    def leave_out(self, said: str) -> None:
        """Note, once, what is left out."""
        if said not in self.left_out:
            self.left_out.append(said)

    def most(self, seconds_each: float, share: float, fewest: int) -> int | None:
        """How many things that take ``seconds_each`` fit into a share of the time; None for all of them."""
        return max(int(share * self.seconds / max(seconds_each, 1e-9)), fewest) if self.limited else None

    def watching(self, progress: Progress | None, stages: Collection[str] = INTERRUPTIBLE) -> Progress | None:
        """``progress``, which raises OutOfTime in one of ``stages`` once the last share has passed."""
        if not self.limited:
            return progress

        def watched(stage: str, done: int, total: int) -> None:
            if progress is not None:
                progress(stage, done, total)
            if stage in stages and self.passed(LAST):
                raise OutOfTime(
                    f"{self.seconds:g} s were not enough: the stage {stage} had come to {done} of {total}; "
                    "allow more with --time, or give fewer samples."
                )

        return watched
