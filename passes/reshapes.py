"""Where channels lie behind a Reshape: on one axis still, perhaps at many positions, or in heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from onnx_lrsd.graph.shapes import OpenShape
from onnx_lrsd.passes.carried_channels import SCALES, Carried, Count, Flow, Handed, Owner, Place, length_of
from onnx_lrsd.passes.constants import constant_value
from onnx_lrsd.passes.nodes import is_op, label


def reshaped(flow: Flow, node: gs.Node, carried: Carried) -> Handed:
    """Reshape and Flatten that keep each channel on one axis, perhaps at many positions."""
    before = flow.shape(node.inputs[0])
    if before is None and carried.axis == -1:
        before = (None, len(carried.owner))  # whatever lies in front counts as one axis
    after = flow.shape(node.outputs[0]) or _target(flow, node)
    spread = f"{node.op} {label(node)} spreads them over axes, or its shapes are not known"
    if before is None or after is None:
        return spread
    blocks = _aligned(before, after)
    block = next((b for b in blocks if carried.axis + len(before) in b.before), None)
    owners = None if block is None else _owners_behind(carried, block, before, after)
    if block is None or owners is None:
        return spread
    split = len(block.before) == 1 and len(block.after) == 2
    if split and _in_attention(node, block.after[1] - len(after), len(after)):
        found = _in_heads(flow, owners)
    else:
        found = _on_one_axis(flow, owners)
    if found is None:
        return spread
    axis, owner = block.after[0] + found[0], found[1]
    flow.note(node.outputs[0], after)
    heads = _heads(carried, blocks, len(before), len(after))
    if is_op(node, "Reshape"):
        reason = _count_entry(flow, node, axis, carried.axis + len(before), owner)
        if reason:
            return reason
    return [Carried(axis - len(after), len(after), owner, heads)]


class _Block(NamedTuple):
    """Consecutive axes of the shape before a Reshape and of that after it, which hold as many entries."""

    before: list[int]
    after: list[int]


def _owners_behind(
    carried: Carried,
    block: _Block,
    before: Sequence[int | str | None],
    after: Sequence[int | str | None],
) -> Owner | None:
    """The owner of each position of the axes that ``block`` has after a Reshape; None if not known."""
    old, new = [before[axis] for axis in block.before], [after[axis] for axis in block.after]
    if len(old) == len(new) == 1:
        return carried.owner
    sizes = [size for size in old if isinstance(size, int)], [size for size in new if isinstance(size, int)]
    if len(sizes[0]) < len(old) or len(sizes[1]) < len(new):
        return None
    along = [1] * len(old)
    along[carried.axis + len(before) - block.before[0]] = len(carried.owner)
    return np.broadcast_to(carried.owner.reshape(along), sizes[0]).reshape(sizes[1])


def _in_attention(node: gs.Node, axis: int, rank: int) -> bool:
    """Whether a product of two computed operands alone reads what ``node`` gives, of ``rank`` axes.

    ``axis``, where a head has its channels, must be one of the last two of it. Scales may stand in between.
    """
    tensor, readers = node.outputs[0], _readers(node.outputs[0])
    while len(readers) == 1 and is_op(readers[0], "Transpose", *SCALES):
        if is_op(readers[0], "Transpose"):
            order = readers[0].attrs.get("perm", list(range(rank))[::-1])
            axis = order.index(axis + rank) - rank
        tensor = readers[0].outputs[0]
        readers = _readers(tensor)
    if len(readers) != 1 or not is_op(readers[0], "MatMul"):
        return False
    first, second = readers[0].inputs
    other = second if first is tensor else first
    return axis in (-1, -2) and constant_value(other) is None


def _readers(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that read ``tensor``, but for those that read its shape."""
    return [node for node in tensor.outputs if not is_op(node, "Shape")]


def _in_heads(flow: Flow, owners: Owner) -> tuple[int, Owner] | None:
    """The last axis of ``owners`` (heads, channels), whose positions of all heads are tied together."""
    if (owners < 0).any() or len(np.unique(owners)) != owners.size:
        return None
    for own in owners.T:
        flow.tie(own.tolist())
    return 1, owners[0]


def _heads(carried: Carried, blocks: Sequence[_Block], before: int, after: int) -> int | None:
    """The axis of the heads behind a Reshape of these ``blocks``; as in ``Carried``."""
    if carried.heads is None:
        return None
    own = next(block for block in blocks if carried.axis + before in block.before)
    if carried.heads == 0:
        if len(own.before) != 1 or len(own.after) > 2:
            return None
        return 0 if len(own.after) == 1 else own.after[0] - after
    at = carried.heads + before
    if own.before == [at, carried.axis + before] and len(own.after) == 1:
        return 0
    of_heads = next(block for block in blocks if at in block.before)
    alone = all(len(axes) == 1 for axes in (*own, *of_heads))
    return of_heads.after[0] - after if alone else None


def _target(flow: Flow, node: gs.Node) -> OpenShape | None:
    """The shape that a Reshape asks for, as far as it is constant; None for sizes that are copied or left."""
    if len(node.inputs) < 2:
        return None
    source = node.inputs[1]
    value = constant_value(source)
    if value is not None:
        return tuple(int(size) if size > 0 else None for size in value.ravel())
    if not source.inputs or not is_op(source.inputs[0], "Concat"):
        return None
    found = list[int | str | None]()
    for piece in source.inputs[0].inputs:
        value = constant_value(piece)
        if value is not None:
            found += [int(size) if size > 0 else None for size in value.ravel()]
            continue
        length = length_of(flow.shape(piece), 0) if flow.shape(piece) else 0
        if not length:
            return None
        found += [None] * length
    return tuple(found)


def _aligned(before: Sequence[int | str | None], after: Sequence[int | str | None]) -> list[_Block]:
    """The axes of two shapes in blocks of like size, the least ones; none where they do not align.

    From the front if all sizes can be told, else from the end as far as they are known: what is left on both
    sides is one block.
    """
    return _from_the_front(before, after) or _from_the_end(before, after)


def _from_the_end(before: Sequence[int | str | None], after: Sequence[int | str | None]) -> list[_Block]:
    blocks: list[_Block] = []
    i, j = len(before), len(after)
    while i and j:
        first, second = i, j  # the block has the axes from these on
        held_before = held_after = 1
        while (first, second) == (i, j) or held_before != held_after or second == j:
            fewer_before = first == i or (held_before < held_after and second < j)
            shape, axis = (before, first - 1) if fewer_before else (after, second - 1)
            size = _known_size(shape, axis) if axis >= 0 else None
            if size is None:
                return [_Block([*range(i)], [*range(j)]), *blocks] if blocks else []
            if fewer_before:
                held_before, first = held_before * size, axis
            else:
                held_after, second = held_after * size, axis
        blocks.insert(0, _Block([*range(first, i)], [*range(second, j)]))
        i, j = first, second
    return [_Block([*range(i)], [*range(j)]), *blocks]


def _from_the_front(before: Sequence[int | str | None], after: Sequence[int | str | None]) -> list[_Block]:
    blocks: list[_Block] = []
    i = j = 0
    while i < len(before) and j < len(after):
        if before[i] == after[j] and before[i] is not None:
            blocks.append(_Block([i], [j]))
            i, j = i + 1, j + 1
            continue
        # Axes are added one by one, to the side with fewer entries, until both sides hold as many.
        block, held_before, held_after = _Block([], []), 1, 1
        while not block.before or held_before != held_after:
            fewer_before = held_before < held_after and bool(block.after)
            if fewer_before or not block.before:
                size = _known_size(before, i)
                block.before.append(i)
                held_before, i = held_before * (size or 0), i + 1
            else:
                size = _known_size(after, j)
                block.after.append(j)
                held_after, j = held_after * (size or 0), j + 1
            if size is None:
                return []
        blocks.append(block)
    rest = _Block([*range(i, len(before))], [*range(j, len(after))])
    if any(before[a] != 1 for a in rest.before) or any(after[a] != 1 for a in rest.after) or not blocks:
        return []
    last = blocks[-1]
    blocks[-1] = _Block(last.before + rest.before, last.after + rest.after)
    return blocks


def _known_size(shape: Sequence[int | str | None], axis: int) -> int | None:
    """The size of an axis; None where it is open, or where there is no such axis."""
    size = shape[axis] if axis < len(shape) else None
    return size if isinstance(size, int) else None


def _on_one_axis(flow: Flow, owners: Owner) -> tuple[int, Owner] | None:
    """The axis along which alone ``owners`` change, and the owner of each of its positions.

    Else the first of some length, if all channels at one of its positions may be tied together.
    """
    rows = [np.moveaxis(owners, axis, 0).reshape(owners.shape[axis], -1) for axis in range(owners.ndim)]
    for axis, row in enumerate(rows):
        if (row == row[:, :1]).all() and len(row) > 1:
            return axis, row[:, 0]
    long = [axis for axis, row in enumerate(rows) if len(row) > 1]
    if not long or (owners < 0).any():
        return None
    row = rows[long[0]]
    if sum(len(np.unique(own)) for own in row) != len(np.unique(row)):
        return None
    for own in row:
        flow.tie(np.unique(own).tolist())
    return long[0], row[:, 0]


def _count_entry(flow: Flow, node: gs.Node, axis: int, before: int, owner: Owner) -> str:
    """Note the entry of a Reshape's shape that counts the channels; why that cannot be, '' where it can."""
    unknown = f"the shape of {node.op} {label(node)} is computed at run time"
    if len(node.inputs) < 2:
        flow.count(node, "shape", axis, owner)
        return ""
    shape, index = node.inputs[1], axis
    value, place = constant_value(shape), Place(node.outputs[0].name, 1)
    source = shape.inputs[0] if value is None and shape.inputs else None
    if source is not None and is_op(source, "Concat"):
        for given, piece in enumerate(source.inputs):
            value, place = constant_value(piece), Place(source.outputs[0].name, given)
            length = length_of(flow.shape(piece), 0) if value is None else value.size
            if not length or index < length:
                break
            index -= length
    if value is None:
        return unknown
    entry = int(value.ravel()[index])
    if entry == 0 and not node.attrs.get("allowzero", 0):
        return "" if axis == before else unknown
    if entry > 0:
        flow.counts.append(Count(place, index, owner))
    return ""
