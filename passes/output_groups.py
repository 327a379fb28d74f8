"""What the outputs of a model are joined of, and what makes them probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import onnx

SIGMOID, SOFTMAX = "Sigmoid", "Softmax"

KEEPING = ("Identity", "Cast", "QuantizeLinear", "DequantizeLinear", "Clip", "Relu", SIGMOID)
"""Nodes that leave shapes alone and keep channels apart."""
MOVING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")
"""Nodes that move entries to other places."""
BY_CONSTANT = ("Add", "Sub", "Mul", "Div")
"""Nodes that keep channels apart where one of their two operands is a constant."""

_Shapes = Mapping[str, tuple[int, ...]]


class _Part(NamedTuple):
    """One operand of a Concat; ``activation`` is Sigmoid or Softmax where it holds probabilities, else ''."""

    tensor: str
    activation: str


class Slices(NamedTuple):
    """Channels ``bounds[i]`` to ``bounds[i + 1]`` along ``axis`` of an output are its part i."""

    axis: int
    bounds: tuple[int, ...]


class Ending(NamedTuple):
    """How an output comes about.

    ``parts`` are the operands of the last Concat on the way to it, along ``axis``, or the output itself
    where there is none. ``path`` are the nodes behind that Concat, first one first.
    """

    output: str
    parts: tuple[_Part, ...]
    axis: int
    path: tuple[onnx.NodeProto, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Tensors whose shapes ``slices`` needs; none without a Concat."""
        if not self.path:
            return ()
        return (*(part.tensor for part in self.parts), *(node.output[0] for node in self.path))

    def slices(self, shapes: _Shapes) -> Slices | None:
        """Where the parts lie in the output; None where they do not stay apart, or differ by sample."""
        if not self.path:
            return None
        here = shapes[self.path[0].output[0]]
        axis: int | None = self.axis % len(here)
        sizes = [shapes[part.tensor][self.axis % len(here)] for part in self.parts]
        for node in self.path[1:]:
            after = shapes[node.output[0]]
            axis = _moved(node, axis, here, after)
            if axis is None:
                return None
            here = after
        bounds = [0]
        for size in sizes:
            bounds.append(bounds[-1] + size)
        return Slices(axis, tuple(bounds)) if axis and bounds[-1] == here[axis] else None


def endings(proto: onnx.ModelProto) -> dict[str, Ending]:
    """How each output of the main graph comes about, by its name."""
    makers = {name: node for node in proto.graph.node for name in node.output if name}
    constants = {tensor.name for tensor in proto.graph.initializer}
    constants |= {name for name, node in makers.items() if node.op_type == "Constant"}
    return {value.name: _ending(value.name, makers, constants) for value in proto.graph.output}


def _ending(output: str, makers: Mapping[str, onnx.NodeProto], constants: set[str]) -> Ending:
    path: list[onnx.NodeProto] = []
    tensor, activation, scaled = output, "", False
    while (node := makers.get(tensor)) is not None and node.domain in ("", "ai.onnx"):
        if node.op_type == "Concat":
            parts = (
                _Part(name, "" if scaled else activation or _activation(name, makers)) for name in node.input
            )
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            return Ending(output, tuple(parts), axis, (node, *reversed(path)))
        if node.op_type in (SIGMOID, SOFTMAX) and not scaled:
            activation = activation or node.op_type
        following = _operand(node, constants)
        if following is None:
            break
        scaled = scaled or node.op_type in (*BY_CONSTANT, "Relu")
        path.append(node)
        tensor = following
    return Ending(output, (_Part(output, activation),), 0, ())


def _operand(node: onnx.NodeProto, constants: set[str]) -> str | None:
    """The operand whose channels ``node`` keeps apart, if it does."""
    if node.op_type in KEEPING or node.op_type in MOVING:
        return str(node.input[0])
    if node.op_type in BY_CONSTANT:
        varying = [name for name in node.input if name not in constants]
        return varying[0] if len(varying) == 1 else None
    return None


def _activation(tensor: str, makers: Mapping[str, onnx.NodeProto]) -> str:
    """Sigmoid or Softmax, where ``tensor`` is what one gave, perhaps moved or cast."""
    while (node := makers.get(tensor)) is not None and node.domain in ("", "ai.onnx"):
        if node.op_type in (SIGMOID, SOFTMAX):
            return str(node.op_type)
        if node.op_type not in KEEPING and node.op_type not in MOVING:
            break
        tensor = node.input[0]
    return ""


def _moved(
    node: onnx.NodeProto, axis: int | None, before: tuple[int, ...], after: tuple[int, ...]
) -> int | None:
    """Where ``axis`` of ``before`` is behind ``node``; None where it was merged or cut."""
    if axis is None:
        return None
    if node.op_type == "Transpose":
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        return (order or list(reversed(range(len(before))))).index(axis)
    if node.op_type not in MOVING:
        return axis + len(after) - len(before)
    for place, size in enumerate(after):
        if size == before[axis] and prod(after[place + 1 :]) == prod(before[axis + 1 :]):
            return place
    return None
