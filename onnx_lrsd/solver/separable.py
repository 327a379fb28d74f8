"""Two factors of which the first is shared by several kernel positions.

Split the inputs of a layer into groups b = 0..B-1 that the first factor treats alike, so
x = (x_0, ..., x_{B-1}) with x_b of length A, m = A B. The weight becomes

    W_b ~ H_b V,    V (r, A), H (B, n, r):    y = sum_b H_b (V x_b).

One family holds every two-factor form. *Channel*: B = 1. *Spatial* (k x 1, then 1 x k): b is the
kernel column, A = channels x kernel rows. *Channel-in* (1 x 1, then k x k): b is the kernel
position, A = channels. *Tucker-2* (1 x 1, k x k, 1 x 1) is channel-in with H_b = U G_b for one U.

The error tr(D C D^T) is quadratic in each factor: alternating least squares in the metric C of the
data. H is a linear regression on the r B features V x_b. V solves
sum_{bd} H_b^T H_d V C_db = sum_b H_b^T (W C)_b by conjugate gradients, preconditioned with
(sum_b H_b^T H_b) kron (mean_b C_bb), which is exact for B = 1; the (r A, r A) matrix is never formed.
Source: Jaderberg, Vedaldi, Zisserman, BMVC 2014 (the spatial form); "Distribution-Aware Tensor
Decomposition for Compression of Convolutional Neural Networks", NeurIPS 2025 (the metric).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from onnx_lrsd.arrays import (
    add_to_diagonal,
    cast,
    from_numpy,
    identity,
    namespace,
    spd_inverse,
    top_eigenvectors,
    trace,
)
from onnx_lrsd.types import Array

_RIDGE = 1e-6
"""Ridge of normal equations, relative to their mean diagonal: they stay positive definite in float32."""
RESTS = 0.01
"""Sweeps end when one lowers the error by less than this share of it (results/time.md)."""
OVERSAMPLED, POWERS, LEADING_FROM = 16, 3, 256
"""Leading eigenvectors of a matrix of at least LEADING_FROM rows come from random directions, OVERSAMPLED
more than asked for, and POWERS of the matrix. Source: Halko, Martinsson, Tropp, SIAM Review 53 (2011)."""


@dataclass(frozen=True)
class GroupedMetric:
    """The damped second moment of grouped inputs: ``blocks`` (B, B, A, A), C_bd = E[x_b x_d^T], float32.

    ``mean`` (A, A) is the mean of the C_bb, ``inverse`` its inverse and ``root`` its Cholesky factor,
    float64.
    """

    blocks: Array
    mean: Array
    inverse: Array
    root: Array


@dataclass(frozen=True)
class Separable:
    """One layer prepared for fits of any rank.

    ``weight`` (B, n, A); ``product`` (B, n, A), (W C)_b; ``energy`` tr(W C W^T).
    """

    weight: Array
    metric: GroupedMetric
    product: Array
    energy: float


class RankErrors(NamedTuple):
    """Relative errors: ``by_rank`` (top + 1,), and by outer rank ``by_outer[rank]`` (n + 1,)."""

    by_rank: Array
    by_outer: dict[int, Array]


def grouped_metric(blocks: Array) -> GroupedMetric:
    """Factorise ``blocks`` (B, B, A, A). They are copied to lie in memory as the axes do."""
    xp = namespace(blocks)
    groups = blocks.shape[0]
    blocks = xp.reshape(xp.reshape(blocks, (-1,)), blocks.shape)
    mean = cast(sum(blocks[b, b, ...] for b in range(groups)) / groups, xp.float64)
    mean = add_to_diagonal((mean + mean.T) / 2, 1e-10 * trace(mean) / mean.shape[0])
    return GroupedMetric(blocks, mean, spd_inverse(mean), xp.linalg.cholesky(mean))


def separable_problem(weight: Array, metric: GroupedMetric, product: Array | None = None) -> Separable:
    """The problem of ``weight`` (B, n, A); ``product`` (B, n, A), if it is known, is (W C)_b."""
    xp = namespace(weight)
    if product is None:
        groups, n, width = weight.shape
        wide = xp.reshape(xp.permute_dims(weight, (1, 0, 2)), (n, groups * width))
        columns = (xp.reshape(metric.blocks[:, b, ...], (groups * width, width)) for b in range(groups))
        product = xp.stack([wide @ column for column in columns])
    return Separable(weight, metric, product, float(xp.sum(weight * product)))


def fit(
    problem: Separable, rank: int, sweeps: int = 4, steps: int = 6, outer: int = 0
) -> tuple[Array, Array, float]:
    """V (rank, A), H (B, n, rank) and the error relative to ``energy``, after at most so many ``sweeps``.

    With ``outer``, H_b = U G_b for one U (n, outer): Tucker-2.
    """
    v = leading_directions(problem, rank)
    h, error = _outer(problem, v, outer)
    for _ in range(sweeps if problem.weight.shape[0] > 1 else 0):
        before = error
        v, h, error = alternate(problem, v, h, steps, outer)
        if before - error < RESTS * before:
            break
    return v, h, error


def leading_directions(problem: Separable, rank: int) -> Array:
    """V (rank, A): the right singular directions of the stacked W_b in the metric mean_b C_bb, best first.

    Its rows are orthonormal in that metric.
    """
    xp = namespace(problem.weight)
    root = problem.metric.root
    stacked = xp.reshape(problem.weight, (-1, problem.weight.shape[2])) @ cast(root, problem.weight.dtype)
    found = _leading(stacked.T @ stacked, rank)
    directions = (root @ cast(found, xp.float64)).T @ problem.metric.inverse
    return cast(directions, problem.weight.dtype)


def _leading(gram: Array, rank: int) -> Array:
    """The first ``rank`` eigenvectors (A, rank) of ``gram`` (A, A), by subspace iteration if they are few."""
    size = gram.shape[0]
    if size < LEADING_FROM or 4 * rank > size:
        return top_eigenvectors(gram, rank)[1]
    qr = namespace(gram).linalg.qr
    drawn = np.random.default_rng(0).standard_normal((size, rank + OVERSAMPLED))
    found = qr(gram @ from_numpy(drawn, gram))[0]
    for _ in range(POWERS):
        found = qr(gram @ found)[0]
    small = found.T @ gram @ found
    return found @ top_eigenvectors((small + small.T) / 2, rank)[1]


def alternate(
    problem: Separable, v: Array, h: Array, steps: int, outer: int = 0
) -> tuple[Array, Array, float]:
    """Both factors once: V by ``steps`` of conjugate gradients from ``v``, then the best H for it."""
    v = _orthonormalise(problem, _inner(problem, v, h, steps))
    h, error = _outer(problem, v, outer)
    return v, h, error


def curve(problem: Separable, top: int, outer_at: Sequence[int] = ()) -> RankErrors:
    """Errors of all ranks up to ``top``, and of all outer ranks beside those ``outer_at``, without sweeps.

    V of rank r is the first r leading directions, so the normal equations of all ranks are leading blocks of
    one matrix G. In the Cholesky factor of [[G, R^T], [R, *]] the lower left block Z = R L^-T holds what each
    feature adds to each output: error_r = 1 - sum of squares of its first r B columns. The features of rank r
    explain outputs of covariance Z_r Z_r^T, of which q outer directions keep the q largest eigenvalues.
    """
    xp = namespace(problem.weight)
    groups = problem.weight.shape[0]
    gram, right = _normal_equations(problem, leading_directions(problem, top), by_rank=True)
    size = gram.shape[0]
    corner = 2 * problem.energy * identity(right.shape[0], gram)
    stacked = xp.concat([xp.concat([gram, right.T], axis=1), xp.concat([right, corner], axis=1)], axis=0)
    added = xp.linalg.cholesky(stacked)[size:, :size]
    gains = xp.sum(xp.reshape(added**2, (added.shape[0], top, groups)), axis=(0, 2)) / problem.energy
    by_outer, explained, done = {}, xp.zeros_like(corner), 0
    for rank in sorted(set(outer_at)):
        part = added[:, done * groups : rank * groups]
        explained, done = explained + part @ part.T, rank
        by_outer[rank] = _missed(xp.flip(xp.linalg.eigvalsh(explained)) / problem.energy)
    return RankErrors(_missed(gains), by_outer)


def _missed(gains: Array) -> Array:
    """1 minus the sum of the first 0, 1, ..., k of ``gains`` (k,), at least 0: (k + 1,)."""
    xp = namespace(gains)
    return xp.maximum(1 - xp.concat([xp.zeros_like(gains[:1]), xp.cumulative_sum(gains)]), 0.0)


def _normal_equations(problem: Separable, v: Array, *, by_rank: bool = False) -> tuple[Array, Array]:
    """Gram matrix (B r, B r) of the features V x_b, ridged, and R (n, B r), both float64.

    Features are ordered by group, or by rank with their groups together.
    """
    xp = namespace(v)
    groups, _, width = problem.weight.shape
    rank = v.shape[0]
    size = groups * rank
    half = xp.reshape(xp.matmul(v, problem.metric.blocks), (groups * groups * rank, width))
    features = xp.reshape(half @ v.T, (groups, groups, rank, rank))
    right = xp.matmul(problem.product, v.T)
    order, columns = ((2, 0, 3, 1), (1, 2, 0)) if by_rank else ((0, 2, 1, 3), (1, 0, 2))
    gram = cast(xp.reshape(xp.permute_dims(features, order), (size, size)), xp.float64)
    gram = add_to_diagonal((gram + gram.T) / 2, _RIDGE * trace(gram) / size)
    return gram, cast(xp.reshape(xp.permute_dims(right, columns), (right.shape[1], size)), xp.float64)


def _outer(problem: Separable, v: Array, outer: int = 0) -> tuple[Array, float]:
    """H (B, n, r) for a fixed V, and the error it leaves.

    With features z = V x_b of Gram matrix G and R = E[y z^T] the regression is R G^-1. The best one of at
    most ``outer`` output directions (Tucker-2) is its projection on the top eigenvectors of R G^-1 R^T, the
    covariance of what it explains (reduced-rank regression; Izenman, J. Multivariate Anal. 5, 1975).
    """
    xp = namespace(v)
    gram, right = _normal_equations(problem, v)
    solution = xp.linalg.solve(gram, right.T).T
    if 0 < outer < right.shape[0]:
        explained = solution @ right.T
        _, u = top_eigenvectors((explained + explained.T) / 2, outer)
        solution = u @ (u.T @ solution)
    error = max(1 - float(xp.sum(solution * right)) / problem.energy, 0.0) if problem.energy > 0 else 0.0
    h = xp.permute_dims(xp.reshape(solution, (right.shape[0], -1, v.shape[0])), (1, 0, 2))
    return cast(h, v.dtype), error


def _inner(problem: Separable, v: Array, h: Array, steps: int) -> Array:
    """V for a fixed H: ``steps`` of preconditioned conjugate gradients from the present V."""
    xp = namespace(v)
    groups = h.shape[0]
    transposed = xp.permute_dims(h, (0, 2, 1))
    gram = xp.matmul(transposed[:, None], h[None])
    own = xp.sum(xp.stack([gram[b, b] for b in range(groups)]), axis=0)
    own = add_to_diagonal(own, _RIDGE * trace(own) / own.shape[0])
    own_inverse = cast(spd_inverse(cast(own, xp.float64)), v.dtype)
    inverse, blocks = cast(problem.metric.inverse, v.dtype), problem.metric.blocks
    rank, width = v.shape
    # For each d, the rows of H_b^T H_d of all b: (r, B r) with row i of block b at (i, b).
    by_row = xp.permute_dims(gram, (1, 2, 0, 3))
    beside = [xp.reshape(by_row[d, ...], (rank * groups, rank)) for d in range(groups)]

    def apply(x: Array) -> Array:
        # sum_bd H_b^T H_d x C_db, by two large products for each d.
        total = xp.zeros_like(x)
        for d in range(groups):
            wide = xp.reshape(beside[d] @ x, (rank, groups * width))
            total = total + wide @ xp.reshape(blocks[d, ...], (groups * width, width))
        return total

    residual = xp.sum(xp.matmul(transposed, problem.product), axis=0) - apply(v)
    step = own_inverse @ residual @ inverse
    fall = float(xp.sum(residual * step))
    for _ in range(steps):
        image = apply(step)
        curvature = float(xp.sum(step * image))
        if curvature <= 0 or fall <= 0:
            break
        v = v + (fall / curvature) * step
        residual = residual - (fall / curvature) * image
        preconditioned = own_inverse @ residual @ inverse
        fall, before = float(xp.sum(residual * preconditioned)), fall
        step = preconditioned + (fall / before) * step
    return v


def _orthonormalise(problem: Separable, v: Array) -> Array:
    """Rows of V orthonormal in the metric mean_b C_bb: the next regression is then well conditioned."""
    xp = namespace(v)
    wide = cast(v, xp.float64)
    gram = wide @ problem.metric.mean @ wide.T
    values, vectors = xp.linalg.eigh((gram + gram.T) / 2)
    values = xp.maximum(values, values[-1] * 1e-12)
    return cast((vectors / xp.sqrt(values)).T @ wide, v.dtype)
