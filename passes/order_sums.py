"""Write the sums of a residual block in the order that ONNX Runtime fuses."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_graphsurgeon as gs

from onnx_lrsd.passes.tidy import captured_names, remove_node


def order_sums(graph: gs.Graph, names: Iterable[str]) -> int:
    """Turn (L + S) + skip into (L + skip) + S for the convolutions that give ``names``; returns how many.

    A convolution takes one sum with what is there before it: L that with the skip, S that with both. As
    L + S is formed first, only one of three is fused and neither is the activation behind them. The tensor
    that L + S had is gone then, so that only a block's sum may read it, and this comes after all fits.
    """
    tensors, kept = graph.tensors(), {output.name for output in graph.outputs} | captured_names(graph)
    turned = 0
    for name in names:
        inner = tensors[name].inputs[0]
        if inner.op != "Add" or any(given.inputs[0].op != "Conv" for given in inner.inputs if given.inputs):
            continue
        readers = tensors[name].outputs
        if len(readers) == 1 and readers[0].op == "Add" and name not in kept:
            turned += _turn(graph, inner, readers[0])
    return turned


def _turn(graph: gs.Graph, inner: gs.Node, outer: gs.Node) -> bool:
    """Let ``inner`` add the skip, and ``outer`` the sparse branch; not where the other side is a bias."""
    skips = [given for given in outer.inputs if given is not inner.outputs[0]]
    if len(skips) != 1 or isinstance(skips[0], gs.Constant):
        return False
    low, branch = inner.inputs
    between = gs.Variable(f"{inner.name}_out")
    inner.inputs, inner.outputs = [low, skips[0]], [between]
    outer.inputs = [between, branch]
    remove_node(graph, inner)  # the skip may be computed after it: put it where both are known
    place = next(i for i, node in enumerate(graph.nodes) if node is outer)
    graph.nodes.insert(place, inner)
    return True
