"""What a node is and what it is called."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

DOMAIN = ""
"""The domain of ONNX's own operators, which is also written "ai.onnx"."""


def domain_of(written: str | None) -> str:
    """The domain as operators are registered by it: "" for ONNX's own, however it is written."""
    return DOMAIN if written in (None, "ai.onnx") else str(written)


def is_op(node: gs.Node, *ops: str) -> bool:
    """Whether ``node`` is one of these operators of ONNX; one of another domain may mean anything."""
    return node.op in ops and domain_of(node.domain) == DOMAIN


def attribute(node: onnx.NodeProto, name: str, default: int = 0) -> int:
    """The integer attribute ``name`` of ``node``."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def label(node: gs.Node) -> str:
    """What a person calls the node: its name, or its output where it has none."""
    return str(node.name or (node.outputs[0].name if node.outputs else node.op))


def unused_name(base: str, taken: set[str]) -> str:
    """``base``, with a number where it is taken already; it is ``taken`` from now on."""
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    taken.add(name)
    return name
