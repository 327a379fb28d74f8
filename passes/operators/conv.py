"""A chain of convolutions and a sparse branch in place of one Conv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_graphsurgeon as gs

from onnx_lrsd.passes.writer import Writer
from onnx_lrsd.types import Factors, Layer


def split_conv(write: Writer, layer: Layer, source: gs.Tensor, factors: Factors) -> gs.Tensor:
    """Write the factors and S for the input ``source``; returns the tensor that replaces the layer's.

    The last factor carries the bias, and the sum follows it directly: ONNX Runtime then fuses the
    addition, and an activation behind it, into that convolution.
    """
    bias = write.constant("bias", factors.bias)
    tensor: gs.Tensor | None = None
    names = ("V", "U") if len(factors.kernels) == 2 else tuple(f"F{i}" for i in range(len(factors.kernels)))
    taken = [False] * len(layer.kernel)
    for index, (name, kernel) in enumerate(zip(names, factors.kernels, strict=True)):
        last = index == len(factors.kernels) - 1
        mine = _axes_of(kernel.shape[2:], taken, index == 0, layer)
        inputs = [source if tensor is None else tensor, write.constant(name, kernel)]
        tensor = write.node(
            "Conv", name, inputs + ([bias] if last else []), conv_attributes(layer, kernel.shape[2:], mine)
        )
    if factors.sparse is None:
        assert tensor is not None
        return tensor
    picked = write.gather(source, factors.channels, axis=1, total=layer.channels)
    everything = [True] * len(layer.kernel)
    inputs = [picked, write.constant("S", factors.sparse)] + ([bias] if tensor is None else [])
    branch = write.node("Conv", "S", inputs, conv_attributes(layer, factors.sparse.shape[2:], everything))
    return branch if tensor is None else write.node("Add", "sum", [tensor, branch], {})


def _axes_of(extent: tuple[int, ...], taken: list[bool], first: bool, layer: Layer) -> list[bool]:
    """Which axes' stride, padding and dilation this factor takes: those it spans first.

    An axis of extent 1 in the whole kernel goes to the first factor, which then runs less often.
    """
    mine = []
    for axis, length in enumerate(extent):
        take = not taken[axis] and (length > 1 or (first and layer.kernel[axis] == 1))
        taken[axis] = taken[axis] or take
        mine.append(take)
    return mine


def conv_attributes(layer: Layer, extent: Sequence[int], mine: list[bool]) -> dict[str, Any]:
    """Attributes of a Conv of kernel ``extent`` that takes over the layer's on the axes marked ``mine``."""
    axes = len(layer.kernel)
    attributes: dict[str, Any] = {
        "kernel_shape": list(extent),
        "strides": [layer.strides[i] if mine[i] else 1 for i in range(axes)],
        "dilations": [layer.dilations[i] if mine[i] else 1 for i in range(axes)],
    }
    if layer.auto_pad in ("NOTSET", ""):
        attributes["pads"] = [layer.pads[i] if mine[i % axes] else 0 for i in range(2 * axes)]
    else:
        attributes["auto_pad"] = layer.auto_pad
    return attributes
