"""3BASiL: one ADMM over three blocks, a dense copy of the sparse part, the sparse part, the low-rank part.

Source: Makni, Meng, Mazumder, "3BASiL: An Algorithmic Framework for Sparse plus Low-Rank Compression of
LLMs", NeurIPS 2025, arXiv 2603.01376. The tuning of whole transformer blocks that follows there is left out.
"""

from __future__ import annotations

from benchmarks.reference.linalg import eigen, shifted_inverse, thin_svd
from benchmarks.reference.metric import unit_diagonal
from benchmarks.reference.patterns import Select
from onnx_lrsd.arrays import namespace
from onnx_lrsd.types import Array

START, EVERY, LIMIT, REST = 0.1, 10, 1000, 0.0003
GROWTH = ((0.1, 1.1), (0.005, 1.05), (0.0, 1.02))
"""(share of the support that changed since the last look, factor of the penalty)."""
OVERSAMPLING, POWERS = 10, 2
DAMPING = 0.005
"""Of each diagonal entry, and of their mean."""


def three_basil(
    weight: Array, second: Array, rank: int, select: Select, seed: int = 0
) -> tuple[Array, Array, Array]:
    """U (n, rank), V (rank, m) and S (n, m) with the pattern of ``select``.

    Per iteration, in coordinates where H has a unit diagonal: the dense copy
    B = ((W − L) H − Y + ρ S)(H + ρ I)⁻¹; S the chosen entries of B + Y / ρ; Y += ρ (B − S); L the
    rank fit of W − B in the metric H by a randomised SVD. The penalty ρ grows by how much the
    support still moves; the end is when it moves less than 0.03 %.
    """
    xp = namespace(weight)
    raw = xp.array(second, dtype=xp.float64)
    diagonal = xp.diagonal(raw)
    raw = raw + xp.diag(DAMPING * (diagonal + xp.mean(diagonal)))
    metric, scale = unit_diagonal(raw)
    target = weight.astype(xp.float32) * scale
    values, vectors = eigen(metric)
    root = (vectors * xp.sqrt(values)) @ vectors.T
    rng = xp.random.default_rng(seed)
    penalty = START
    inverse = shifted_inverse(values, vectors, penalty)
    sparse, dual, low = target, xp.zeros_like(target), xp.zeros_like(target)
    left, right = target[:, :0], target[:0]
    before = xp.zeros(target.shape, dtype=bool)
    for step in range(1, LIMIT + 1):
        dense = ((target - low) @ metric - dual + penalty * sparse) @ inverse
        moved = dense + dual / penalty
        support = select(xp.abs(moved))
        sparse = xp.where(support, moved, 0)
        dual = dual + penalty * (dense - sparse)
        if rank:
            rest = target - dense
            left = leading_vectors(rest @ root, rank, rng)
            right = left.T @ rest
            low = left @ right
        if step % EVERY == 0:
            changed, count = int(xp.sum(support != before)), int(xp.sum(support))
            if changed < REST * count:
                break
            before = support
            penalty *= next(factor for share, factor in GROWTH if changed >= share * count)
            inverse = shifted_inverse(values, vectors, penalty)
    return left, right / scale, sparse / scale


def leading_vectors(matrix: Array, rank: int, rng: Array) -> Array:
    """About the ``rank`` leading left singular vectors (n, rank) of ``matrix`` (n, m).

    Source: Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithms 4.4 and 5.1.
    """
    xp = namespace(matrix)
    width = min(rank + OVERSAMPLING, *matrix.shape)
    basis = xp.linalg.qr(matrix @ rng.standard_normal((matrix.shape[1], width), dtype=xp.float32))[0]
    for _ in range(POWERS):
        basis = xp.linalg.qr(matrix @ xp.linalg.qr(matrix.T @ basis)[0])[0]
    inner, _, _ = thin_svd(basis.T @ matrix)
    return basis @ inner[:, :rank]
