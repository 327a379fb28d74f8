"""Where the bytes of a model are that no layer holds: tables, recurrent weights, and what else is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.constants import is_view, stored_tensor
from onnx_lrsd.passes.find_layers import recurrent, weighted
from onnx_lrsd.passes.nodes import is_op
from onnx_lrsd.types import Layer

_MUCH = 0.25
"""Share of the bytes outside all layers from which it is said where they are."""


def bytes_outside(working: WorkingGraph, layers: Sequence[Layer]) -> str:
    """A sentence on what is stored outside ``layers``; empty where that is little."""
    tensors = working.tensors()
    inside = {
        id(stored_tensor(tensors[layer.weight]))
        for layer in layers
        if not layer.also_read.startswith("Gather")
    }
    sums, largest, whole = dict[str, int](), dict[str, tuple[int, str]](), 0
    for tensor in tensors.values():
        if not isinstance(tensor, gs.Constant):
            continue
        size = int(tensor._values.nbytes)
        whole += size
        if id(tensor) not in inside:
            kind = _kind(tensor)
            sums[kind] = sums.get(kind, 0) + size
            largest[kind] = max(largest.get(kind, (0, "")), (size, tensor.name))
    total = sum(sums.values())
    if total <= _MUCH * whole:
        return ""
    shares = sorted(sums.items(), key=lambda entry: -entry[1])
    said = [
        f"{size / whole:.0%} {kind} (most in {largest[kind][1]})"
        for kind, size in shares
        if size > whole / 50
    ]
    listed = ", ".join(said)
    return f"{total / whole:.0%} of what is stored is outside the layers that can be worked on: {listed}."


def _kind(tensor: gs.Tensor) -> str:
    nodes = list(_readers(tensor))
    if any(is_op(node, "Gather") for node in nodes):
        return "in tables that Gather reads"
    if any(recurrent(node) for node in nodes):
        return "in recurrent weights"
    if any(weighted(node) for node in nodes):
        return "in weights of nodes that are left"
    return "in other constants"


def _readers(tensor: gs.Tensor) -> Iterator[gs.Node]:
    for node in tensor.outputs:
        if is_view(node) and node.inputs[0] is tensor:
            for output in node.outputs:
                yield from _readers(output)
        else:
            yield node
