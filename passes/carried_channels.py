"""What is known of channels on their way through a graph: where each lies, and which constants count them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_lrsd.graph.shapes import OpenShape
from onnx_lrsd.passes.constants import constant_value, overridable
from onnx_lrsd.passes.nodes import label

Owner: TypeAlias = npt.NDArray[np.int64]
OpenShapes: TypeAlias = Mapping[str, Sequence[int | str | None]]

SCALES = ("Mul", "Div")
"""Operators that are linear where all channels of a head are scaled alike."""


class Carried(NamedTuple):
    """The channels of a tensor: ``owner`` (length,) has the channel of each position of ``axis``, -1: none.

    ``axis`` counts from the end, so broadcasting does not move it; ``rank`` is None if not known.

    Channels are *turned* when as many linear combinations of them take their place, in each head of attention
    by itself. ``heads`` is the axis of the heads, from the end too, or 0 while the channels of all heads are
    on one axis in their order. It is None where channels may not be turned: what lies between is not linear
    in them, or heads may be out of order.
    """

    axis: int
    rank: int | None
    owner: Owner
    heads: int | None = None


class Place(NamedTuple):
    """An input (its index) or an attribute (its name) of the node that gives the tensor ``output``."""

    output: str
    given: int | str


class ConstantPart(NamedTuple):
    """A constant, and in ``owner`` the channel of each of its positions along ``axis``; -1: none."""

    place: Place
    axis: int
    owner: Owner


class Count(NamedTuple):
    """A number that counts channels, those in ``owner``: ``entry`` of a constant or an attribute.

    ``entry`` None: the number is all of it.
    """

    place: Place
    entry: int | None
    owner: Owner


class HeadProduct(NamedTuple):
    """The node ``name``, which gives ``output``, sums over channels: ``one`` of queries, ``two`` of keys.

    Position by position these are multiplied with each other. Of heads, one stands for all. ``softmax``: one
    over all positions of the keys alone reads what comes of it.
    """

    output: str
    name: str
    one: Owner
    two: Owner
    softmax: bool


class WrittenSize(NamedTuple):
    """The tensor ``output``, of that ``shape``, is how many positions ``owner`` has, for calculations alone.

    A scale of attention, 1 / sqrt(size), stays what it was where channels go.
    """

    output: str
    shape: tuple[int, ...]
    owner: Owner


@dataclass
class Flow:
    """What was found on the way through the graph; channels are numbered over all of it."""

    opset: int
    overridable: frozenset[str]
    shapes: OpenShapes
    carried: dict[str, Carried] = field(default_factory=dict)
    parts: list[ConstantPart] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    ties: list[tuple[int, int]] = field(default_factory=list)
    """Channels that stay or go together."""
    products: list[HeadProduct] = field(default_factory=list)
    sizes: list[WrittenSize] = field(default_factory=list)
    seen: dict[str, OpenShape] = field(default_factory=dict)
    """Shapes that were found on the way, of tensors of which nothing else was known."""

    def shape(self, tensor: gs.Tensor) -> OpenShape | None:
        """The shape of ``tensor`` as far as it is known."""
        value = constant_value(tensor)
        if value is not None:
            return value.shape
        found = self.shapes.get(tensor.name, tensor.shape)
        return self.seen.get(tensor.name) if found is None else tuple(found)

    def note(self, tensor: gs.Tensor, shape: Sequence[int | str | None]) -> None:
        """Note the ``shape`` that was found of ``tensor``, if nothing is known of it."""
        if self.shape(tensor) is None:
            self.seen[tensor.name] = tuple(shape)

    def take(self, node: gs.Node, index: int, axis: int, owner: Owner) -> str:
        """Note that a constant input is cut along ``axis``; returns why it cannot be, '' where it can."""
        if overridable(node.inputs[index], self.overridable):
            return f"{node.op} {label(node)} reads a constant that a caller may override"
        if (owner >= 0).any():
            self.parts.append(ConstantPart(Place(node.outputs[0].name, index), axis, owner))
        return ""

    def count(self, node: gs.Node, given: int | str, index: int | None, owner: Owner) -> None:
        """Note that a number of ``node`` counts the positions of ``owner``."""
        if (owner >= 0).any():
            self.counts.append(Count(Place(node.outputs[0].name, given), index, owner))

    def tie(self, channels: Iterable[int]) -> None:
        """These channels stay or go together."""
        first, *others = channels
        self.ties.extend((first, other) for other in others)

    def merge(self, one: Owner, two: Owner) -> bool:
        """Tie the channels of two axes position by position; False where one holds what is no channel."""
        if one.shape != two.shape or ((one < 0) != (two < 0)).any():
            return False
        self.ties.extend((int(a), int(b)) for a, b in zip(one, two, strict=True) if a >= 0 and a != b)
        return True


Given: TypeAlias = Sequence[Carried | None]
Handed: TypeAlias = list[Carried | None] | str
"""The channels of each output, or why these can no longer be told apart."""


def length_of(shape: Sequence[int | str | None] | None, axis: int) -> int:
    """The size of an axis; 0 where it is open, or the shape is not known."""
    size = None if shape is None else shape[axis]
    return size if isinstance(size, int) else 0
