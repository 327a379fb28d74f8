"""Truncated SVD of the weight alone: no data.

Source: Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1 (1936).
"""

from __future__ import annotations

from benchmarks.reference.linalg import thin_svd
from onnx_lrsd.types import Array


def truncated_svd(weight: Array, rank: int) -> tuple[Array, Array]:
    """U (n, rank) and V (rank, m) of least ‖W − U V‖."""
    left, values, right = thin_svd(weight)
    return left[:, :rank] * values[:rank], right[:rank]
