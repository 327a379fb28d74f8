"""Functions of a model that hold layers, as the nodes of their bodies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeAlias

import onnx
import onnx.inliner

from onnx_lrsd.graph.external_data import subgraphs
from onnx_lrsd.graph.model import Model
from onnx_lrsd.passes.find_layers import find_layers, holds_weight
from onnx_lrsd.passes.nodes import DOMAIN, domain_of
from onnx_lrsd.passes.unfuse import unfuse

FunctionId: TypeAlias = tuple[str, str]
"""Domain and name."""


def without_layers_in_functions(model: Model) -> Model:
    """``model`` with the bodies of functions that hold weights in place of each call.

    Tensors of the main graph keep their names, and a constant of a function is stored once however often it
    is called. Other functions stay. The result is ``model`` itself where that shows no more layers, and where
    onnx refuses: for a function of another opset, or a model of more than 2 GB.
    """
    chosen = _with_weights(model.proto)
    if not chosen:
        return model
    try:
        proto = onnx.inliner.inline_selected_functions(model.proto, sorted(chosen))
    except Exception:  # it raises RuntimeError and more for what it does not know
        return model
    known = {domain_of(opset.domain) for opset in proto.opset_import}
    for function in model.proto.functions:
        if (function.domain, function.name) in chosen:
            missing = [opset for opset in function.opset_import if domain_of(opset.domain) not in known]
            proto.opset_import.extend(missing)
            known |= {domain_of(opset.domain) for opset in missing}
    _store_once(proto.graph, {name for node in model.proto.graph.node for name in node.output})
    inlined = replace(model, proto=proto)
    return inlined if _layers(inlined) > _layers(model) else model


def _layers(model: Model) -> int:
    working = model.graph()
    unfuse(working)
    return len(find_layers(working)[0])


def _with_weights(proto: onnx.ModelProto) -> set[FunctionId]:
    """The functions with a node that may hold a weight, and those that call one of these.

    A function that means another version of some operators than the model does is none of them.
    """
    versions = {domain_of(opset.domain): opset.version for opset in proto.opset_import}
    functions = [
        function
        for function in proto.functions
        if all(versions.get(domain_of(o.domain), o.version) == o.version for o in function.opset_import)
    ]
    chosen = set[FunctionId]()
    while True:
        found = {
            (function.domain, function.name)
            for function in functions
            if any(
                holds_weight(node.domain, node.op_type) or (node.domain, node.op_type) in chosen
                for node in function.node
            )
        }
        if found == chosen:
            return chosen
        chosen = found


def _store_once(graph: onnx.GraphProto, own: set[str]) -> None:
    """Leave one of each Constant that came into ``graph`` several times; those that give ``own`` stay."""
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Constant" and domain_of(node.domain) == DOMAIN and node.output[0] not in own:
            value = b"".join(a.SerializeToString(deterministic=True) for a in node.attribute)
            kept = first.setdefault(value, node.output[0])
            if kept != node.output[0]:
                same[node.output[0]] = kept
    if not same:
        return
    nodes = [node for node in graph.node if not same.keys() & set(node.output)]
    _rename(nodes, same)
    del graph.node[:]
    graph.node.extend(nodes)
    values = [value for value in graph.value_info if value.name not in same]
    del graph.value_info[:]
    graph.value_info.extend(values)


def _rename(nodes: Iterable[onnx.NodeProto], names: dict[str, str]) -> None:
    """Let ``nodes``, and those of graphs inside them, read other tensors in the place of some."""
    for node in nodes:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        for inner in subgraphs(node):
            _rename(inner.node, names)
