"""After an edit: nothing dead that the edit left behind, inputs and outputs untouched."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.constants import ARITHMETIC
from onnx_lrsd.passes.nodes import is_op

LAYOUTS = ("Identity", "Cast", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
"""Nodes that change how a tensor is laid out or typed, and no value."""
LIFTED = ("Constant", *LAYOUTS, *ARITHMETIC)
"""Nodes that stand between a stored tensor and the layer that reads it."""


def remove_orphans(working: WorkingGraph, tensors: list[gs.Tensor]) -> None:
    """Remove the nodes that compute ``tensors`` where nothing reads these any more.

    ``tensors`` are what a removed node read. Other nodes that nothing needs stay: they were dead before.
    """
    outputs = {id(output) for output in working.outputs}
    captured = captured_names(working.graph)
    waiting = list(tensors)
    while waiting:
        tensor = waiting.pop()
        if tensor.outputs or id(tensor) in outputs or tensor.name in captured:
            continue
        for node in list(tensor.inputs):
            if is_op(node, *LIFTED) and len(node.outputs) == 1:
                waiting.extend(node.inputs)
                node.inputs.clear()
                node.outputs.clear()
                remove_node(working, node)


def remove_node(working: WorkingGraph, node: gs.Node) -> None:
    """Take ``node`` out of the list; by identity, since graphsurgeon's nodes compare by value."""
    index = next(i for i, other in enumerate(working.nodes) if other is node)
    del working.nodes[index]


def captured_names(graph: gs.Graph) -> set[str]:
    """Names that the bodies of control-flow nodes read, perhaps from outside."""
    names: set[str] = set()
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                names |= captured_names(value) | {output.name for output in value.outputs}
                names |= {given.name for inner in value.nodes for given in inner.inputs}
    return names
