"""SparseGPT: columns from left to right, each pruned weight made good by all that follow in its row.

Source: Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
ICML 2023, arXiv 2301.00774, algorithm 1.
"""

from __future__ import annotations

from benchmarks.reference.metric import damped
from benchmarks.reference.patterns import Select
from onnx_lrsd.arrays import namespace
from onnx_lrsd.types import Array

BLOCK = 128


def sparsegpt(
    weight: Array, second: Array, select: Select, choose: int = BLOCK, damping: float = 0.01
) -> Array:
    """S (n, m) with the pattern of ``select``, which sees ``choose`` columns at a time.

    ``choose`` divides the block of 128 columns: 128 for unstructured zeros, 4 for 2:4. With
    H⁻¹ = Rᵀ R, R upper triangular, row i of R holds what the update of column i needs.
    """
    xp = namespace(weight)
    root = _inverse_root(damped(second, damping)).astype(xp.float32)
    pivots = xp.diagonal(root)
    left, result = xp.array(weight, dtype=xp.float32), xp.zeros(weight.shape, dtype=xp.float32)
    inputs = weight.shape[1]
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        block, errors = left[:, start:stop].copy(), xp.empty((weight.shape[0], stop - start), xp.float32)
        within = root[start:stop, start:stop]
        for i in range(stop - start):
            if i % choose == 0:
                part = slice(i, min(i + choose, stop - start))
                kept = select((block[:, part] / pivots[start:stop][part]) ** 2)
            result[:, start + i] = xp.where(kept[:, i % choose], block[:, i], 0)
            errors[:, i] = (block[:, i] - result[:, start + i]) / within[i, i]
            block[:, i + 1 :] -= errors[:, i, None] * within[i, i + 1 :]
        left[:, stop:] -= errors @ root[start:stop, stop:]
    return result


def _inverse_root(metric: Array) -> Array:
    """Upper triangular R with Rᵀ R = H⁻¹: the inverse of the factor of H = U Uᵀ, U upper triangular."""
    xp = namespace(metric)
    return xp.linalg.inv(xp.linalg.cholesky(metric[::-1, ::-1])[::-1, ::-1])
