"""Gemm: y = alpha A B + beta C, the weight B (m, n), or (n, m) with transB, and the activation A."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.batchnorm import fold, foldable_batchnorm
from onnx_lrsd.passes.constants import constant_float64
from onnx_lrsd.passes.nodes import attribute, label
from onnx_lrsd.passes.operators.bias import bias_of, why_no_bias
from onnx_lrsd.passes.operators.operator import ChannelAxes, Matrix, Positions, WeightAxes, WeightLayout
from onnx_lrsd.passes.operators.rows import feature_rows
from onnx_lrsd.passes.writer import Writer, beside_factors
from onnx_lrsd.types import Factors, Layer, Rows, Values

WEIGHT_INPUTS = (1,)
HAS_BIAS_INPUT = True
FETCHES_OUTPUTS = False
FUSES_SUM = False
SPARSE_MATH = True
NOT_INT8 = ""


def read(node: gs.Node, weight: Values, side: int, working: WorkingGraph) -> Layer | str:
    """The layer, with a BatchNormalization behind it; its C must be a bias."""
    if weight.ndim != 2:
        return "its weight is no matrix"
    n, m = weight.shape if node.attrs.get("transB", 0) else weight.shape[::-1]
    norm = foldable_batchnorm(node, working)
    if (reason := why_no_bias(node, working)) is not None:
        return reason
    # C may also vary along the rows; that is no bias of the layer.
    shape = bias_of(node, n).shape
    if prod(shape) not in (1, n) or (len(shape) == 2 and shape[0] != 1 and n != 1):
        return "its C is not one value for each output"
    return Layer(
        output=(norm or node).outputs[0].name,
        name=label(node),
        op="Gemm",
        input=node.inputs[0].name,
        weight=node.inputs[1].name,
        shape=weight.shape,
        dtype=weight.dtype.name,
        n=n,
        m=m,
        axis=0 if node.attrs.get("transA", 0) else -1,
    )


def weight_and_bias(layer: Layer, node: gs.Node, last: gs.Node) -> tuple[Matrix, Matrix]:
    """alpha B as (n, m) and beta C as (n,), with the BatchNormalization ``last`` folded in."""
    stored = constant_float64(node.inputs[1])
    weight = node.attrs.get("alpha", 1.0) * (stored if node.attrs.get("transB", 0) else stored.T)
    given = bias_of(node, layer.n).reshape(-1)
    bias = node.attrs.get("beta", 1.0) * np.broadcast_to(given, layer.n)
    return fold(last, weight, bias)


def write_factors(write: Writer, layer: Layer, source: gs.Tensor, factors: Factors) -> gs.Tensor:
    """A chain of Gemms; the sparse branch is the C of the last one, so no Add is left over."""
    transposed = layer.axis == 0
    addend = write.constant("bias", factors.bias)
    if factors.sparse is not None:
        picked = write.gather(source, factors.channels, axis=0 if transposed else 1, total=layer.m)
        part = beside_factors(factors)
        inputs = [picked, write.constant(part, factors.sparse), addend]
        addend = write.node("Gemm", part, inputs, {"transA": int(transposed), "transB": 1})
        if not factors.kernels:
            return addend
    first, last = factors.kernels
    hidden = write.node(
        "Gemm",
        "V",
        [source, write.constant("V", first)],
        {"transA": int(transposed), "transB": 1},
        optional_c=True,
    )
    return write.node("Gemm", "U", [hidden, write.constant("U", last), addend], {"transB": 1})


def weight_layout(layer: Layer) -> WeightLayout:
    """(n, m): the node is written with transB."""
    return WeightLayout()


def write_dense(write: Writer, layer: Layer, source: gs.Tensor, weight: gs.Tensor, bias: Matrix) -> gs.Tensor:
    """One Gemm."""
    attributes = {"transA": int(layer.axis == 0), "transB": 1}
    return write.node("Gemm", "gemm", [source, weight, write.constant("bias", bias)], attributes)


def count_rows(layer: Layer, shape: tuple[int, ...]) -> int:
    """The vectors of m features in an input of that ``shape``."""
    return prod(shape) // layer.m


def input_rows(layer: Layer, x: Values, positions: Positions, out: Rows) -> None:
    """Put the rows of A at ``positions`` into ``out``, its columns with transA."""
    feature_rows(layer, x, positions, out)


def macs(node: onnx.NodeProto, first: Sequence[int], second: Sequence[int], output: Sequence[int]) -> int:
    """Each output value takes one weight for each column of A."""
    return prod(output) * first[0 if attribute(node, "transA") else 1]


def sparse_axis(node: gs.Node) -> int | None:
    """The rows of B, or its columns with transB."""
    return 1 if node.attrs.get("transB", 0) else 0


def weight_axes(node: onnx.NodeProto) -> WeightAxes | None:
    """B is (inputs, outputs), or (outputs, inputs) with transB; None with transA, which reads columns."""
    if attribute(node, "transA"):
        return None
    outputs, inputs = (0, 1) if attribute(node, "transB") else (-1, -2)
    return WeightAxes(outputs=outputs, inputs=inputs, given=-1)


def channel_axes(node: gs.Node, weight: Values, side: int) -> ChannelAxes | None:
    """Features are the last axis of A, the first with transA, and the last of y."""
    if weight.ndim != 2:
        return None
    inputs, outputs = (-1, -2) if node.attrs.get("transB", 0) else (-2, -1)
    read = -2 if node.attrs.get("transA", 0) else -1
    return ChannelAxes(read=read, inputs=inputs, outputs=outputs, given=-1, rank=2)
