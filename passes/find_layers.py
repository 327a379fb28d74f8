"""Every Conv, Gemm and MatMul with a constant weight, as a Layer; every refusal with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_lrsd.passes.batchnorm import foldable_batchnorm, scale_and_shift
from onnx_lrsd.passes.constants import constant_value, derived, overridable, quantised
from onnx_lrsd.passes.pack import PREFIX
from onnx_lrsd.types import Declined, Layer

Matrix = npt.NDArray[np.float64]

FLOATS = ("float16", "bfloat16", "float32", "float64")
SMALLEST = 8
"""Outputs and inputs a layer must have before a split can gain anything."""
QUANTISED = (
    *("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulNBits", "MatMulBnb4", "QGemm"),
    *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention"),
)
RECURRENT = ("LSTM", "GRU", "RNN")
NESTED = ("If", "Loop", "Scan")
WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose", *QUANTISED, *RECURRENT)


def find_layers(graph: gs.Graph) -> tuple[tuple[Layer, ...], tuple[Declined, ...]]:
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
    for node in graph.nodes:
        if node.op in ("Conv", "Gemm", "MatMul") and node.domain in (None, "", "ai.onnx"):
            found = _read(node, graph)
            if isinstance(found, Layer):
                layers.append(found)
            elif found is not None:
                declined.append(Declined(label(node), node.op, found))
        elif node.op in QUANTISED:
            declined.append(Declined(label(node), node.op, "already quantised"))
        elif node.op in RECURRENT:
            declined.append(Declined(label(node), node.op, "recurrent weights are left as they are"))
        elif node.op == "ConvTranspose":
            declined.append(Declined(label(node), node.op, "transposed convolutions are left as they are"))
        declined.extend(_nested(node))
    for function in graph.functions:
        for node in function.nodes:
            if node.op in WEIGHTED:
                reason = f"inside the function {function.name}: left as it is"
                declined.append(Declined(label(node), node.op, reason))
    return tuple(layers), tuple(declined)


def label(node: gs.Node) -> str:
    """What a person calls the node: its name, or its output where it has none."""
    return str(node.name or (node.outputs[0].name if node.outputs else node.op))


def producer(graph: gs.Graph, layer: Layer) -> gs.Node:
    """The Conv, Gemm or MatMul of ``layer`` (``layer.name`` may be that of a node folded into it)."""
    tensor = graph.tensors()[layer.output]
    node = tensor.inputs[0]
    while node.op != layer.op:
        node = next(
            t for t in node.inputs if t.inputs and t.inputs[0].op in (layer.op, "BatchNormalization")
        ).inputs[0]
    return node


def read_weight(graph: gs.Graph, layer: Layer) -> tuple[Matrix, Matrix]:
    """W (n, m) and b (n,) of ``layer``, float64, with everything folded in that the layer absorbs."""
    node = producer(graph, layer)
    last = graph.tensors()[layer.output].inputs[0]
    if layer.op == "Conv":
        weight = _float64(node.inputs[1]).reshape(layer.n, layer.m)
        bias = _float64(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else np.zeros(layer.n)
    elif layer.op == "Gemm":
        stored = _float64(node.inputs[1])
        weight = node.attrs.get("alpha", 1.0) * (stored if node.attrs.get("transB", 0) else stored.T)
        bias = np.zeros(layer.n)
        if len(node.inputs) > 2 and node.inputs[2].name:
            bias = node.attrs.get("beta", 1.0) * np.broadcast_to(
                _float64(node.inputs[2]).reshape(-1), layer.n
            )
    else:
        left = layer.axis == -2
        weight = _float64(node.inputs[0]) if left else _float64(node.inputs[1]).T
        bias = np.zeros(layer.n)
        if last is not node and last.op == "Add":
            constant = next(t for t in last.inputs if constant_value(t) is not None)
            bias = np.broadcast_to(_float64(constant).reshape(-1), layer.n)
    if last.op == "BatchNormalization":
        scale, shift = scale_and_shift(last)
        weight, bias = scale[:, None] * weight, scale * bias + shift
    return np.ascontiguousarray(weight), np.array(bias, dtype=np.float64)


def _float64(tensor: gs.Tensor) -> Matrix:
    return np.asarray(constant_value(tensor)).astype(np.float64)


def _nested(node: gs.Node) -> Iterator[Declined]:
    """What lies in the bodies of a control-flow node."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                if inner.op in WEIGHTED:
                    reason = f"inside the body of {node.op}: left as it is"
                    yield Declined(label(inner), inner.op, reason)
                yield from _nested(inner)


def _read(node: gs.Node, graph: gs.Graph) -> Layer | str | None:
    """The layer that ``node`` is, or why it is none; None where it has no weight at all."""
    side = _weight_side(node)
    if side is None:
        return _no_weight(node)
    tensor = node.inputs[side]
    value = constant_value(tensor)
    assert value is not None
    if overridable(tensor, graph.overridable):
        return "its weight is an input that a caller may override"
    if value.dtype.name not in FLOATS:
        return f"weights of type {value.dtype.name} are not supported"
    if not np.isfinite(value.astype(np.float32)).all():
        return "its weight has NaN or infinite entries"
    read = {"Conv": _read_conv, "Gemm": _read_gemm, "MatMul": _read_matmul}[node.op]
    found = read(node, value, side, graph)
    if isinstance(found, Layer) and min(found.n, found.m) < SMALLEST:
        return "too small to gain"
    return found


def _weight_side(node: gs.Node) -> int | None:
    """Index of the constant input; where both are constant, none."""
    constant = [i for i, given in enumerate(node.inputs[:2]) if constant_value(given) is not None]
    if len(constant) != 1 or (constant == [0] and node.op != "MatMul"):
        return None
    return constant[0]


def _no_weight(node: gs.Node) -> str | None:
    """Why ``node`` has no weight to read; None for a product of activations."""
    if any(quantised(given) for given in node.inputs):
        return "already quantised"
    first, second = node.inputs[:2]
    if derived(first) and derived(second):
        return "all that it reads is constant"
    for operand in (first, second) if node.op == "MatMul" else (second,):
        if derived(operand) and operand.name.startswith(PREFIX):
            return "its weight is in codes: `onnx-lrsd unpack` writes the plain model"
        if derived(operand):
            return f"its weight is not stored but computed, by {operand.inputs[0].op}"
    return None if node.op == "MatMul" else "its weight is computed at run time"


def _read_conv(node: gs.Node, value: npt.NDArray[Any], side: int, graph: gs.Graph) -> Layer | str:
    groups = node.attrs.get("group", 1)
    if groups > 1:
        depthwise = value.shape[1] == 1
        return "depthwise convolution: left as it is" if depthwise else "grouped convolution: left as it is"
    if len(node.inputs) > 2 and node.inputs[2].name and constant_value(node.inputs[2]) is None:
        return "its bias is computed at run time"
    kernel = tuple(value.shape[2:])
    axes = len(kernel)
    norm = foldable_batchnorm(node, graph)
    return Layer(
        output=(norm or node).outputs[0].name,
        name=label(node),
        op="Conv",
        input=node.inputs[0].name,
        weight=node.inputs[1].name,
        shape=tuple(value.shape),
        dtype=value.dtype.name,
        n=value.shape[0],
        m=value.shape[1] * prod(kernel),
        axis=1,
        kernel=kernel,
        strides=tuple(node.attrs.get("strides", (1,) * axes)),
        pads=tuple(node.attrs.get("pads", (0,) * 2 * axes)),
        dilations=tuple(node.attrs.get("dilations", (1,) * axes)),
        auto_pad=node.attrs.get("auto_pad", "NOTSET"),
    )


def _read_gemm(node: gs.Node, value: npt.NDArray[Any], side: int, graph: gs.Graph) -> Layer | str:
    n, m = value.shape if node.attrs.get("transB", 0) else value.shape[::-1]
    norm = foldable_batchnorm(node, graph)
    if len(node.inputs) > 2 and node.inputs[2].name:
        bias = constant_value(node.inputs[2])
        if bias is None:
            return "its bias is computed at run time"
        # C may also vary along the rows; that is no bias of the layer.
        if bias.size not in (1, n) or (bias.ndim == 2 and bias.shape[0] != 1 and n != 1):
            return "its C is not one value for each output"
    axis = 0 if node.attrs.get("transA", 0) else -1
    name = (norm or node).outputs[0].name
    return Layer(
        output=name,
        name=label(node),
        op="Gemm",
        input=node.inputs[0].name,
        weight=node.inputs[1].name,
        shape=value.shape,
        dtype=value.dtype.name,
        n=n,
        m=m,
        axis=axis,
    )


def _read_matmul(node: gs.Node, value: npt.NDArray[Any], side: int, graph: gs.Graph) -> Layer | str:
    if value.ndim != 2:
        return f"its weight has {value.ndim} axes, not two"
    left = side == 0
    rank = _rank(node.inputs[1 - side])
    if left and rank == 1:
        return "its input has one axis, not rows and columns"
    n, m = value.shape if left else value.shape[::-1]
    add = _absorbed_add(node, n, left, rank, graph)
    name = (add or node).outputs[0].name
    activation, axis = node.inputs[1 - side], -2 if left else -1
    weight = node.inputs[side].name
    return Layer(
        output=name,
        name=label(node),
        op="MatMul",
        input=activation.name,
        weight=weight,
        shape=value.shape,
        dtype=value.dtype.name,
        n=n,
        m=m,
        axis=axis,
    )


def _rank(tensor: gs.Tensor) -> int | None:
    return None if tensor.shape is None else len(tensor.shape)


def _absorbed_add(node: gs.Node, n: int, left: bool, rank: int | None, graph: gs.Graph) -> gs.Node | None:
    """The Add of one constant per output that alone reads the product, or None."""
    output = node.outputs[0]
    if len(output.outputs) != 1 or any(output is o for o in graph.outputs):
        return None
    add = output.outputs[0]
    if add.op != "Add":
        return None
    others = [given for given in add.inputs if given is not output]
    value = constant_value(others[0]) if len(others) == 1 else None
    if value is None or overridable(others[0], graph.overridable):
        return None
    if left:
        return add if value.shape == (n, 1) else None
    # A constant of more axes than the product has would add axes to the result.
    fits = value.ndim == 1 or (value.ndim == 2 and rank is not None and rank > 1)
    return add if fits and value.shape[-1] == n and value.size == n else None
