"""ConvTranspose: each input position adds W x to the outputs that its kernel reaches.

W is (output channels x kernel positions, input channels), and x the channels of one input position, so
that the layer is a matrix product at every input position, followed by a sum of what overlaps. Where
strides equal the kernel nothing overlaps: outputs are the rows of all products, and an error in the
metric of the inputs is the error of the outputs. Elsewhere it leaves out how errors of neighbouring
positions add up, and is an approximation; what the model as a whole loses is measured in any case.

The bias belongs to an output channel, so the rows of a channel share one. An output gets the sum of
``taps / prod(strides)`` rows on average, borders aside, so each row carries that part of the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
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
FETCHES_OUTPUTS = False
FUSES_SUM = False
SPARSE_MATH = False
NOT_INT8 = "ONNX Runtime has no int8 kernel for transposed convolutions"


def read(node: gs.Node, weight: Values, side: int, working: WorkingGraph) -> Layer | str:
    """The layer, with a BatchNormalization behind it; grouped ones are declined."""
    if node.attrs.get("group", 1) > 1:
        return "grouped transposed convolution: left as it is"
    if (reason := why_no_bias(node, working)) is not None:
        return reason
    channels, outputs, *kernel = weight.shape
    norm = foldable_batchnorm(node, working)
    return Layer(
        output=(norm or node).outputs[0].name,
        name=label(node),
        op="ConvTranspose",
        input=node.inputs[0].name,
        weight=node.inputs[1].name,
        shape=tuple(weight.shape),
        dtype=weight.dtype.name,
        n=outputs * prod(kernel),
        m=channels,
        axis=1,
        rows_per_bias=prod(kernel),
        strides=tuple(node.attrs.get("strides", ())),
        pads=tuple(node.attrs.get("pads", ())),
        dilations=tuple(node.attrs.get("dilations", ())),
        output_padding=tuple(node.attrs.get("output_padding", ())),
        output_shape=tuple(node.attrs.get("output_shape", ())),
        auto_pad=node.attrs.get("auto_pad", "NOTSET"),
    )


def weight_and_bias(layer: Layer, node: gs.Node, last: gs.Node) -> tuple[Matrix, Matrix]:
    """W (n, m) and each row's part of the bias (n,), with the BatchNormalization ``last`` folded in."""
    stored = constant_float64(node.inputs[1])
    by_channel = np.moveaxis(stored, 0, -1).reshape(layer.output_channels, -1)
    by_channel, bias = fold(last, by_channel, bias_of(node, layer.output_channels))
    return by_channel.reshape(layer.n, layer.m), np.repeat(bias / _rows_of_output(layer), layer.rows_per_bias)


def _rows_of_output(layer: Layer) -> float:
    """How many rows of W add up to one output, on average."""
    return layer.rows_per_bias / prod(layer.strides)


def write_factors(write: Writer, layer: Layer, source: gs.Tensor, factors: Factors) -> gs.Tensor:
    """A convolution of one position to the ranks, and the transposed one from there; beside it that of S."""
    bias = _bias(write, layer, factors.bias)
    tensor: gs.Tensor | None = None
    if factors.kernels:
        first, last = factors.kernels
        point = (1,) * (len(layer.shape) - 2)
        reduce = write.constant("V", first.reshape(*first.shape, *point))
        hidden = write.node("Conv", "V", [source, reduce], {"kernel_shape": list(point)})
        tensor = _transposed(write, "U", layer, hidden, last, [bias])
    if factors.sparse is None:
        assert tensor is not None
        return tensor
    picked = write.gather(source, factors.channels, axis=1, total=layer.m)
    branch = _transposed(
        write, beside_factors(factors), layer, picked, factors.sparse, [bias] if tensor is None else []
    )
    return branch if tensor is None else write.node("Add", "sum", [tensor, branch], {})


def _transposed(
    write: Writer, part: str, layer: Layer, source: gs.Tensor, matrix: Matrix, bias: list[gs.Tensor]
) -> gs.Tensor:
    """The layer's own operator with the weight ``matrix`` (n, channels of ``source``)."""
    stored = np.moveaxis(matrix.reshape(layer.output_channels, *layer.shape[2:], -1), -1, 0)
    return write.node(
        "ConvTranspose", part, [source, write.constant(part, stored), *bias], _attributes(layer)
    )


def _bias(write: Writer, layer: Layer, rows: Matrix) -> gs.Tensor:
    """The bias of each output channel, from the part that each of its rows carries."""
    return write.constant("bias", rows[:: layer.rows_per_bias] * _rows_of_output(layer))


def _attributes(layer: Layer) -> dict[str, Any]:
    """The attributes that the node was written with."""
    attributes: dict[str, Any] = {"kernel_shape": list(layer.shape[2:])}
    for name in ("strides", "pads", "dilations", "output_padding", "output_shape"):
        values = getattr(layer, name)
        if values:
            attributes[name] = list(values)
    if layer.auto_pad not in ("NOTSET", ""):
        attributes["auto_pad"] = layer.auto_pad
    return attributes


def weight_layout(layer: Layer) -> WeightLayout:
    """(output channels, kernel, input channels), input channels then moved to the front."""
    axes = len(layer.shape)
    return WeightLayout((*layer.shape[1:], layer.shape[0]), (axes - 1, *range(axes - 1)))


def write_dense(write: Writer, layer: Layer, source: gs.Tensor, weight: gs.Tensor, bias: Matrix) -> gs.Tensor:
    """One ConvTranspose, as it was."""
    inputs = [source, weight, _bias(write, layer, bias)]
    return write.node("ConvTranspose", "conv_transpose", inputs, _attributes(layer))


def count_rows(layer: Layer, shape: tuple[int, ...]) -> int:
    """The positions of the input."""
    return shape[0] * prod(shape[2:])


def input_rows(layer: Layer, x: Values, positions: Positions, out: Rows) -> None:
    """Put the channels of ``x`` at ``positions`` (batch, *input size) into ``out``."""
    out[:] = pixel_rows(x, positions)


def macs(node: onnx.NodeProto, first: Sequence[int], second: Sequence[int], output: Sequence[int]) -> int:
    """Each input value meets one weight for each output channel of its group and kernel position."""
    return prod(first) * prod(second[1:])


def sparse_axis(node: gs.Node) -> int | None:
    """None: TensorRT takes no 2:4 weight of a transposed convolution."""
    return None


def weight_axes(node: onnx.NodeProto) -> WeightAxes | None:
    """(input channels, output channels, *kernel); channels are the second axis of an image."""
    return WeightAxes(outputs=1, inputs=0, given=1) if attribute(node, "group", 1) == 1 else None


def channel_axes(node: gs.Node, weight: Values, side: int) -> ChannelAxes | None:
    """Channels are the second axis."""
    if node.attrs.get("group", 1) != 1:
        return None
    axes = weight.ndim
    return ChannelAxes(read=1 - axes, inputs=-axes, outputs=1 - axes, given=1 - axes, rank=axes)
