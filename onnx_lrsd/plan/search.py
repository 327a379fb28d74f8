"""The largest ratio whose output error stays within a limit, in few fits; and what limit a score allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import inf, log
from typing import NamedTuple, TypeVar

from onnx_lrsd.errors import BudgetError
from onnx_lrsd.facts import Verification

SEARCHES = 6
"""Fits of the whole model that a search may take."""
REFUSALS, AGAIN = 3, 2
"""How often what was found may be refused, and the fits that each refusal may take."""
STEP, NEAR = 1.5, 1.05
"""By how much a search raises a ratio that is kept, and how near it comes to the best."""
AIM = 0.9
"""The share of its limit that an error is aimed at: plans scatter, and half of what is aimed at it misses."""

Found = TypeVar("Found")


def search(
    first: float,
    propose: Callable[[float], Found],
    error: Callable[[Found], float],
    limit: Callable[[], float],
) -> Iterator[Found]:
    """What was proposed for the largest ratio whose output error is within the limit; refused, for a smaller.

    ``propose`` makes something of a ratio, from ``first`` on, or raises BudgetError. The limit may move with
    each error that is measured. Whoever refuses what was found lowers the limit and asks for another: the
    search goes on from all it has tried, REFUSALS times at most.
    """
    tried: list[tuple[float, float, Found]] = []  # ratio, output error, what was proposed
    beyond = refused = inf  # the least ratio out of reach, and the least that was refused

    def following() -> float | None:
        untried = not tried and beyond == inf
        return first if untried else next_ratio([entry[:2] for entry in tried], beyond, limit())

    for fits in (SEARCHES, *[AGAIN] * REFUSALS):
        for _ in range(fits):
            if (ratio := following()) is None:
                break
            try:
                proposed = propose(ratio)
            except BudgetError:
                beyond = ratio
            else:
                tried.append((ratio, error(proposed), proposed))
        most = limit()
        kept = [entry for entry in tried if entry[1] <= most and entry[0] < refused]
        if not kept:
            return
        refused, _, found = max(kept, key=lambda entry: entry[0])
        yield found


def next_ratio(tried: Sequence[tuple[float, float]], beyond: float, limit: float) -> float | None:
    """Where the output error should fall just below ``limit``, going by the (ratio, error) ``tried``.

    None if one of these is near enough.

    Between two of them the error is taken as a power of what is saved, ratio - 1; below all as its square.
    """
    low, least = max((entry for entry in tried if entry[1] <= limit), default=(1.0, 0.0))
    high, most = min((entry for entry in tried if entry[0] > low), default=(beyond, inf))
    if high == inf:
        return low * STEP
    if high / low < NEAR:
        return None
    part = 0.5
    if most < inf and limit > 0:
        power = 2.0
        if least > 0:
            power = max(log(most / least) / log((high - 1) / (low - 1)), 0.5)
        part = (1 + (high - 1) * (AIM * limit / most) ** (1 / power) - low) / (high - low)
    return low + (high - low) * min(max(part, 0.2), 0.8)


class Drop(NamedTuple):
    """What a model did on labelled samples: its output error, the fall of its score and its deviation."""

    error: float
    drop: float
    deviation: float


def drop_of(found: Verification) -> Drop:
    """What was found of a model, where its score was asked for."""
    assert found.metric is not None
    low, high = found.metric.interval
    return Drop(found.error, found.metric.before - found.metric.after, (high - low) / (2 * 1.96))


def bearable(drops: Sequence[Drop], most: float) -> float:
    """The output error at which the score is expected to fall by ``most``, with one standard error to spare.

    A small change of the outputs costs score in proportion to its square, the output error: as many samples
    cross a boundary in one direction as in the other to first order. So one factor is fitted to all models
    tried, by least squares weighted with their variances, and the large falls, which stand out of the noise
    of few samples, tell what small ones are to be expected (results/largest.md).
    """
    weights = [entry.error / max(entry.deviation, 1e-12) ** 2 for entry in drops]
    precision = sum(w * entry.error for w, entry in zip(weights, drops, strict=True))
    if precision <= 0:
        return inf if drops else 0.0
    slope = sum(w * entry.drop for w, entry in zip(weights, drops, strict=True)) / precision
    careful = slope + precision**-0.5
    return most / careful if careful > 0 else inf
