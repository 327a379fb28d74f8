"""W ~ L + S for a given low-rank part and pattern: the least output error, support and factors jointly.

Minimise tr(D H D^T), D = W - L - S, over L of some form and S of a pattern. ADMM splits S into a dense copy Z
and the patterned S. With S and the dual variable fixed, Z *and* L have a joint closed form: eliminating Z
leaves a fit of L in the metric M = rho H (H + rho I)^-1, and Z follows. The scheme thus has two blocks, not
three, and one (n, m, m) product an iteration; of the fit of L each iteration takes one step. On the support
that comes out, conjugate gradients refit S; where L is U V they do so with the right factor eliminated
(variable projection).

Sources: Boyd et al., Foundations and Trends in Machine Learning 3 (2011), section 9.1 (ADMM for
cardinality); Golub and Pereyra, SIAM J. Numer. Anal. 10 (1973) (variable projection). Peers: Meng et
al., ALPS, NeurIPS 2024; Makni et al., 3BASiL, NeurIPS 2025 (three blocks).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lrsd.arrays import cast, namespace
from onnx_lrsd.solver.effort import STANDARD, Effort
from onnx_lrsd.solver.lowrank import low_rank
from onnx_lrsd.solver.parts import FreeFactors, Part, orthonormal
from onnx_lrsd.solver.pattern import check_pattern, grown, nonzeros, support
from onnx_lrsd.solver.problem import Metric, Outputs
from onnx_lrsd.solver.resolvent import Resolvent
from onnx_lrsd.types import NONE, Array, Pattern

FIRST_RHO, DAMPED_RHO, LAST_RHO = 0.015, 0.3, 0.25
"""rho rises geometrically from max(FIRST_RHO, DAMPED_RHO x damping) to LAST_RHO / share of entries kept."""
_POLISHES, _S_STEPS = 2, 4
"""Polishes at the end, each of which refits L and then takes _S_STEPS conjugate gradient steps on S."""
RESTED = 0.01
"""A search has converged if its last step moved at most this share of the support."""


@dataclass(frozen=True)
class LowRankPlusSparse:
    """``left`` (n, r), ``right`` (r, m) and ``sparse`` (n, m), float64.

    ``error`` is tr(D C D^T) / tr(W C W^T) with the undamped C; columns of ``left`` are orthonormal and
    sorted, so the first r' of them are a good fit of rank r'. ``converged``: the support had all but stopped
    to change.
    """

    left: Array
    right: Array
    sparse: Array
    error: float
    converged: bool


def low_rank_plus_sparse(
    weight: Array,
    metric: Metric,
    rank: int,
    pattern: Pattern = NONE,
    *,
    taps: int = 1,
    effort: Effort = STANDARD,
    seed: int = 0,
    resolvent: Resolvent | None = None,
) -> LowRankPlusSparse:
    """Fit U V + S to ``weight`` (n, m), float64, in ``metric``.

    ``taps`` is the number of kernel positions of an input channel. ``resolvent``, that of ``metric``, may be
    shared between calls. Raises ValueError for a rank or pattern that the shape does not allow, and for a
    weight that is not finite.
    """
    xp = namespace(weight)
    n, m = weight.shape
    if not 0 <= rank <= min(n, m):
        raise ValueError(f"rank {rank} of an ({n}, {m}) weight is not between 0 and {min(n, m)}")
    check_pattern(pattern, n, m, taps)
    if not bool(xp.all(xp.isfinite(weight))):
        raise ValueError("weight has NaN or infinite entries")
    kept = nonzeros(pattern, n, m, taps)
    left, sparse, rested = weight[:, :0], xp.zeros_like(weight), True
    if kept == n * m:
        sparse = weight
    elif not kept or rank == min(n, m):
        left = low_rank(weight, metric).left[:, :rank]
    else:
        h = resolvent or Resolvent(metric, weight, taps)
        w = cast(weight * h.columns, xp.float32)
        part = FreeFactors.random(w, rank, seed)
        s, rested = fit_sparse(w, h, part, pattern, taps, effort)
        sparse, left = cast(s, xp.float64) / h.columns, orthonormal(cast(part.p, xp.float64))
    right = left.T @ (weight - sparse)
    difference = weight - sparse - left @ right
    energy = float(xp.sum(metric.undamped(weight) * weight))
    missed = float(xp.sum(metric.undamped(difference) * difference))
    error = max(missed, 0.0) / energy if energy > 0 else 0.0
    return LowRankPlusSparse(left, right, sparse, error, rested)


def fit_sparse(
    w: Array, h: Resolvent, part: Part, pattern: Pattern, taps: int, effort: Effort
) -> tuple[Array, bool]:
    """S (n, m), fitted together with ``part``, and whether the search for its support converged.

    ``w`` and S are float32 and in the scaled columns of ``h``; the pattern keeps some entries but not all.
    """
    s, mask, rested = _search(w, h, part, pattern, taps, effort)
    for _ in range(_POLISHES):
        part.refit(w - s, h)
        s = gradients(w, h, part, s, mask)
    part.refit(w - s, h)
    return s, rested


def _search(
    w: Array, h: Resolvent, part: Part, pattern: Pattern, taps: int, effort: Effort
) -> tuple[Array, Array, bool]:
    """S, its support, and whether the last step moved little of the support."""
    xp = namespace(w)
    stages, iterations = effort.penalties, effort.iterations
    kept = nonzeros(pattern, w.shape[0], w.shape[1], taps)
    first = max(FIRST_RHO, DAMPED_RHO * h.damping)
    last = max(LAST_RHO * w.shape[0] * w.shape[1] / kept, first)
    zero = xp.zeros_like(w)
    s = dual = zero
    mask = before = s != 0
    rho, step = first, 0
    for value in np.geomspace(first, last, stages).tolist():
        dual, rho = dual * (rho / value), value
        inverse = h.shifted_inverse(rho)
        part.shift(h, rho)
        for _ in range(iterations):
            a = w - s + dual
            # Z + dual = S + (A - L)(I - rho (H + rho I)^-1): what is to be projected.
            moving = s + part.follow(a, a - rho * inverse(a))
            present = grown(pattern, 0.5 + step / (stages * iterations))
            before, mask = mask, support(moving, present, taps, exact=False)
            s = xp.where(mask, moving, zero)
            dual = moving - s
            step += 1
    moved = float(xp.count_nonzero(mask != before)) / (2 * kept)
    mask = support(s, pattern, taps)
    return xp.where(mask, s, zero), mask, moved <= RESTED


def gradients(
    w: Array, h: Resolvent, part: Part, s: Array, mask: Array, outputs: Outputs | None = None
) -> Array:
    """Conjugate gradients for min_S |W - L - S|_H^2 on the support ``mask``, from ``s``.

    With ``outputs`` for min_S tr(G D H D^T), D = W - L - S, in their metric G.
    """
    xp = namespace(w)
    zero = xp.zeros_like(w)

    def image_of(x: Array) -> Array:
        seen = h.apply(x)
        return xp.where(mask, seen if outputs is None else outputs.apply(seen), zero)

    residual = image_of(part.miss(w - s))
    direction, fall = residual, xp.sum(residual**2)
    for _ in range(_S_STEPS):
        image = image_of(part.tangent(direction))
        curvature = xp.sum(direction * image)
        step = fall / xp.where(curvature > 0, curvature, xp.inf)
        s, residual = s + step * direction, residual - step * image
        fall, last = xp.sum(residual**2), fall
        direction = residual + fall / xp.where(last > 0, last, xp.inf) * direction
    return s
