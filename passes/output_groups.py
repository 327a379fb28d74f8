"""What the outputs of a model are concatenated from, and what makes them probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import onnx

from onnx_lrsd.passes.nodes import DOMAIN, attribute, domain_of

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
    """The last nodes on the way to an output.

    ``parts`` are the operands of the last Concat, along ``axis``, or the output itself where there is none.
    ``path`` is that Concat and the nodes behind it, in the order in which they run; empty without a Concat.
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
        axis = self.axis % len(here)
        bounds = [0]
        for part in self.parts:
            bounds.append(bounds[-1] + shapes[part.tensor][axis])
        for node in self.path[1:]:
            after = shapes[node.output[0]]
            moved = _moved(node, axis, here, after)
            if moved is None:
                return None
            axis, here = moved, after
        # The first axis is that of the samples.
        if axis == 0 or bounds[-1] != here[axis]:
            return None
        return Slices(axis, tuple(bounds))


def endings(proto: onnx.ModelProto) -> dict[str, Ending]:
    """The ``Ending`` of each output of the main graph, by its name."""
    makers = {name: node for node in proto.graph.node for name in node.output if name}
    constants = {tensor.name for tensor in proto.graph.initializer}
    constants |= {name for name, node in makers.items() if node.op_type == "Constant"}
    return {value.name: _ending(value.name, makers, constants) for value in proto.graph.output}


def _ending(output: str, makers: Mapping[str, onnx.NodeProto], constants: set[str]) -> Ending:
    """Go from ``output`` up to the last Concat, through nodes that keep channels apart.

    An activation behind the Concat counts for all parts. Probabilities that are rescaled behind it are none.
    """
    path: list[onnx.NodeProto] = []
    tensor, activation, scaled = output, "", False
    while (node := makers.get(tensor)) is not None and domain_of(node.domain) == DOMAIN:
        if node.op_type == "Concat":
            parts = list[_Part]()
            for name in node.input:
                own = activation or _activation(name, makers)
                parts.append(_Part(name, "" if scaled else own))
            return Ending(output, tuple(parts), attribute(node, "axis", 1), (node, *reversed(path)))
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
    while (node := makers.get(tensor)) is not None and domain_of(node.domain) == DOMAIN:
        if node.op_type in (SIGMOID, SOFTMAX):
            return str(node.op_type)
        if node.op_type not in KEEPING and node.op_type not in MOVING:
            break
        tensor = node.input[0]
    return ""


def _moved(node: onnx.NodeProto, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """Where ``axis`` of ``before`` is behind ``node``; None where it was merged or cut."""
    if node.op_type == "Transpose":
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        return (order or list(reversed(range(len(before))))).index(axis)
    if node.op_type not in MOVING:
        return axis + len(after) - len(before)
    for place, size in enumerate(after):
        if size == before[axis] and prod(after[place + 1 :]) == prod(before[axis + 1 :]):
            return place
    return None
