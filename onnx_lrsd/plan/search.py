"""Proposals of what to fit: the largest ratio whose output error stays within a limit, in few fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from onnx_lrsd.errors import BudgetError
from onnx_lrsd.facts import Trial, Verification
from onnx_lrsd.types import Form

SEARCHES = 6
"""Fits of the whole model that a search may take."""
REFUSALS, AGAIN = 3, 2
"""How often what was found may be refused, and the fits that each refusal may take."""
STEP, NEAR = 1.5, 1.05
"""By how much a search raises a ratio that is kept, and how near it comes to the best."""
AIM = 0.9
"""The share of its limit that an error is aimed at: plans scatter, and half of what is aimed at it misses."""

MARGIN = 0.9
"""What a search for an output error aims at, as a share of what was asked: other samples must confirm it."""

Found = TypeVar("Found")
Forms: TypeAlias = Mapping[str, Form]


class Proposals(Protocol):
    """Forms to fit, one set after the other, until none is refused."""

    def propose(self) -> Forms | None:
        """The next forms; None where none are left and the original has to do."""
        ...

    def refuse(self, found: Verification) -> None:
        """The forms that were proposed last broke the promise, as ``found``."""
        ...

    def why_nothing(self) -> str:
        """Why no forms were found, for the user; empty where that needs no word."""
        ...

    def tried(self) -> Sequence[Trial]:
        """The models that were fitted and measured on the way."""
        ...


@dataclass(frozen=True)
class Once:
    """The forms of a plan that is settled; nothing is promised of them, so nothing is refused."""

    forms: Forms | None
    why: str = ""

    def propose(self) -> Forms | None:
        """The forms."""
        return self.forms

    def refuse(self, found: Verification) -> None:
        """There are no others: the forms are proposed again."""

    def why_nothing(self) -> str:
        """What was given to say."""
        return self.why

    def tried(self) -> Sequence[Trial]:
        """None: the forms were settled."""
        return ()


class Limit(Protocol):
    """The output error that a search may reach; it moves with what is measured."""

    def value(self) -> float:
        """The present limit."""
        ...

    def refused(self, found: Verification) -> None:
        """Take in what others found of a model that was within the limit and broke the promise."""
        ...

    def why_nothing(self) -> str:
        """A sentence for the user where nothing was within the limit; it may be empty."""
        ...


class Search(Generic[Found]):
    """The largest ratio whose output error is within a limit, found in few fits.

    ``make`` makes something of a ratio, from ``first`` on, or raises BudgetError; ``error`` measures it.
    """

    def __init__(
        self,
        first: float,
        make: Callable[[float], Found],
        error: Callable[[Found], float],
        limit: Limit,
    ) -> None:
        self._first, self._make, self._error = first, make, error
        self._limit = limit
        self._tried: list[tuple[float, float, Found]] = []  # ratio, output error, what was made
        self._beyond = self._refused = inf  # the least ratio out of reach, and the least that was refused
        self._proposed = inf
        self._rounds = [SEARCHES, *[AGAIN] * REFUSALS]

    def propose(self) -> Found | None:
        """What was made for the largest ratio within the limit, of those below what was refused."""
        if not self._rounds:
            return None
        for _ in range(self._rounds.pop(0)):
            if (ratio := self._next_ratio()) is None:
                break
            try:
                made = self._make(ratio)
            except BudgetError:
                self._beyond = ratio
            else:
                self._tried.append((ratio, self._error(made), made))
        most = self._limit.value()
        kept = [entry for entry in self._tried if entry[1] <= most and entry[0] < self._refused]
        if not kept:
            self._rounds = []
            return None
        self._proposed, _, found = max(kept, key=lambda entry: entry[0])
        return found

    def refuse(self, found: Verification) -> None:
        """What was proposed last broke the promise, as ``found``: the next proposal gains less."""
        self._refused = self._proposed
        self._limit.refused(found)

    def why_nothing(self) -> str:
        """Why nothing was within the limit, for the user; empty where something was."""
        return self._limit.why_nothing() if self._proposed == inf else ""

    def tried(self) -> Sequence[Trial]:
        """Ratio and output error of all that was made, in the order of the ratios."""
        return sorted(Trial(ratio, error) for ratio, error, _ in self._tried)

    def _next_ratio(self) -> float | None:
        if not self._tried and self._beyond == inf:
            return self._first
        return next_ratio([entry[:2] for entry in self._tried], self._beyond, self._limit.value())


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


class ErrorLimit:
    """The output error that ``max_error`` allows, less a margin."""

    def __init__(self, most: float) -> None:
        self._most = most

    def value(self) -> float:
        """The present limit."""
        return MARGIN * self._most

    def searched(self, found: Verification) -> None:
        """The error itself is what is limited: there is nothing to learn."""

    def refused(self, found: Verification) -> None:
        """Nothing is refused."""

    def why_nothing(self) -> str:
        """Nothing to say."""
        return ""


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


class DropLimit:
    """The output error up to which the score is expected to fall by at most ``most`` points."""

    def __init__(self, most: float) -> None:
        self._most = most / 100
        self._searched: list[Drop] = []
        self._refused: list[Drop] = []
        self._samples = 0

    def value(self) -> float:
        """The least limit that the models of the search, and each that was refused, leave."""
        alone = (bearable([drop], self._most) for drop in self._refused)
        return min([bearable(self._searched, self._most), *alone])

    def searched(self, found: Verification) -> None:
        """Take in the drop of a model on the samples of the search."""
        self._searched.append(drop_of(found))
        self._samples = found.samples

    def refused(self, found: Verification) -> None:
        """Take in the drop of a model on the samples that confirm."""
        self._refused.append(drop_of(found))

    def why_nothing(self) -> str:
        """How much the best of the models tried lost."""
        if not self._searched:
            return ""
        return (
            "No smaller model was sure to keep the score: the best one lost "
            f"{100 * min(drop.drop for drop in self._searched):.2f} points on {self._samples} samples; "
            "allow more with --max-drop, or give more samples."
        )
