"""Tensor by tensor: where two models that share names drift apart on the same samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx

from onnx_lrsd.data.samples import Samples, as_fed
from onnx_lrsd.errors import VerificationError
from onnx_lrsd.facts import Drift, TensorDrift
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.subgraph import reads
from onnx_lrsd.runtime.divergence import Divergence, as_array, positions_first
from onnx_lrsd.runtime.likeness import Likeness
from onnx_lrsd.runtime.session import open_model
from onnx_lrsd.types import Feed, Progress, Values

MOST_SAMPLES = 64
"""Samples that tensors are compared on: where two models part is seen on few."""
SCORE_RANGE = 16.0
"""A score so far below the largest one has a share of 1e-7 of it after a Softmax: rounding."""
FETCHED_BYTES = 128 << 20
"""Tensors of both models that are held at a time."""


def drift(before: Model, after: Model, samples: Samples, *, progress: Progress | None = None) -> Drift:
    """Error of every floating tensor that both main graphs compute under one name, in the order of the first.

    A tensor that is quantised for all of its readers counts as they read it. At most MOST_SAMPLES samples
    are run. Tensors that depend on no input are left out, and those whose channels were cut. Raises
    VerificationError where the models share no name.
    """
    nodes = {name: node for node in before.proto.graph.node for name in node.output if name}
    shared = _shared(before.proto, after.proto, nodes)
    if not shared:
        raise VerificationError(
            "The two models share no name of a tensor: compare them without --layers and --node-data, or a "
            "model with what was made of it."
        )
    axes = _softmax_axes(before.proto)
    found = {name: _Tensor(axes.get(name)) for name in shared}
    samples = samples.some(MOST_SAMPLES)
    done = 0
    for old, new, real, size in paired_runs(before, after, samples, shared):
        for tensor, one, two in zip(found.values(), old, new, strict=True):
            tensor.add(one, two, real, size)
        done += size
        if progress is not None:
            progress("tensors", done, samples.count)
    comparable = {name: tensor for name, tensor in found.items() if tensor.comparable}
    carried: dict[str, float] = {}
    result = []
    for name, node in nodes.items():
        inherited = max((carried.get(source, 0.0) for source in reads(node)), default=0.0)
        carried[name] = inherited
        if name in comparable:
            tensor = comparable[name]
            carried[name] = error = tensor.divergence.relative()
            result.append(
                TensorDrift(
                    name=name,
                    node=node.name or name,
                    op=node.op_type,
                    error=error,
                    inherited=inherited,
                    cosine=tensor.likeness.cosine,
                    largest=tensor.likeness.largest,
                )
            )
    return Drift(tuple(result))


def paired_runs(
    before: Model, after: Model, samples: Samples, names: Sequence[str]
) -> Iterator[tuple[list[Values], list[Values], Values | None, int]]:
    """Tensors ``names`` of both models, batch by batch, where they are no padding, and the batch's size."""

    def runner(model: Model) -> Callable[[Feed], list[Values]]:
        read = _as_read(model.proto)
        wanted = [read.get(name, name) for name in names]
        session = open_model(model, outputs=list(dict.fromkeys(wanted)))

        def run(feed: Feed) -> list[Values]:
            values = session.run(feed)
            return [as_array(values[name]) for name in wanted]

        return run

    old, new = runner(before), runner(after)
    samples = as_fed(samples, old)
    first = next(iter(samples.batches(1)))
    held = 2 * sum(value.nbytes for value in old(first))
    batch = samples.batch_size(held // samples.size_of(first), FETCHED_BYTES)
    for feed in samples.batches(batch):
        yield old(feed), new(feed), samples.real(feed), samples.size_of(feed)


def _as_read(proto: onnx.ModelProto) -> dict[str, str]:
    """Tensors that all their readers quantise -> what is dequantised of them.

    A quantiser may leave an activation to the range of QuantizeLinear, which cuts off what is below zero:
    the tensor itself is then no longer what its name says.
    """
    readers = defaultdict[str, list[onnx.NodeProto]](list)
    for node in proto.graph.node:
        for name in reads(node):
            readers[name].append(node)
    given = {value.name for value in proto.graph.output}
    found = {}
    for name, nodes in readers.items():
        if name in given or {node.op_type for node in nodes} != {"QuantizeLinear"}:
            continue
        behind = readers.get(nodes[0].output[0], [])
        back = [node for node in behind if node.op_type == "DequantizeLinear"]
        if back:
            found[name] = back[0].output[0]
    return found


class _Tensor:
    """One tensor, batch by batch; ``softmax`` is the axis along which a Softmax reads it, if one does."""

    def __init__(self, softmax: int | None) -> None:
        self.softmax = softmax
        self.divergence, self.likeness = Divergence(), Likeness()
        self.comparable = True

    def add(self, old: Values, new: Values, real: Values | None, size: int) -> None:
        if old.dtype.kind != "f" or new.dtype.kind != "f" or old.shape != new.shape:
            self.comparable = False
        if self.comparable:
            if self.softmax is not None:
                old, new = (_as_softmax_sees(values, self.softmax) for values in (old, new))
            self.divergence.add(old, new, real, size)
            self.likeness.add(positions_first(old, real, ()), positions_first(new, real, ()), size)


def _softmax_axes(proto: onnx.ModelProto) -> dict[str, int]:
    """Tensors that a Softmax reads -> the axis along which it does."""
    return {
        node.input[0]: next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -1)
        for node in proto.graph.node
        if node.op_type in ("Softmax", "LogSoftmax")
    }


def _as_softmax_sees(values: Values, axis: int) -> Values:
    """``values``, none further than SCORE_RANGE below the largest one along ``axis``.

    Masks of attention hold numbers such as -65504, beside which no error of a score would count.
    """
    if not values.ndim or not values.size:
        return values
    seen: Values = np.maximum(values, values.max(axis=axis, keepdims=True) - SCORE_RANGE)
    return seen


def _shared(
    before: onnx.ModelProto, after: onnx.ModelProto, nodes: Mapping[str, onnx.NodeProto]
) -> list[str]:
    """Tensors that nodes of both graphs give and that depend on an input, in the order of the first graph."""
    there = {name for node in after.graph.node for name in node.output}
    moving = _fed(before)
    for node in before.graph.node:
        if moving.intersection(reads(node)):
            moving.update(node.output)
    return [name for name in nodes if name in there and name in moving]


def _fed(proto: onnx.ModelProto) -> set[str]:
    defaults: Iterable[str] = (tensor.name for tensor in proto.graph.initializer)
    return {value.name for value in proto.graph.input} - set(defaults)
