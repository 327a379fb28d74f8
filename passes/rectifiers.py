"""The rectifier behind a layer: Relu, or Clip with constant limits."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.constants import constant_bias
from onnx_lrsd.passes.nodes import is_op


def rectifiers(working: WorkingGraph, names: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Limits of the rectifier that alone reads a tensor, for those of ``names`` that have one.

    (0, inf) for Relu; what lies outside of the limits reaches no other node.
    """
    tensors, outputs = working.tensors(), {id(output) for output in working.outputs}
    found = {}
    for name in names:
        tensor = tensors[name]
        if len(tensor.outputs) == 1 and id(tensor) not in outputs:
            limits = _limits(tensor.outputs[0])
            if limits is not None:
                found[name] = limits
    return found


def _limits(node: gs.Node) -> tuple[float, float] | None:
    if is_op(node, "Relu"):
        return 0.0, inf
    if not is_op(node, "Clip"):
        return None
    given = [node.attrs.get("min"), node.attrs.get("max")]  # before opset 11
    for index, tensor in enumerate(node.inputs[1:3]):
        if isinstance(tensor, gs.Variable) and not tensor.name:
            continue
        value = constant_bias(tensor)
        if value is None:
            return None
        given[index] = float(value)
    low, high = given
    return -inf if low is None else low, inf if high is None else high
