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
from onnx_lrsd.wording import percent

SEARCHES = 6
"""Fits of the whole model that a search may take before its first proposal."""
REFUSALS, AGAIN = 3, 2
"""How often what was found may be refused, and the fits that each refusal may take."""
STEP, NEAR = 1.5, 1.05
"""Factor by which a search raises a ratio that keeps the limit, and that within which it finds the best."""
LEAP, LEARNING = 2.0, 3
"""Factor by which it raises a ratio while its limit is unknown, and the models it learns from, at most."""
CLEAR = 2.0
"""Standard errors from which the fall of a score stands out from chance."""
LESS = 0.9
"""The share, at most, of the error of a model that broke the promise that the next one may have."""
FAR = 5.0
"""Falls of more than so many times what is allowed say little of small ones: scores have only so much to
lose."""
AIM = 0.9
"""The share of its limit that an error is aimed at: plans scatter, and half of what is aimed at it misses."""
MARGIN = 0.9
"""What a search for an output error aims at, as a share of what was asked: other samples must confirm it."""
_ROUNDING = 1e-9
"""Rounding error of differences."""
HAIR = 1.002
"""Factor by which a plan is made for more than the ratio asked for, which is then met exactly."""
NUDGE, NUDGES = 1.01, 8
"""Factor by which an aim is raised that gave the very plan that was refused, and how often at most."""
HALVINGS = 7
"""How often the interval in which a predicted error is looked for is halved."""
MISPREDICTED = 1.5
"""A search begins where its limit is predicted to be met if its usual beginning is predicted so many times
above it: predictions were at most so far from what was measured, as a rule (results/time.md)."""
CORRECTIONS = 3
"""Fits that a ratio may take: what a plan costs is known exactly only once it is written."""

_Made = TypeVar("_Made")
Forms: TypeAlias = Mapping[str, Form]
Predicted: TypeAlias = Callable[[float], float]
"""The output error that a plan for a ratio is expected to have, up to a factor; inf where there is none."""
Announce: TypeAlias = Callable[[str], None]
"""Tells who watches that a step begins."""


def _silent(step: str) -> None:
    """Tell nobody."""


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
        self._made: Forms | None = None

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
                self._made = self._another(aim)
            except (BudgetError, OutOfTime) as error:
                self._beyond = error
            else:
                return self._made
        return None

    def _another(self, aim: float) -> Forms:
        """Forms for ``aim``, or a little more where these are what was refused: plans lie apart."""
        for _ in range(NUDGES):
            found = self._make(aim)
            if found != self._made:
                break
            aim *= NUDGE
        self._aim = max(self._aim, aim)
        return found

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

    def unsure(self) -> bool:
        """Whether a model with a larger error would teach what the limit is."""
        ...

    def refused(self, searched: float, found: Verification) -> None:
        """Take in a model that the search found to have the error ``searched`` and that broke the promise."""
        ...

    def why_nothing(self, tried: Sequence[Trial]) -> str:
        """A sentence for the user where nothing of what was ``tried``, least ratio first, will do."""
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
        return self._limit.why_nothing(self.tried())

    def tried(self) -> Sequence[Trial]:
        """Ratio and output error of all that was made, in the order of the ratios."""
        return sorted(Trial(ratio, error) for ratio, error, _ in self._tried)

    def _next_ratio(self) -> float | None:
        if not self._tried and self._beyond == inf:
            return self._beginning()
        tried = [entry[:2] for entry in self._tried]
        if self._refused == inf and 0 < len(tried) < LEARNING and self._limit.unsure():
            most, _ = max(tried)
            higher = min(LEAP * most, (most + self._beyond) / 2)
            if higher > NEAR * most:
                return higher
        return next_ratio(tried, self._beyond, self._limit.value(), self._predicted)

    def _beginning(self) -> float:
        """The first ratio to try: the usual one, or a smaller one predicted to be within the limit."""
        limit = self._limit.value()
        if (
            self._predicted is None
            or not 0 < limit < inf
            or self._predicted(self._first) <= MISPREDICTED * limit
        ):
            return self._first
        return max(_largest_ratio(self._predicted, AIM * limit, 1.0, self._first), NEAR)


def next_ratio(
    tried: Sequence[tuple[float, float]], beyond: float, limit: float, predicted: Predicted | None = None
) -> float | None:
    """The ratio at which the output error should be just below ``limit``, from the (ratio, error) ``tried``.

    None if one of these is near enough.

    With a prediction, the error between two ratios that were tried is taken as a power of what is
    ``predicted``, and above all of them as a multiple of it. Without one, the error is taken as a power of
    what is saved, ratio - 1: its square where no lower ratio was tried.
    """
    low, least = max((entry for entry in tried if entry[1] <= limit), default=(1.0, 0.0))
    high, most = min((entry for entry in tried if entry[0] > low), default=(beyond, inf))
    if high == inf:
        if predicted is None or not least > 0:
            return low * STEP
        more = _largest_ratio(predicted, predicted(low) * AIM * limit / least, low, low * STEP)
        return more if more >= NEAR * low else None
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
    ratio = _largest_ratio(predicted, wanted, low, high)
    if least > 0 and ratio < NEAR * low:
        return None
    least_part = 0.05 if low == 1 else 0.2
    return low + (high - low) * min(max((ratio - low) / (high - low), least_part), 0.8)


def _largest_ratio(predicted: Predicted, wanted: float, low: float, high: float) -> float:
    """The largest ratio from ``low`` to ``high`` that is predicted to have at most the error ``wanted``."""
    if predicted(high) <= wanted:
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if predicted(middle) <= wanted:
            low = middle
        else:
            high = middle
    return low


class ErrorLimit:
    """The output error that ``most`` allows, less a margin; ``hint`` says what else might gain."""

    def __init__(self, most: float, hint: str) -> None:
        self._most, self._hint = most, hint
        self._limit = MARGIN * most

    def value(self) -> float:
        """The present limit."""
        return self._limit

    def unsure(self) -> bool:
        """Never: it is given."""
        return False

    def refused(self, searched: float, found: Verification) -> None:
        """Lower the limit: other models are taken to change other samples by as much more as this one did."""
        share = searched / found.error_bound if isfinite(found.error_bound) else 0.0
        self._limit = min(self._limit, MARGIN * self._most * share)

    def why_nothing(self, tried: Sequence[Trial]) -> str:
        """What the least gain worth having costs, of those that cost too much."""
        gains = (trial for trial in tried if trial.ratio >= NEAR and trial.error > self._most)
        found = next(gains, tried[-1])
        said = f"No gain by low rank within {100 * self._most:g} %: at {found.ratio:.2f} x the"
        if not isfinite(found.error):
            return (
                f"{said} outputs have values that are not finite where the original's are: leave it as it is."
            )
        lost = percent(found.error)
        return f"{said} output error is up to {lost}; allow more with --max-error{self._hint}."


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
    slope, deviation = _factor(drops)
    careful = slope + deviation
    if not drops:
        return 0.0
    return most / careful if careful > 0 else inf


def _factor(drops: Sequence[Drop]) -> tuple[float, float]:
    """The fall of the score for a unit of output error, and its standard error.

    All models are tried on the same samples and err alike, so the errors of their falls do not average out.
    """
    weights = [entry.error / max(entry.deviation, 1e-12) ** 2 for entry in drops]
    precision = sum(w * entry.error for w, entry in zip(weights, drops, strict=True))
    if precision <= 0:
        return 0.0, 0.0
    slope = sum(w * entry.drop for w, entry in zip(weights, drops, strict=True)) / precision
    return slope, sum(w * entry.deviation for w, entry in zip(weights, drops, strict=True)) / precision


class DropLimit:
    """The output error up to which the score is expected to fall by at most ``most`` points.

    Every model is scored on all labelled samples. One factor from errors to falls is fitted to those that
    fell by no more than FAR times what is allowed. A model that itself fell by more than is allowed is
    followed by one with less error (results/promise.md).
    """

    def __init__(self, most: float, hint: str) -> None:
        self._most, self._hint = most / 100, hint
        self._searched: list[Drop] = []
        self._refused: list[Drop] = []
        self._samples = 0

    def value(self) -> float:
        """The least limit that all models of the search together and each that fell too far leave."""
        worse = [drop for drop in (*self._searched, *self._refused) if drop.drop > self._most + _ROUNDING]
        return min([bearable(self._telling(), self._most), *(self._below(drop) for drop in worse)])

    def unsure(self) -> bool:
        """Whether no fall of the score stands out from chance, and the last model did not lose too much."""
        slope, deviation = _factor(self._telling())
        return slope < CLEAR * deviation and self._searched[-1].drop <= self._most

    def searched(self, found: Verification) -> None:
        """Take in a model of the search."""
        self._searched.append(drop_of(found))
        self._samples = found.samples

    def refused(self, searched: float, found: Verification) -> None:
        """Take in the fall of a finished model, which had the error ``searched`` in the search."""
        self._refused.append(drop_of(found)._replace(error=searched))

    def why_nothing(self, tried: Sequence[Trial]) -> str:
        """How much the best of the models tried lost."""
        least = min(drop.drop for drop in self._searched)
        return (
            "No smaller model was sure to keep the score: the best one lost "
            f"{100 * least:.2f} points on {self._samples} samples; "
            f"allow more with --max-drop, or give more samples{self._hint}."
        )

    def _below(self, worse: Drop) -> float:
        """The error that the next model may have after one whose score fell too far, perhaps by chance."""
        least = worse.drop - worse.deviation
        return worse.error * (min(LESS, self._most / least) if least > 0 else LESS)

    def _telling(self) -> list[Drop]:
        """The models of the search whose falls are small enough to tell what small falls to expect."""
        near = max(FAR * self._most, min((drop.drop for drop in self._searched), default=0.0))
        return [drop for drop in self._searched if drop.drop <= near]
