"""The layers on every path from a layer to the outputs of the model: its post-dominators."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.types import Layer


def count_post_dominators(working: WorkingGraph, layers: Sequence[Layer]) -> dict[str, int]:
    """How many of ``layers`` lie on every path from a layer to the outputs of the model, by its output.

    In a chain these are all layers behind it; a layer that a skip connection leads past does not count.
    One pass from the outputs to the inputs intersects the sets of what lies behind each reader; a set
    is the bits of an integer.
    Source: Muchnick, Advanced Compiler Design and Implementation, section 7.3.
    """
    bits = {layer.output: 1 << index for index, layer in enumerate(layers)}
    all_layers = (1 << len(layers)) - 1
    outputs = {id(tensor) for tensor in working.outputs}
    from_node: dict[int, int] = {}

    def behind(tensor: gs.Tensor) -> int:
        found = 0 if id(tensor) in outputs else all_layers
        for reader in tensor.outputs:
            # A reader that is not in the main graph lies in a branch or a loop: nothing is known behind it.
            found &= from_node.get(id(reader), 0)
        return found

    for node in reversed(working.nodes):
        found, own = all_layers, 0
        for tensor in node.outputs:
            found &= behind(tensor)
            own |= bits.get(tensor.name, 0)
        from_node[id(node)] = found | own
    tensors = working.tensors()
    return {layer.output: behind(tensors[layer.output]).bit_count() for layer in layers}
