"""Activation-whitened SVD: the least output error of any rank-r weight.

Source: Wang, Zheng, Wan, Zhang, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language
Model Compression", ICLR 2025, arXiv 2403.07378.
"""

from __future__ import annotations

from benchmarks.reference.linalg import thin_svd
from benchmarks.reference.metric import damped
from onnx_lrsd.arrays import namespace
from onnx_lrsd.types import Array


def whitened_svd(weight: Array, second: Array, rank: int, damping: float = 0.01) -> tuple[Array, Array]:
    """U (n, rank) and V (rank, m) of least tr((W − U V) H (W − U V)ᵀ), H = C + damping · mean(diag C) · I.

    With H = L Lᵀ the truncated SVD of W L is P Σ Qᵀ, and P Σ Qᵀ L⁻¹ = P (Pᵀ W): nothing is inverted.
    """
    left = whitened_basis(weight, namespace(second).linalg.cholesky(damped(second, damping)), rank)
    return left, left.T @ weight


def whitened_basis(weight: Array, root: Array, rank: int) -> Array:
    """The ``rank`` leading left singular vectors (n, rank) of W ``root``."""
    left, _, _ = thin_svd(weight @ root)
    return left[:, :rank]
