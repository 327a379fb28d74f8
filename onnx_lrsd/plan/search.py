"""Proposals of what to fit: the largest ratio whose output error stays within a limit, in few fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, log
from typing import Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from onnx_lrsd.errors import BudgetError
from onnx_lrsd.facts import Trial, Verification
from onnx_lrsd.time_limit import OutOfTime, TimeLimit
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
HAIR = 1.002
"""By how much more than a ratio is planned for, so that it is met exactly."""
HALVINGS = 7
"""How often the interval in which a predicted error is looked for is halved."""
CORRECTIONS = 3
"""Fits that a ratio may take: what a plan costs is known exactly only once it is written."""

_Made = TypeVar("_Made")
Forms: TypeAlias = Mapping[str, Form]
Predicted: TypeAlias = Callable[[float], float]
"""The output error that a plan for a ratio is expected to have, up to a factor; inf where there is none."""
Announce: TypeAlias = Callable[[str], None]
"""Tells who watches that a step begins."""


def _silent(step: str) -> None:
    """Nobody watches."""


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

    forms: Forms

    def propose(self) -> Forms | None:
        """The forms."""
        return self.forms

    def refuse(self, found: Verification) -> None:
        """There are no others."""

    def why_nothing(self) -> str:
        """There is always something."""
        return ""

    def tried(self) -> Sequence[Trial]:
        """None: the forms were settled."""
        return ()


class RatioSearch:
    """Forms for ``ratio``, made by ``make`` a hair above it; refused, further above it.

    ``reached`` is the ratio that a model was found to have.
    """

    def __init__(
        self,
        ratio: float,
        make: Callable[[float], Forms],
        reached: Callable[[Verification], float],
        announce: Announce = _silent,
        time: TimeLimit | None = None,
    ) -> None:
        self._time, self._since, self._took = time or TimeLimit(), 0.0, 0.0
        self._ratio, self._make, self._reached = ratio, make, reached
        self._announce = announce
        self._aim, self._left = ratio * HAIR, CORRECTIONS
        self._beyond: BudgetError | OutOfTime | None = None

    def propose(self) -> Forms | None:
        """Forms for the present aim; None where it is out of reach or was corrected often enough."""
        first = self._left == CORRECTIONS
        self._left -= 1
        if self._left < 0:
            return None
        if not first and not self._time.room(self._took):
            self._time.leave_out("a fit that corrects the ratio")
            return None
        self._since = self._time.spent
        self._announce(f"fit {CORRECTIONS - self._left} of at most {CORRECTIONS}: {self._aim:.3g} x")
        for aim in (self._aim, self._ratio) if first else (self._aim,):
            try:
                return self._make(aim)
            except (BudgetError, OutOfTime) as error:
                self._beyond = error
        return None

    def refuse(self, found: Verification) -> None:
        """Aim higher by what was missed."""
        self._took = self._time.spent - self._since
        self._aim *= HAIR * self._ratio / max(self._reached(found), 1.0)

    def why_nothing(self) -> str:
        """That the ratio is out of reach, and which one is not."""
        return f"{self._beyond} The original is handed back." if self._beyond else ""

    def tried(self) -> Sequence[Trial]:
        """None: a ratio needs no trial of its error."""
        return ()


class Limit(Protocol):
    """The output error that a search may reach; it moves with what is measured."""

    def value(self) -> float:
        """The present limit."""
        ...

    def refused(self, searched: float, found: Verification) -> None:
        """Take in a model that the search found to have the error ``searched`` and that broke the promise."""
        ...

    def why_nothing(self, ratio: float, error: float) -> str:
        """A sentence for the user where nothing is within the limit: the least ``ratio`` has ``error``."""
        ...


class Search(Generic[_Made]):
    """The largest ratio whose output error is within a limit, found in few fits.

    ``make`` makes something of a ratio, from ``first`` on, or raises BudgetError; ``error`` measures it.
    Where ``time`` has no room for another fit as long as the longest one, what was found by then is taken.
    """

    def __init__(
        self,
        first: float,
        make: Callable[[float], _Made],
        error: Callable[[_Made], float],
        limit: Limit,
        announce: Announce = _silent,
        time: TimeLimit | None = None,
        predicted: Predicted | None = None,
    ) -> None:
        self._predicted = predicted
        self._time, self._longest = time or TimeLimit(), 0.0
        self._first, self._make, self._error = first, make, error
        self._limit, self._announce = limit, announce
        self._tried: list[tuple[float, float, _Made]] = []  # ratio, output error, what was made
        self._beyond = self._refused = inf  # the least ratio out of reach, and the least that was refused
        self._proposed = inf, inf
        self._out_of_reach = ""
        self._rounds = [SEARCHES, *[AGAIN] * REFUSALS]

    def propose(self) -> _Made | None:
        """What was made for the largest ratio within the limit, of those below what was refused."""
        if not self._rounds:
            return None
        fits = self._rounds.pop(0)
        for number in range(1, fits + 1):
            if (ratio := self._next_ratio()) is None:
                break
            if self._tried and not self._time.room(self._longest):
                self._time.leave_out(f"fits of the search after {len(self._tried)}")
                break
            self._announce(f"fit {number} of at most {fits}: {ratio:.3g} x")
            start = self._time.spent
            try:
                made = self._make(ratio)
                self._tried.append((ratio, self._error(made), made))
            except BudgetError as nearest:
                self._beyond, self._out_of_reach = ratio, str(nearest)
            except OutOfTime as late:
                self._time.leave_out("the fit that was under way when time ran out")
                self._out_of_reach, self._rounds = f"{late} The original is handed back.", []
                break
            self._longest = max(self._longest, self._time.spent - start)
        most = self._limit.value()
        kept = [entry for entry in self._tried if entry[1] <= most and entry[0] < self._refused]
        if not kept:
            self._rounds = []
            return None
        ratio, error, found = max(kept, key=lambda entry: entry[0])
        self._proposed = ratio, error
        return found

    def refuse(self, found: Verification) -> None:
        """What was proposed last broke the promise, as ``found``: the next proposal gains less."""
        self._refused, error = self._proposed
        self._limit.refused(error, found)

    def why_nothing(self) -> str:
        """Why nothing is within the limit, for the user, and what might gain."""
        if not self._tried:
            return self._out_of_reach
        ratio, error, _ = min(self._tried, key=lambda entry: entry[0])
        return self._limit.why_nothing(ratio, error)

    def tried(self) -> Sequence[Trial]:
        """Ratio and output error of all that was made, in the order of the ratios."""
        return sorted(Trial(ratio, error) for ratio, error, _ in self._tried)

    def _next_ratio(self) -> float | None:
        if not self._tried and self._beyond == inf:
            return self._first
        tried = [entry[:2] for entry in self._tried]
        return next_ratio(tried, self._beyond, self._limit.value(), self._predicted)


def next_ratio(
    tried: Sequence[tuple[float, float]], beyond: float, limit: float, predicted: Predicted | None = None
) -> float | None:
    """Where the output error should fall just below ``limit``, going by the (ratio, error) ``tried``.

    None if one of these is near enough.

    Between two of them the error is taken as a power of what is ``predicted``, below all as a multiple of it;
    without a prediction as a power of what is saved, ratio - 1, below all as its square.
    """
    low, least = max((entry for entry in tried if entry[1] <= limit), default=(1.0, 0.0))
    high, most = min((entry for entry in tried if entry[0] > low), default=(beyond, inf))
    if high == inf:
        return low * STEP
    if high / low < NEAR:
        return None
    if predicted is not None and most < inf and limit > 0:
        return _by_prediction(predicted, (low, least), (high, most), AIM * limit)
    part = 0.5
    if most < inf and limit > 0:
        power = 2.0
        if least > 0:
            power = max(log(most / least) / log((high - 1) / (low - 1)), 0.5)
        part = (1 + (high - 1) * (AIM * limit / most) ** (1 / power) - low) / (high - low)
    return low + (high - low) * min(max(part, 0.2), 0.8)


def _by_prediction(
    predicted: Predicted, below: tuple[float, float], above: tuple[float, float], aim: float
) -> float | None:
    """The ratio between those of ``below`` and ``above`` (ratio, error) that should have the error ``aim``.

    None where that of ``below``, which was made, is as near to it as a search comes.
    """
    (low, least), (high, most) = below, above
    near, far = predicted(low), predicted(high)
    wanted = far * aim / most
    if 0 < least < most and 0 < near < far < inf:
        wanted = near * (aim / least) ** (log(far / near) / log(most / least))
    left, right = low, high
    for _ in range(HALVINGS):
        middle = (left + right) / 2
        if predicted(middle) <= wanted:
            left = middle
        else:
            right = middle
    if least > 0 and left < NEAR * low:
        return None
    least_part = 0.05 if low == 1 else 0.2
    return low + (high - low) * min(max((left - low) / (high - low), least_part), 0.8)


class ErrorLimit:
    """The output error that ``most`` allows, less a margin; ``hint`` says what else might gain."""

    def __init__(self, most: float, hint: str) -> None:
        self._most, self._hint = most, hint
        self._limit = MARGIN * most

    def value(self) -> float:
        """The present limit."""
        return self._limit

    def refused(self, searched: float, found: Verification) -> None:
        """Take it that other models change other samples by as much more as this one did."""
        share = searched / found.error_bound if isfinite(found.error_bound) else 0.0
        self._limit = min(self._limit, MARGIN * self._most * share)

    def why_nothing(self, ratio: float, error: float) -> str:
        """What the least gain that was tried costs."""
        return (
            f"No gain by low rank within {100 * self._most:g} %: at {ratio:.2f} x the output error is up to "
            f"{100 * error:.2g} %; allow more with --max-error{self._hint}."
        )


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
    """The output error up to which the score is expected to fall by at most ``most`` points.

    Every model is scored on both halves of the labelled samples. One factor from errors to falls is fitted
    to all of them. What a choice by one half loses on the other, pooled, is what choosing costs on samples
    that were not seen: where that is more than was allowed, the limit shrinks by as much.
    """

    def __init__(self, most: float, hint: str) -> None:
        self._most, self._hint = most / 100, hint
        self._halves: tuple[list[Drop], list[Drop]] = [], []
        self._refused: list[Drop] = []
        self._samples = 0

    def value(self) -> float:
        """The least limit that the models of the search, cross-fitting and each that was refused leave."""
        limit = bearable([*self._halves[0], *self._halves[1]], self._most)
        lost = cross_fitted(*self._halves, self._most)
        if lost > self._most:
            limit *= self._most / lost
        return min([limit, *(bearable([drop], self._most) for drop in self._refused)])

    def searched(self, *halves: Verification) -> None:
        """Take in a model, as found on each half of the labelled samples."""
        for drops, found in zip(self._halves, halves, strict=True):
            drops.append(drop_of(found))
        self._samples = sum(found.samples for found in halves)

    def refused(self, searched: float, found: Verification) -> None:
        """Take in the drop of a model on all samples."""
        self._refused.append(drop_of(found))

    def why_nothing(self, ratio: float, error: float) -> str:
        """How much the best of the models tried lost."""
        least = min((one.drop + two.drop) / 2 for one, two in zip(*self._halves, strict=True))
        return (
            "No smaller model was sure to keep the score: the best one lost "
            f"{100 * least:.2f} points on {self._samples} samples, at {ratio:.2f} x or more; "
            f"allow more with --max-drop, or give more samples{self._hint}."
        )


def cross_fitted(one: Sequence[Drop], other: Sequence[Drop], most: float) -> float:
    """The mean fall, on the half it was not chosen by, of the model that each half alone would choose.

    ``one`` and ``other`` are the same models on two halves of the samples, ``most`` is the fall allowed.
    """
    lost = 0.0
    for chosen_by, judged_by in ((one, other), (other, one)):
        limit = bearable(chosen_by, most)
        within = [i for i, drop in enumerate(chosen_by) if drop.error <= limit]
        if within:
            lost += judged_by[max(within, key=lambda i: chosen_by[i].error)].drop / 2
    return lost
