"""The published solvers that ours is judged against keep their budgets and are exact where they should."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.reference.alps import alps
from benchmarks.reference.hassle_free import hassle_free
from benchmarks.reference.magnitude import magnitude
from benchmarks.reference.oats import oats
from benchmarks.reference.patterns import largest, largest_in_groups, largest_in_rows
from benchmarks.reference.sparsegpt import sparsegpt
from benchmarks.reference.three_basil import three_basil
from benchmarks.reference.truncated_svd import truncated_svd
from benchmarks.reference.tucker2 import expand, tucker2
from benchmarks.reference.wanda import wanda
from benchmarks.reference.whitened_svd import whitened_svd

Matrix = npt.NDArray[np.float64]

N, M, RANK, DENSITY = 24, 48, 3, 0.25


def problem(n: int = N, m: int = M) -> tuple[Matrix, Matrix]:
    """A weight, and the second moment of correlated inputs."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4 * m, m)) @ (np.eye(m) + 0.5 * rng.standard_normal((m, m)) / np.sqrt(m))
    return rng.standard_normal((n, m)), np.cov(rows.T, bias=True)


def error(weight: Matrix, found: Matrix, second: Matrix) -> float:
    difference = weight - found
    return float(np.sum(difference @ second * difference) / np.sum(weight @ second * weight))


def pruned(density: float, choose: int = 128) -> dict[str, Matrix]:
    weight, second = problem()
    select = largest_in_groups if choose == 4 else partial(largest, density=density)
    return {
        "magnitude": magnitude(weight, select),
        "wanda": wanda(weight, np.diagonal(second), select),
        "sparsegpt": sparsegpt(weight, second, select, choose),
        "alps": alps(weight, second, select),
    }


def test_pruned_weights_have_the_non_zeros_of_the_budget() -> None:
    for name, sparse in pruned(DENSITY).items():
        assert np.count_nonzero(sparse) == DENSITY * N * M, name


def test_two_of_four_neighbouring_columns_are_kept() -> None:
    for name, sparse in pruned(0.5, choose=4).items():
        assert (np.count_nonzero(sparse.reshape(N, -1, 4), axis=2) == 2).all(), name


def test_a_budget_for_every_entry_leaves_the_weight_as_it_is() -> None:
    for name, sparse in pruned(1.0).items():
        assert sparse == pytest.approx(problem()[0], abs=1e-4), name


def test_the_more_a_method_knows_of_the_inputs_the_less_it_loses() -> None:
    weight, second = problem()
    found = {name: error(weight, sparse, second) for name, sparse in pruned(DENSITY).items()}
    assert found["alps"] < found["sparsegpt"] < found["magnitude"]


@pytest.mark.parametrize("method", ["oats", "three_basil", "hassle_free"])
@pytest.mark.parametrize("structured", [False, True])
def test_low_rank_plus_sparse_keeps_rank_and_pattern(method: str, structured: bool) -> None:
    weight, second = problem()
    free = partial(largest_in_rows if method == "oats" else largest, density=DENSITY)
    select = largest_in_groups if structured else free
    given = (weight, np.diagonal(second) if method == "oats" else second, RANK, select)
    solvers: dict[str, Callable[..., tuple[Matrix, Matrix, Matrix]]] = {
        "oats": oats,
        "three_basil": three_basil,
        "hassle_free": partial(hassle_free, rounds=3),
    }
    left, right, sparse = solvers[method](*given)
    assert left.shape == (N, RANK) and right.shape == (RANK, M)
    assert np.count_nonzero(sparse) == (0.5 if structured else DENSITY) * N * M
    alone = alps(weight, second, select) if method != "oats" else wanda(weight, np.diagonal(second), select)
    assert error(weight, left @ right + sparse, second) < error(weight, alone, second)


def test_whitened_svd_has_the_least_error_of_its_rank() -> None:
    weight, second = problem()
    left, right = whitened_svd(weight, second, RANK, damping=1e-9)
    values = np.linalg.svd(weight @ np.linalg.cholesky(second), compute_uv=False) ** 2
    found = error(weight, left @ right, second)
    assert found == pytest.approx(values[RANK:].sum() / values.sum(), rel=1e-6)
    plain = truncated_svd(weight, RANK)
    assert found < error(weight, plain[0] @ plain[1], second)
    rng = np.random.default_rng(1)
    for _ in range(20):
        near = (left + 0.01 * rng.standard_normal(left.shape)) @ (
            right + 0.01 * rng.standard_normal(right.shape)
        )
        assert found < error(weight, near, second)


def test_tucker_2_is_exact_at_full_ranks_and_gains_from_its_sweeps() -> None:
    weight, second = problem(16, 8 * 9)
    assert error(weight, expand(*tucker2(weight, second, 9, (8, 16))), second) < 1e-9
    errors = [error(weight, expand(*tucker2(weight, second, 9, (4, 8), sweeps=s)), second) for s in (0, 2, 8)]
    assert errors[2] <= errors[1] < errors[0]
