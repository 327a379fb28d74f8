"""Who reads the tensor that stores a weight: layers that share it, and whatever else needs it as it is.

Costs are those of stored tensors. Layers that apply one and the same weight take one form, are fitted
together, and it is stored once. A tensor that anything else reads as well stays, so a smaller copy saves
nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.constants import is_view, stored_tensor
from onnx_lrsd.passes.find_layers import producer
from onnx_lrsd.passes.nodes import is_op, label
from onnx_lrsd.passes.tidy import captured_names
from onnx_lrsd.types import Layer


def share_weights(working: WorkingGraph, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """``layers`` (in graph order) with what they share: ``shares``, ``also_read`` and ``pays`` are set.

    The first of several that apply one weight stores it, the others name that one. What else reads the
    tensor is named by ``also_read``, a layer that is not among ``layers`` included. The first of all that
    read a tensor pays for it.
    """
    tensors = working.tensors()
    nodes = {layer.output: producer(working, layer) for layer in layers}
    applied = {layer.output: _application(tensors, layer, nodes[layer.output]) for layer in layers}
    captured = captured_names(working.graph)
    outputs = {id(output) for output in working.outputs}
    by_tensor = dict[int, list[Layer]]()
    stored = dict[int, gs.Tensor]()
    for layer in layers:
        tensor = stored_tensor(tensors[layer.weight])
        by_tensor.setdefault(id(tensor), []).append(layer)
        stored[id(tensor)] = tensor
    changed = dict[str, Layer]()
    for key, readers in by_tensor.items():
        owners = dict[Hashable, Layer]()
        for layer in readers:
            owners.setdefault(applied[layer.output], layer)
        theirs = {id(nodes[layer.output]) for layer in readers}
        others = _other_readers(stored[key], theirs, outputs, captured)
        for layer in readers:
            owner = owners[applied[layer.output]]
            unlike = [other for other in owners.values() if other is not owner]
            said = [*others, *(f"{other.op} {other.name}" for other in unlike)]
            shares = "" if owner is layer else owner.output
            changed[layer.output] = replace(
                layer, shares=shares, also_read=said[0] if said else "", pays=owner is readers[0]
            )
    return tuple(changed[layer.output] for layer in layers)


def groups(layers: Sequence[Layer]) -> list[tuple[Layer, ...]]:
    """``layers`` in groups that apply one weight: first in each is the one that stores it."""
    found = dict[str, list[Layer]]()
    for layer in layers:
        found.setdefault(layer.shares or layer.output, []).append(layer)
    return [tuple(group) for group in found.values()]


def _application(tensors: Mapping[str, gs.Tensor], layer: Layer, node: gs.Node) -> Hashable:
    """Equal for layers with the same W, whose new forms are stored in the same tensors."""
    views, tensor = list[Hashable](), tensors[layer.weight]
    while not isinstance(tensor, gs.Constant) and is_view(tensor.inputs[0]):
        view = tensor.inputs[0]
        if not is_op(view, "Identity"):
            views.append((view.op, repr(view.attrs), tuple(given.name for given in view.inputs[1:])))
        tensor = view.inputs[0]
    last = tensors[layer.output].inputs[0]
    # What a BatchNormalization folds into the weight belongs to that layer alone.
    folded = layer.output if is_op(last, "BatchNormalization") else ""
    factor = node.attrs.get("alpha", 1.0), node.attrs.get("transB", 0)
    like = (layer.op, layer.n, layer.m, layer.axis, layer.kernel, layer.shape, layer.dtype)
    return *like, *factor, folded, tuple(views)


def _other_readers(stored: gs.Tensor, layers: set[int], outputs: set[int], captured: set[str]) -> list[str]:
    """What reads ``stored`` or a view of it beside the nodes of ``layers``, in words."""
    found, waiting = list[str](), [stored]
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in outputs:
            found.append("an output of the model")
        if tensor.name in captured:
            found.append("the body of a control-flow node")
        for node in tensor.outputs:
            if is_view(node) and node.inputs[0] is tensor:
                waiting.extend(node.outputs)
            elif id(node) not in layers:
                found.append(f"{node.op} {label(node)}")
    return found
