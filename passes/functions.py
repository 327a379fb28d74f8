"""Functions of a model that hold layers, as the nodes of their bodies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    is called. Other functions stay, and those of another opset than the model's. The result is ``model``
    itself where that shows no more layers, and where onnx refuses.
    """
    alike, unlike = _by_opset(model.proto)
    chosen = _with_weights(alike)
    if not chosen:
        return model
    try:
        proto = _inlined(model.proto, chosen, unlike)
    except Exception:  # it raises RuntimeError and more for what it does not know, and above 2 GB
        return model
    inlined = replace(model, proto=proto)
    return inlined if _layers(inlined) > _layers(model) else model


def _inlined(
    proto: onnx.ModelProto, chosen: set[FunctionId], unlike: Sequence[onnx.FunctionProto]
) -> onnx.ModelProto:
    """``proto`` without calls of the functions ``chosen``, but for those inside ``unlike`` functions."""
    given = proto
    if unlike:  # the inliner refuses models that have any
        given = onnx.ModelProto()
        given.CopyFrom(proto)
        del given.functions[:]
        left = {_id(function) for function in unlike}
        given.functions.extend(function for function in proto.functions if _id(function) not in left)
    found = onnx.inliner.inline_selected_functions(given, sorted(chosen))
    kept = _called([*unlike, *found.functions], proto.functions)
    del found.functions[:]
    found.functions.extend(function for function in proto.functions if _id(function) in kept)
    known = {domain_of(opset.domain) for opset in found.opset_import}
    for function in proto.functions:
        if _id(function) in chosen:
            missing = [opset for opset in function.opset_import if domain_of(opset.domain) not in known]
            found.opset_import.extend(missing)
            known |= {domain_of(opset.domain) for opset in missing}
    _store_once(found.graph, {name for node in proto.graph.node for name in node.output})
    return found


def _called(first: Iterable[onnx.FunctionProto], functions: Iterable[onnx.FunctionProto]) -> set[FunctionId]:
    """``first`` and those of ``functions`` that these call, and so on."""
    by_id = {_id(function): function for function in functions}
    found, waiting = set[FunctionId](), [_id(function) for function in first]
    while waiting:
        now = waiting.pop()
        if now in by_id and now not in found:
            found.add(now)
            waiting += [(node.domain, node.op_type) for node in _every_node(by_id[now].node)]
    return found


def _every_node(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """``nodes`` and those of graphs inside them."""
    for node in nodes:
        yield node
        for inner in subgraphs(node):
            yield from _every_node(inner.node)


def _id(function: onnx.FunctionProto) -> FunctionId:
    return function.domain, function.name


def _layers(model: Model) -> int:
    working = model.graph()
    unfuse(working)
    return len(find_layers(working)[0])


def _by_opset(
    proto: onnx.ModelProto,
) -> tuple[list[onnx.FunctionProto], list[onnx.FunctionProto]]:
    """The functions that use the model's own versions of all operators, and the other ones."""
    versions = {domain_of(opset.domain): opset.version for opset in proto.opset_import}
    alike, unlike = list[onnx.FunctionProto](), list[onnx.FunctionProto]()
    for function in proto.functions:
        same = all(versions.get(domain_of(o.domain), o.version) == o.version for o in function.opset_import)
        (alike if same else unlike).append(function)
    return alike, unlike


def _with_weights(functions: Sequence[onnx.FunctionProto]) -> set[FunctionId]:
    """Those of ``functions`` with a node that may hold a weight, and those that call one of these."""
    chosen = set[FunctionId]()
    while True:
        found = {
            _id(function)
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
    for node in _every_node(nodes):
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)
    del graph.node[:]
    graph.node.extend(nodes)
    values = [value for value in graph.value_info if value.name not in same]
    del graph.value_info[:]
    graph.value_info.extend(values)
