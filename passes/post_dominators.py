"""How many layers everything that a layer gives has to pass."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from onnx_lrsd.types import Layer


def unavoidable(graph: gs.Graph, layers: Sequence[Layer]) -> dict[str, int]:
    """The number of ``layers`` on every path from each layer to the outputs of the model, by its name.

    All that follow in a chain; none for what a skip leads past them. These are the layer's post-dominators
    (Muchnick, Advanced Compiler Design and Implementation, section 7.3), as sets of bits.
    """
    bits = {layer.output: 1 << index for index, layer in enumerate(layers)}
    anything = (1 << len(layers)) - 1
    final = {id(tensor) for tensor in graph.outputs}
    passed: dict[int, int] = {}

    def behind(tensor: gs.Tensor) -> int:
        met = 0 if id(tensor) in final else anything
        for reader in tensor.outputs:
            met &= passed.get(id(reader), 0)  # 0: inside a branch or a loop
        return met

    for node in reversed(graph.nodes):
        met, own = anything, 0
        for tensor in node.outputs:
            met &= behind(tensor)
            own |= bits.get(tensor.name, 0)
        passed[id(node)] = met | own
    tensors = graph.tensors()
    return {layer.output: behind(tensors[layer.output]).bit_count() for layer in layers}
