"""Low rank plus sparse keeps its pattern, tells its true error, and loses no more with more budget."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from plain_layers import conv

from benchmarks.share import choose_split, split_forms
from onnx_lrsd import arrays
from onnx_lrsd.solver.admm import low_rank_plus_sparse
from onnx_lrsd.solver.channels import eliminate
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.effort import BRIEF, Effort
from onnx_lrsd.solver.layout import expand
from onnx_lrsd.solver.lowrank import low_rank
from onnx_lrsd.solver.pattern import nonzeros, support
from onnx_lrsd.solver.problem import Metric, Problem
from onnx_lrsd.types import (
    CHANNEL,
    CHANNELS,
    N_OF_M,
    NONE,
    SPATIAL,
    TUCKER,
    UNSTRUCTURED,
    Form,
    Pattern,
)

THOROUGH = Effort(sweeps=8, penalties=16, iterations=16)

Matrix = npt.NDArray[np.float64]
PATTERNS = [Pattern(UNSTRUCTURED, 301), Pattern(N_OF_M, 2, 4), Pattern(CHANNELS, 3), NONE]


def _read_only(x: Matrix) -> Matrix:
    x = x.copy()
    x.flags.writeable = False
    return x


def _strict(x: Matrix) -> Any:
    import array_api_strict

    return array_api_strict.asarray(x, device=array_api_strict.Device("device1"))


def _cupy(x: Matrix) -> Any:
    module = arrays.cupy()
    if module is None:
        pytest.skip("CuPy finds no GPU")
    return module.asarray(x)


LIBRARIES = [
    pytest.param(np.asarray, id="numpy"),
    pytest.param(_read_only, id="read-only"),
    pytest.param(_strict, id="array-api-strict"),
    pytest.param(_cupy, id="cupy"),
]


def host(x: Any) -> Matrix:
    """``x`` as NumPy, from whichever device."""
    if type(x).__module__.startswith("array_api_strict"):
        import array_api_strict

        x = x.to_device(array_api_strict.Device("CPU_DEVICE"))
    return arrays.to_numpy(x)


def moment(m: int, seed: int = 0, count: int = 3000, decay: float = 0.03) -> Matrix:
    """Second moment of correlated inputs behind a ReLU, centred."""
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(rng.standard_normal((m, m)))[0] * np.geomspace(1, decay, m)
    x = np.maximum(rng.standard_normal((count, m)) @ mixing.T + 0.05, 0)
    x -= x.mean(axis=0)
    return np.asarray(x.T @ x / count)


def problem(n: int = 24, m: int = 36, seed: int = 0) -> tuple[Matrix, Matrix, float]:
    """A weight of decaying spectrum with some large entries, its metric and a damping of 1 %."""
    rng = np.random.default_rng(seed)
    low = rng.standard_normal((n, n)) * np.geomspace(1, 0.02, n) @ rng.standard_normal((n, m))
    spikes = rng.standard_normal((n, m)) * (rng.random((n, m)) < 0.1) * 3
    second = moment(m, seed)
    return low + spikes, second, 0.01 * float(np.trace(second)) / m


def missed(difference: Matrix, metric: Matrix, weight: Matrix) -> float:
    return float(np.sum((difference @ metric) * difference) / np.sum((weight @ metric) * weight))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("rank", [0, 4])
def test_the_pattern_is_kept_and_the_error_is_true_on_every_library(
    library: Callable[[Matrix], Any], pattern: Pattern, rank: int
) -> None:
    weight, second, damping = problem()
    taps = 3 if pattern.kind != N_OF_M else 9
    found = low_rank_plus_sparse(
        library(weight), Metric(library(second), None, damping), rank, pattern, taps=taps
    )
    sparse, left, right = host(found.sparse), host(found.left), host(found.right)
    assert left.shape == (24, rank) and right.shape == (rank, 36)
    assert np.count_nonzero(sparse) <= nonzeros(pattern, 24, 36, taps)
    if pattern.kind == UNSTRUCTURED:
        assert np.count_nonzero(sparse) == 301
    if pattern.kind == N_OF_M:
        kept = np.count_nonzero(sparse.reshape(24, 1, 4, 9), axis=2)
        assert (kept <= 2).all()
    if pattern.kind == CHANNELS:
        assert np.count_nonzero(np.abs(sparse).sum(axis=0).reshape(12, 3).sum(axis=1)) == 3
    error = missed(weight - sparse - left @ right, second, weight)
    assert found.error == pytest.approx(error, rel=1e-9, abs=1e-12)
    reference = low_rank_plus_sparse(weight, Metric(second, None, damping), rank, pattern, taps=taps)
    assert found.error == pytest.approx(reference.error, rel=0.05, abs=1e-9)


def test_ties_do_not_change_the_count() -> None:
    values = np.ones((5, 8))
    assert support(values, Pattern(UNSTRUCTURED, 13)).sum() == 13
    assert (support(values, Pattern(N_OF_M, 2, 4)).reshape(5, 2, 4).sum(axis=2) == 2).all()
    assert support(values, Pattern(CHANNELS, 3), taps=2).sum() == 5 * 3 * 2
    assert support(values, Pattern(UNSTRUCTURED, 0)).sum() == 0
    assert support(values, Pattern(UNSTRUCTURED, 40)).all()


@pytest.mark.parametrize("rank", [0, 3])
def test_more_budget_never_loses_more(rank: int) -> None:
    weight, second, damping = problem()
    metric = Metric(second, None, damping)
    by_entries = [
        low_rank_plus_sparse(weight, metric, rank, Pattern(UNSTRUCTURED, count)).error
        for count in (40, 120, 240, 400, 600, 864)
    ]
    assert by_entries == sorted(by_entries, reverse=True) and by_entries[-1] < 1e-12
    by_rank = [
        low_rank_plus_sparse(weight, metric, rank, Pattern(UNSTRUCTURED, 200)).error
        for rank in (0, 2, 5, 10, 24)
    ]
    assert by_rank == sorted(by_rank, reverse=True) and by_rank[-1] < 1e-12


def test_a_planted_sum_is_found() -> None:
    rng = np.random.default_rng(3)
    n, m, rank, count = 60, 80, 4, 400
    sparse = np.zeros(n * m)
    sparse[rng.permutation(n * m)[:count]] = rng.standard_normal(count) * 2
    weight = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, m)) + sparse.reshape(n, m)
    second = moment(m, 3, decay=0.2)
    metric = Metric(second, None, 0.01 * float(np.trace(second)) / m)
    assert low_rank_plus_sparse(weight, metric, rank, Pattern(UNSTRUCTURED, count)).error < 1e-10


def test_with_uncorrelated_inputs_the_support_is_that_of_magnitude() -> None:
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((12, 20))
    found = low_rank_plus_sparse(weight, Metric(np.eye(20), None, 0.01), 0, Pattern(UNSTRUCTURED, 60))
    largest = np.abs(weight) >= np.sort(np.abs(weight).ravel())[-60]
    np.testing.assert_array_equal(found.sparse != 0, largest)
    np.testing.assert_allclose(found.sparse, np.where(largest, weight, 0), atol=1e-5)


def test_without_a_sparse_part_it_is_the_closed_form() -> None:
    weight, second, damping = problem()
    metric = Metric(second, None, damping)
    found = low_rank_plus_sparse(weight, metric, 5)
    best = low_rank(weight, metric)
    np.testing.assert_allclose(found.left @ found.right, best.left[:, :5] @ best.right[:5], atol=1e-9)


def test_whole_channels_come_near_the_closed_form_on_the_same_channels() -> None:
    weight, second, damping = problem()
    metric = Metric(second, None, damping)
    found = low_rank_plus_sparse(weight, metric, 4, Pattern(CHANNELS, 3), taps=3, effort=THOROUGH)
    channels = tuple(np.flatnonzero(np.abs(found.sparse).sum(axis=0).reshape(12, 3).sum(axis=1)).tolist())
    chosen = eliminate(metric.matrix(weight), channels, 3)
    rest = weight[:, chosen.rest]
    best = low_rank(rest, Metric(chosen.metric, None, 0.0))
    low = best.left[:, :4] @ best.right[:4]
    optimum = weight - chosen.join(chosen.sparse(weight, low), low)
    assert found.error <= 1.05 * missed(optimum, second, weight)


def test_permuting_inputs_and_outputs_or_rotating_outputs_changes_nothing_of_a_low_rank_fit() -> None:
    weight, second, damping = problem()
    rng = np.random.default_rng(5)
    rows, columns = rng.permutation(24), rng.permutation(36)
    rotation = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    one = low_rank_plus_sparse(weight, Metric(second, None, damping), 5)
    moved = Metric(second[np.ix_(columns, columns)], None, damping)
    two = low_rank_plus_sparse(weight[rows][:, columns], moved, 5)
    product = one.left @ one.right
    np.testing.assert_allclose(two.left @ two.right, product[rows][:, columns], atol=1e-8)
    three = low_rank_plus_sparse(rotation @ weight, Metric(second, None, damping), 5)
    np.testing.assert_allclose(three.left @ three.right, rotation @ product, atol=1e-8)


def test_equal_calls_give_equal_answers_and_seeds_nearly() -> None:
    weight, second, damping = problem()
    runs = [
        low_rank_plus_sparse(weight, Metric(second, None, damping), 4, PATTERNS[0], seed=seed)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(runs[0].sparse, runs[1].sparse)
    np.testing.assert_array_equal(runs[0].left, runs[1].left)
    assert runs[2].error == pytest.approx(runs[0].error, rel=0.3)


def test_few_rows_need_no_square_matrix_and_give_what_it_gives() -> None:
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((20, 300)) * np.geomspace(1, 0.1, 300)
    rows -= rows.mean(axis=0)
    weight = rng.standard_normal((16, 300))
    damping = 0.1 * float(np.sum(rows**2)) / rows.size
    thin, full = Metric(None, rows, damping), Metric(rows.T @ rows / 20, None, damping)
    one, two = (
        low_rank_plus_sparse(weight, metric, 2, Pattern(UNSTRUCTURED, 900)) for metric in (thin, full)
    )
    assert one.error <= 1.2 * two.error + 1e-9
    assert np.count_nonzero(one.sparse) == 900


def test_nearly_singular_inputs_are_safe_in_single_precision() -> None:
    weight, second, _ = problem()
    values, vectors = np.linalg.eigh(second)
    second = (vectors * np.geomspace(1e-10, 1, 36) * values[-1]) @ vectors.T
    metric = Metric(second, None, 0.01 * float(np.trace(second)) / 36)
    errors = [
        low_rank_plus_sparse(weight, metric, 4, Pattern(UNSTRUCTURED, count)).error for count in (100, 400)
    ]
    assert np.isfinite(errors).all() and errors[1] < errors[0] < 0.2


def conv_problem(seed: int = 0) -> Problem:
    layer = conv(12, 8)
    rng = np.random.default_rng(seed)
    second = moment(layer.m, seed)
    weight = rng.standard_normal((layer.n, layer.m)) * np.geomspace(1, 0.1, layer.m)
    damping = 0.01 * float(np.trace(second)) / layer.m
    energy = float(np.sum((weight @ second) * weight))
    return Problem(
        layer=layer,
        weight=weight,
        mean=np.zeros(layer.m),
        output_mean=np.zeros(layer.n),
        metric=Metric(second, None, damping),
        energy=energy,
    )


FORMS = [
    Form(CHANNEL, 3, Pattern(UNSTRUCTURED, 200)),
    Form(SPATIAL, 4, Pattern(UNSTRUCTURED, 200)),
    Form(SPATIAL, 4, Pattern(N_OF_M, 2, 4)),
    Form(SPATIAL, 4, Pattern(CHANNELS, 2)),
    Form(TUCKER, 4, NONE, 6),
    Form(TUCKER, 4, Pattern(UNSTRUCTURED, 200), 6),
    Form(TUCKER, 4, Pattern(CHANNELS, 2), 6),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_factor_form_goes_with_every_pattern(form: Form) -> None:
    posed = conv_problem()
    found = decompose(posed, form)
    whole = expand(posed.layer, found)
    assert found.error == pytest.approx(posed.error(whole), rel=1e-6)
    alone = decompose(posed, Form(form.kind, form.rank, NONE, form.outer)).error
    assert found.error < alone or form.pattern == NONE
    if found.sparse is not None:
        assert np.count_nonzero(found.sparse) <= nonzeros(form.pattern, 12, 72, 9)


def test_tucker_at_full_ranks_is_exact_and_its_error_falls_with_both_ranks() -> None:
    posed = conv_problem()
    assert decompose(posed, Form(TUCKER, 8, NONE, 12)).error < 1e-9
    by_outer = [decompose(posed, Form(TUCKER, 4, NONE, outer)).error for outer in (2, 4, 8, 12)]
    by_rank = [decompose(posed, Form(TUCKER, rank, NONE, 6)).error for rank in (1, 2, 4, 8)]
    assert by_outer == sorted(by_outer, reverse=True) and by_rank == sorted(by_rank, reverse=True)


def test_the_split_is_chosen_by_samples_that_were_not_fitted() -> None:
    fit, held = conv_problem(0), conv_problem(0)
    for kind in (CHANNEL, SPATIAL):
        forms = split_forms(fit.layer, kind, 0.4 * 12 * 72)
        cost = {CHANNEL: 72 + 12, SPATIAL: 24 + 36}[kind]
        assert all(form.rank * cost + form.pattern.count <= 0.4 * 12 * 72 for form in forms)
        chosen = choose_split(fit, held, forms)
        every = [decompose(fit, form, effort=BRIEF).error for form in forms]
        assert chosen.error <= sorted(every)[1] * 1.1 and chosen.form in forms
    dearer = split_forms(fit.layer, CHANNEL, 300, entry_cost=2)
    assert all(form.rank * 84 + 2 * form.pattern.count <= 300 for form in dearer)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"rank": 25}, "rank"),
        ({"rank": -1}, "rank"),
        ({"pattern": Pattern(UNSTRUCTURED, 1000)}, "pattern"),
        ({"pattern": Pattern(UNSTRUCTURED, -1)}, "pattern"),
        ({"pattern": Pattern(N_OF_M, 2, 5)}, "pattern"),
        ({"weight": np.full((24, 36), np.nan)}, "weight"),
    ],
)
def test_a_bad_call_names_the_argument(change: dict[str, Any], named: str) -> None:
    weight, second, damping = problem()
    given = {"weight": weight, "metric": Metric(second, None, damping), "rank": 3, **change}
    with pytest.raises(ValueError, match=named):
        low_rank_plus_sparse(**given)


def test_the_strict_library_is_really_there() -> None:
    assert importlib.util.find_spec("array_api_strict") is not None
