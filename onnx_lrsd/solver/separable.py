"""Two factors of which the first is shared by several kernel positions.

Split the inputs of a layer into groups b = 0..B-1 that the first factor treats alike, so that
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

from onnx_lrsd.arrays import cast, identity, namespace, spd_inverse, top_eigenvectors, trace
from onnx_lrsd.types import Array

_RIDGE = 1e-6
"""Relative to the mean diagonal; float32 normal equations stay positive definite with it."""


@dataclass(frozen=True)
class Separable:
    """One layer prepared for fits of any rank.

    ``weight`` (B, n, A); ``metric`` (B, B, A, A), the damped centred second moment C_bd =
    E[x_b x_d^T]; ``product`` (B, n, A), (W C)_b; ``energy`` tr(W C W^T); ``whiten`` (A, A) and
    ``basis`` (A, A): rows of ``basis`` are the right singular directions of the stacked W_b in the
    metric mean_b C_bb, best first, orthonormal in that metric; ``inverse`` (A, A) of that metric.
    """

    weight: Array
    metric: Array
    product: Array
    energy: float
    basis: Array
    inverse: Array


def prepare(weight: Array, metric: Array) -> Separable:
    """Factorise once what all ranks share: ``weight`` (B, n, A), ``metric`` (B, B, A, A)."""
    xp = namespace(weight)
    groups = weight.shape[0]
    product = xp.sum(xp.matmul(weight[:, None], metric), axis=0)
    energy = float(xp.sum(weight * product))
    mean = xp.sum(xp.stack([metric[b, b] for b in range(groups)]), axis=0) / groups
    values, vectors = xp.linalg.eigh(cast(mean, xp.float64))
    values = xp.maximum(values, values[-1] * 1e-10)
    root, inverse_root = vectors * xp.sqrt(values), vectors / xp.sqrt(values)
    stacked = cast(xp.reshape(weight, (-1, weight.shape[2])), xp.float64)
    if stacked.shape[0] < stacked.shape[1]:
        white = stacked @ root
        _, _, right = xp.linalg.svd(white, full_matrices=True)
        basis = right @ inverse_root.T
    else:
        white = stacked @ root
        _, right = top_eigenvectors(white.T @ white, white.shape[1])
        basis = right.T @ inverse_root.T
    dtype = weight.dtype
    return Separable(
        weight, metric, product, energy, cast(basis, dtype), cast(inverse_root @ inverse_root.T, dtype)
    )


def fit(
    problem: Separable, rank: int, sweeps: int = 4, steps: int = 6, outer: int = 0
) -> tuple[Array, Array, float]:
    """V (rank, A), H (B, n, rank) and the error relative to ``energy``.

    With ``outer``, H_b = U G_b for one U (n, outer): Tucker-2.
    """
    v = problem.basis[:rank]
    h, error = _outer(problem, v, outer)
    for _ in range(sweeps if problem.weight.shape[0] > 1 else 0):
        v, h, error = sweep(problem, v, h, steps, outer)
    return v, h, error


def sweep(problem: Separable, v: Array, h: Array, steps: int, outer: int = 0) -> tuple[Array, Array, float]:
    """Both factors once: V by ``steps`` of conjugate gradients from ``v``, then the best H for it."""
    v = _orthonormalise(problem, _inner(problem, v, h, steps))
    h, error = _outer(problem, v, outer)
    return v, h, error


def rank_errors(problem: Separable, top: int) -> Array:
    """Errors (top + 1,) of every rank up to ``top`` before any sweep, from one Cholesky factorisation.

    V of rank r is the first r rows of ``basis``, so that the normal equations of all ranks are leading
    blocks of one matrix G. In the factor of [[G, R^T], [R, *]] the lower left block Z = R L^-T holds
    what each feature adds: error_r = 1 - sum of squares of its first r B columns.
    """
    xp = namespace(problem.weight)
    added = _added(problem, top)
    gains = xp.sum(xp.reshape(added**2, (added.shape[0], top, -1)), axis=(0, 2)) / problem.energy
    return xp.maximum(1 - xp.concat([xp.zeros_like(gains[:1]), xp.cumulative_sum(gains)]), 0.0)


def outer_errors(problem: Separable, ranks: Sequence[int]) -> dict[int, Array]:
    """Errors (n + 1,) of every outer rank beside each of ``ranks`` (ascending), before any sweep.

    The features of rank r explain outputs of covariance Z_r Z_r^T, of which q outer directions keep the
    q largest eigenvalues.
    """
    xp = namespace(problem.weight)
    added, found = _added(problem, ranks[-1]), {}
    explained, done, groups = xp.zeros_like(added @ added.T), 0, problem.weight.shape[0]
    for rank in ranks:
        part = added[:, done * groups : rank * groups]
        explained, done = explained + part @ part.T, rank
        values = xp.flip(xp.linalg.eigvalsh(explained)) / problem.energy
        found[rank] = xp.maximum(1 - xp.concat([xp.zeros_like(values[:1]), xp.cumulative_sum(values)]), 0.0)
    return found


def _added(problem: Separable, top: int) -> Array:
    """Z (n, top B): what each feature of the first ``top`` rows of ``basis`` adds to each output."""
    xp = namespace(problem.weight)
    gram, right = _normal_equations(problem, problem.basis[:top], by_rank=True)
    size = gram.shape[0]
    corner = 2 * problem.energy * identity(right.shape[0], gram)
    stacked = xp.concat([xp.concat([gram, right.T], axis=1), xp.concat([right, corner], axis=1)], axis=0)
    return xp.linalg.cholesky(stacked)[size:, :size]


def _normal_equations(problem: Separable, v: Array, *, by_rank: bool = False) -> tuple[Array, Array]:
    """Gram matrix (B r, B r) of the features V x_b, ridged, and R (n, B r), both float64.

    Features are ordered by group, or by rank with their groups together.
    """
    xp = namespace(v)
    size = problem.metric.shape[0] * v.shape[0]
    features = xp.matmul(xp.matmul(v, problem.metric), v.T)
    right = xp.matmul(problem.product, v.T)
    order, columns = ((2, 0, 3, 1), (1, 2, 0)) if by_rank else ((0, 2, 1, 3), (1, 0, 2))
    gram = cast(xp.reshape(xp.permute_dims(features, order), (size, size)), xp.float64)
    gram = (gram + gram.T) / 2 + _RIDGE * trace(gram) / size * identity(size, gram)
    return gram, cast(xp.reshape(xp.permute_dims(right, columns), (right.shape[1], size)), xp.float64)


def _outer(problem: Separable, v: Array, outer: int = 0) -> tuple[Array, float]:
    """H (B, n, r) for a fixed V, and the error it leaves.

    With features z = V x_b of Gram matrix G and R = E[y z^T] the regression is R G^-1. Of ``outer``
    outputs at most (Tucker-2) the best is its projection on the top eigenvectors of R G^-1 R^T, the
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
    own = own + _RIDGE * trace(own) / own.shape[0] * identity(own.shape[0], own)
    own_inverse = cast(spd_inverse(cast(own, xp.float64)), v.dtype)

    def apply(x: Array) -> Array:
        # sum_bd H_b^T H_d x C_db: the (r, r) products first, then one long product for each b.
        total = xp.zeros_like(x)
        for b in range(groups):
            for d in range(groups):
                total = total + (gram[b, d] @ x) @ problem.metric[d, b]
        return total

    residual = xp.sum(xp.matmul(transposed, problem.product), axis=0) - apply(v)
    step = own_inverse @ residual @ problem.inverse
    fall = float(xp.sum(residual * step))
    for _ in range(steps):
        image = apply(step)
        curvature = float(xp.sum(step * image))
        if curvature <= 0 or fall <= 0:
            break
        v = v + (fall / curvature) * step
        residual = residual - (fall / curvature) * image
        preconditioned = own_inverse @ residual @ problem.inverse
        fall, before = float(xp.sum(residual * preconditioned)), fall
        step = preconditioned + (fall / before) * step
    return v


def _orthonormalise(problem: Separable, v: Array) -> Array:
    """Rows of V orthonormal in the metric mean_b C_bb: the next regression is then well conditioned."""
    xp = namespace(v)
    groups = problem.metric.shape[0]
    gram = sum(v @ problem.metric[b, b] @ v.T for b in range(groups)) / groups
    gram = cast(gram, xp.float64)
    values, vectors = xp.linalg.eigh((gram + gram.T) / 2)
    values = xp.maximum(values, values[-1] * 1e-12)
    return cast((vectors / xp.sqrt(values)).T @ cast(v, xp.float64), v.dtype)
