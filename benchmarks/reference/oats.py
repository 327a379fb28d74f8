"""OATS: alternating thresholding of singular values and entries, inputs scaled by their second moment.

Source: Zhang, Papyan, "OATS: Outlier-Aware Pruning Through Sparse and Low Rank Decomposition", ICLR 2025,
arXiv 2409.13652, algorithm 1.
"""

from __future__ import annotations

from benchmarks.reference.linalg import thin_svd
from benchmarks.reference.patterns import Select
from onnx_lrsd.arrays import namespace
from onnx_lrsd.types import Array

ROUNDS = 80


def oats(
    weight: Array, square: Array, rank: int, select: Select, rounds: int = ROUNDS
) -> tuple[Array, Array, Array]:
    """U (n, rank), V (rank, m) and S (n, m) for A = W · (E x²)^½; ``square`` (m,) is E x².

    Each round: U V is the truncated SVD of A − S, S the chosen entries of A − U V (in the paper the
    largest of every row).
    """
    xp = namespace(weight)
    scale = xp.sqrt(xp.maximum(square, 1e-12 * xp.max(square))).astype(xp.float32)
    target = weight.astype(xp.float32) * scale
    sparse = xp.zeros_like(target)
    left, right = target[:, :0], target[:0]
    for _ in range(rounds):
        if rank:
            vectors, values, others = thin_svd(target - sparse)
            left, right = vectors[:, :rank] * values[:rank], others[:rank]
        rest = target - left @ right
        sparse = xp.where(select(xp.abs(rest)), rest, 0)
    return left, right / scale, sparse / scale
