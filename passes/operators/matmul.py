"""MatMul: y = x W^T (axis -1) or y = W x (axis -2), with the Add of a constant behind it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.constants import constant_bias, constant_float64, overridable
from onnx_lrsd.passes.nodes import is_op, label
from onnx_lrsd.passes.operators.operator import ChannelAxes, Matrix, Positions, WeightAxes, WeightLayout
from onnx_lrsd.passes.operators.rows import feature_rows
from onnx_lrsd.passes.writer import Writer, beside_factors
from onnx_lrsd.types import Factors, Layer, Rows, Values

WEIGHT_INPUTS = (0, 1)
HAS_BIAS_INPUT = False
FETCHES_OUTPUTS = False
FUSES_SUM = False
SPARSE_MATH = False
NOT_INT8 = ""


def read(node: gs.Node, weight: Values, side: int, working: WorkingGraph) -> Layer | str:
    """The layer, with the Add of a bias behind it; the weight is a matrix, on either side."""
    if weight.ndim < 2 or prod(weight.shape[:-2]) != 1:
        return f"its weight has {weight.ndim} axes, not two"
    left = side == 0
    activation = node.inputs[1 - side]
    rank = None if activation.shape is None else len(activation.shape)
    if left and rank == 1:
        return "its input has one axis, not rows and columns"
    n, m = weight.shape[-2:] if left else weight.shape[-2:][::-1]
    # The product has the axes of both; what is not known of the activation leaves those of the weight.
    axes = max(rank or 1, weight.ndim if weight.ndim > 2 else 1)
    add = _absorbed_add(node, n, left, axes, working)
    return Layer(
        output=(add or node).outputs[0].name,
        name=label(node),
        op="MatMul",
        input=activation.name,
        weight=node.inputs[side].name,
        shape=weight.shape,
        dtype=weight.dtype.name,
        n=n,
        m=m,
        axis=-2 if left else -1,
    )


def _absorbed_add(node: gs.Node, n: int, left: bool, axes: int, working: WorkingGraph) -> gs.Node | None:
    """The Add of one constant per output that alone reads the product, of ``axes`` at least, or None."""
    output = node.outputs[0]
    if len(output.outputs) != 1 or any(output is o for o in working.outputs):
        return None
    add = output.outputs[0]
    if not is_op(add, "Add"):
        return None
    others = [given for given in add.inputs if given is not output]
    value = constant_bias(others[0]) if len(others) == 1 else None
    if value is None or overridable(others[0], working.overridable):
        return None
    if left:
        return add if value.shape == (n, 1) else None
    # A constant of more axes than the product has would add axes to the result.
    fits = 1 <= value.ndim <= axes and value.shape[-1] == n and value.size == n
    return add if fits else None


def weight_and_bias(layer: Layer, node: gs.Node, last: gs.Node) -> tuple[Matrix, Matrix]:
    """W (n, m) and b (n,), the constant of the Add ``last``."""
    left = layer.axis == -2
    stored = constant_float64(node.inputs[0 if left else 1]).reshape(layer.shape[-2:])
    weight = stored if left else stored.T
    bias = np.zeros(layer.n)
    if last is not node:
        constant = next(given for given in last.inputs if constant_bias(given) is not None)
        bias = np.broadcast_to(constant_float64(constant).reshape(-1), layer.n)
    return np.ascontiguousarray(weight), np.array(bias, dtype=np.float64)


def write_factors(write: Writer, layer: Layer, source: gs.Tensor, factors: Factors) -> gs.Tensor:
    """A chain of MatMuls. S reads its inputs beside the hidden values: Concat keeps one last MatMul.

    Leading axes of 1, which give the product axes that the activation may lack, go to the last weight.
    """
    left = layer.axis == -2
    tensor = source
    if factors.kernels:
        tensor = _product(write, "V", factors.kernels[0], source, left)
    last = factors.kernels[1] if factors.kernels else None
    if factors.sparse is not None:
        picked = write.gather(source, factors.channels, axis=layer.axis, total=layer.m)
        if last is None:
            tensor, last = picked, factors.sparse
        else:
            tensor = write.node("Concat", "concat", [tensor, picked], {"axis": layer.axis})
            last = np.concatenate([last, factors.sparse], axis=1)
    assert last is not None
    last = last.reshape(*_leading(layer), *last.shape)
    part = "U" if factors.kernels else beside_factors(factors)
    tensor = _product(write, part, last, tensor, left)
    return _plus_bias(write, tensor, factors.bias, left)


def _leading(layer: Layer) -> tuple[int, ...]:
    """The axes of 1 in front of the matrix."""
    return layer.shape[:-2]


def _product(write: Writer, name: str, matrix: np.ndarray, source: gs.Tensor, left: bool) -> gs.Tensor:
    constant = write.constant(name, matrix if left else np.swapaxes(matrix, -1, -2))
    return write.node("MatMul", name, [constant, source] if left else [source, constant], {})


def _plus_bias(write: Writer, product: gs.Tensor, bias: Matrix, left: bool) -> gs.Tensor:
    if not np.any(bias):
        return product
    constant = write.constant("bias", bias[:, None] if left else bias)
    return write.node("Add", "bias", [product, constant], {})


def weight_layout(layer: Layer) -> WeightLayout:
    """(n, m) on the left of the activation, (m, n) on its right, behind the leading axes of 1."""
    leading = _leading(layer)
    shape = (*leading, layer.n, layer.m) if leading else None
    order = (*range(len(leading)), len(leading) + 1, len(leading))
    return WeightLayout(shape, None if layer.axis == -2 else order)


def write_dense(write: Writer, layer: Layer, source: gs.Tensor, weight: gs.Tensor, bias: Matrix) -> gs.Tensor:
    """One MatMul, and an Add where there is a bias."""
    left = layer.axis == -2
    product = write.node("MatMul", "matmul", [weight, source] if left else [source, weight], {})
    return _plus_bias(write, product, bias, left)


def count_rows(layer: Layer, shape: tuple[int, ...]) -> int:
    """The vectors of m features in an input of that ``shape``."""
    return prod(shape) // layer.m


def input_rows(layer: Layer, x: Values, positions: Positions, out: Rows) -> None:
    """Put the vectors of features at ``positions`` into ``out``."""
    feature_rows(layer, x, positions, out)


def macs(node: onnx.NodeProto, first: Sequence[int], second: Sequence[int], output: Sequence[int]) -> int:
    """Each output value is a sum over the last axis of the first operand."""
    return prod(output) * first[-1]


def sparse_axis(node: gs.Node) -> int | None:
    """None: TensorRT takes no 2:4 weight of a MatMul."""
    return None


def weight_axes(node: onnx.NodeProto) -> WeightAxes | None:
    """The last two axes, (inputs, outputs); features are the last axis of what it gives."""
    return WeightAxes(outputs=-1, inputs=-2, given=-1)


def channel_axes(node: gs.Node, weight: Values, side: int) -> ChannelAxes | None:
    """Features are the last axis, or the last but one where the weight stands first."""
    if weight.ndim != 2:
        return None
    if side == 1:
        return ChannelAxes(read=-1, inputs=-2, outputs=-1, given=-1, rank=None)
    return ChannelAxes(read=-2, inputs=-1, outputs=-2, given=-2, rank=None)
