"""Refine a layer in front of a rectifier: an error that the rectifier cuts off does not count.

Minimise E|a(y) - a(y~)|^2 over the factors, a = clip(., low, high); Relu is clip(., 0, inf). Of all z
with a(z) = a(y) take the one nearest to the present p: y itself where it passes, min(p, low) below,
max(p, high) above. Since |a(y) - a(y~)| <= |z - y~| for every y~, with equality at y~ = p, a
least-squares step towards z cannot raise the error: majorise, then minimise by one sweep of alternating
least squares from the present factors. Sources: Zhang, Zou, He, Sun, TPAMI 2016, section 3.2 (there a
penalty ties z to p); Hunter and Lange, The American Statistician 58 (2004). Where outputs have a
metric G of their own the step is taken in G, and a round that raises the error in G is undone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from onnx_lrsd.arrays import cast, from_numpy, namespace
from onnx_lrsd.solver import separable
from onnx_lrsd.solver.admm import gradients
from onnx_lrsd.solver.layout import group_weight, ungroup_weight
from onnx_lrsd.solver.parts import FreeFactors
from onnx_lrsd.solver.problem import Problem
from onnx_lrsd.solver.resolvent import Resolvent
from onnx_lrsd.types import Array

Parts = TypeVar("Parts")

_ROUNDS = 4
"""More rounds fit the calibration samples better and held-out ones worse."""
STEPS = 4
"""Conjugate gradient steps of one sweep."""
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Rectified:
    """``rows`` (N, m) of a layer's input, the ``outputs`` (N, n) they should give, the rectifier's limits.

    Both are float32. The rows are those that the moments come from.
    """

    rows: np.ndarray
    outputs: np.ndarray
    low: float
    high: float


class Refined(NamedTuple):
    """V (r, A), H (B, n, r) and ``shift`` (n,), which is added to the bias, float64.

    ``error`` is the squared error behind the rectifier, summed over all rows.
    """

    v: Array
    h: Array
    shift: Array
    error: float


def refine(
    problem: Problem, shared: separable.Separable, v: Array, h: Array, seen: Rectified, outer: int = 0
) -> Refined:
    """Refine the linear fit ``v`` (r, A), ``h`` (B, n, r) of ``shared``, ``problem`` grouped for its form.

    ``shared`` and ``h`` are weighed by the metric of the outputs, if there is one; the result is not. Rounds
    end when the error behind the rectifier does not fall: ``shared`` is fitted in the damped metric, in which
    a step may look better than it is.
    """
    xp, single = namespace(v), shared.weight.dtype
    groups = h.shape[0]

    def weight_of(pair: tuple[Array, Array]) -> Array:
        return ungroup_weight(xp.matmul(problem.unweigh(pair[1]), pair[0]))

    def step(pair: tuple[Array, Array], moved: Array) -> tuple[Array, Array]:
        product = shared.product + group_weight(problem.weigh(moved), groups)
        return separable.alternate(replace(shared, product=product), *pair, STEPS, outer)[:2]

    best = _rounds(problem, seen, (cast(v, single), cast(h, single)), weight_of, step)
    v, h, shift = (cast(x, xp.float64) for x in (*best.parts, best.shift))
    return Refined(v, problem.unweigh(h), shift, best.error)


def refine_entries(
    problem: Problem, h: Resolvent, low: Array, sparse: Array, seen: Rectified
) -> tuple[Array, Array]:
    """Refine ``sparse`` (n, m), on its support, beside ``low`` (n, m), which stays.

    Returns S and what is added to the bias (n,). ``h`` is the resolvent of the metric of ``problem``.
    """
    xp = namespace(sparse)
    single, columns = xp.float32, h.columns
    low, s, aim = (cast(x * columns, single) for x in (low, sparse, problem.weight))
    columns = cast(columns, single)
    inverse, mask, none = h.shifted_inverse(0.0), s != 0, FreeFactors.random(aim, 0, 0)

    def weight_of(entries: Array) -> Array:
        return (low + entries) / columns

    def step(entries: Array, moved: Array) -> Array:
        target = aim + inverse(moved / columns)
        return gradients(target - low, h, none, entries, mask, problem.outputs)

    best = _rounds(problem, seen, s, weight_of, step)
    return cast(best.parts, xp.float64) / h.columns, cast(best.shift, xp.float64)


def refine_weight(
    problem: Problem, weight: Array, fitted: Callable[[Array], Array], seen: Rectified
) -> tuple[Array, Array]:
    """Refine the least-squares fit ``weight`` (n, m); returns it and what is added to the bias (n,), float64.

    ``fitted(moved)`` is the least-squares fit (n, m) for cross moments E[(y - E y) x^T] + ``moved``.
    """
    xp = namespace(weight)

    def weight_of(parts: Array) -> Array:
        return parts

    def step(parts: Array, moved: Array) -> Array:
        return cast(fitted(moved), parts.dtype)

    best = _rounds(problem, seen, cast(weight, xp.float32), weight_of, step)
    return cast(best.parts, xp.float64), cast(best.shift, xp.float64)


class _Best(NamedTuple, Generic[Parts]):
    """The best round: the parts of a weight, what is added to its bias (n,), and the squared error."""

    parts: Parts
    shift: Array
    error: float


def _rounds(
    problem: Problem,
    seen: Rectified,
    parts: Parts,
    weight_of: Callable[[Parts], Array],
    step: Callable[[Parts, Array], Parts],
) -> _Best[Parts]:
    """Take up to _ROUNDS steps from ``parts``, float32, until one does not lower the error.

    ``step(parts, moved)`` is given E[(z - y) x^T] (n, m), by which the target of the least squares moves.
    """
    weight = weight_of(parts)
    xp = namespace(weight)
    rows, outputs = from_numpy(seen.rows, weight), from_numpy(seen.outputs, weight)
    origin, mean = cast(problem.mean, weight.dtype), cast(problem.output_mean, weight.dtype)
    shift, best = xp.zeros_like(mean), None
    for number in range(_ROUNDS + 1):
        error, moved, next_shift = _targets(problem, rows, origin, outputs, weight, mean + shift, seen)
        if best is not None and error >= best.error:
            break
        best = _Best(parts, shift, error)
        if number < _ROUNDS:
            parts, shift = step(parts, moved), next_shift
            weight = weight_of(parts)
    assert best is not None
    return best


def _targets(
    problem: Problem,
    rows: Array,
    origin: Array,
    outputs: Array,
    weight: Array,
    mean: Array,
    seen: Rectified,
) -> tuple[float, Array, Array]:
    """The error of ``weight`` (n, m) behind the rectifier, and how its targets z differ from y.

    Returns the sum of |a(y) - a(p)|^2 over all rows (in the metric of the outputs), E[(z - y) x^T] (n, m) and
    E[z - y] (n,). ``origin`` (m,) is taken from the ``rows`` (N, m) and ``mean`` (n,) is the output there.
    """
    xp = namespace(rows)
    error, moved, shift = 0.0, xp.zeros_like(weight), xp.zeros_like(mean)
    for start in range(0, rows.shape[0], _ROWS_AT_ONCE):
        stop = start + _ROWS_AT_ONCE
        x, y = rows[start:stop, :] - origin, outputs[start:stop, :]
        p = x @ weight.T + mean
        missed = xp.clip(y, seen.low, seen.high) - xp.clip(p, seen.low, seen.high)
        error += float(xp.sum(xp.square(problem.weigh(missed.T))))
        below, above = y <= seen.low, y >= seen.high
        z = xp.where(below, xp.clip(p, max=seen.low), xp.where(above, xp.clip(p, min=seen.high), y))
        moved = moved + (z - y).T @ x
        shift = shift + xp.sum(z - y, axis=0)
    return error, moved / rows.shape[0], shift / rows.shape[0]
