"""Width: the error of every width is that of its fit, and no other channel was a better one to drop."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_layers import linear

from onnx_lrsd import arrays
from onnx_lrsd.solver.problem import Metric, Problem, pose
from onnx_lrsd.solver.rectified import Rectified
from onnx_lrsd.solver.width import Columns, Widths, fit_width, widths
from onnx_lrsd.types import Factors, Moments

Matrix = npt.NDArray[np.float64]


def _strict(x: Matrix) -> Any:
    import array_api_strict

    return array_api_strict.asarray(x, device=array_api_strict.Device("device1"))


def _cupy(x: Matrix) -> Any:
    module = arrays.cupy()
    if module is None:
        pytest.skip("CuPy finds no GPU")
    return module.asarray(x)


LIBRARIES = [pytest.param(_strict, id="array-api-strict"), pytest.param(_cupy, id="cupy")]


def correlated(count: int, m: int, seed: int) -> Matrix:
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(rng.standard_normal((m, m)))[0] * np.geomspace(1, 0.03, m)
    return np.maximum(rng.standard_normal((count, m)) @ mixing.T + 0.05, 0)


def posed(n: int, m: int, count: int, seed: int = 0, crossed: bool = False, least: float = 0.1) -> Problem:
    """A layer of unchanged inputs, or of changed ones; where there are few rows, these and no matrix.

    ``least`` is the size of its last columns beside its first ones.
    """
    rng = np.random.default_rng(seed + 1)
    x = correlated(count, m, seed)
    weight = rng.standard_normal((n, m)) * np.geomspace(1, least, m)
    y = x @ weight.T
    known: dict[str, Any] = {}
    if crossed:
        x = x + 0.1 * rng.standard_normal(x.shape)
        away = y - y.mean(axis=0)
        known = {
            "cross": away.T @ (x - x.mean(axis=0)) / count,
            "output_mean": y.mean(axis=0),
            "output_energy": float(np.sum(away**2)) / count,
        }
    centred = x - x.mean(axis=0)
    second, rows = (None, centred) if 2 * count < m else (centred.T @ centred / count, None)
    moments = Moments(name="y", count=count, mean=x.mean(axis=0), second=second, rows=rows, **known)
    return pose(linear(n, m), weight, np.zeros(n), moments)


def alone(m: int) -> Columns:
    return np.arange(m)[:, None]


def matrix(problem: Problem) -> Matrix:
    found: Matrix = problem.metric.matrix(problem.weight)
    return found


def lost(problem: Problem, columns: Columns, kept: tuple[int, ...]) -> float:
    """The least error in the damped metric with the channels ``kept``, computed anew."""
    h, w = matrix(problem), problem.weight
    gone = columns[np.setdiff1d(np.arange(len(columns)), np.asarray(kept, dtype=int))].ravel()
    at = np.setdiff1d(np.arange(w.shape[1]), gone)
    best = np.zeros_like(w)
    best[:, at] = (w @ h)[:, at] @ np.linalg.inv(h[np.ix_(at, at)])
    return float(np.sum(((w - best) @ h) * (w - best))) / problem.energy


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(2, 30),
    taps=st.integers(1, 3),
    beside=st.integers(0, 4),
    n=st.integers(1, 50),
    few=st.booleans(),
    crossed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_error_of_every_width_is_that_of_its_fit(
    channels: int, taps: int, beside: int, n: int, few: bool, crossed: bool, seed: int
) -> None:
    m = channels * taps + beside
    problem = posed(n, m, max(2, m // 3) if few else 200, seed, crossed)
    assume(problem.energy > 0)  # two samples may be alike
    columns = np.random.default_rng(seed).permutation(m)[: channels * taps].reshape(channels, taps)
    found = widths([problem], [columns])
    errors = found.errors[0]
    assert errors[channels] == 0
    assert (np.diff(errors) <= 0).all()
    assert sorted(found.dropped) == list(range(channels))
    for width in range(channels + 1):
        exact = lost(problem, columns, found.kept(width))
        assert errors[width] == pytest.approx(exact, rel=1e-6, abs=1e-9)


def test_each_step_drops_the_channel_that_costs_least() -> None:
    problem, columns = posed(5, 24, 300), alone(24).reshape(8, 3)
    found = widths([problem], [columns])
    for width in range(1, 9):
        left = found.kept(width)
        best = min(lost(problem, columns, kept) for kept in combinations(left, width - 1))
        assert lost(problem, columns, found.kept(width - 1)) == pytest.approx(best, rel=1e-9)


def test_all_channels_kept_give_the_layer_itself() -> None:
    problem = posed(7, 20, 300)
    factors = fit_width(problem, alone(20), range(20))
    assert factors.sparse is not None
    np.testing.assert_allclose(factors.sparse, problem.weight, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(factors.bias, np.zeros(7), atol=1e-10)
    assert factors.error < 1e-15 and factors.channels == tuple(range(20))


@pytest.mark.parametrize("count", [300, 9])
@pytest.mark.parametrize("crossed", [False, True])
def test_the_fit_says_what_it_loses(count: int, crossed: bool) -> None:
    problem = posed(6, 20, count, 3, crossed)
    columns = alone(20).reshape(10, 2)
    kept = widths([problem], [columns]).kept(4)
    factors = fit_width(problem, columns, kept)
    assert factors.sparse is not None
    at = columns[list(kept)].ravel()
    h = matrix(problem)
    best = (problem.weight @ h)[:, at] @ np.linalg.inv(h[np.ix_(at, at)])
    np.testing.assert_allclose(factors.sparse, best, rtol=1e-6, atol=1e-9)
    wide = np.zeros_like(problem.weight)
    wide[:, at] = best
    assert factors.error == pytest.approx(problem.error(wide), rel=1e-9)
    np.testing.assert_allclose(factors.bias, problem.output_mean - wide @ problem.mean)
    assert factors.channels == tuple(sorted(at.tolist()))


@pytest.mark.parametrize("seed", range(3))
def test_it_loses_less_than_keeping_the_largest_channels(seed: int) -> None:
    """Both are refitted; channels are large by their weights, or by what they carry."""
    problem, columns = posed(30, 64, 1000, seed, least=1.0), alone(64)
    found = widths([problem], [columns])
    by_weight = np.linalg.norm(problem.weight, axis=0)
    for size in (by_weight, by_weight * np.sqrt(np.diag(matrix(problem)))):
        ratios = []
        for width in (16, 32, 48):
            largest = tuple(sorted(np.argsort(-size)[:width].tolist()))
            best = fit_width(problem, columns, found.kept(width)).error
            ratios.append(best / fit_width(problem, columns, largest).error)
        assert max(ratios) < 1 and np.mean(ratios) < 0.95


def test_several_readers_of_one_set_of_channels_add_up() -> None:
    """Two readers of the same inputs are one of both their outputs, and errors count by their weights."""
    one, two = posed(4, 24, 300, 1), posed(9, 24, 300, 1)
    columns = alone(24)
    found = widths([one, two], [columns, columns], weights=[2.0, 0.5])
    for row, problem in zip(found.errors, (one, two), strict=True):
        for width in range(25):
            assert row[width] == pytest.approx(lost(problem, columns, found.kept(width)), rel=1e-6, abs=1e-9)
    total = found.errors[0] * 2 + found.errors[1] / 2
    for width in range(1, 25):
        left = found.kept(width)
        best = min(
            2 * lost(one, columns, kept) + lost(two, columns, kept) / 2
            for kept in combinations(left, width - 1)
        )
        assert total[width - 1] == pytest.approx(best, rel=1e-6)


def test_an_elimination_may_stop_early() -> None:
    problem = posed(5, 200, 700)
    every, some = (widths([problem], [alone(200)], least=least) for least in (0, 150))
    assert some.dropped == every.dropped[:50]
    np.testing.assert_allclose(some.errors[0, 150:], every.errors[0, 150:])
    assert np.isinf(some.errors[0, :150]).all()
    with pytest.raises(ValueError, match="no width below 150"):
        some.kept(149)


def test_columns_must_fit() -> None:
    with pytest.raises(ValueError, match="distinct"):
        widths([posed(5, 8, 100)], [np.zeros((8, 1), dtype=np.int64)])


def test_dead_and_duplicate_channels_go_first_and_cost_nothing() -> None:
    rng = np.random.default_rng(0)
    x = correlated(500, 12, 2)
    x[:, 3] = 0
    x[:, 5] = x[:, 7]
    x -= x.mean(axis=0)
    moments = Moments(name="y", count=500, mean=np.zeros(12), second=x.T @ x / 500)
    problem = pose(linear(6, 12), rng.standard_normal((6, 12)), np.zeros(6), moments)
    found = widths([problem], [alone(12)])
    assert found.dropped[0] == 3 and {5, 7} & set(found.dropped[1:4])
    factors = fit_width(problem, alone(12), [c for c in range(12) if c not in (3, 5)])
    assert factors.error < 1e-3


def test_without_data_the_weights_alone_decide() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 12)) * np.arange(1, 13)
    problem = pose(linear(6, 12), weight, np.zeros(6), None)
    found = widths([problem], [alone(12)])
    assert list(found.dropped) == np.argsort(np.sum(weight**2, axis=0)).tolist()
    assert isinstance(problem.metric, Metric) and np.isfinite(found.errors).all()


def test_what_a_rectifier_cuts_off_need_not_be_right() -> None:
    rng = np.random.default_rng(5)
    x = correlated(3000, 40, 5).astype(np.float32)
    weight, bias = rng.standard_normal((10, 40)), rng.standard_normal(10) - 1
    y = (x @ weight.T + bias).astype(np.float32)
    mean = x.mean(axis=0, dtype=np.float64)
    moments = Moments(name="y", count=3000, mean=mean, second=np.cov(x.T.astype(np.float64), bias=True))
    problem = pose(linear(10, 40), weight, bias, moments)
    kept = widths([problem], [alone(40)]).kept(12)
    plain = fit_width(problem, alone(40), kept)
    refined = fit_width(problem, alone(40), kept, Rectified(x, y, 0.0, np.inf))

    def missed(factors: Factors) -> float:
        assert factors.sparse is not None
        given = x[:, list(factors.channels)] @ factors.sparse.T + factors.bias
        return float(np.sum((np.maximum(given, 0) - np.maximum(y, 0)) ** 2))

    assert missed(refined) < 0.97 * missed(plain)
    assert refined.error > plain.error  # before the rectifier


@pytest.mark.parametrize("to", LIBRARIES)
@pytest.mark.parametrize("taps", [1, 2])
@pytest.mark.parametrize("few", [False, True])
def test_every_array_library_drops_the_same(to: Any, taps: int, few: bool) -> None:
    problem = posed(8, 24, 10 if few else 200, 4)
    columns = alone(24).reshape(-1, taps)
    want = widths([problem], [columns])

    def moved(x: Any) -> Any:
        return None if x is None else to(x)

    metric = Metric(moved(problem.metric.second), moved(problem.metric.rows), problem.metric.damping)
    there = Problem(
        layer=problem.layer,
        weight=to(problem.weight),
        mean=to(problem.mean),
        output_mean=to(problem.output_mean),
        metric=metric,
        energy=problem.energy,
    )
    found = widths([there], [columns])
    assert isinstance(found, Widths) and found.dropped == want.dropped
    np.testing.assert_allclose(found.errors, want.errors, rtol=1e-9, atol=1e-12)
