"""Which layer a runtime's kernel works for, from the kernel's name and the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from onnx_lrsd.passes.consumers import CHANNELWISE
from onnx_lrsd.passes.nodes import DOMAIN, domain_of
from onnx_lrsd.passes.writer import PART
from onnx_lrsd.types import Layer

FUSIONS = ("/MatMulAddFusion",)
"""What ONNX Runtime appends to the name of a node that it fuses with the one behind."""


def kernel_owners(proto: onnx.ModelProto, layers: Sequence[Layer], names: Sequence[str]) -> list[str | None]:
    """The output of the layer that each kernel works for, None where it is none of ``layers``.

    A kernel is named after a node of ``proto`` or after the tensor it gives. It belongs to a layer if its
    node is the layer's, or was written in its place, or reads it through channel-wise nodes alone: a kernel
    that does what several nodes did may have the name of the last one.
    """
    producers = {name: node for node in proto.graph.node for name in node.output if name}
    outputs = {layer.output for layer in layers}
    written = {layer.name: layer.output for layer in layers}
    return [
        None if node is None else _owner(node, producers, outputs, written)
        for node in kernel_nodes(proto, names)
    ]


def kernel_nodes(proto: onnx.ModelProto, names: Sequence[str]) -> list[onnx.NodeProto | None]:
    """The node of ``proto`` that each kernel is named after, None where the runtime made one of its own."""
    nodes = {node.name: node for node in proto.graph.node if node.name}
    producers = {name: node for node in proto.graph.node for name in node.output if name}
    found = []
    for name in names:
        for fusion in FUSIONS:
            name = name.split(fusion)[0]
        found.append(nodes.get(name) or producers.get(name))
    return found


def _owner(
    node: onnx.NodeProto,
    producers: Mapping[str, onnx.NodeProto],
    outputs: set[str],
    written: Mapping[str, str],
) -> str | None:
    """The output of the layer that ``node`` works for, the nearest one in front of it; None if there is none.

    ``written`` has the outputs of layers by name: the names of nodes that replace a layer begin with its own.
    """
    seen, waiting = set[str](), [node]
    while waiting:
        node = waiting.pop(0)
        given = outputs.intersection(node.output)
        if given:
            return given.pop()
        own = node.name.rpartition(PART)[0] or node.name
        if own in written:
            return written[own]
        if domain_of(node.domain) != DOMAIN or node.op_type not in CHANNELWISE:
            continue
        for name in node.input:
            if name in producers and name not in seen:
                seen.add(name)
                waiting.append(producers[name])
    return None
