"""Pairs of layers with only channel-wise work between them, and fewer channels for both.

Channels that one layer gives and only others read need not all be computed. A channel goes with its row of
the layer that gives it, its columns of the layers that read it, and its value in every constant between.
Nothing is added, and what is left is as an exporter would have written a narrower network: smaller constants,
no mask, no Gather.

In attention each head loses a channel at a time. Where all that lies between is linear, the channels of a
head may be turned first: into another basis, in which fewer of them matter.

Queries and keys are such a pair as well, though no layer reads them: their product alone does, and it sums
over the channels. What is turned in the one is turned back in the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.carried_channels import (
    Carried,
    ConstantPart,
    Count,
    Flow,
    OpenShapes,
    Owner,
    Place,
    WrittenSize,
)
from onnx_lrsd.passes.channel_flow import hand_on
from onnx_lrsd.passes.constants import constant_value, overridable, stored_tensor
from onnx_lrsd.passes.find_layers import producer
from onnx_lrsd.passes.nodes import is_op, label, unused_name
from onnx_lrsd.passes.operators import operator_at
from onnx_lrsd.passes.operators.operator import ChannelAxes
from onnx_lrsd.passes.tidy import captured_names, remove_node, remove_orphans
from onnx_lrsd.passes.writer import PART
from onnx_lrsd.types import OUTPUT_OF_MODEL, Declined, Layer

Mask = npt.NDArray[np.bool_]

NARROWED = f"{PART}width"
"""Suffix of the name of a constant that holds the channels which stay."""
NEITHER, QUERIES, KEYS = 0, 1, 2
"""What channels are in a product that sums over them."""


class End(NamedTuple):
    """A layer that gives or reads the channels of a pair.

    ``output`` is its tensor: ``Layer.output`` where it is a layer. ``positions`` (channels, k) has for each
    channel the k outputs, or input channels, of the node that belong to it.
    """

    output: str
    positions: Owner


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """``channels`` that ``producers`` give and ``consumers`` alone read; each stays or goes as a whole.

    ``name`` is what a person calls the first producer. The rest is what a cut changes, by channel: ``parts``
    of constants, ``counts`` of channels, axes of tensors, and ``sizes``, which must stay what they were. All
    of it is of the graph the pair was found in.

    Where there are ``heads``, each has a position of every channel, in order, and its channels may be turned.

    Where a ``product`` alone reads the channels, the tensor of that name, there are no consumers. The first
    producer gives queries, the second one keys, whose parts are the ``opposite`` ones: they are turned by the
    inverse. ``softmax``: it is over all positions of the keys, and nothing else reads the product.
    """

    name: str
    channels: int
    producers: tuple[End, ...]
    consumers: tuple[End, ...]
    parts: tuple[ConstantPart, ...]
    counts: tuple[Count, ...]
    carried: Mapping[str, Carried]
    sizes: tuple[WrittenSize, ...] = ()
    heads: int = 0
    product: str = ""
    softmax: bool = False
    opposite: tuple[ConstantPart, ...] = ()

    @property
    def deciding(self) -> tuple[End, ...]:
        """The layers whose inputs tell what a cut loses: those that read the channels, or are multiplied."""
        return self.consumers or self.producers


@dataclass(kw_only=True)
class _Given:
    """Channels ``first`` to ``first + n - 1``, which the layer ``name`` gives, and why they must all stay.

    ``node`` is the label of the node that ``reason`` names, if it names one.
    """

    name: str
    op: str
    output: str
    first: int
    n: int
    reason: str = ""
    node: str = ""

    @property
    def channels(self) -> slice:
        """Its channels among those of the whole graph."""
        return slice(self.first, self.first + self.n)


@dataclass
class _Seen:
    """What layers give and read, in graph order: their channels are numbered over the whole graph.

    ``straight`` are layers that read channels which may be turned.
    """

    given: list[_Given] = field(default_factory=list)
    read: list[tuple[str, Owner]] = field(default_factory=list)
    straight: set[str] = field(default_factory=set)

    @property
    def total(self) -> int:
        """How many channels there are so far."""
        return self.given[-1].first + self.given[-1].n if self.given else 0

    def block(self, owners: Iterable[Carried | None], reason: str, node: str = "") -> None:
        """These channels must stay, and all that are given with them; the first ``reason`` is kept."""
        for carried in owners:
            for channel in np.unique(carried.owner) if carried is not None else ():
                own = next((g for g in self.given if g.first <= channel < g.first + g.n), None)
                if own is not None and not own.reason:
                    own.reason, own.node = reason, node


class _Sides(NamedTuple):
    """How a layer reads and gives channels: ``n`` outputs, and ``axes``, whose rank is that of its output.

    ``reads`` and ``weight`` are the indices of the activation and of the weight among its inputs.
    """

    reads: int
    weight: int
    n: int
    axes: ChannelAxes


def find_pairs(
    working: WorkingGraph, layers: Sequence[Layer], shapes: OpenShapes
) -> tuple[tuple[Pair, ...], tuple[Declined, ...]]:
    """Every pair of the main graph in graph order, and the layers whose channels must stay, with the reason.

    ``shapes`` are those of tensors as far as they are known, symbols for sizes that are open.

    >>> import numpy as np, onnx, onnx_lrsd
    >>> text = "g (float[n, 64] x) => (float[n, 8] y) { h = MatMul (x, v)  r = Relu (h)  y = MatMul (r, w) }"
    >>> graph = onnx.parser.parse_graph(text)
    >>> weights = {"v": np.ones((64, 32), np.float32), "w": np.ones((32, 8), np.float32)}
    >>> graph.initializer.extend(onnx.numpy_helper.from_array(w, name) for name, w in weights.items())
    >>> opset = onnx.helper.make_opsetid("", 17)
    >>> model = onnx_lrsd.load(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8))
    >>> working = model.graph()
    >>> (pair,), declined = find_pairs(working, onnx_lrsd.find_layers(working)[0], {})
    >>> pair.channels, pair.producers[0].output, pair.consumers[0].output, declined[0].reason
    (32, 'h', 'y', 'they are an output of the model')
    >>> cut(working, [(pair, range(0, 32, 2))])
    >>> {t.name: list(t.dims) for t in model.splice(working).proto.graph.initializer}
    {'v/lrsd/width': [64, 16], 'w/lrsd/width': [16, 8]}
    """
    flow = Flow(working.opset, working.overridable, shapes)
    names = {id(producer(working, layer)): layer.output for layer in layers}
    seen = _Seen()
    for node in working.nodes:
        carried = [flow.carried.get(tensor.name) for tensor in node.inputs]
        sides = _sides(flow, node)
        if sides is not None:
            _pass_layer(flow, seen, node, sides, carried, names.get(id(node), node.outputs[0].name))
        elif any(carried):
            handed = hand_on(flow, node, carried)
            if isinstance(handed, str):
                seen.block(carried, handed, label(node))
                continue
            flow.carried |= {t.name: c for t, c in zip(node.outputs, handed, strict=False) if c is not None}
    sized = {size.output: Carried(-1, None, size.owner) for size in flow.sizes}
    for node in working.nodes:
        if is_op(node, "Shape") and node.inputs[0].name in flow.carried:
            sized[node.outputs[0].name] = flow.carried[node.inputs[0].name]
    for output in working.outputs:
        seen.block([flow.carried.get(output.name), sized.get(output.name)], OUTPUT_OF_MODEL)
    for captured in captured_names(working.graph):
        reason = "a branch or a loop reads them"
        seen.block([flow.carried.get(captured), sized.get(captured)], reason)
    return _pairs(flow, seen)


def _pass_layer(
    flow: Flow, seen: _Seen, node: gs.Node, sides: _Sides, carried: Sequence[Carried | None], name: str
) -> None:
    """Note which channels the layer ``name`` reads, and number those that it gives."""
    reason, own = _read(flow, node, sides, carried), carried[sides.reads]
    if reason:
        seen.block(carried, reason, label(node))
    elif own is not None:
        seen.read.append((name, own.owner))
        if own.heads == 0 and is_op(node, "MatMul", "Gemm"):
            seen.straight.add(name)
    given = _Given(name=label(node), op=node.op, output=name, first=seen.total, n=sides.n)
    given.reason = _give(flow, node, sides, np.arange(given.first, given.first + given.n))
    given.node = given.name if given.reason else ""
    seen.given.append(given)


def _heads(pair: Pair, straight: Set[str]) -> int:
    """How many heads a pair has whose channels may be turned; 0 where they may not, or for one head."""
    heads = pair.consumers[0].positions.shape[1]
    known = all(end.output in straight for end in pair.consumers)
    ends = (*pair.producers, *pair.consumers)
    alike = all(end.positions.shape[1] == heads for end in ends)
    parts = all(len(part.owner[part.owner >= 0]) == heads * pair.channels for part in pair.parts)
    return heads if heads > 1 and known and alike and parts else 0


def _sides(flow: Flow, node: gs.Node) -> _Sides | None:
    """How ``node`` reads and gives channels; None if it is no layer, as one of groups is not."""
    operator = operator_at(node)
    if operator is None:
        return None
    constant = [constant_value(tensor) for tensor in node.inputs[:2]]
    side = next((side for side in operator.WEIGHT_INPUTS if constant[side] is not None), 1)
    weight = constant[side]
    if weight is None or constant[1 - side] is not None:
        return None
    axes = operator.channel_axes(node, weight, side)
    if axes is None:
        return None
    shape = flow.shape(node.inputs[1 - side])
    rank = None if shape is None else len(shape)
    return _Sides(1 - side, side, weight.shape[axes.outputs], axes if axes.rank else axes._replace(rank=rank))


def _read(flow: Flow, node: gs.Node, sides: _Sides, carried: Sequence[Carried | None]) -> str:
    """Note what a cut changes where ``node`` reads channels; why they must stay, '' where they need not."""
    own = carried[sides.reads]
    if any(other is not None for index, other in enumerate(carried) if index != sides.reads):
        return f"{node.op} {label(node)} adds them to others"
    if own is None:
        return ""
    weight = constant_value(node.inputs[sides.weight])
    if own.axis != sides.axes.read or weight is None or weight.shape[sides.axes.inputs] != len(own.owner):
        return f"{node.op} {label(node)} reads them along another axis"
    return flow.take(node, sides.weight, sides.axes.inputs, own.owner)


def _give(flow: Flow, node: gs.Node, sides: _Sides, owner: Owner) -> str:
    """Note what a cut changes where ``node`` gives channels; why they must stay, '' where they need not."""
    reason = flow.take(node, sides.weight, sides.axes.outputs, owner)
    heads = 0 if is_op(node, "MatMul", "Gemm") else None
    if len(node.inputs) > 2 and node.inputs[2].name and not reason:
        bias = constant_value(node.inputs[2])
        if bias is None:
            reason = f"the bias of {node.op} {label(node)} is computed at run time"
        elif bias.ndim and bias.shape[-1] == sides.n and bias.size > 1:
            reason = flow.take(node, 2, -1, owner)
        elif overridable(node.inputs[2], flow.overridable):
            reason = f"the bias of {node.op} {label(node)} may be overridden"
        else:
            heads = None  # one number for all channels is not turned with them
    flow.carried[node.outputs[0].name] = Carried(sides.axes.given, sides.axes.rank, owner, heads)
    return reason


def _pairs(flow: Flow, seen: _Seen) -> tuple[tuple[Pair, ...], tuple[Declined, ...]]:
    """The pairs, and the layers that are in none: sets of channels that are tied are cut alike."""
    sides = _sides_of_products(flow, seen)
    multiplied = [link for p in flow.products for link in zip(p.one.tolist(), p.two.tolist(), strict=True)]
    root = _joined(seen.total, [*flow.ties, *multiplied])
    first_of: dict[int, int] = {}  # the first set that holds a channel tied to this one
    links = []
    for index, own in enumerate(seen.given):
        for channel in np.unique(root[own.channels]).tolist():
            links.append((first_of.setdefault(channel, index), index))
    together = _joined(len(seen.given), links)
    pairs, declined = list[Pair](), list[Declined]()
    for index in np.unique(together):
        sets = [own for own, joined in zip(seen.given, together, strict=True) if joined == index]
        reason, node = next(((own.reason, own.node) for own in sets if own.reason), ("", ""))
        found = [] if reason else _pairs_of(flow, sets, seen, root, sides)
        able = [pair for pair in found if pair.heads or not pair.product]
        pairs += able
        if not able:
            reason = reason or ("they are not alike in all heads" if found else "no layer reads them")
            declined += [Declined(own.name, own.op, reason, node) for own in sets]
    return tuple(pairs), tuple(declined)


def _sides_of_products(flow: Flow, seen: _Seen) -> Owner:
    """By channel of the whole graph: QUERIES or KEYS where one product alone reads it, else NEITHER.

    Those of products that are read otherwise as well must stay.
    """
    root = _joined(seen.total, flow.ties)
    sides = np.zeros(seen.total, dtype=np.int64)
    for product in flow.products:
        one, two = (np.isin(root, root[owner]) for owner in (product.one, product.two))
        both = one | two
        reason = ""
        if (one & two).any() or sides[both].any():
            reason = f"{product.name} multiplies some of them twice, or with each other"
        elif any(both[owner[owner >= 0]].any() for _, owner in seen.read):
            reason = f"{product.name} is not all that reads them"
        elif any(sum(side[own.channels].any() for own in seen.given) > 1 for side in (one, two)):
            reason = f"{product.name} multiplies what several layers give"
        elif np.count_nonzero(one) != np.count_nonzero(two):
            reason = f"{product.name} multiplies other numbers of heads"
        for owner in (product.one, product.two) if reason else ():
            seen.block([Carried(-1, None, owner)], reason, product.name)
        sides[one], sides[two] = QUERIES, KEYS
    return sides


def _pairs_of(flow: Flow, sets: Sequence[_Given], seen: _Seen, root: Owner, sides: Owner) -> list[Pair]:
    """The pairs of sets that are tied: one, or one for each part of the channels that is read alike."""
    groups = np.concatenate([root[own.channels] for own in sets])  # channels of one root go together
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    ranks = np.argsort(np.argsort(first))  # groups are numbered in the order in which they are given
    number = np.full(len(root) + 1, -1)  # by channel; the last entry is that of position -1
    ends_of_sets = np.cumsum([own.n for own in sets])[:-1]
    for own, numbers in zip(sets, np.split(ranks[inverse], ends_of_sets), strict=True):
        number[own.channels] = numbers
    givers = []
    for own in sets:
        by_side = sides[own.channels]
        for side in (NEITHER, QUERIES, KEYS):
            owner = np.where(by_side == side, number[own.channels], -1)
            givers.append(_Member(own.name, own.output, owner, side))
    givers = [member for member in givers if (member.owner >= 0).any()]
    readers = [
        _Member("", output, number[owner]) for output, owner in seen.read if (number[owner] >= 0).any()
    ]
    # A pair has the channels that are given and read alike: by the same layers, at as many positions.
    uses = [np.bincount(end.owner[end.owner >= 0], minlength=len(first)) for end in (*givers, *readers)]
    _, kind = np.unique(np.array(uses), axis=1, return_inverse=True)
    found = []
    for index in np.unique(kind):
        part = np.full(len(first) + 1, -1)
        part[:-1][kind == index] = np.arange(np.count_nonzero(kind == index))
        giving, reading = _renumbered(givers, part), _renumbered(readers, part)
        if any(member.side for member in giving):
            found.append(_multiplied(flow, giving, part[number], sides))
        elif giving and reading:
            pair = _pair(flow, giving, reading, part[number])
            found.append(replace(pair, heads=_heads(pair, seen.straight)))
    return found


class _Member(NamedTuple):
    """A layer that gives or reads channels, with the number of the channel at each position; -1: none."""

    name: str
    output: str
    owner: Owner
    side: int = NEITHER


def _renumbered(members: Iterable[_Member], numbers: Owner) -> list[_Member]:
    """Those of ``members`` that have any of the channels whose new ``numbers`` are not -1."""
    found = [member._replace(owner=numbers[member.owner]) for member in members]
    return [member for member in found if (member.owner >= 0).any()]


def _pair(flow: Flow, giving: Sequence[_Member], reading: Sequence[_Member], number: Owner) -> Pair:
    """The pair of these layers; ``number`` is by channel of the whole graph."""

    def end(output: str, owner: Owner) -> End:
        order = np.argsort(owner, kind="stable")[np.count_nonzero(owner < 0) :]
        return End(output, order.reshape(channels, -1))

    channels = int(number.max()) + 1
    owned = {name: number[c.owner] for name, c in flow.carried.items()}
    return Pair(
        name=giving[0].name,
        channels=channels,
        producers=tuple(end(member.output, member.owner) for member in giving),
        consumers=tuple(end(member.output, member.owner) for member in reading),
        parts=_parts(flow, number),
        counts=tuple(c._replace(owner=number[c.owner]) for c in flow.counts if (number[c.owner] >= 0).any()),
        carried={
            name: flow.carried[name]._replace(owner=owner)
            for name, owner in owned.items()
            if (owner >= 0).any()
        },
        sizes=tuple(z._replace(owner=number[z.owner]) for z in flow.sizes if (number[z.owner] >= 0).any()),
    )


def _multiplied(flow: Flow, giving: Sequence[_Member], number: Owner, sides: Owner) -> Pair:
    """The pair of queries and keys of these layers; its ``heads`` are 0 where they are not all alike."""
    one, two = (np.where(np.append(sides, NEITHER) == side, number, -1) for side in (QUERIES, KEYS))
    product = next(p for p in flow.products if number[p.one[0]] >= 0)
    pair = replace(
        _pair(flow, sorted(giving, key=_side), (), number),
        product=product.output,
        softmax=product.softmax,
        parts=_parts(flow, one),
        opposite=_parts(flow, two),
    )
    heads = {end.positions.shape[1] for end in pair.producers}
    heads |= {np.count_nonzero(p.owner >= 0) / pair.channels for p in (*pair.parts, *pair.opposite)}
    return replace(pair, heads=pair.producers[0].positions.shape[1] if len(heads) == 1 else 0)


def _side(member: _Member) -> int:
    return member.side


def _parts(flow: Flow, number: Owner) -> tuple[ConstantPart, ...]:
    """What is cut of constants; ``number`` is by channel of the whole graph."""
    return tuple(p._replace(owner=number[p.owner]) for p in flow.parts if (number[p.owner] >= 0).any())


def _joined(count: int, links: Iterable[tuple[int, int]]) -> Owner:
    """Connected components (union-find): for each of ``count`` numbers the least one in its component."""
    parent = list(range(count))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for one, two in links:
        low, high = sorted((root(one), root(two)))
        parent[high] = low
    return np.array([root(number) for number in range(count)], dtype=np.int64)


class _Masks(NamedTuple):
    """What stays of constants by place and axis, of counts by place and entry, of tensors' axes by name."""

    parts: Mapping[Place, Mapping[int, Mask]]
    counts: Mapping[Place, Mapping[int | None, Mask]]
    axes: Mapping[str, tuple[int, Mask]]


def _masks(cuts: Iterable[tuple[Pair, Sequence[int]]]) -> _Masks:
    """What the ``cuts``, pairs with the channels that stay, leave together."""
    parts = defaultdict[Place, dict[int, Mask]](dict)
    counts = defaultdict[Place, dict[int | None, Mask]](dict)
    axes: dict[str, tuple[int, Mask]] = {}
    for pair, kept in cuts:
        stays = np.zeros(pair.channels + 1, dtype=bool)
        stays[[*kept, -1]] = True  # the last entry is for positions of no channel, whose owner is -1
        for place, axis, owner in (*pair.parts, *pair.opposite):
            parts[place][axis] = stays[owner] & parts[place].get(axis, True)
        for place, entry, owner in pair.counts:
            counts[place][entry] = stays[owner] & counts[place].get(entry, True)
        for name, carried in pair.carried.items():
            known = axes[name][1] if name in axes else True
            axes[name] = carried.axis, stays[carried.owner] & known
    return _Masks(parts, counts, axes)


def cut(working: WorkingGraph, cuts: Iterable[tuple[Pair, Sequence[int]]]) -> None:
    """Keep the given channels of each pair and cut the others, of all pairs at once.

    The pairs can no longer be used then. Consumers are not refitted: they lose what the other channels gave
    them. Constants that another node reads are copied.
    """
    cuts = list(cuts)
    masks = _masks(cuts)
    nodes = {tensor.name: node for node in working.nodes for tensor in node.outputs}
    made = _Constants(working)
    for place, by_axis in masks.parts.items():
        node = nodes[place.output]
        values = np.asarray(constant_value(node.inputs[place.given]))
        for axis, mask in by_axis.items():
            values = np.compress(mask, values, axis=axis)
        made.put(node, int(place.given), values)
    for place, counted in masks.counts.items():
        node = nodes[place.output]
        if isinstance(place.given, str):
            renewed = _count_attribute(working, node, place.given, counted)
            nodes.update((tensor.name, renewed) for tensor in renewed.outputs)
            continue
        values = np.array(constant_value(node.inputs[place.given]))
        for entry, mask in counted.items():
            values.reshape(-1)[entry] = np.count_nonzero(mask)
        made.put(node, place.given, values)
    tensors = working.tensors()
    for name, (axis, mask) in masks.axes.items():
        shape = tensors[name].shape
        if shape is not None and isinstance(shape[axis], int):
            sizes = list(shape)
            sizes[axis] = np.count_nonzero(mask)
            tensors[name].shape = sizes
    for size in (size for pair, _ in cuts for size in pair.sizes):
        _write(working, made, tensors[size.output], np.full(size.shape, len(size.owner)))
    remove_orphans(working, made.replaced)


def _write(working: WorkingGraph, made: _Constants, size: gs.Tensor, value: npt.NDArray[np.int64]) -> None:
    """Write the ``value`` of a size in the places where it is read, and take away what found it."""
    for reader in list(size.outputs):
        for index, given in enumerate(reader.inputs):
            if given is size:
                made.put(reader, index, value)
    waiting = list(size.inputs)
    while waiting:
        node = waiting.pop()
        if is_op(node, "Gather", "Slice", "Shape") and not any(tensor.outputs for tensor in node.outputs):
            waiting += node.inputs[0].inputs
            node.inputs.clear()
            node.outputs.clear()
            remove_node(working, node)


def turn(working: WorkingGraph, pair: Pair, bases: npt.NDArray[np.float64]) -> None:
    """Turn the channels of each head by its own of the ``bases`` (heads, channels, channels).

    Those of queries and keys may be any that are invertible, all others are orthogonal. Whatever constants a
    cut would change are turned in the same way, so what reads the channels gives the same but for rounding.
    The pair stays as it is.
    """
    nodes = {tensor.name: node for node in working.nodes for tensor in node.outputs}
    made = _Constants(working)
    back = inverses(bases) if pair.product else bases
    for matrices, parts in ((bases, pair.parts), (back, pair.opposite)):
        for place, axis, owner in parts:
            node = nodes[place.output]
            values = np.asarray(constant_value(node.inputs[place.given]))
            turned = np.moveaxis(values, axis, -1).astype(np.float64)
            order = np.argsort(owner, kind="stable")[np.count_nonzero(owner < 0) :]
            for at, matrix in zip(order.reshape(pair.channels, -1).T, matrices, strict=True):
                turned[..., at] = turned[..., at] @ matrix.T
            made.put(node, int(place.given), np.moveaxis(turned, -1, axis).astype(values.dtype))
    remove_orphans(working, made.replaced)


def inverses(bases: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """By what keys are turned where queries are turned by ``bases``: products of the two stay the same."""
    return np.asarray(np.linalg.inv(bases).transpose(0, 2, 1), dtype=np.float64)


def cut_tensors(working: WorkingGraph, pair: Pair) -> set[str]:
    """Names of the stored tensors that a cut of ``pair`` would replace, weights of its layers included."""
    nodes = {tensor.name: node for node in working.nodes for tensor in node.outputs}
    parts = (*pair.parts, *pair.opposite)
    given = [nodes[place.output].inputs[int(place.given)] for place, _, _ in parts]
    return {stored_tensor(tensor).name for tensor in given}


def _count_attribute(
    working: WorkingGraph, node: gs.Node, name: str, counted: Mapping[int | None, Mask]
) -> gs.Node:
    """A node in the place of ``node``, whose attribute or entries of it count the channels that are left."""
    attributes = dict(node.attrs)
    for entry, mask in counted.items():
        number = int(np.count_nonzero(mask))
        if entry is None:
            attributes[name] = number
        else:
            attributes[name] = [*attributes[name][:entry], number, *attributes[name][entry + 1 :]]
    inputs, outputs = list(node.inputs), list(node.outputs)
    node.inputs.clear()
    node.outputs.clear()
    renewed = gs.Node(node.op, node.name, attributes, inputs, outputs, node.domain)
    place = next(i for i, other in enumerate(working.nodes) if other is node)
    working.nodes[place] = renewed
    return renewed


class _Constants:
    """Puts new constants in the places of old ones; equal ones in the place of one are one."""

    def __init__(self, working: WorkingGraph) -> None:
        self.replaced: list[gs.Tensor] = []
        self._taken = set(working.tensors())
        self._made = defaultdict[int, list[gs.Constant]](list)

    def put(self, node: gs.Node, index: int, values: npt.NDArray[Any]) -> None:
        old = node.inputs[index]
        made = self._made[id(old)]
        new = next((c for c in made if np.array_equal(c.values, values)), None)
        if new is None:
            new = gs.Constant(self._name(old.name), np.ascontiguousarray(values))
            made.append(new)
        self.replaced.append(old)
        node.inputs[index] = new

    def _name(self, old: str) -> str:
        return unused_name(f"{old.removesuffix(NARROWED)}{NARROWED}", self._taken)
