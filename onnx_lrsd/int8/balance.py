"""Channels between two factors are scaled alike before int8 rounds them.

The channels that a first factor gives have variances that fall as the spectrum of the weight does, and one
scale of a tensor in uint8 is set by the largest: the others drown in its rounding, the more of them there are
the more. Nothing but a product stands between two factors, so a channel may be divided by any number and the
weights that read it multiplied by it. The root of its deviation shares what is unlike between the activations
and the weights of the second factor, which have one scale for all channels they read.
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
from onnx_lrsd.passes.products import attribute
from onnx_lrsd.runtime.session import open_session

BALANCE_SAMPLES = 32
"""Samples that deviations are taken from."""
POWER = 0.5
"""Of the deviation, by which a channel is divided (results/int8.md)."""
LEAST_DEVIATION = 1e-3
"""Share of the largest deviation below which channels count alike: what is nearly dead is not blown up."""


class _Link(NamedTuple):
    """Two linear nodes, of which the second alone reads what the first gives."""

    first: onnx.NodeProto
    second: onnx.NodeProto

    @property
    def between(self) -> str:
        """The tensor between them."""
        return str(self.first.output[0])


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
        _multiply(weights[link.first.input[1]], 1 / scale, _axes(link.first)[0])
        for bias in link.first.input[2:]:
            _multiply(weights[bias], 1 / scale, -1)
        _multiply(weights[link.second.input[1]], scale, _axes(link.second)[1])
    return found


def _links(proto: onnx.ModelProto) -> list[_Link]:
    graph = proto.graph
    read = Counter(name for node in graph.node for name in reads(node))
    own = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and read[t.name] == 1}
    own -= {value.name for value in (*graph.input, *graph.output)}
    linear = [node for node in graph.node if _linear(node) and own.issuperset(node.input[1:])]
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    giving = {
        node.output[0]: node
        for node in linear
        if all(
            sizes[bias][-1:] == (sizes[node.input[1]][_axes(node)[0]],) for bias in node.input[2:]
        )  # one that is the same for all channels cannot follow them
    }
    outputs = {value.name for value in graph.output}
    return [
        _Link(giving[node.input[0]], node)
        for node in linear
        if node.input[0] in giving and read[node.input[0]] == 1 and node.input[0] not in outputs
    ]


def _linear(node: onnx.NodeProto) -> bool:
    """Whether the channels of input and output of ``node`` are axes of its weight."""
    if domain_of(node.domain) or node.op_type not in ("Conv", "Gemm", "MatMul") or not all(node.input):
        return False
    if node.op_type == "Conv":
        return attribute(node, "group", 1) == 1
    return attribute(node, "transA") == 0


def _axes(node: onnx.NodeProto) -> tuple[int, int]:
    """The axes of the weight that output and input channels are."""
    if node.op_type == "Conv" or attribute(node, "transB"):
        return 0, 1
    return -1, -2


def _deviations(
    proto: onnx.ModelProto, links: list[_Link], samples: Samples
) -> dict[str, npt.NDArray[np.float64]]:
    """Root mean square of every channel between two factors."""
    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=link.between) for link in links)
    axis = {link.between: 1 if link.first.op_type == "Conv" else -1 for link in links}
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
