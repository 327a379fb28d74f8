"""What a model costs: multiply-accumulates from concrete shapes, and parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np
import onnx

from onnx_lrsd.passes.nodes import domain_of
from onnx_lrsd.passes.operators import OPERATORS, conv, matmul
from onnx_lrsd.passes.operators.operator import Operator

Shapes = Mapping[str, tuple[int, ...]]

QUANTISED: Mapping[str, Operator] = {
    "QLinearConv": conv,
    "ConvInteger": conv,
    "QLinearMatMul": matmul,
    "MatMulInteger": matmul,
}
"""Operators with integers in place of floats, and those that they compute the same as."""
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
WEIGHTS = ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int4", "uint4", "int2", "uint2")


def compute_tensors(proto: onnx.ModelProto) -> list[str]:
    """Tensors of the main graph whose shapes ``macs`` needs."""
    names: list[str] = []
    folded = _folded(proto)
    for node in proto.graph.node:
        if _is_counted(node) and not folded.issuperset(node.output):
            names.extend(name for name in (*_operands(node), node.output[0]) if name)
    return list(dict.fromkeys(names))


def macs(proto: onnx.ModelProto, shapes: Shapes) -> dict[str, int]:
    """First output of every counted node of the main graph -> its multiply-accumulates.

    Convolutions, products (of activations too), Gemm and recurrent operators are counted, the
    bodies of control flow and functions are not: how often they run is not known. Nor is what reads
    constants alone, which a runtime computes once.
    """
    folded = _folded(proto)
    return {
        node.output[0]: _macs(node, shapes)
        for node in proto.graph.node
        if _is_counted(node)
        and not folded.issuperset(node.output)
        and all(name in shapes for name in (*_operands(node), node.output[0]) if name)
    }


def parameters(proto: onnx.ModelProto) -> int:
    """Elements of all stored tensors of a weight's type: floating point and 8 bits or fewer."""
    total = 0
    for tensor in _stored(proto):
        if onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name in WEIGHTS:
            total += prod(tensor.dims)
    return total


def _folded(proto: onnx.ModelProto) -> set[str]:
    """Tensors of the main graph that are computed from constants alone, and these."""
    listed = {value.name for value in proto.graph.input} if proto.ir_version >= 4 else set()
    known = {tensor.name for tensor in proto.graph.initializer} - listed | {""}
    for node in proto.graph.node:
        # Without inputs a node is a constant or draws at random, which no counted node does.
        if known.issuperset(node.input) and not any(a.HasField("g") for a in node.attribute):
            known.update(node.output)
    return known


def _operands(node: onnx.NodeProto) -> tuple[str, ...]:
    """Names of the activation and of the weight (of both factors of a product)."""
    if node.op_type in ("QLinearConv", "QLinearMatMul"):
        return node.input[0], node.input[3]
    return node.input[0], node.input[1]


def _operator(node: onnx.NodeProto) -> Operator | None:
    """The operator whose MACs ``node`` has."""
    found = OPERATORS.get((domain_of(node.domain), node.op_type))
    return found if found is not None else QUANTISED.get(node.op_type)


def _is_counted(node: onnx.NodeProto) -> bool:
    return _operator(node) is not None or node.op_type in GATES


def _macs(node: onnx.NodeProto, shapes: Shapes) -> int:
    first, second = (shapes[name] for name in _operands(node))
    operator = _operator(node)
    if operator is not None:
        return operator.macs(node, first, second, shapes[node.output[0]] if node.output[0] else ())
    # Recurrent: W is (directions, gates x hidden, input), R (directions, gates x hidden, hidden).
    directions, rows, inputs = second
    hidden = rows // GATES[node.op_type]
    return first[0] * first[1] * directions * rows * (inputs + hidden)


def _stored(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers and Constant nodes of all graphs and functions, sparse ones by their values."""
    graphs: list[onnx.GraphProto] = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            yield from (sparse.values for sparse in graph.sparse_initializer)
            nodes.extend(graph.node)
            continue
        node = nodes.pop()
        for attribute in node.attribute:
            if attribute.HasField("t") and node.op_type == "Constant":
                yield attribute.t
            elif attribute.floats and node.op_type == "Constant":
                yield onnx.numpy_helper.from_array(np.asarray(attribute.floats, dtype=np.float32))
            graphs.extend(attribute.graphs)
            if attribute.HasField("g"):
                graphs.append(attribute.g)
