"""The damped second moment, and coordinates in which its diagonal is one."""

from __future__ import annotations

from onnx_lrsd.arrays import namespace
from onnx_lrsd.types import Array


def damped(second: Array, relative: float) -> Array:
    """C + ``relative`` · mean(diag C) · I, float64 (m, m)."""
    xp = namespace(second)
    result = xp.array(second, dtype=xp.float64)
    diagonal = xp.arange(result.shape[0])
    result[diagonal, diagonal] += relative * xp.mean(result[diagonal, diagonal])
    return result


def unit_diagonal(metric: Array) -> tuple[Array, Array]:
    """H / (d dᵀ) in float32, and d = diag(H)^½ (m,): a weight W becomes W · d."""
    xp = namespace(metric)
    scale = xp.sqrt(xp.diagonal(metric))
    return (metric / scale / scale[:, None]).astype(xp.float32), scale.astype(xp.float32)
