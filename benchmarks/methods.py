"""Every method on one layer problem and one budget: the package's solver and the published ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from benchmarks.layer_problems import LayerProblem
from benchmarks.reference.alps import alps
from benchmarks.reference.hassle_free import hassle_free
from benchmarks.reference.magnitude import magnitude
from benchmarks.reference.oats import oats
from benchmarks.reference.patterns import largest, largest_in_groups, largest_in_rows
from benchmarks.reference.sparsegpt import BLOCK, sparsegpt
from benchmarks.reference.three_basil import three_basil
from benchmarks.reference.truncated_svd import truncated_svd
from benchmarks.reference.wanda import wanda
from benchmarks.reference.whitened_svd import whitened_svd
from benchmarks.share import choose_split, split_forms
from onnx_lrsd.solver.admm import low_rank_plus_sparse
from onnx_lrsd.solver.effort import BRIEF, FAST, STANDARD, Effort
from onnx_lrsd.solver.problem import Problem
from onnx_lrsd.types import CHANNEL, N_OF_M, NONE, UNSTRUCTURED, Array, Pattern

EFFORTS = {
    "brief": BRIEF,
    "fast": FAST,
    "standard": STANDARD,
    "thorough": Effort(sweeps=8, penalties=16, iterations=16),
}
"""The product's, and one beyond them."""
FREE, TWO_OF_FOUR = "unstructured", "2:4"
SHARE, RANKED = 0.3, 0.1
"""Share of the budget that is rank, where a method does not choose; rank beside 2:4, in shares of n m."""


@dataclass(frozen=True)
class Budget:
    """``rank`` and the ``density`` of S, nnz / (n m), within ``keep`` · n m parameters."""

    keep: float
    rank: int
    density: float
    pattern: str = FREE

    def share(self, n: int, m: int) -> float:
        """The part of the budget that the factors have."""
        return self.rank * (n + m) / (self.keep * n * m)


@dataclass(frozen=True)
class Row:
    """One result: a line of the JSON file. ``seconds`` are CPU seconds, those of choosing a split apart."""

    layer: str
    method: str
    keep: float
    share: float
    pattern: str
    error: float
    calibration_error: float
    seconds: float
    choosing_seconds: float = 0.0


def spend(n: int, m: int, keep: float, share: float) -> Budget:
    """``share`` of ``keep`` · n m for the factors, to the nearest rank, and the rest for S."""
    rank = min(round(share * keep * n * m / (n + m)), int(keep * n * m / (n + m)))
    return Budget(keep, rank, keep - rank * (n + m) / (n * m) if share < 1 else 0.0)


def budgets(problem: LayerProblem, method: str, keeps: list[float]) -> list[Budget]:
    """What ``method`` is run at: every keep, and 2:4 with a rank or, if it has none, alone."""
    n, m = problem.weight.shape
    share = METHODS[method][0]
    found = [spend(n, m, keep, SHARE if share is None else share) for keep in keeps]
    if share == 1 or method in ("magnitude", "wanda", "hassle-free", "ours, split chosen"):
        return found
    if (m // problem.taps) % 4:
        return found
    if share is not None:
        return [*found, Budget(0.5, 0, 0.5, TWO_OF_FOUR)]
    return [*found, Budget(0.5 + RANKED, round(RANKED * n * m / (n + m)), 0.5, TWO_OF_FOUR)]


def run_method(problem: LayerProblem, method: str, budget: Budget) -> Row:
    """Fit, judge, and time the fit on one thread."""
    problem.moments, problem.held_moments  # noqa: B018 (computed now, not within the time)
    n, m = problem.weight.shape
    share, choosing = budget.share(n, m), 0.0
    start = time.process_time()
    if method == "ours, split chosen":
        posed, rank, pattern = chosen(problem, budget.keep)
        share, choosing = rank * (n + m) / (budget.keep * n * m), time.process_time() - start
        start = time.process_time()
        weight = ours(problem, posed, rank, pattern)
    else:
        weight = METHODS[method][1](problem, budget)
    seconds = time.process_time() - start
    errors = problem.errors(weight)
    return Row(problem.name, method, budget.keep, share, budget.pattern, *errors, seconds, choosing)


def ours(
    problem: LayerProblem, posed: Problem, rank: int, pattern: Pattern, effort: Effort = STANDARD
) -> Array:
    """The package's solver."""
    found = low_rank_plus_sparse(posed.weight, posed.metric, rank, pattern, taps=problem.taps, effort=effort)
    return found.left @ found.right + found.sparse


def chosen(problem: LayerProblem, keep: float) -> tuple[Problem, int, Pattern]:
    """Rank, pattern and damping by the fold."""
    fit, held = problem.folds
    forms = split_forms(problem.layer, CHANNEL, keep * problem.weight.size)
    split = choose_split(fit, held, forms)
    posed = problem.posed()
    metric = replace(posed.metric, damping=split.damping * posed.metric.damping)
    return replace(posed, metric=metric), split.form.rank, split.form.pattern


def _ours(problem: LayerProblem, budget: Budget, effort: Effort = STANDARD) -> Array:
    pattern = NONE
    if budget.pattern == TWO_OF_FOUR:
        pattern = Pattern(N_OF_M, 2, 4)
    elif budget.density:
        pattern = Pattern(UNSTRUCTURED, int(budget.density * problem.weight.size + 1e-6))
    return ours(problem, problem.posed(), budget.rank, pattern, effort)


def _square(second: Array, mean: Array) -> Array:
    return np.diagonal(second) + mean**2


def _peer(solve: Callable[..., Array]) -> Callable[[LayerProblem, Budget], Array]:
    """A reference on our problem. For 2:4 its columns are put in the order (kernel position, channel)."""

    def fit(problem: LayerProblem, budget: Budget) -> Array:
        weight, second, mean = problem.weight, problem.second, problem.moments.mean
        order = np.arange(weight.shape[1])
        if budget.pattern == TWO_OF_FOUR:
            order = order.reshape(-1, problem.taps).T.reshape(-1)
            weight, second, mean = weight[:, order], second[np.ix_(order, order)], mean[order]
        found = solve(weight, second, mean, budget, problem)
        if isinstance(found, tuple):
            low = found[0] @ found[1]
            found = low + found[2] if len(found) == 3 else low
        result = np.empty_like(problem.weight)
        result[:, order] = found
        return result

    return fit


def _select(budget: Budget, free: Callable[..., Array] = largest) -> Callable[[Array], Array]:
    return largest_in_groups if budget.pattern == TWO_OF_FOUR else partial(free, density=budget.density)


METHODS: dict[str, tuple[float | None, Callable[[LayerProblem, Budget], Array]]] = {
    "svd": (1, _peer(lambda w, c, mean, b, _: truncated_svd(w, b.rank))),
    "whitened svd": (
        1,
        _peer(lambda w, c, mean, b, p: whitened_svd(w, c, b.rank, _damping(p))),
    ),
    "magnitude": (0, _peer(lambda w, c, mean, b, _: magnitude(w, _select(b)))),
    "wanda": (0, _peer(lambda w, c, mean, b, _: wanda(w, _square(c, mean), _select(b, largest_in_rows)))),
    "sparsegpt": (
        0,
        _peer(lambda w, c, mean, b, _: sparsegpt(w, c, _select(b), 4 if b.pattern == TWO_OF_FOUR else BLOCK)),
    ),
    "alps": (0, _peer(lambda w, c, mean, b, _: alps(w, c, _select(b)))),
    "oats": (
        None,
        _peer(lambda w, c, mean, b, _: oats(w, _square(c, mean), b.rank, _select(b, largest_in_rows))),
    ),
    "3basil": (None, _peer(lambda w, c, mean, b, _: three_basil(w, c, b.rank, _select(b)))),
    "hassle-free": (None, _peer(lambda w, c, mean, b, _: hassle_free(w, c, b.rank, _select(b)))),
    "ours": (None, _ours),
    "ours, fast": (None, partial(_ours, effort=FAST)),
    "ours, thorough": (None, partial(_ours, effort=EFFORTS["thorough"])),
    "ours, sparse only": (0, _ours),
    "ours, split chosen": (None, _ours),
}
"""Name -> (share of the budget that is rank, None for ``SHARE``; the fit, to an (n, m) weight)."""


def _damping(problem: LayerProblem) -> float:
    """The relative damping that our own fit has: the whitened SVD is then the optimum for S = 0."""
    return problem.posed().metric.damping / float(np.mean(np.diagonal(problem.second)))
