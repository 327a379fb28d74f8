"""What the outputs of a model are concatenated from, and what makes them probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import onnx

from onnx_lrsd.passes.nodes import DOMAIN, attribute, domain_of

SIGMOID, SOFTMAX, LOG_SOFTMAX = "Sigmoid", "Softmax", "LogSoftmax"
PROBABLE = (SIGMOID, SOFTMAX, LOG_SOFTMAX)
"""Activations that give probabilities, or their logarithms."""

KEEPING = ("Identity", "Cast", "QuantizeLinear", "DequantizeLinear", "Clip", "Relu", SIGMOID)
"""Nodes that leave shapes alone and keep channels apart."""
MOVING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")
"""Nodes that move entries to other places."""
PICKING = ("Split", "Slice", "Gather")
"""Nodes that take some entries."""
BY_CONSTANT = ("Add", "Sub", "Mul", "Div")
"""Nodes that keep channels apart where one of their two operands is a constant."""
DEEPEST = 3
"""Concats, one in front of the other, that are looked at."""

_Shapes = Mapping[str, tuple[int, ...]]


class Operand(NamedTuple):
    """One operand of a Concat; ``activation`` is one of PROBABLE where it holds probabilities, else ''."""

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
    ``before`` are the ways to the output through one of the operands each, from Concats of their own.
    """

    output: str
    parts: tuple[Operand, ...]
    axis: int
    path: tuple[onnx.NodeProto, ...]
    before: tuple[Ending, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """Tensors whose shapes ``partitions`` needs; none without a Concat."""
        if not self.path:
            return ()
        own = (*(part.tensor for part in self.parts), *(node.output[0] for node in self.path))
        return (*own, *(tensor for ending in self.before for tensor in ending.tensors))

    def partitions(self, shapes: _Shapes) -> list[tuple[tuple[Operand, ...], Slices]]:
        """The parts that the output can be cut into, and where they lie.

        By the last Concat, and by those in front of it where all of its operands are joined alike, as those
        of a detector's levels, of boxes and scores each.
        """
        found = [] if (own := self.slices(shapes)) is None else [(self.parts, own)]
        deeper = [ending.partitions(shapes) for ending in self.before]
        for parts, slices in deeper[0] if deeper else []:
            alike = [part.activation for part in parts], slices
            if all(
                any(([part.activation for part in others], place) == alike for others, place in each)
                for each in deeper
            ):
                found.append((parts, slices))
        return found

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
    return {value.name: _ending(value.name, value.name, makers, constants) for value in proto.graph.output}


def _ending(
    output: str,
    tensor: str,
    makers: Mapping[str, onnx.NodeProto],
    constants: set[str],
    *,
    behind: tuple[onnx.NodeProto, ...] = (),
    activation: str = "",
    scaled: bool = False,
    deepest: int = DEEPEST,
) -> Ending:
    """Go from ``tensor`` up to the last Concat, through nodes that keep channels apart.

    An activation behind the Concat counts for all parts. Probabilities that are rescaled behind it are none.
    ``behind`` are the nodes between ``tensor`` and ``output``, with the ``activation`` there, and whether
    values are ``scaled``.
    """
    start, path = tensor, list[onnx.NodeProto]()
    while (node := makers.get(tensor)) is not None and domain_of(node.domain) == DOMAIN:
        if node.op_type == "Concat":
            parts = list[Operand]()
            for name in node.input:
                own = activation or _activation(name, makers)
                parts.append(Operand(name, "" if scaled else own))
            way = (node, *reversed(path), *behind)
            before = tuple(
                _ending(
                    output,
                    name,
                    makers,
                    constants,
                    behind=way,
                    activation=activation,
                    scaled=scaled,
                    deepest=deepest - 1,
                )
                for name in node.input[: len(node.input) if deepest > 1 else 0]
            )
            return Ending(output, tuple(parts), attribute(node, "axis", 1), way, before)
        if node.op_type in PROBABLE and not scaled:
            activation = activation or node.op_type
        following = _operand(node, constants)
        if following is None:
            break
        scaled = scaled or node.op_type in (*BY_CONSTANT, "Relu")
        path.append(node)
        tensor = following
    if not scaled:
        activation = activation or _activation(tensor, makers)
    return Ending(output, (Operand(start, activation),), 0, ())


def _operand(node: onnx.NodeProto, constants: set[str]) -> str | None:
    """The operand whose channels ``node`` keeps apart, if it does."""
    if node.op_type in KEEPING or node.op_type in MOVING:
        return str(node.input[0])
    if node.op_type in BY_CONSTANT:
        varying = [name for name in node.input if name not in constants]
        return varying[0] if len(varying) == 1 else None
    return None


def _activation(tensor: str, makers: Mapping[str, onnx.NodeProto]) -> str:
    """Which of PROBABLE gave ``tensor``, perhaps moved or cast, or some entries of it; '' where none did."""
    while (node := makers.get(tensor)) is not None and domain_of(node.domain) == DOMAIN:
        if node.op_type in PROBABLE:
            return str(node.op_type)
        if node.op_type not in (*KEEPING, *MOVING, *PICKING):
            break
        tensor = node.input[0]
    return ""


def _moved(node: onnx.NodeProto, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """Where ``axis`` of ``before`` is behind ``node``; None where it was merged or cut."""
    if node.op_type == "Transpose":
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        return (order or list(reversed(range(len(before))))).index(axis)
    if node.op_type == "Concat":
        return None if attribute(node, "axis", 1) % len(after) == axis else axis
    if node.op_type not in MOVING:
        return axis + len(after) - len(before)
    for place, size in enumerate(after):
        if size == before[axis] and prod(after[place + 1 :]) == prod(before[axis + 1 :]):
            return place
    return None
