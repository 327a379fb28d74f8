"""Scale the channels between two factors alike, before int8 rounds them.

The variances of the channels that a first factor gives fall as the spectrum of the weight does. A uint8
tensor has one scale, which the largest channel sets: the smaller a channel, the more of it is lost in
rounding. As nothing stands between the two factors, a channel may be divided by any number if the weights
that read it are multiplied by it. These have one scale for all channels, too, so each channel is divided by
the root of its deviation: half of the differences stays in the activations, half goes to the weights.
Source: Nagel et al., Data-free quantization through weight equalization and bias correction, ICCV 2019,
who scale by the ranges of weights alone.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from onnx_lrsd.data.samples import Samples, batch_to_run
from onnx_lrsd.graph.subgraph import reads
from onnx_lrsd.passes.nodes import domain_of
from onnx_lrsd.passes.operators import OPERATORS
from onnx_lrsd.passes.operators.operator import WeightAxes
from onnx_lrsd.runtime.session import open_session

BALANCE_SAMPLES = 32
"""Samples that deviations are taken from."""
POWER = 0.5
"""A channel is divided by this power of its deviation (results/int8.md)."""
LEAST_DEVIATION = 1e-3
"""Least deviation that counts, as a share of the largest: a channel that hardly varies is not blown up."""


class _Linear(NamedTuple):
    """A node with a weight, and the axes along which channels lie."""

    node: onnx.NodeProto
    axes: WeightAxes


class _Link(NamedTuple):
    """Two linear nodes, of which the second alone reads what the first gives."""

    first: _Linear
    second: _Linear

    @property
    def between(self) -> str:
        """The tensor between them."""
        return str(self.first.node.output[0])


def balanced(proto: onnx.ModelProto, samples: Samples) -> onnx.ModelProto:
    """``proto``, which holds its weights, with the channels between factors scaled alike; it is not changed.

    The outputs are the same but for rounding in float32.
    """
    links = _links(proto)
    if not links:
        return proto
    deviations = _deviations(proto, links, samples.some(BALANCE_SAMPLES))
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    weights = {tensor.name: tensor for tensor in found.graph.initializer}
    for link in links:
        deviation = deviations[link.between]
        scale = np.maximum(deviation, LEAST_DEVIATION * deviation.max()) ** POWER
        if not np.isfinite(scale).all() or scale.min() <= 0:
            continue
        scale /= np.exp(np.log(scale).mean())
        first, second = link
        _multiply(weights[first.node.input[1]], 1 / scale, first.axes.outputs)
        for bias in first.node.input[2:]:
            _multiply(weights[bias], 1 / scale, -1)
        _multiply(weights[second.node.input[1]], scale, second.axes.inputs)
    return found


def _links(proto: onnx.ModelProto) -> list[_Link]:
    """Every two nodes with weights of their own, of which one alone reads the other."""
    graph = proto.graph
    read = Counter(name for node in graph.node for name in reads(node))
    own = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and read[t.name] == 1}
    own -= {value.name for value in (*graph.input, *graph.output)}
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    linear, giving = list[_Linear](), dict[str, _Linear]()
    for node in graph.node:
        axes = _weight_axes(node)
        if axes is None or not own.issuperset(node.input[1:]):
            continue
        linear.append(_Linear(node, axes))
        channels = sizes[node.input[1]][axes.outputs]
        # A bias that is the same for all channels cannot follow them.
        if all(sizes[bias][-1:] == (channels,) for bias in node.input[2:]):
            giving[node.output[0]] = linear[-1]
    outputs = {value.name for value in graph.output}
    links = [_Link(giving[two.node.input[0]], two) for two in linear if two.node.input[0] in giving]
    return [link for link in links if read[link.between] == 1 and link.between not in outputs]


def _weight_axes(node: onnx.NodeProto) -> WeightAxes | None:
    """Where the channels of a node that int8 runs lie; None for any other, and where they are no axes."""
    operator = OPERATORS.get((domain_of(node.domain), node.op_type))
    if operator is None or operator.NOT_INT8 or not all(node.input):
        return None
    return operator.weight_axes(node)


def _deviations(
    proto: onnx.ModelProto, links: list[_Link], samples: Samples
) -> dict[str, npt.NDArray[np.float64]]:
    """Root mean square of every channel (channels,) between two factors, by the tensor that holds them."""
    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=link.between) for link in links)
    axis = {link.between: link.first.axes.given for link in links}
    session = open_session(probe)
    squares, counts = dict[str, npt.NDArray[np.float64]](), Counter[str]()
    for feed in samples.batches(batch_to_run(samples)):
        for name, value in session.run(feed).items():
            rows = np.moveaxis(value, axis[name], 0).reshape(value.shape[axis[name]], -1).astype(np.float64)
            squares[name] = squares.get(name, 0.0) + np.square(rows).sum(axis=1)
            counts[name] += rows.shape[1]
    return {name: np.sqrt(total / counts[name]) for name, total in squares.items()}


def _multiply(tensor: onnx.TensorProto, scale: npt.NDArray[np.float64], axis: int) -> None:
    values = numpy_helper.to_array(tensor)
    shape = [1] * values.ndim
    shape[axis] = -1
    product = (values * scale.reshape(shape)).astype(values.dtype)
    tensor.CopyFrom(numpy_helper.from_array(product, tensor.name))
