"""HASSLE-free: sparse part and low-rank part in turn, each with the full second moment.

Source: Makni, Behdin, Xu, Ponomareva, Mazumder, "HASSLE-free: A unified Framework for Sparse plus Low-Rank
Matrix Decomposition for LLMs", CPAL 2025, arXiv 2502.00899.
"""

from __future__ import annotations

from benchmarks.reference.alps import prune
from benchmarks.reference.linalg import eigen
from benchmarks.reference.metric import damped, unit_diagonal
from benchmarks.reference.patterns import Select
from benchmarks.reference.whitened_svd import whitened_basis
from onnx_lrsd.arrays import namespace
from onnx_lrsd.types import Array

ROUNDS = 40


def hassle_free(
    weight: Array, second: Array, rank: int, select: Select, rounds: int = ROUNDS, damping: float = 0.01
) -> tuple[Array, Array, Array]:
    """U (n, rank), V (rank, m), S (n, m): ALPS on W − U V, then whitened SVD of W − S, ``rounds`` times."""
    xp = namespace(weight)
    metric, scale = unit_diagonal(damped(second, damping))
    target = weight.astype(xp.float32) * scale
    spectrum = eigen(metric)
    root = spectrum[1] * xp.sqrt(spectrum[0])
    left, right = target[:, :0], target[:0]
    for _ in range(rounds):
        sparse = prune(target - left @ right, metric, spectrum, select)
        left = whitened_basis(target - sparse, root, rank)
        right = left.T @ (target - sparse)
    return left, right / scale, sparse / scale
