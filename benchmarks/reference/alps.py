"""ALPS: pruning by ADMM with the full second moment, then conjugate gradients on the support.

Source: Meng, Behdin, Wang, Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
Large Language Models", NeurIPS 2024, arXiv 2406.07831, algorithms 1 and 2.
"""

from __future__ import annotations

from benchmarks.reference.linalg import eigen, shifted_inverse
from benchmarks.reference.metric import damped, unit_diagonal
from benchmarks.reference.patterns import Select
from onnx_lrsd.arrays import namespace
from onnx_lrsd.types import Array

START, EVERY, LIMIT = 0.1, 3, 300
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""(share of the support that changed since the last look, factor of the penalty)."""


def alps(weight: Array, second: Array, select: Select, damping: float = 0.01) -> Array:
    """S (n, m) with the pattern of ``select`` and little tr((W − S) H (W − S)ᵀ)."""
    xp = namespace(weight)
    metric, scale = unit_diagonal(damped(second, damping))
    target = weight.astype(xp.float32) * scale
    return prune(target, metric, eigen(metric), select) / scale


def prune(target: Array, metric: Array, spectrum: tuple[Array, Array], select: Select) -> Array:
    """S (n, m) for a ``target`` (n, m) in coordinates where ``metric`` (m, m) has a unit diagonal.

    Per iteration: the dense copy B = (T H − V + ρ D)(H + ρ I)⁻¹, D the chosen entries of B + V / ρ,
    V += ρ (B − D). The penalty ρ grows by how much the support still moves; when it rests, the
    entries are refitted.
    """
    xp = namespace(target)
    product = target @ metric
    sparse, dual, penalty = target, xp.zeros_like(target), START
    inverse = shifted_inverse(*spectrum, penalty)
    before = select(xp.abs(target))
    count = int(xp.sum(before))
    for step in range(1, LIMIT + 1):
        dense = (product - dual + penalty * sparse) @ inverse
        moved = dense + dual / penalty
        support = select(xp.abs(moved))
        sparse = xp.where(support, moved, 0)
        dual = dual + penalty * (dense - sparse)
        if step % EVERY == 0:
            changed = int(xp.sum(support != before))
            if not changed:
                break
            before = support
            penalty *= next(factor for share, factor in GROWTH if changed >= share * count)
            inverse = shifted_inverse(*spectrum, penalty)
    return refit(target, metric, sparse, support)


def refit(target: Array, metric: Array, sparse: Array, support: Array, steps: int = 10) -> Array:
    """Conjugate gradients, row by row, for the entries on ``support``; the unit diagonal preconditions."""
    xp = namespace(target)
    residual = xp.where(support, (target - sparse) @ metric, 0)
    direction, size = residual, xp.sum(residual * residual, axis=1, keepdims=True)
    tiny = xp.finfo(target.dtype).tiny
    for _ in range(steps):
        image = xp.where(support, direction @ metric, 0)
        length = size / xp.maximum(xp.sum(direction * image, axis=1, keepdims=True), tiny)
        sparse = sparse + length * direction
        residual = residual - length * image
        size, last = xp.sum(residual * residual, axis=1, keepdims=True), size
        direction = residual + size / xp.maximum(last, tiny) * direction
    return sparse
