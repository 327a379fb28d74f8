"""Layers of no model, for what knows arrays and no graph."""

from __future__ import annotations

from math import prod
from typing import Any

from onnx_lrsd.types import Layer


def linear(n: int, m: int, name: str = "y", **others: Any) -> Layer:
    """A MatMul of weight (m, n); ``others`` are fields of ``Layer`` that are not as usual."""
    usual = {"op": "MatMul", "input": "x", "weight": "w", "shape": (m, n), "dtype": "float32"}
    return Layer(**{"output": name, "name": name, "n": n, "m": m, **usual, **others})


def conv(n: int, channels: int, kernel: tuple[int, ...] = (3, 3), **others: Any) -> Layer:
    """A Conv of stride 1 without padding; ``others`` are fields of ``Layer`` that are not as usual."""
    ones = (1,) * len(kernel)
    usual = {"op": "Conv", "axis": 1, "kernel": kernel, "shape": (n, channels, *kernel)}
    usual |= {"strides": ones, "dilations": ones, "pads": (0,) * 2 * len(kernel)}
    return linear(n, channels * prod(kernel), **{**usual, **others})
