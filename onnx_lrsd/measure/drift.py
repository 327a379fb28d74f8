"""Tensor by tensor: where two models that share names drift apart on the same samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lrsd.data.samples import Samples, as_fed
from onnx_lrsd.errors import VerificationError
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.subgraph import reads
from onnx_lrsd.runtime.divergence import Divergence, as_array, unpadded
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.types import Progress

MOST_SAMPLES = 64
"""Samples that tensors are compared on: where two models part is seen on few."""
FETCHED_BYTES = 128 << 20
"""Tensors of both models that are held at a time."""
ROUNDING = 1e-9
"""An error below it is the rounding of another order of sums."""

Values = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class TensorDrift:
    """How far one tensor of the second model is from that of the first.

    ``name`` is the tensor, ``node`` and ``op`` what computes it in the first model. ``error`` is relative
    as an output's, ``inherited`` that of the input which had changed most already: what is above it came
    about in between. ``cosine`` is that of the angle between both, over all samples; None where one is zero.
    ``largest`` is the largest absolute difference.
    """

    name: str
    node: str
    op: str
    error: float
    inherited: float
    cosine: float | None
    largest: float


@dataclass(frozen=True)
class Drift:
    """How far two models are apart after each tensor, in the order of the first graph."""

    tensors: tuple[TensorDrift, ...]

    @property
    def first(self) -> TensorDrift | None:
        """The first tensor that differs by more than rounding."""
        return next((tensor for tensor in self.tensors if tensor.error > ROUNDING), None)

    @property
    def most(self) -> TensorDrift | None:
        """The tensor whose error rises most above that of what it is computed from."""
        differing = [tensor for tensor in self.tensors if tensor.error > ROUNDING]
        return max(differing, key=lambda tensor: tensor.error - tensor.inherited, default=None)


def drift(before: Model, after: Model, samples: Samples, *, progress: Progress | None = None) -> Drift:
    """Error of every floating tensor that both main graphs compute under one name, in the order of the first.

    At most MOST_SAMPLES samples are run. Tensors that depend on no input are left out. Raises
    VerificationError where the models share no name.
    """
    nodes = {name: node for node in before.proto.graph.node for name in node.output if name}
    shared = _shared(before.proto, after.proto, nodes)
    if not shared:
        raise VerificationError(
            "The two models share no name of a tensor: compare them without --layers, or a model with what "
            "was made of it."
        )
    found = {name: _Tensor() for name in shared}
    samples = samples.some(MOST_SAMPLES)
    done = 0
    for old, new, real, size in paired_runs(before, after, samples, shared):
        for name, tensor in found.items():
            tensor.add(unpadded(as_array(old[name]), real), unpadded(as_array(new[name]), real))
        done += size
        if progress is not None:
            progress("tensors", done, samples.count)
    floating = {name: tensor for name, tensor in found.items() if tensor.floating}
    carried: dict[str, float] = {}
    result = []
    for name, node in nodes.items():
        inherited = max((carried.get(source, 0.0) for source in reads(node)), default=0.0)
        carried[name] = inherited
        if name in floating:
            tensor = floating[name]
            carried[name] = error = tensor.divergence.relative()
            result.append(
                TensorDrift(
                    name=name,
                    node=node.name or name,
                    op=node.op_type,
                    error=error,
                    inherited=inherited,
                    cosine=tensor.cosine(),
                    largest=tensor.largest,
                )
            )
    return Drift(tuple(result))


def paired_runs(
    before: Model, after: Model, samples: Samples, names: Sequence[str]
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], Values | None, int]]:
    """Tensors ``names`` of both models, batch by batch, where they are no padding, and the batch's size."""
    old = open_session(before.proto, folder=before.folder, outputs=names)
    new = open_session(after.proto, folder=after.folder, outputs=names)
    samples = as_fed(samples, old.run)
    first = next(iter(samples.batches(1)))
    held = sum(as_array(value).nbytes for value in old.run(first).values()) * 2
    batch = samples.batch_size(held // samples.size_of(first), FETCHED_BYTES)
    for feed in samples.batches(batch):
        yield old.run(feed), new.run(feed), samples.real(feed), samples.size_of(feed)


class _Tensor:
    """One tensor, batch by batch."""

    def __init__(self) -> None:
        self.divergence = Divergence()
        self.floating = False
        self.largest = 0.0
        self.dot = self.old = self.new = 0.0

    def add(self, old: Values, new: Values) -> None:
        self.floating = old.dtype.kind == new.dtype.kind == "f"
        if not self.floating:
            return
        self.divergence.add(old, new)
        if old.shape != new.shape or not old.size:
            return
        one, two = old.astype(np.float64).ravel(), new.astype(np.float64).ravel()
        finite = np.isfinite(one) & np.isfinite(two)  # masks of attention hold infinities
        one, two = one[finite], two[finite]
        self.largest = max(self.largest, float(np.max(np.abs(one - two), initial=0.0)))
        self.dot += float(one @ two)
        self.old += float(one @ one)
        self.new += float(two @ two)

    def cosine(self) -> float | None:
        product = (self.old * self.new) ** 0.5
        return min(max(self.dot / product, -1.0), 1.0) if product > 0 else None


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
