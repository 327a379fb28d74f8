"""What ONNX Runtime's optimiser fused, as the plain operators that it was made of; Einsum that is a MatMul.

The plain ones can be worked on, every runtime has them, and ONNX Runtime fuses them again as it opens the
model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.constants import constant_value
from onnx_lrsd.passes.nodes import DOMAIN, domain_of, unused_name
from onnx_lrsd.passes.products import CONTRIB

_PLAIN = "/lrsd/plain"
"""What is added to the name of a tensor that the plain operators have and the fused one had not."""
ACTIVATIONS = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
}
"""Activations with the attributes that follow from ``activation_params``, in order."""
_NAMED = ("Conv", "Gemm", "MatMul")
"""The plain operator that has the name of the fused one."""
CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
GEMM = ("alpha", "beta", "transA", "transB")


def unfuse(working: WorkingGraph) -> int:
    """Put plain operators in the place of fused ones; the number of nodes that were replaced.

    One that does more than these can say is left.
    """
    done = 0
    for node in list(working.nodes):
        rewrite = REWRITES.get((domain_of(node.domain), node.op))
        if rewrite is None or len(node.inputs) < 2 or len(node.outputs) != 1:
            continue
        plain = _Plain(working, node)
        if rewrite(plain, node):
            plain.replace()
            done += 1
    return done


class _Plain:
    """Collects the plain nodes for one fused node."""

    def __init__(self, working: WorkingGraph, node: gs.Node) -> None:
        self._working, self._node, self._nodes = working, node, list[gs.Node]()
        self._taken = set(working.tensors())

    def add(self, op: str, inputs: list[gs.Tensor], attributes: dict[str, Any]) -> gs.Tensor:
        output = gs.Variable(unused_name(f"{self._node.outputs[0].name}{_PLAIN}", self._taken))
        name = self._node.name if op in _NAMED else ""
        self._nodes.append(gs.Node(op, name, attributes, inputs, [output]))
        return output

    def constant(self, value: float, like: gs.Tensor) -> gs.Constant:
        known = constant_value(like)
        dtype = np.dtype(np.float32) if known is None else known.dtype
        return gs.Constant(
            unused_name(f"{self._node.outputs[0].name}{_PLAIN}", self._taken), np.array(value, dtype)
        )

    def replace(self) -> None:
        """The last of the nodes gives what the fused one gave."""
        place = next(i for i, other in enumerate(self._working.nodes) if other is self._node)
        output = self._node.outputs[0]
        self._node.inputs.clear()
        self._node.outputs.clear()
        self._nodes[-1].outputs[0] = output
        self._working.nodes[place : place + 1] = self._nodes


def _given(node: gs.Node, index: int) -> gs.Tensor | None:
    return node.inputs[index] if len(node.inputs) > index and node.inputs[index].name else None


def _kept(node: gs.Node, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: node.attrs[name] for name in names if name in node.attrs}


def _activation(plain: _Plain, node: gs.Node, tensor: gs.Tensor) -> bool:
    """Add the activation of ``node`` behind ``tensor``; whether it is one that can be written."""
    name = node.attrs.get("activation", "")
    given = node.attrs.get("activation_params") or [
        node.attrs[key] for key in ("activation_alpha", "activation_beta") if key in node.attrs
    ]
    if name in ("", "Identity"):
        return True
    if name == "Clip":
        if len(given) != 2:
            return False
        weight = node.inputs[1]
        plain.add("Clip", [tensor, *(plain.constant(bound, weight) for bound in given)], {})
        return True
    if name not in ACTIVATIONS:
        return False
    plain.add(name, [tensor], dict(zip(ACTIVATIONS[name], map(float, given), strict=False)))
    return True


def _conv(plain: _Plain, node: gs.Node) -> bool:
    """Conv, perhaps a sum with the fourth input, and the activation."""
    bias, addend = _given(node, 2), _given(node, 3)
    inputs = [*node.inputs[:2], *([] if bias is None else [bias])]
    tensor = plain.add("Conv", inputs, _kept(node, CONV))
    if addend is not None:
        tensor = plain.add("Add", [tensor, addend], {})
    return _activation(plain, node, tensor)


def _gemm(plain: _Plain, node: gs.Node) -> bool:
    """Gemm and the activation."""
    bias = _given(node, 2)
    inputs = [*node.inputs[:2], *([] if bias is None else [bias])]
    return _activation(plain, node, plain.add("Gemm", inputs, _kept(node, GEMM)))


def _matmul(plain: _Plain, node: gs.Node) -> bool:
    """MatMul of a constant matrix, transposed on the way, and its factor."""
    left, right = node.inputs[:2]
    weight = constant_value(right)
    otherwise = any(node.attrs.get(name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    if weight is None or weight.ndim != 2 or otherwise:
        return False
    if node.attrs.get("transB", 0):
        right = plain.add("Transpose", [right], {"perm": [1, 0]})
    product = plain.add("MatMul", [left, right], {})
    if node.attrs.get("alpha", 1.0) != 1.0:
        plain.add("Mul", [product, plain.constant(node.attrs["alpha"], node.inputs[1])], {})
    return True


def _einsum(plain: _Plain, node: gs.Node) -> bool:
    """A MatMul where a constant matrix takes up the last label of the activation."""
    equation = str(node.attrs.get("equation", "")).replace(" ", "")
    given, arrow, result = equation.partition("->")
    labels = given.split(",")
    if not arrow or len(labels) != 2 or len(node.inputs) != 2:
        return False
    constant = [constant_value(tensor) is not None for tensor in node.inputs]
    if constant.count(True) != 1:
        return False
    side = constant.index(True)
    weight, activation = labels[side], labels[1 - side]
    prefix, inner, outer = activation[:-1], activation[-1:], result[-1:]
    named = result.replace("...", "")
    if len(set(named)) != len(named) or result[:-1] != prefix:
        return False  # a diagonal, or axes in another order
    if inner == outer or inner in prefix or outer in activation:
        return False
    if weight not in (inner + outer, outer + inner) or "." in inner + outer:
        return False
    matrix = node.inputs[side]
    if weight == outer + inner:
        matrix = plain.add("Transpose", [matrix], {"perm": [1, 0]})
    plain.add("MatMul", [node.inputs[1 - side], matrix], {})
    return True


REWRITES: dict[tuple[str, str], Callable[[_Plain, gs.Node], bool]] = {
    (CONTRIB, "FusedConv"): _conv,
    (CONTRIB, "FusedGemm"): _gemm,
    (CONTRIB, "FusedMatMul"): _matmul,
    (CONTRIB, "TransposeMatMul"): _matmul,
    (DOMAIN, "Einsum"): _einsum,
}
"""By domain and type of node; each says whether it could be written."""


def optimised_by_runtime(working: WorkingGraph) -> str:
    """A sentence that says so where ONNX Runtime's optimiser wrote the file; empty where it did not."""
    found = dict.fromkeys(
        node.op
        for node in working.nodes
        if node.op in FUSED_OPERATORS or str(node.domain or "").endswith(".nchwc")
    )
    if not found:
        return ""
    listed = ", ".join([*found][:3])
    return (
        f"The file was optimised by ONNX Runtime ({listed}), which hides layers and ties it to machines like "
        "the one it was made on: give the model as it was before."
    )


FUSED_OPERATORS = (
    *("FusedConv", "FusedGemm", "FusedMatMul", "TransposeMatMul", "BiasGelu", "FastGelu", "QuickGelu"),
    *("SkipLayerNormalization", "EmbedLayerNormalization", "BiasSplitGelu", "NhwcFusedConv"),
)
"""Operators that its optimiser makes and exporters do not."""
