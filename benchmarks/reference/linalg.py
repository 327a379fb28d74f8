"""Factorisations: SciPy's for NumPy arrays, as its LAPACK is about twice as fast as NumPy's; CuPy's own."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from onnx_lrsd.arrays import namespace
from onnx_lrsd.types import Array


def thin_svd(matrix: Array) -> tuple[Array, Array, Array]:
    """P (n, k), values (k,) descending and Qᵀ (k, m) of a matrix (n, m), k = min(n, m)."""
    if isinstance(matrix, np.ndarray):
        left, values, right = scipy.linalg.svd(matrix, full_matrices=False, check_finite=False)
    else:
        left, values, right = namespace(matrix).linalg.svd(matrix, full_matrices=False)
    return left, values, right


def eigen(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues (m,) ascending, no less than float32 resolves, and eigenvectors (m, m)."""
    xp = namespace(matrix)
    if isinstance(matrix, np.ndarray):
        values, vectors = scipy.linalg.eigh(matrix, driver="evd", check_finite=False)
    else:
        values, vectors = xp.linalg.eigh(matrix)
    return xp.maximum(values, 1e-7 * values[-1]), vectors


def shifted_inverse(values: Array, vectors: Array, shift: float) -> Array:
    """(H + ``shift`` I)⁻¹ from the eigenvalues and eigenvectors of H."""
    half = vectors / namespace(values).sqrt(values + shift)
    return half @ half.T
