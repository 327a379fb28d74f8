"""After an edit: nothing dead that the edit left behind, inputs and outputs untouched."""

from __future__ import annotations

import onnx_graphsurgeon as gs

LIFTED = ("Constant", "Identity", "Cast", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")


def remove_orphans(graph: gs.Graph, tensors: list[gs.Tensor]) -> None:
    """Remove the nodes behind ``tensors`` that only fed a node which is gone.

    Dead nodes that were dead before are not ours to remove.
    """
    outputs = {id(output) for output in graph.outputs}
    captured = captured_names(graph)
    waiting = list(tensors)
    while waiting:
        tensor = waiting.pop()
        if tensor.outputs or id(tensor) in outputs or tensor.name in captured:
            continue
        for node in list(tensor.inputs):
            if node.op in LIFTED and len(node.outputs) == 1:
                waiting.extend(node.inputs)
                node.inputs.clear()
                node.outputs.clear()
                remove_node(graph, node)


def remove_node(graph: gs.Graph, node: gs.Node) -> None:
    """Take ``node`` out of the list; by identity, since graphsurgeon's nodes compare by value."""
    index = next(i for i, other in enumerate(graph.nodes) if other is node)
    del graph.nodes[index]


def captured_names(graph: gs.Graph) -> set[str]:
    """Names that the bodies of control-flow nodes read, perhaps from outside."""
    names: set[str] = set()
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                names |= captured_names(value) | {output.name for output in value.outputs}
                names |= {given.name for inner in value.nodes for given in inner.inputs}
    return names
