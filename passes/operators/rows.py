"""Rows out of an activation where a row is one vector of features, not a patch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnx_lrsd.passes.operators.operator import Positions
from onnx_lrsd.types import Layer, Rows, Values


def feature_rows(layer: Layer, x: Values, positions: Positions, out: Rows) -> None:
    """Put the vectors along the feature axis of ``x`` at ``positions`` into ``out``."""
    features = np.moveaxis(x, layer.axis, -1).reshape(-1, layer.m)
    out[:] = features[positions]


def pixel_rows(x: npt.NDArray[np.floating], positions: Positions) -> npt.NDArray[np.floating]:
    """All channels of ``x`` (batch, channels, *size) at ``positions``, counted batch first: (k, channels)."""
    pixels = x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)
    return pixels[np.divmod(positions, pixels.shape[1])]
