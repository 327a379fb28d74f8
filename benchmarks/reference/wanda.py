"""Wanda: weights times the norm of their input, compared within each output.

Source: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models",
ICLR 2024, arXiv 2306.11695.
"""

from __future__ import annotations

from benchmarks.reference.patterns import Select
from onnx_lrsd.arrays import namespace
from onnx_lrsd.types import Array


def wanda(weight: Array, square: Array, select: Select) -> Array:
    """S (n, m): W where |W_ij| (E x_j²)^½ is chosen, else 0; ``square`` (m,) is E x²."""
    xp = namespace(weight)
    return xp.where(select(xp.abs(weight) * xp.sqrt(square)), weight, 0)
