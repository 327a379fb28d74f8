"""The solver reaches the optimum where one is known, and never claims an error it does not have."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from plain_layers import conv, linear

from onnx_lrsd.solver import separable
from onnx_lrsd.solver.channels import eliminate
from onnx_lrsd.solver.curve import errors
from onnx_lrsd.solver.decompose import choose_channels, decompose, factors
from onnx_lrsd.solver.layout import expand, group_metric, group_weight, shared_groups, ungroup_weight
from onnx_lrsd.solver.lowrank import low_rank
from onnx_lrsd.solver.moments import MomentAccumulator
from onnx_lrsd.solver.problem import Metric, Problem, pose
from onnx_lrsd.types import CHANNEL, CHANNEL_IN, SPATIAL, Form, Layer, Moments, whole_channels

Matrix = npt.NDArray[np.float64]


def inputs(count: int, m: int, seed: int) -> Matrix:
    """Correlated inputs of a decaying spectrum and a mean that is not zero, as behind a ReLU."""
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(rng.standard_normal((m, m)))[0] * np.geomspace(1, 0.01, m)
    return np.maximum(rng.standard_normal((count, m)) @ mixing.T + 0.1, 0)


def posed(layer: Layer, seed: int = 0, count: int = 4000) -> Problem:
    rng = np.random.default_rng(seed)
    accumulator = MomentAccumulator(layer, count)
    accumulator.add(inputs(count, layer.m, seed).astype(np.float32))
    weight = rng.standard_normal((layer.n, layer.m)) * np.geomspace(1, 0.1, layer.m)
    return pose(layer, weight, rng.standard_normal(layer.n), accumulator.result())


@pytest.mark.parametrize("n, m", [(12, 30), (30, 12)])
def test_low_rank_is_the_truncated_svd_in_the_metric_of_the_data(n: int, m: int) -> None:
    problem = posed(linear(n, m))
    root = np.linalg.cholesky(problem.metric.matrix(problem.weight))
    best = np.linalg.svd(problem.weight @ root, compute_uv=False) ** 2
    found = low_rank(problem.weight, problem.metric)
    for rank in range(min(n, m) + 1):
        assert found.errors[rank] == pytest.approx(best[rank:].sum() / best.sum(), rel=1e-6, abs=1e-10)
        difference = problem.weight - found.left[:, :rank] @ found.right[:rank]
        missed = np.sum((difference @ root) ** 2) / best.sum()
        assert missed == pytest.approx(float(found.errors[rank]), rel=1e-6, abs=1e-10)


def test_few_rows_give_what_their_matrix_gives() -> None:
    layer = linear(10, 60)
    rows = inputs(25, 60, 3).astype(np.float32)
    rows -= rows.mean(axis=0)
    weight = np.random.default_rng(0).standard_normal((10, 60))
    thin = Metric(None, rows.astype(np.float64), 0.1)
    full = Metric(thin.matrix(weight) - 0.1 * np.eye(60), None, 0.1)
    one, two = low_rank(weight, thin), low_rank(weight, full)
    np.testing.assert_allclose(one.errors, two.errors, atol=1e-10)
    assert MomentAccumulator(layer, 25).thin and not MomentAccumulator(layer, 40).thin


@pytest.mark.parametrize("kind", [CHANNEL, CHANNEL_IN, SPATIAL])
@pytest.mark.parametrize("channels", [0, 2])
def test_full_rank_is_exact(kind: str, channels: int) -> None:
    layer = conv(7, 6)
    problem = posed(layer)
    groups = shared_groups(layer.kernel, kind)
    rank = min(layer.n * groups, (layer.channels - channels) * 9 // groups)
    found = decompose(problem, Form(kind, rank, whole_channels(channels)))
    assert found.error < 1e-9
    np.testing.assert_allclose(expand(layer, found), problem.weight, atol=1e-3)


@pytest.mark.parametrize("kind", [CHANNEL, CHANNEL_IN, SPATIAL])
@pytest.mark.parametrize("channels", [0, 3])
def test_the_error_reported_is_the_error_recomputed(kind: str, channels: int) -> None:
    layer = conv(10, 8)
    rng = np.random.default_rng(1)
    x = inputs(4000, layer.m, 1)
    weight, bias = rng.standard_normal((layer.n, layer.m)), rng.standard_normal(layer.n)
    accumulator = MomentAccumulator(layer, len(x))
    for part in np.array_split(x.astype(np.float32), 7):
        accumulator.add(part)
    found = decompose(
        pose(layer, weight, bias, accumulator.result()), Form(kind, 4, whole_channels(channels))
    )
    y, new = x @ weight.T + bias, x @ expand(layer, found).T + found.bias
    assert len(found.channels) == channels
    missed = np.sum((new - y) ** 2) / np.sum((y - y.mean(axis=0)) ** 2)
    assert found.error == pytest.approx(missed, rel=1e-3)


@pytest.mark.parametrize("kind", [CHANNEL_IN, SPATIAL])
def test_curves_are_the_errors_before_any_sweep_and_sweeps_only_lower_them(kind: str) -> None:
    layer = conv(12, 10)
    problem = posed(layer)
    groups = shared_groups(layer.kernel, kind)
    metric = group_metric(problem.metric.matrix(problem.weight), groups).astype(np.float32)
    grouped = separable.grouped_metric(metric)
    prepared = separable.separable_problem(group_weight(problem.weight, groups).astype(np.float32), grouped)
    curve = separable.curve(prepared, 10).by_rank
    assert curve[0] == 1 and (np.diff(curve) <= 1e-9).all()
    for rank in (2, 5, 9):
        start = separable.fit(prepared, rank, sweeps=0)[2]
        assert curve[rank] == pytest.approx(start, rel=1e-2, abs=1e-5)
        after = [separable.fit(prepared, rank, sweeps=sweeps)[2] for sweeps in (1, 3, 6)]
        assert after[0] <= start * 1.001 and after[1] <= after[0] * 1.001 and after[2] <= after[1] * 1.001


def test_the_spatial_fit_is_stationary() -> None:
    """No small step away from the fit lowers its error: both factors are at their optimum."""
    layer = conv(8, 6)
    problem = posed(layer)
    v, h = factors(layer, problem.weight, problem.metric, Form(SPATIAL, 3), 60)
    metric = problem.metric.matrix(problem.weight)

    def missed(v: Matrix, h: Matrix) -> float:
        difference = problem.weight - ungroup_weight(np.matmul(h, v))
        return float(np.sum((difference @ metric) * difference))

    rng = np.random.default_rng(2)
    at = missed(v, h)
    for _ in range(20):
        dv, dh = rng.standard_normal(v.shape), rng.standard_normal(h.shape)
        step = 1e-3
        assert missed(v + step * dv * np.abs(v).mean(), h + step * dh * np.abs(h).mean()) >= at * (1 - 1e-4)


def test_freed_channels_are_regressed_out_exactly() -> None:
    layer = linear(5, 12)
    problem = posed(layer)
    metric = problem.metric.matrix(problem.weight)
    found = eliminate(metric, (2, 7), 1)
    rest = np.random.default_rng(0).standard_normal((5, 10))
    weight = np.zeros((5, 12))
    weight[:, found.rest] = rest
    weight[:, found.kept] = found.sparse(problem.weight, rest)
    difference = problem.weight - weight
    gradient = difference @ metric
    np.testing.assert_allclose(gradient[:, found.kept], 0, atol=1e-9)
    kept_error = np.sum(gradient * difference)
    remaining = (problem.weight - weight)[:, found.rest]
    assert np.sum((remaining @ found.metric) * remaining) == pytest.approx(kept_error)


def test_the_channels_chosen_are_among_the_best_of_all() -> None:
    """S alone, two of eight channels: the choice against every other one."""
    layer = linear(6, 8)
    problem = posed(layer)
    metric = problem.metric.matrix(problem.weight)

    def missed(channels: tuple[int, ...]) -> float:
        found = eliminate(metric, channels, 1)
        rest = problem.weight[:, found.rest]
        return float(np.sum((rest @ found.metric) * rest))

    every = sorted(missed(pair) for pair in itertools.combinations(range(8), 2))
    chosen = missed(choose_channels(problem, Form(CHANNEL, 0, whole_channels(2))).channels)
    assert chosen <= every[len(every) // 4]


@pytest.mark.parametrize("kind", [CHANNEL, SPATIAL])
def test_permuting_outputs_and_channels_permutes_the_answer(kind: str) -> None:
    layer = conv(9, 6)
    problem = posed(layer)
    rng = np.random.default_rng(4)
    rows, order = rng.permutation(9), rng.permutation(6)
    columns = (order[:, None] * 9 + np.arange(9)).ravel()
    assert problem.metric.second is not None
    moved = replace(
        problem,
        weight=problem.weight[rows][:, columns],
        mean=problem.mean[columns],
        output_mean=problem.output_mean[rows],
        metric=Metric(problem.metric.second[np.ix_(columns, columns)], None, problem.metric.damping),
    )
    one, two = decompose(problem, Form(kind, 3)), decompose(moved, Form(kind, 3))
    assert one.error == pytest.approx(two.error, rel=1e-3)
    np.testing.assert_allclose(
        expand(layer, one)[rows][:, columns], expand(layer, two), atol=2e-2 * np.abs(problem.weight).max()
    )


def test_changed_inputs_are_answered_by_regression_on_the_original_outputs() -> None:
    layer = linear(4, 9)
    rng = np.random.default_rng(5)
    x = inputs(6000, 9, 5)
    h = x + 0.2 * rng.standard_normal(x.shape)  # what a compressed network would feed instead
    weight, bias = rng.standard_normal((4, 9)), rng.standard_normal(4)
    y = x @ weight.T + bias
    accumulator = MomentAccumulator(layer, len(h))
    for rows, wanted in zip(np.array_split(h, 5), np.array_split(y, 5), strict=True):
        accumulator.add(rows.astype(np.float32), wanted.astype(np.float32))
    found = decompose(pose(layer, weight, bias, accumulator.result()), Form(CHANNEL, 4))
    design = np.concatenate([h, np.ones((len(h), 1))], axis=1)
    best = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    unchanged = y - h @ weight.T - bias
    missed = y - h @ expand(layer, found).T - found.bias
    energy = np.sum((y - y.mean(axis=0)) ** 2)
    assert found.error == pytest.approx(np.sum(missed**2) / energy, rel=1e-3)
    assert np.sum(best**2) <= np.sum(missed**2) <= 1.1 * np.sum(best**2) < np.sum(unchanged**2)


def test_moments_do_not_depend_on_how_the_rows_arrive() -> None:
    layer = linear(3, 20)
    x = inputs(9000, 20, 6).astype(np.float32) + 100  # a mean far from zero must not cancel
    whole, parts = MomentAccumulator(layer, len(x)), MomentAccumulator(layer, len(x))
    whole.add(x)
    for part in np.array_split(x, 37):
        parts.add(part)
    one, two = whole.result(), parts.result()
    exact = np.cov(x.T.astype(np.float64), bias=True)
    for found in (one, two):
        assert found.count == 9000 and found.second is not None
        np.testing.assert_allclose(found.second, exact, atol=1e-4 * np.abs(exact).max())
        np.testing.assert_allclose(found.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-6)


def test_dead_constant_and_duplicate_inputs_are_borne() -> None:
    layer = linear(6, 10)
    x = inputs(500, 10, 7).astype(np.float32)
    x[:, 0], x[:, 1], x[:, 2] = 0, 3, x[:, 3]
    accumulator = MomentAccumulator(layer, len(x))
    accumulator.add(x)
    weight = np.random.default_rng(0).standard_normal((6, 10))
    problem = pose(layer, weight, np.zeros(6), accumulator.result())
    curve = errors(problem, [Form(CHANNEL, rank) for rank in range(1, 7)])
    assert all(np.isfinite(error) for error in curve.values())
    assert decompose(problem, Form(CHANNEL, 6)).error < 1e-9


def test_one_row_and_no_data_still_give_an_answer() -> None:
    layer = linear(4, 6)
    weight, bias = np.random.default_rng(0).standard_normal((4, 6)), np.zeros(4)
    one = Moments(name="y", count=1, mean=np.ones(6), rows=np.zeros((1, 6), np.float32))
    for moments in (one, None):
        found = decompose(pose(layer, weight, bias, moments), Form(CHANNEL, 4))
        np.testing.assert_allclose(expand(layer, found), weight, atol=1e-8)


@pytest.mark.parametrize(
    "form",
    [
        Form(),
        Form(CHANNEL),
        Form(CHANNEL, 99),
        Form(CHANNEL, 2, whole_channels(10)),
        Form(SPATIAL, 2),
        Form(CHANNEL, -1),
    ],
)
def test_a_form_that_does_not_fit_is_refused(form: Form) -> None:
    with pytest.raises(ValueError, match=r"layer|form"):
        decompose(posed(linear(5, 10, "layer")), form)
