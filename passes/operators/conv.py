"""Conv: W is (output channels, input channels x kernel positions), and x a patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.batchnorm import fold, foldable_batchnorm
from onnx_lrsd.passes.constants import constant_float64
from onnx_lrsd.passes.nodes import attribute, label
from onnx_lrsd.passes.operators.bias import bias_of, why_no_bias
from onnx_lrsd.passes.operators.operator import ChannelAxes, Matrix, Positions, WeightAxes, WeightLayout
from onnx_lrsd.passes.operators.rows import pixel_rows
from onnx_lrsd.passes.writer import Writer, beside_factors
from onnx_lrsd.types import Factors, Layer, Rows, Values

WEIGHT_INPUTS = (1,)
HAS_BIAS_INPUT = True
FETCHES_OUTPUTS = True
FUSES_SUM = True
SPARSE_MATH = True
NOT_INT8 = ""

_NAMES: Mapping[int, tuple[str, ...]] = {0: (), 2: ("V", "U"), 3: ("V", "core", "U")}
"""What factors are called, by how many there are: none beside an S that stands alone, three in Tucker-2."""


def read(node: gs.Node, weight: Values, side: int, working: WorkingGraph) -> Layer | str:
    """The layer, with a BatchNormalization behind it; grouped convolutions are declined."""
    if node.attrs.get("group", 1) > 1:
        depthwise = weight.shape[1] == 1
        return "depthwise convolution: left as it is" if depthwise else "grouped convolution: left as it is"
    if (reason := why_no_bias(node, working)) is not None:
        return reason
    kernel = tuple(weight.shape[2:])
    axes = len(kernel)
    norm = foldable_batchnorm(node, working)
    return Layer(
        output=(norm or node).outputs[0].name,
        name=label(node),
        op="Conv",
        input=node.inputs[0].name,
        weight=node.inputs[1].name,
        shape=tuple(weight.shape),
        dtype=weight.dtype.name,
        n=weight.shape[0],
        m=weight.shape[1] * prod(kernel),
        axis=1,
        kernel=kernel,
        strides=tuple(node.attrs.get("strides", (1,) * axes)),
        pads=tuple(node.attrs.get("pads", (0,) * 2 * axes)),
        dilations=tuple(node.attrs.get("dilations", (1,) * axes)),
        auto_pad=node.attrs.get("auto_pad", "NOTSET"),
    )


def weight_and_bias(layer: Layer, node: gs.Node, last: gs.Node) -> tuple[Matrix, Matrix]:
    """W (n, m) and b (n,), with the BatchNormalization ``last`` folded in."""
    weight = constant_float64(node.inputs[1]).reshape(layer.n, layer.m)
    return fold(last, weight, bias_of(node, layer.n))


def write_factors(write: Writer, layer: Layer, source: gs.Tensor, factors: Factors) -> gs.Tensor:
    """Write the factors and S for the input ``source``; returns the tensor that replaces the layer's.

    The last factor carries the bias, and the sum follows it directly: ONNX Runtime then fuses the
    addition, and an activation behind it, into that convolution.
    """
    bias = write.constant("bias", factors.bias)
    tensor: gs.Tensor | None = None
    count = len(factors.kernels)
    taken = [False] * len(layer.kernel)
    for index, (name, kernel) in enumerate(zip(_NAMES[count], factors.kernels, strict=True)):
        last = index == count - 1
        mine = _axes_of(kernel.shape[2:], taken, index == 0, layer)
        inputs = [source if tensor is None else tensor, write.constant(name, kernel)]
        tensor = write.node(
            "Conv", name, inputs + ([bias] if last else []), _attributes(layer, kernel.shape[2:], mine)
        )
    if factors.sparse is None:
        assert tensor is not None
        return tensor
    picked = write.gather(source, factors.channels, axis=1, total=layer.channels)
    everything = [True] * len(layer.kernel)
    part = beside_factors(factors)
    inputs = [picked, write.constant(part, factors.sparse)] + ([bias] if tensor is None else [])
    branch = write.node("Conv", part, inputs, _attributes(layer, factors.sparse.shape[2:], everything))
    return branch if tensor is None else write.node("Add", "sum", [tensor, branch], {})


def _axes_of(extent: tuple[int, ...], taken: list[bool], first: bool, layer: Layer) -> list[bool]:
    """Which axes' stride, padding and dilation this factor takes over; these are marked in ``taken``.

    It is the first factor that spans the axis. An axis of extent 1 in the whole kernel goes to the first
    factor of all, so the others run less often.
    """
    mine = []
    for axis, length in enumerate(extent):
        take = not taken[axis] and (length > 1 or (first and layer.kernel[axis] == 1))
        taken[axis] = taken[axis] or take
        mine.append(take)
    return mine


def _attributes(layer: Layer, extent: Sequence[int], mine: list[bool]) -> dict[str, Any]:
    """Attributes of a Conv of kernel ``extent`` that takes over the layer's on the axes marked ``mine``."""
    axes = len(layer.kernel)
    attributes: dict[str, Any] = {
        "kernel_shape": list(extent),
        "strides": [layer.strides[i] if mine[i] else 1 for i in range(axes)],
        "dilations": [layer.dilations[i] if mine[i] else 1 for i in range(axes)],
    }
    if layer.auto_pad in ("NOTSET", ""):
        both_ends = zip(layer.pads, [*mine, *mine], strict=True)
        attributes["pads"] = [pad if takes else 0 for pad, takes in both_ends]
    else:
        attributes["auto_pad"] = layer.auto_pad
    return attributes


def weight_layout(layer: Layer) -> WeightLayout:
    """The shape that the node reads."""
    return WeightLayout(shape=layer.shape)


def write_dense(write: Writer, layer: Layer, source: gs.Tensor, weight: gs.Tensor, bias: Matrix) -> gs.Tensor:
    """One Conv, as it was."""
    attributes = _attributes(layer, layer.kernel, [True] * len(layer.kernel))
    return write.node("Conv", "conv", [source, weight, write.constant("bias", bias)], attributes)


def pads_of(layer: Layer, size: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Begin and end padding of every spatial axis for an input of that spatial ``size``."""
    axes = len(layer.kernel)
    if layer.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for length, kernel, stride, dilation in zip(
            size, layer.kernel, layer.strides, layer.dilations, strict=True
        ):
            outputs = ceil(length / stride)
            total = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - length, 0)
            small = total // 2
            pads.append((small, total - small) if layer.auto_pad == "SAME_UPPER" else (total - small, small))
        return tuple(pads)
    if layer.auto_pad == "VALID" or not layer.pads:
        return ((0, 0),) * axes
    return tuple(zip(layer.pads[:axes], layer.pads[axes:], strict=True))


def output_size(layer: Layer, size: tuple[int, ...]) -> tuple[int, ...]:
    """Spatial size of a Conv's output for an input of that spatial ``size``."""
    return tuple(
        (length + sum(pads) - (kernel - 1) * dilation - 1) // stride + 1
        for length, kernel, stride, dilation, pads in zip(
            size, layer.kernel, layer.strides, layer.dilations, pads_of(layer, size), strict=True
        )
    )


def count_rows(layer: Layer, shape: tuple[int, ...]) -> int:
    """The positions of the output of an input of that ``shape``."""
    return shape[0] * prod(output_size(layer, shape[2:]))


def input_rows(layer: Layer, x: Values, positions: Positions, out: Rows) -> None:
    """Put the patches that the output ``positions`` (batch, *output size) read into ``out``.

    Padding reads as zero.
    """
    size, kernel = x.shape[2:], layer.kernel
    if output_size(layer, size) == size and prod(kernel) == 1:
        out[:] = pixel_rows(x, positions)
        return
    where = np.unravel_index(positions, (x.shape[0], *output_size(layer, size)))
    flat = np.zeros((len(positions),) + (1,) * len(kernel), dtype=np.int64)
    inside = np.ones((len(positions), *kernel), dtype=bool)
    for axis, (begin, _) in enumerate(pads_of(layer, size)):
        offsets = np.arange(kernel[axis]) * layer.dilations[axis] - begin
        at = (where[axis + 1] * layer.strides[axis])[:, None] + offsets
        ok = (at >= 0) & (at < size[axis])
        shape = [len(positions)] + [1] * len(kernel)
        shape[axis + 1] = kernel[axis]
        inside &= ok.reshape(shape)
        flat = flat * size[axis] + np.where(ok, at, 0).reshape(shape)
    taps = prod(kernel)
    flat, inside = flat.reshape(-1, taps), inside.reshape(-1, 1, taps)
    patches = out.reshape(len(positions), layer.channels, taps)
    # Image by image and channel by channel: each channel's map is read while it is in the cache.
    for image, start, stop in _runs(where[0]):
        picked = x[image].reshape(layer.channels, -1).take(flat[start:stop].ravel(), axis=1)
        patches[start:stop] = picked.reshape(layer.channels, -1, taps).transpose(1, 0, 2)
    border = np.flatnonzero(~inside.all(axis=(1, 2)))
    patches[border] *= inside[border]


def _runs(batch: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """(value, start, stop) of each run of equal values in an ascending array."""
    values, starts = np.unique(batch, return_index=True)
    stops = [*starts[1:].tolist(), len(batch)]
    return list(zip(values.tolist(), starts.tolist(), stops, strict=True))


def macs(node: onnx.NodeProto, first: Sequence[int], second: Sequence[int], output: Sequence[int]) -> int:
    """Each output value takes one weight for each input channel of its group and kernel position."""
    return prod(output) * prod(second[1:])


def sparse_axis(node: gs.Node) -> int | None:
    """Axis 1 of a convolution without groups."""
    return 1 if node.attrs.get("group", 1) == 1 else None


def weight_axes(node: onnx.NodeProto) -> WeightAxes | None:
    """(output channels, input channels, *kernel); channels are the second axis of an image."""
    return WeightAxes(outputs=0, inputs=1, given=1) if attribute(node, "group", 1) == 1 else None


def channel_axes(node: gs.Node, weight: Values, side: int) -> ChannelAxes | None:
    """Channels are the second axis."""
    if node.attrs.get("group", 1) != 1:
        return None
    axes = weight.ndim
    return ChannelAxes(read=1 - axes, inputs=1 - axes, outputs=-axes, given=1 - axes, rank=axes)
