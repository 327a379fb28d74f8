"""How each operator hands on channels: along which axis, and which channel every position belongs to.

A node is channel-wise where each channel of what it gives needs that channel of what it reads alone. Most are
nodes of elementwise operators, whatever function they compute together; the others move channels about.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnx_lrsd.passes.carried_channels import (
    SCALES,
    Carried,
    Flow,
    Given,
    Handed,
    HeadProduct,
    WrittenSize,
    length_of,
)
from onnx_lrsd.passes.constants import constant_value
from onnx_lrsd.passes.nodes import DOMAIN, domain_of, is_op, label
from onnx_lrsd.passes.reshapes import reshaped

UNARY = {
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cast", "Ceil", "Celu", "Cos", "Cosh", "Elu"),
    *("Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu"),
    *("Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin"),
    *("Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu", "QuickGelu"),
}
BROADCAST = {
    *("Add", "And", "BiasGelu", "Clip", "Div", "Dropout", "Equal", "FastGelu", "Greater", "GreaterOrEqual"),
    *("Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where"),
    "Xor",
}
LINEAR = ("Add", "Identity", "Dropout")
"""Linear operators, in front of which channels may be turned (see ``Carried``). Where an Add has a value for
each channel, these values are turned as well."""
KEEP_HEADS = ("Reshape", "Transpose", "Split", "Slice")
"""Handlers of these say themselves on which axis heads lie behind them; behind others none may be turned."""
FLOATING = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
POOLS = ("MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool")
REDUCTIONS = {
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
    *("ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"),
}
DOMAINS = (DOMAIN, "com.microsoft")


def hand_on(flow: Flow, node: gs.Node, given: Given) -> Handed:
    """The channels of what ``node`` gives, by those of its inputs, one of which has some."""
    if domain_of(node.domain) not in DOMAINS:
        return _mixed(node)
    if node.op in UNARY or node.op in BROADCAST:
        if any(output.name and output.outputs for output in node.outputs[1:]):
            return _mixed(node)
        return _elementwise(flow, node, given)
    if is_op(node, "Concat"):
        return _bent(_concat(flow, node, given))
    if is_op(node, "MatMul"):
        return _weighted(flow, node, given)
    handler, first = _HANDLERS.get(node.op), given[0]
    if handler is None or first is None or any(other is not None for other in given[1:]):
        return _mixed(node)
    handed = handler(flow, node, first)
    return handed if node.op in KEEP_HEADS else _bent(handed)


def _bent(handed: Handed) -> Handed:
    """The same channels, marked as such that may not be turned from here on."""
    if isinstance(handed, str):
        return handed
    return [None if carried is None else carried._replace(heads=None) for carried in handed]


def _weighted(flow: Flow, node: gs.Node, given: Given) -> Handed:
    """A product that sums over another axis, as attention weights values: each channel by itself.

    Or one that sums over the channels of both operands, as that of queries and keys.
    """
    one, two = given
    if one is not None and two is not None:
        return _summed(flow, node, one, two)
    side = 0 if given[0] is not None else 1
    own, other = given[side], _rank(flow, node.inputs[1 - side])
    kept = -2 if side == 0 else -1  # the axis of this operand that is not summed over
    if own is None or given[1 - side] is not None or own.rank is None or other is None:
        return _mixed(node)
    if own.axis != kept or min(own.rank, other) < 2:
        return _mixed(node)
    shape = flow.shape(node.inputs[side])
    if shape is not None and own.rank >= other:
        given_axes = [size if axis == kept else None for axis, size in zip((-2, -1), shape[-2:], strict=True)]
        flow.note(node.outputs[0], (*shape[:-2], *given_axes))
    # The last two axes are those of the product: heads must lie in front of them.
    in_front = own.heads is not None and (own.heads == 0 or own.heads < -2)
    heads = own.heads if in_front else None
    return [own._replace(rank=max(own.rank, other), heads=heads)]


def _rank(flow: Flow, tensor: gs.Tensor) -> int | None:
    """The rank of ``tensor``: what a softmax or a scale gives has that of what it reads."""
    shape = flow.shape(tensor)
    while shape is None and tensor.inputs and is_op(tensor.inputs[0], "Softmax", *SCALES):
        read = [other for other in tensor.inputs[0].inputs if not _is_number(flow, other)]
        if len(read) != 1:
            return None
        (tensor,) = read
        shape = flow.shape(tensor)
    return None if shape is None else len(shape)


def _summed(flow: Flow, node: gs.Node, one: Carried, two: Carried) -> Handed:
    """A product that sums over the channels of both operands, in each head for itself."""
    along = (one.axis, two.axis) == (-1, -2) and len(one.owner) == len(two.owner)
    whole = (one.owner >= 0).all() and (two.owner >= 0).all()
    if min(one.axis, two.axis) < -2:
        return f"{node.op} {label(node)} multiplies channels that are mixed, or read by others, in between"
    if not along or not whole:
        return _mixed(node)
    if one.heads is None or one.heads != two.heads or one.heads in (-1, -2):
        return f"{node.op} {label(node)} multiplies what is not linear in them, or not alike in all heads"
    ranks = one.rank, two.rank
    rank = None if None in ranks else max(rank for rank in ranks if rank is not None)
    if rank is not None:
        flow.note(node.outputs[0], [None] * rank)
    softmax = _softmax_alone(flow, node.outputs[0], rank)
    flow.products.append(
        HeadProduct(node.outputs[0].name, f"{node.op} {label(node)}", one.owner, two.owner, softmax)
    )
    return [None]


def _softmax_alone(flow: Flow, tensor: gs.Tensor, rank: int | None) -> bool:
    """Whether a Softmax over the last of ``rank`` axes alone reads ``tensor``, scaled and masked perhaps."""
    while len(tensor.outputs) == 1:
        reader = tensor.outputs[0]
        if is_op(reader, "Softmax"):
            return reader.attrs.get("axis", -1) in (-1, None if rank is None else rank - 1)
        others = [other for other in reader.inputs if other is not tensor]
        scale = is_op(reader, *SCALES) and all(_is_number(flow, other) for other in others)
        if not scale and not is_op(reader, "Add", "Where", "Cast"):
            return False
        tensor = reader.outputs[0]
    return False


def _is_number(flow: Flow, tensor: gs.Tensor) -> bool:
    shape = flow.shape(tensor)
    return shape is not None and all(size == 1 for size in shape)


def _mixed(node: gs.Node) -> str:
    """Why channels can no longer be told apart behind ``node``."""
    return f"{node.op} {label(node)} may mix them"


def _elementwise(flow: Flow, node: gs.Node, given: Given) -> Handed:
    first = next(carried for carried in given if carried is not None)
    carrying = sum(carried is not None for carried in given)
    scales = is_op(node, *SCALES) and carrying == 1 and (is_op(node, "Mul") or given[0] is not None)
    linear = is_op(node, *LINEAR) or scales
    if is_op(node, *BROADCAST) and flow.opset < 7 and len(node.inputs) > 1:
        return f"{node.op} {label(node)} broadcasts in the way of old operator sets"
    ranks = [first.rank]
    for index, (tensor, carried) in enumerate(zip(node.inputs, given, strict=True)):
        if carried is not None:
            if carried.axis != first.axis or not flow.merge(first.owner, carried.owner):
                return f"{node.op} {label(node)} joins them with others"
            ranks.append(carried.rank)
            linear = linear and carried.heads == first.heads
        elif not tensor.is_empty():
            parts = len(flow.parts)
            reason = _beside(flow, node, index, first)
            if reason:
                return reason
            by_channel = len(flow.parts) > parts
            linear = linear and (by_channel or not is_op(node, "Add")) and not (by_channel and scales)
            shape = flow.shape(tensor)
            ranks.append(None if shape is None else len(shape))
    known = [rank for rank in ranks if rank is not None]
    rank = max(known) if len(known) == len(ranks) else None
    return [first._replace(rank=rank, heads=first.heads if linear else None)]


def _beside(flow: Flow, node: gs.Node, index: int, carried: Carried) -> str:
    """Why the operand ``index``, which carries no channels, cannot be cut with them; empty where it can."""
    tensor = node.inputs[index]
    shape = flow.shape(tensor)
    if shape is not None and (len(shape) < -carried.axis or shape[carried.axis] == 1):
        return ""
    if constant_value(tensor) is None or shape is None or shape[carried.axis] != len(carried.owner):
        return f"{node.op} {label(node)} joins them with others"
    return flow.take(node, index, carried.axis, carried.owner)


def _concat(flow: Flow, node: gs.Node, given: Given) -> Handed:
    first = next(carried for carried in given if carried is not None)
    axis = _from_end(node.attrs.get("axis", 1), first.rank)
    if axis is None or any(carried is not None and carried.axis != first.axis for carried in given):
        return _mixed(node)
    if axis != first.axis:
        same = all(c is not None and flow.merge(first.owner, c.owner) for c in given)
        return [first] if same else _mixed(node)
    owners = []
    for tensor, carried in zip(node.inputs, given, strict=True):
        shape = flow.shape(tensor)
        if carried is None and (shape is None or not isinstance(shape[axis], int)):
            return _mixed(node)
        owners.append(np.full(length_of(shape, axis), -1) if carried is None else carried.owner)
    return [first._replace(owner=np.concatenate(owners))]


def _from_end(axis: int, rank: int | None) -> int | None:
    """``axis`` counted from the end; None where that takes a rank that is not known."""
    if axis < 0:
        return axis
    return None if rank is None else axis - rank


def _is_second(carried: Carried) -> bool:
    """Whether channels are where images have them."""
    return carried.rank is not None and carried.axis == 1 - carried.rank


def _pool(flow: Flow, node: gs.Node, carried: Carried) -> Handed:
    second_used = any(output.name and output.outputs for output in node.outputs[1:])
    return [carried] if _is_second(carried) and not second_used else _mixed(node)


def _normalised(flow: Flow, node: gs.Node, carried: Carried) -> Handed:
    """BatchNormalization and InstanceNormalization: constants of one value a channel."""
    training = node.attrs.get("training_mode", 0) or len(node.outputs) > 1 or not node.attrs.get("spatial", 1)
    if training or not _is_second(carried):
        return _mixed(node)
    for index, tensor in enumerate(node.inputs[1:], start=1):
        value = constant_value(tensor)
        if value is None or value.shape != carried.owner.shape:
            return _mixed(node)
        reason = flow.take(node, index, -1, carried.owner)
        if reason:
            return reason
    return [carried]


def _grouped(flow: Flow, node: gs.Node, carried: Carried, transposed: bool = False) -> Handed:
    """A convolution of groups: its outputs go with the inputs of their group, all of which stay or go."""
    weight = constant_value(node.inputs[1])
    groups = node.attrs.get("group", 1)
    if weight is None or carried.axis != 1 - weight.ndim:
        return _mixed(node)
    length = len(carried.owner)
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    each = length // groups
    owners = carried.owner.reshape(groups, each)
    if ((owners < 0).any(axis=1) != (owners < 0).all(axis=1)).any():
        return _mixed(node)
    for own in owners:
        if own[0] >= 0:
            flow.tie(own.tolist())
    owner = np.repeat(owners[:, 0], outputs // groups)
    reason = flow.take(node, 1, -weight.ndim, carried.owner if transposed else owner)
    if not reason and len(node.inputs) > 2 and node.inputs[2].name:
        bias = constant_value(node.inputs[2])
        reason = _mixed(node) if bias is None else flow.take(node, 2, -1, owner)
    flow.count(node, "group", None, owners[:, 0])
    return reason or [carried._replace(owner=owner)]


def _reduced(flow: Flow, node: gs.Node, carried: Carried) -> Handed:
    """Sums and the like over other axes than that of the channels."""
    axes = _axes(node, carried.rank)
    if not axes or carried.axis in axes or carried.rank is None:
        return _mixed(node)
    if node.attrs.get("keepdims", 1):
        return [carried]
    behind = sum(axis > carried.axis for axis in axes)
    return [Carried(carried.axis + behind, carried.rank - len(axes), carried.owner)]


def _axes(node: gs.Node, rank: int | None, index: int = 1) -> list[int] | None:
    """The axes that a node names, in its attribute or its input ``index``, from the end of ``rank`` axes."""
    named = _numbers(node, "axes", index)
    if named is None:
        return None
    found = [_from_end(axis, rank) for axis in named]
    known = [axis for axis in found if axis is not None]
    return known if len(known) == len(found) else None


def _squeezed(flow: Flow, node: gs.Node, carried: Carried) -> Handed:
    axes = _axes(node, carried.rank)
    if axes is None or carried.axis in axes:
        return _mixed(node)
    rank = None if carried.rank is None else carried.rank - len(axes)
    return [Carried(carried.axis + sum(axis > carried.axis for axis in axes), rank, carried.owner)]


def _unsqueezed(flow: Flow, node: gs.Node, carried: Carried) -> Handed:
    named = _axes(node, 0)
    if carried.rank is None or named is None:
        return _mixed(node)
    rank = carried.rank + len(named)
    new = _axes(node, rank) or []
    old = [axis for axis in range(-rank, 0) if axis not in new]
    return [Carried(old[carried.axis], rank, carried.owner)]


def _transposed(flow: Flow, node: gs.Node, carried: Carried) -> Handed:
    order = node.attrs.get("perm")
    if order is None:
        if carried.rank is None:
            return _mixed(node)
        order = list(range(carried.rank))[::-1]
    rank = len(order)

    def moved(axis: int) -> int:
        return int(order.index(axis + rank)) - rank

    shape = flow.shape(node.inputs[0])
    if shape is not None:
        flow.note(node.outputs[0], [shape[axis] for axis in order])
    heads = moved(carried.heads) if carried.heads else carried.heads
    return [Carried(moved(carried.axis), rank, carried.owner, heads)]


def _padded(flow: Flow, node: gs.Node, carried: Carried) -> Handed:
    if carried.rank is None or any(c for c in node.inputs[3:] if c.name):
        return _mixed(node)
    pads = _numbers(node, "pads", 1)
    if pads is None or len(pads) != 2 * carried.rank:
        return _mixed(node)
    at = carried.axis + carried.rank
    return [carried] if pads[at] == pads[at + carried.rank] == 0 else _mixed(node)


def _resized(flow: Flow, node: gs.Node, carried: Carried) -> Handed:
    """Resize and Upsample over other axes than that of the channels."""
    if carried.rank is None or node.attrs.get("axes"):
        return _mixed(node)
    at = carried.axis + carried.rank
    scales = node.attrs.get("scales")
    index = 1 if is_op(node, "Upsample") or flow.opset < 11 else 2
    if scales is None and len(node.inputs) > index and node.inputs[index].name:
        value = constant_value(node.inputs[index])
        scales = None if value is None else value.ravel().tolist()
    if scales:
        return [carried] if scales[at] == 1 else _mixed(node)
    sizes = constant_value(node.inputs[3]) if len(node.inputs) > 3 else None
    if sizes is None or int(sizes.ravel()[at]) != len(carried.owner):
        return _mixed(node)
    flow.count(node, 3, at, carried.owner)
    return [carried]


def _gathered(flow: Flow, node: gs.Node, carried: Carried) -> Handed:
    """Gather along another axis, perhaps of a single position, which takes that axis away."""
    axis = _from_end(node.attrs.get("axis", 0), carried.rank)
    shape = flow.shape(node.inputs[1])
    if axis is None or axis == carried.axis or shape is None or carried.rank is None:
        return _mixed(node)
    moved = 1 - len(shape) if axis > carried.axis else 0
    return [Carried(carried.axis + moved, carried.rank + len(shape) - 1, carried.owner)]


def _split(flow: Flow, node: gs.Node, carried: Carried) -> Handed:
    axis = _from_end(node.attrs.get("axis", 0), carried.rank)
    if axis is None:
        return _mixed(node)
    heads = 0 if carried.heads == 0 else None  # pieces of one axis are in order as well
    if axis != carried.axis:
        return [carried._replace(heads=heads)] * len(node.outputs)
    sizes = _numbers(node, "split", 1)
    given: int | str = "split" if "split" in node.attrs else 1
    even = sizes is None
    if sizes is None:
        if len(node.inputs) > 1 and node.inputs[1].name:
            return _mixed(node)
        sizes = [len(carried.owner) // len(node.outputs)] * len(node.outputs)
    if sum(sizes) != len(carried.owner):
        return _mixed(node)
    owners = np.split(carried.owner, np.cumsum(sizes)[:-1])
    for entry, owner in enumerate(owners):
        if not even:
            flow.count(node, given, entry, owner)
        elif not flow.merge(owners[0], owner):  # parts without sizes have to stay equal
            return _mixed(node)
    return [carried._replace(owner=owner, heads=heads) for owner in owners]


def _sliced(flow: Flow, node: gs.Node, carried: Carried) -> Handed:
    """Slice along other axes, or one piece of the channels."""
    starts, ends, steps = (_numbers(node, name, index) for name, index in BOUNDS)
    axes = _axes(node, carried.rank, 3)
    unnamed = "axes" not in node.attrs and (len(node.inputs) < 4 or not node.inputs[3].name)
    if unnamed and starts is not None and carried.rank is not None:
        axes = [axis - carried.rank for axis in range(len(starts))]
    if axes is None:
        return _mixed(node)
    heads = 0 if carried.heads == 0 else None
    if carried.axis not in axes:
        return [carried._replace(heads=heads)]
    at, length = axes.index(carried.axis), len(carried.owner)
    if not starts or not ends or "starts" in node.attrs or (steps or [1] * len(axes))[at] != 1:
        return _mixed(node)
    start, end, _ = slice(starts[at], ends[at]).indices(length)
    if starts[at]:
        flow.count(node, 1, at, carried.owner[:start])
    if end < length:
        flow.count(node, 2, at, carried.owner[:end])
    return [carried._replace(owner=carried.owner[start:end], heads=heads)]


BOUNDS = (("starts", 1), ("ends", 2), ("steps", 4))
"""What a Slice takes, in attributes before opset 10."""


def _numbers(node: gs.Node, name: str, index: int) -> list[int] | None:
    """Whole numbers in an attribute or a constant input; None if there are none."""
    found = node.attrs.get(name)
    if found is None and len(node.inputs) > index and node.inputs[index].name:
        value = constant_value(node.inputs[index])
        found = None if value is None else value.ravel().tolist()
    return None if found is None else [int(number) for number in found]


def _shape(flow: Flow, node: gs.Node, carried: Carried) -> Handed:
    """Shape: harmless where the size of the axis of the channels is read by nobody, or as a number alone."""
    reason = f"{node.op} {label(node)} reads how many they are"
    if carried.rank is None:
        return reason
    start = node.attrs.get("start", 0)
    sizes = list(range(carried.rank))[start : node.attrs.get("end", carried.rank)]
    at = carried.axis + carried.rank
    for reader in node.outputs[0].outputs:
        picked = _picked(reader, sizes)
        if at not in picked:
            continue
        size = reader.outputs[0] if is_op(reader, "Gather", "Slice") else node.outputs[0]
        if picked != [at] or not all(_to_float(other) for other in size.outputs):
            return reason
        index = constant_value(reader.inputs[1]) if is_op(reader, "Gather") else None
        flow.sizes.append(WrittenSize(size.name, (1,) if index is None else index.shape, carried.owner))
    return [None]


def _to_float(node: gs.Node) -> bool:
    """Whether ``node`` casts to a floating type: what it gives is no size of a tensor any more."""
    return is_op(node, "Cast") and node.attrs.get("to") in FLOATING


def _picked(reader: gs.Node, sizes: list[int]) -> list[int]:
    """Which of ``sizes`` a Gather or Slice takes; any other reader takes all."""
    if is_op(reader, "Gather"):
        which = constant_value(reader.inputs[1])
        return sizes if which is None else [sizes[int(index)] for index in which.ravel()]
    if is_op(reader, "Slice"):
        starts, ends, steps = (_numbers(reader, name, index) for name, index in BOUNDS)
        if starts and ends:
            return sizes[starts[0] : ends[0] : (steps or [1])[0]]
    return sizes


Handler: TypeAlias = Callable[[Flow, gs.Node, Carried], Handed]
_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(POOLS, _pool),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), _normalised),
    "Conv": _grouped,
    "ConvTranspose": partial(_grouped, transposed=True),
    **dict.fromkeys(REDUCTIONS, _reduced),
    **dict.fromkeys(("Reshape", "Flatten"), reshaped),
    **dict.fromkeys(("Resize", "Upsample"), _resized),
    "Squeeze": _squeezed,
    "Unsqueeze": _unsqueezed,
    "Transpose": _transposed,
    "Pad": _padded,
    "Gather": _gathered,
    "Split": _split,
    "Slice": _sliced,
    "Shape": _shape,
}
