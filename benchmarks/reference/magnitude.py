"""Magnitude pruning: the largest weights of the layer stay as they are.

Source: Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks",
NIPS 2015, arXiv 1506.02626.
"""

from __future__ import annotations

from benchmarks.reference.patterns import Select
from onnx_lrsd.arrays import namespace
from onnx_lrsd.types import Array


def magnitude(weight: Array, select: Select) -> Array:
    """S (n, m): W where |W| is chosen, else 0."""
    xp = namespace(weight)
    return xp.where(select(xp.abs(weight)), weight, 0)
