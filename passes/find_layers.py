"""Every node with a constant weight that could be written in another form; every refusal with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.constants import (
    constant_float64,
    constant_value,
    derived,
    overridable,
    quantised,
    stored_itemsize,
)
from onnx_lrsd.passes.nodes import DOMAIN, domain_of, is_op, label
from onnx_lrsd.passes.operators import OPERATORS, operator_at, operator_of
from onnx_lrsd.passes.operators.operator import Matrix, Operator
from onnx_lrsd.passes.pack import PACKED_PREFIX
from onnx_lrsd.passes.products import CONTRIB, NCHWC
from onnx_lrsd.types import Declined, Layer

FLOATS = ("float16", "bfloat16", "float32", "float64")
SMALLEST = 8
"""Outputs and inputs a layer must have before a split can gain anything."""
LARGEST = 1e18
"""Entry of a weight from which on float32 products of it overflow, and fits lose all their digits."""
_QUANTISED = (
    *((DOMAIN, op) for op in ("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger")),
    *((CONTRIB, op) for op in ("QLinearConv", "QGemm", "QAttention", "MatMulNBits", "MatMulBnb4")),
    *((CONTRIB, op) for op in ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")),
)
_RECURRENT = ((DOMAIN, "LSTM"), (DOMAIN, "GRU"), (DOMAIN, "RNN"))
LEFT = {
    **dict.fromkeys(_QUANTISED, "already quantised"),
    **dict.fromkeys(_RECURRENT, "recurrent weights are left as they are"),
}
"""Why operators that always hold a weight, and are none of ``OPERATORS``, are left."""
HIDDEN = {
    (DOMAIN, "Einsum"): "its equation is no plain product with a matrix",
    (DOMAIN, "DeformConv"): "deformable convolution: left as it is",
    (CONTRIB, "FusedConv"): "fused by ONNX Runtime with what has no plain form",
    (CONTRIB, "FusedGemm"): "fused by ONNX Runtime with what has no plain form",
    (CONTRIB, "FusedMatMul"): "fused by ONNX Runtime with what has no plain form",
    (CONTRIB, "Attention"): "attention fused by ONNX Runtime: give the model as it was before",
    (NCHWC, "Conv"): "in a layout of ONNX Runtime's own: give the model as it was before",
}
"""Why operators that may hold a weight, and are none of ``OPERATORS``, are left."""
_WEIGHTED = frozenset((*OPERATORS, *LEFT, *HIDDEN))


def find_layers(working: WorkingGraph) -> tuple[tuple[Layer, ...], tuple[Declined, ...]]:
    """Layers of the main graph in graph order, and what was declined.

    >>> import numpy as np, onnx, onnx_lrsd
    >>> graph = onnx.parser.parse_graph("g (float[n, 64] x) => (float[n, 64] y) { y = MatMul (x, w) }")
    >>> weight = np.outer(np.arange(64), np.ones(64)).astype(np.float32)
    >>> graph.initializer.extend([onnx.numpy_helper.from_array(weight, "w")])
    >>> opset = onnx.helper.make_opsetid("", 17)
    >>> model = onnx_lrsd.load(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8))
    >>> (layer,), declined = onnx_lrsd.find_layers(model.graph())
    >>> layer.name, layer.op, layer.n, layer.m, declined
    ('y', 'MatMul', 64, 64, ())
    """
    layers: list[Layer] = []
    declined: list[Declined] = []
    for node in working.nodes:
        operator = operator_at(node)
        if operator is not None:
            found = _read(node, operator, working)
            if isinstance(found, Layer):
                layers.append(found)
            elif found is not None:
                declined.append(Declined(label(node), node.op, found))
        elif (reason := _left(node)) is not None:
            declined.append(Declined(label(node), node.op, reason))
        declined.extend(_nested(node))
    for function in working.graph.functions:
        for node in function.nodes:
            if weighted(node):
                reason = f"inside the function {function.name}: left as it is"
                declined.append(Declined(label(node), node.op, reason))
    return tuple(layers), tuple(declined)


def producer(working: WorkingGraph, layer: Layer) -> gs.Node:
    """The node that reads the weight of ``layer``; ``layer.output`` may be that of a node folded into it."""
    node = working.tensors()[layer.output].inputs[0]
    operator = operator_of(layer)
    while operator_at(node) is not operator:
        node = next(
            given.inputs[0]
            for given in node.inputs
            if given.inputs
            and (operator_at(given.inputs[0]) is operator or is_op(given.inputs[0], "BatchNormalization"))
        )
    return node


def read_weight(working: WorkingGraph, layer: Layer) -> tuple[Matrix, Matrix]:
    """W (n, m) and b (n,) of ``layer``, float64, with everything folded in that the layer absorbs.

    Of a constant these are its rows and zeros.
    """
    if layer.constant:
        return constant_float64(working.tensors()[layer.weight]).reshape(layer.n, layer.m), np.zeros(layer.n)
    last = working.tensors()[layer.output].inputs[0]
    return operator_of(layer).weight_and_bias(layer, producer(working, layer), last)


def weighted(node: gs.Node) -> bool:
    """Whether ``node`` is of an operator that holds a weight, or may."""
    return _operator(node) in _WEIGHTED


def holds_weight(domain: str, op: str) -> bool:
    """Whether an operator holds a weight, or may."""
    return (domain_of(domain), op) in _WEIGHTED


def recurrent(node: gs.Node) -> bool:
    """Whether ``node`` is an LSTM, a GRU or an RNN."""
    return _operator(node) in _RECURRENT


def _operator(node: gs.Node) -> tuple[str, str]:
    return domain_of(node.domain), node.op


def _left(node: gs.Node) -> str | None:
    """Why the weight of ``node`` is left, which is none of ``OPERATORS``; None where it has none."""
    operator = _operator(node)
    if operator in LEFT:
        return LEFT[operator]
    return HIDDEN.get(operator) if any(derived(given) for given in node.inputs[:2]) else None


def _nested(node: gs.Node) -> Iterator[Declined]:
    """What lies in the bodies of a control-flow node."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                if weighted(inner):
                    reason = f"inside the body of {node.op}: left as it is"
                    yield Declined(label(inner), inner.op, reason)
                yield from _nested(inner)


def _read(node: gs.Node, operator: Operator, working: WorkingGraph) -> Layer | str | None:
    """The layer that ``node`` is, or why it is none; None where it has no weight at all."""
    side = _weight_side(node, operator)
    if side is None:
        return _no_weight(node, operator)
    tensor = node.inputs[side]
    value = constant_value(tensor)
    assert value is not None
    if overridable(tensor, working.overridable):
        return "its weight is an input that a caller may override"
    if value.dtype.name not in FLOATS:
        return f"weights of type {value.dtype.name} are not supported"
    if not np.isfinite(value.astype(np.float32)).all():
        return "its weight has NaN or infinite entries"
    if np.abs(value.astype(np.float32)).max(initial=0.0) > LARGEST:
        return f"its weight has entries above {LARGEST:.0e}"
    found = operator.read(node, value, side, working)
    if not isinstance(found, Layer):
        return found
    if min(found.n, found.m) < SMALLEST:
        return "too small to gain"
    size = stored_itemsize(tensor)
    return found if size == value.itemsize else replace(found, stored_bytes=size)


def _weight_side(node: gs.Node, operator: Operator) -> int | None:
    """Index of the constant input; None where both are constant, or the one that cannot be a weight."""
    constant = [i for i, given in enumerate(node.inputs[:2]) if constant_value(given) is not None]
    return constant[0] if len(constant) == 1 and constant[0] in operator.WEIGHT_INPUTS else None


def _no_weight(node: gs.Node, operator: Operator) -> str | None:
    """Why ``node`` has no weight to read; None for a product of activations."""
    if any(quantised(given) for given in node.inputs):
        return "already quantised"
    if all(derived(given) for given in node.inputs[:2]):
        return "all that it reads is constant"
    for operand in (node.inputs[index] for index in operator.WEIGHT_INPUTS):
        if derived(operand) and operand.name.startswith(PACKED_PREFIX):
            return "its weight is in codes: `onnx-lrsd unpack` writes the plain model"
        if derived(operand):
            return f"its weight is not stored but computed, by {operand.inputs[0].op}"
    return "its weight is computed at run time" if len(operator.WEIGHT_INPUTS) == 1 else None
