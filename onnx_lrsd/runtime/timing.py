"""Which of two things runs faster, and how sure that is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

FEWEST_ROUNDS = 7
"""Fewer than six paired ratios have no 95 % interval at all."""
LOOK_EVERY = 12
"""Rounds after which it is looked whether there have been enough."""
BEYOND = 1.05
"""An interval so far beyond a line is not there by chance, however often it is looked at."""
SHORTEST_TIMING, FINEST_TIMING = 1e-3, 1e-6
"""Seconds. Shorter runs are repeated within one timing, so that the clock's own cost does not show."""


def pair_latency(
    before: Callable[[], object],
    after: Callable[[], object],
    *,
    min_rounds: int = FEWEST_ROUNDS,
    seconds: float = 2.0,
    enough: float = 0.0,
    line: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float, float, tuple[float, float]]:
    """Median milliseconds of both, the median of before / after, and its 95 % interval.

    Both are warmed up; then rounds of (before, after, after, before) follow until ``seconds`` have
    passed and there are ``min_rounds``, so that a slow spell or a drift of the machine falls on both. They
    end earlier where the interval has become narrower than ``enough``, a share of the ratio, or lies clearly
    on one side of ``line``, where all that matters is on which. ``clock`` tells seconds. The interval is free
    of assumptions on the distribution: order statistics of the paired ratios.
    Source: Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2.
    """
    for run in (before, after, before):
        run()
    shortest = min(_seconds(run, 1, clock) for run in (after, before))
    repeats = max(1, math.ceil(SHORTEST_TIMING / max(shortest, 1e-9)))
    olds: list[float] = []
    news: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(olds) < min_rounds or time.perf_counter() < deadline:
        one, two, three, four = (_seconds(run, repeats, clock) for run in (before, after, after, before))
        olds.append((one + four) / 2)
        news.append((two + three) / 2)
        if len(olds) % LOOK_EVERY == 0 and len(olds) >= min_rounds:
            low, high = _interval(olds, news)
            aside = line > 0 and (low > BEYOND * line or BEYOND * high < line)
            if aside or high - low < enough * low:
                break
    ratio = float(np.median(np.array(olds) / np.array(news)))
    return float(np.median(olds)) * 1e3, float(np.median(news)) * 1e3, ratio, _interval(olds, news)


def _interval(olds: Sequence[float], news: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median of the paired ratios."""
    ratios = np.sort(np.array(olds) / np.array(news))
    skipped = _below_median(len(ratios))
    return float(ratios[skipped]), float(ratios[-1 - skipped])


def busy_clock() -> Callable[[], float]:
    """A clock that stands still while this thread waits for the machine's other work.

    For things that run in one thread. Where the system's clock of a thread is coarse it is the plain clock.
    """
    fine = time.get_clock_info("thread_time").resolution <= FINEST_TIMING
    return time.thread_time if fine else time.perf_counter


def _seconds(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Seconds of one run, the mean of ``repeats`` in a row."""
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def _below_median(count: int) -> int:
    """How many of ``count`` sorted values may be cut off at either end of a 95 % interval of the median.

    The number of values below the median is Binomial(count, 1/2): each tail keeps at most 2.5 %.
    """
    most = 2**count // 40  # whole numbers: 0.5**count is no float any more for a long run
    tail = term = 1
    skipped = 0
    while skipped < (count - 1) // 2:
        term = term * (count - skipped) // (skipped + 1)
        if tail + term > most:
            break
        tail += term
        skipped += 1
    return skipped
