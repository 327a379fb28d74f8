"""On made-up curves a search for a score ends near the best gain that keeps it, and is as sure as it says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from statistics import NormalDist, fmean, median
from typing import NamedTuple

import numpy as np
import pytest

from onnx_lrsd.errors import BudgetError
from onnx_lrsd.facts import ModelCost, OutputError, Promise, ScoreChange, Verification
from onnx_lrsd.plan.promise import promised
from onnx_lrsd.plan.search import SEARCHES, Drop, DropLimit, Search, drop_of
from onnx_lrsd.run import Options

NORMAL = NormalDist()
STATED = NORMAL.cdf(1)  # one standard error to spare
OUT_OF_REACH = 25.0
COST = ModelCost(1, 1, 1, None)
SPLITS = 12


class Made(NamedTuple):
    """A model of a curve: its output error, the true fall of its score, and what is measured of it."""

    ratio: float
    error: float
    fall: float
    found: Verification


def found(error: float, won: int, lost: int, count: int, before: float = 0.9) -> Verification:
    """What ``compare`` says of a model that is right in ``won`` samples more and in ``lost`` fewer."""
    change, total = (won - lost) / count, count + 2
    half = 1.96 * sqrt(((won + lost + 1) / total - ((won - lost) / total) ** 2) / total)
    score = ScoreChange("top1", before, before + change, count, (change - half, change + half))
    return Verification(
        before=COST,
        after=COST,
        latency_ratio=None,
        latency_interval=None,
        outputs=(OutputError("scores", error),),
        samples=count,
        metric=score,
    )


@dataclass
class Curve:
    """Models whose score falls by ``allowed`` at the ratio ``best``, on ``count`` samples.

    A sample is right where its margin is positive. A model adds noise to margins, most of it the same in all
    models, whose variance is its output error; so the score falls in proportion to the error at first, and
    samples become right as well as wrong.
    """

    rng: np.random.Generator
    count: int
    allowed: float
    best: float
    before: float
    steep: float = 3.0

    def __post_init__(self) -> None:
        self.fits = 0
        self.mean = NORMAL.inv_cdf(self.before)
        self.margins = self.mean + self.rng.standard_normal(self.count)
        self.common = self.rng.standard_normal(self.count)
        variance = (self.mean / NORMAL.inv_cdf(self.before - self.allowed)) ** 2 - 1
        self.unit = variance / self.error(self.best)

    def error(self, ratio: float) -> float:
        return float(0.01 * (ratio - 1) ** self.steep)

    def make(self, ratio: float) -> Made:
        if ratio >= OUT_OF_REACH:
            raise BudgetError("At most 25 times: ask for less.")
        self.fits += 1
        error = self.error(ratio) * float(np.exp(0.2 * self.rng.standard_normal()))  # plans scatter
        noise = 0.7 * self.common + sqrt(1 - 0.7**2) * self.rng.standard_normal(self.count)
        old, new = self.margins > 0, self.margins + sqrt(self.unit * error) * noise > 0
        fall = self.before - NORMAL.cdf(self.mean / sqrt(1 + self.unit * error))
        won, lost = int((new & ~old).sum()), int((old & ~new).sum())
        return Made(ratio, error, fall, found(error, won, lost, self.count, float(old.mean())))


def searched(curve: Curve) -> Made | None:
    """What a search on ``curve`` ends with; a model is refused as ``judge`` would refuse it."""
    limit = DropLimit(100 * curve.allowed, "")

    def error(made: Made) -> float:
        limit.searched(made.found)
        return made.error

    search = Search(2.0, curve.make, error, limit, predicted=lambda ratio: (ratio - 1) ** curve.steep)
    while (made := search.propose()) is not None:
        if kept(made, curve.allowed).kept:
            return made
        search.refuse(made.found)
    return None


def kept(made: Made, allowed: float) -> Promise:
    promise = promised(made.found, Options(max_drop=100 * allowed), "macs")
    assert promise is not None
    return promise


class Row(NamedTuple):
    """Of several draws of one kind of curve."""

    samples: int
    gain: float
    within: float
    said: float
    found: float
    fits: list[int]


def row(count: int, allowed: float, best: float, before: float) -> Row:
    gains, within, said, fits = [], [], [], []
    for draw in range(SPLITS):
        curve = Curve(np.random.default_rng([count, draw]), count, allowed, best, before)
        made = searched(curve)
        gains.append(np.log(made.ratio) / np.log(best) if made else 0.0)
        fits.append(curve.fits)
        if made is not None:
            within.append(made.fall <= allowed)
            said.append(kept(made, allowed).confidence or 0.0)
    return Row(count, median(gains), fmean(within), fmean(said), len(within) / SPLITS, fits)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Of 100 to 2000 labelled samples, steep and flat curves, and scores far from perfect and near to it."""
    return [
        row(count, allowed, best, before)
        for count in (100, 200, 400, 1000, 2000)
        for allowed in (0.005, 0.01)
        for best in (1.5, 3.0, 6.0)
        for before in (0.8, 0.9, 0.98)
    ]


def test_it_ends_near_the_best_gain_that_keeps_the_score(rows: list[Row]) -> None:
    for count, least in ((100, 0.55), (200, 0.65), (400, 0.75), (1000, 0.8), (2000, 0.85)):
        assert fmean(row.gain for row in rows if row.samples == count) > least
    assert fmean(row.found for row in rows) > 0.97


def test_it_is_as_sure_as_it_says(rows: list[Row]) -> None:
    assert fmean(row.within for row in rows) > STATED
    for count in (100, 200, 400, 1000, 2000):
        of_count = [row for row in rows if row.samples == count]
        assert fmean(row.within for row in of_count) > fmean(row.said for row in of_count)


def test_it_takes_few_fits(rows: list[Row]) -> None:
    fits = [number for row in rows for number in row.fits]
    assert max(fits) <= SEARCHES and fmean(fits) < 4.5


def limit_after(*drops: tuple[float, int, int], samples: int = 400) -> DropLimit:
    """The limit for half a point after models of these errors, samples won and samples lost."""
    limit = DropLimit(0.5, "")
    for error, won, lost in drops:
        limit.searched(found(error, won, lost, samples))
    return limit


def test_while_no_fall_stands_out_it_goes_up_to_learn() -> None:
    assert limit_after((2e-5, 0, 1)).unsure()  # a quarter of a point and as much for chance
    assert not limit_after((2e-5, 0, 12)).unsure()
    assert not limit_after((2e-5, 3, 6)).unsure(), "it broke the promise itself"
    made = []

    def make(ratio: float) -> float:
        made.append(ratio)
        return ratio

    limit = DropLimit(0.5, "")

    def error(ratio: float) -> float:
        limit.searched(found(1e-5 * (ratio - 1) ** 3, 0, 1, 400))
        return 1e-5 * (ratio - 1) ** 3

    kept = Search(2.0, make, error, limit).propose()
    assert made[:3] == [2.0, 4.0, 8.0] and kept is not None and kept > 4


def test_a_fall_far_beyond_what_is_allowed_is_not_what_small_ones_are_judged_by() -> None:
    saturated, near = (0.5, 0, 200), (1e-3, 2, 8)
    assert limit_after(saturated, near).value() == limit_after(near).value()
    assert limit_after(saturated).value() > limit_after(near).value()


def test_a_model_that_fell_too_far_is_followed_by_one_with_less_error() -> None:
    clear = (0.1, 10, 17)
    assert limit_after(clear, (1e-3, 3, 6)).value() < 1e-3
    # What stands out of chance by itself asks for as much less as it fell too far.
    assert limit_after(clear, (1e-3, 0, 40)).value() < 0.1e-3
    limit = limit_after(clear)
    limit.refused(1e-3, found(1e-2, 3, 6, 400))
    assert limit.value() < 1e-3, "by the error that the search had found"


def test_models_on_the_same_samples_do_not_count_as_so_many_independent_ones() -> None:
    limit = DropLimit(0.5, "")
    for _ in range(5):
        limit.searched(found(1e-3, 1, 2, 400))
    assert limit.value() == pytest.approx(limit_after((1e-3, 1, 2)).value())
    drop = drop_of(replace(found(1e-3, 1, 2, 400)))
    assert isinstance(drop, Drop) and drop.drop == pytest.approx(0.0025)
