"""Write the sums of a residual block in the order that ONNX Runtime fuses."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.nodes import is_op
from onnx_lrsd.passes.operators import operator_at
from onnx_lrsd.passes.tidy import captured_names, remove_node


def order_sums(working: WorkingGraph, names: Iterable[str]) -> int:
    """Turn (L + S) + skip into (L + skip) + S for the convolutions that give ``names``; returns how many.

    ONNX Runtime fuses into a convolution one sum with a tensor that is computed before it, and the activation
    behind that sum. Of (L + S) + skip it fuses the first sum alone. Of (L + skip) + S it fuses both: the
    first into the convolution of L, the second, with the activation, into that of S. The tensor L + S is gone
    then: nothing but the second sum may read it, and all fits must be done.
    """
    tensors = working.tensors()
    kept = {output.name for output in working.outputs} | captured_names(working.graph)
    turned = 0
    for name in names:
        inner = tensors[name].inputs[0]
        if not is_op(inner, "Add") or not all(_fuses_sum(given) for given in inner.inputs):
            continue
        readers = tensors[name].outputs
        if len(readers) == 1 and is_op(readers[0], "Add") and name not in kept:
            turned += _turn(working, inner, readers[0])
    return turned


def _fuses_sum(addend: gs.Tensor) -> bool:
    """Whether the node that gives ``addend``, if one does, takes a sum behind it."""
    operators = [operator_at(node) for node in addend.inputs]
    return all(operator is not None and operator.FUSES_SUM for operator in operators)


def _turn(working: WorkingGraph, inner: gs.Node, outer: gs.Node) -> bool:
    """Let ``inner`` add the skip, and ``outer`` the sparse branch; not where the other side is a bias."""
    skips = [given for given in outer.inputs if given is not inner.outputs[0]]
    if len(skips) != 1 or isinstance(skips[0], gs.Constant):
        return False
    low, branch = inner.inputs
    between = gs.Variable(f"{inner.name}_out")
    inner.inputs, inner.outputs = [low, skips[0]], [between]
    outer.inputs = [between, branch]
    remove_node(working, inner)  # the skip may be computed after it: put it where both are known
    place = next(i for i, node in enumerate(working.nodes) if node is outer)
    working.nodes.insert(place, inner)
    return True
