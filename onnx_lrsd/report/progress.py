"""How far a run is, while it works: in words, with the time that is likely to be left."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

PAUSE = 1.0
"""Seconds between two lines, at least."""
SECONDS_SHOWN = 90
"""Longer times are in minutes."""


class Stage:
    """One pass of a stage, and the pace since it was first heard of."""

    def __init__(self, name: str, done: int, now: float) -> None:
        self.name, self.done = name, done
        self._first, self._began = done, now

    def goes_on(self, name: str, done: int) -> bool:
        """Whether a report is of this pass; a stage that begins anew has done less than before."""
        return name == self.name and done >= self.done

    def left(self, total: int, now: float) -> str:
        """The time that the rest is likely to take, as so far; empty while that cannot be told."""
        here = self.done - self._first
        seconds = (now - self._began) * (total - self.done) / here if here > 0 else 0.0
        if seconds < 1:
            return ""
        if seconds <= SECONDS_SHOWN:
            return f"about {seconds:.0f} s left"
        return f"about {seconds / 60:.0f} min left"


class PlainProgress:
    """Says each stage and each tenth of it in a line, and no more than a line each PAUSE.

    For where no terminal shows a bar. What comes too soon is left out but for steps of a search, which wait.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._stage: Stage | None = None
        self._tenth = -1
        self._step = ""
        self._last = monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take in that ``done`` of ``total`` are done, as ``types.Progress``."""
        now = monotonic()
        if begins_step(done, total):
            self._step, self._stage = stage, None
        elif self._stage is None or not self._stage.goes_on(stage, done):
            self._stage, self._tenth = Stage(stage, done, now), -1
        if self._stage is not None:
            self._stage.done = done
        if now - self._last < PAUSE:
            return
        if self._step:
            self._say(self._step)
            self._step, self._last = "", now
            return
        tenth = 10 * done // max(total, 1)
        if self._stage is None or tenth <= self._tenth:
            return
        left = self._stage.left(total, now)
        self._say(f"{stage} {100 * done // max(total, 1)} %" + (f", {left}" if left else ""))
        self._tenth, self._last = tenth, now


class BarProgress:
    """What a bar on a terminal is told: a description, done, total, and the time that is left."""

    def __init__(self, draw: Callable[[str, int, int, str], None]) -> None:
        self._draw = draw
        self._stage: Stage | None = None
        self._step = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take in that ``done`` of ``total`` are done, as ``types.Progress``."""
        now = monotonic()
        if begins_step(done, total):
            self._step, self._stage = stage, None
            self._draw(stage, done, total, "")
            return
        if self._stage is None or not self._stage.goes_on(stage, done):
            self._stage = Stage(stage, done, now)
        self._stage.done = done
        said = f"{self._step}, {stage}" if self._step else stage
        self._draw(said, done, total, self._stage.left(total, now))


def begins_step(done: int, total: int) -> bool:
    """Whether a report is of a step of a search, which the stages after it belong to."""
    return (done, total) == (0, 1)
