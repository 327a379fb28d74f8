"""Changed copies of a network, run on the same samples, each from where its change begins.

Up to a changed layer the activations are those of the original network: they are computed once and kept,
batch by batch. Changes are taken in blocks, in the order of the graph. For each copy a session is opened only
for the part up to where the next block begins; one session of the part behind it serves the whole block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, sqrt
from typing import Any

import numpy as np
from onnx import helper

from onnx_lrsd.data.samples import Samples, batch_to_run
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.subgraph import affected, extract, frontier
from onnx_lrsd.runtime.activation_cache import most_held
from onnx_lrsd.runtime.session import Session, open_model
from onnx_lrsd.types import Feed

Held = list[dict[str, Any]]
"""Tensors of the original network by name, for each batch."""


def resumed(
    model: Model, samples: Samples, changing: Sequence[Collection[str]], most: int | None = None
) -> Iterator[Rest]:
    """For each of ``changing`` the rest of ``model`` from where it begins to change.

    ``changing`` has for each copy names of tensors, such as what a layer gives and the weight it reads, in
    the order of the graph. At most ``most`` bytes of activations are kept for a block, by default as many as
    the model allows; where a block would need more, its copies start where those of the block before did.
    """
    most = most_held(model) if most is None else most
    feeds = list(samples.batches(batch_to_run(samples)))
    outputs = [output.name for output in model.proto.graph.output]
    blocks = max(round(sqrt(2 * len(changing))), 1)
    size = max(ceil(len(changing) / blocks), 1)
    held: Held = [{} for _ in feeds]
    for first in range(0, len(changing), size):
        later = {name for names in changing[first + size :] for name in names}
        late = affected(model.proto, later)
        block = _Block(model, feeds, held, outputs, [name for name in outputs if name not in late])
        following = block.follow(frontier(model.proto, later), most) if later else None
        for names in changing[first : first + size]:
            yield Rest(block, block.following is not None and late.isdisjoint(names), names)
        if following is not None:
            held = following


class _Block:
    """The network from the tensors in ``held`` on; ``early`` outputs do not depend on later blocks."""

    def __init__(
        self,
        model: Model,
        feeds: Sequence[Feed],
        held: Held,
        outputs: Sequence[str],
        early: Sequence[str],
    ) -> None:
        self.source, self.feeds, self.held = model, feeds, held
        self.outputs, self.early = outputs, early
        self.following: Held | None = None
        self._ahead: list[str] = []

    def follow(self, ahead: Sequence[str], most: int) -> Held | None:
        """The values of the tensors ``ahead``, where later blocks begin.

        None where they take more than ``most`` bytes, or one is no array.
        """
        known, computed = self.held[0].keys(), [name for name in ahead if name not in self.held[0]]
        session = self._open(self.source, computed, self.held) if computed else None
        found, total = Held(), 0
        for feed, held in zip(self.feeds, self.held, strict=True):
            values = {name: held[name] for name in ahead if name in known}
            values |= session.run({**feed, **held}) if session is not None else {}
            if not all(isinstance(value, np.ndarray) for value in values.values()):
                return None
            total += sum(value.nbytes for value in values.values())
            if total > most:
                return None
            found.append(values)
        self.following, self._ahead = found, computed
        return found

    def _open(self, model: Model, outputs: Sequence[str], held: Held) -> Session:
        given = {name: value.dtype for name, value in held[0].items()}
        return open_model(model, outputs=outputs, given=given)

    @cached_property
    def near(self) -> Model:
        """The part up to where the next block begins."""
        return self._part([*self._ahead, *self.early])

    @cached_property
    def rest(self) -> Model:
        """The part up to the outputs of the network."""
        return self._part(self.outputs)

    @cached_property
    def far(self) -> Session | None:
        """What follows ``near``; None where no output depends on it."""
        late = [name for name in self.outputs if name not in self.early]
        return self._open(self.source, late, self.following or self.held) if late else None

    def _part(self, outputs: Sequence[str]) -> Model:
        given = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
            for name, value in self.held[0].items()
        ]
        return replace(self.source, proto=extract(self.source.proto, outputs, given))


@dataclass(frozen=True)
class Rest:
    """The rest of a network from where the tensors ``names`` change.

    ``alone``: all of them lie in front of the point where the next block begins.
    """

    block: _Block
    alone: bool
    names: Collection[str]

    @property
    def model(self) -> Model:
        """The part to change: from kept activations to where later changes begin, or to the outputs."""
        return self.block.near if self._is_near else self.block.rest

    @cached_property
    def _is_near(self) -> bool:
        if not self.alone:
            return False
        made = {name for node in self.block.near.proto.graph.node for name in node.output}
        return not made.isdisjoint(self.names)

    def outputs(self, changed: Model) -> Iterator[Mapping[str, Any]]:
        """The outputs of the network with ``changed`` in place of ``model``, batch by batch."""
        session = open_model(changed)
        far = self.block.far if self._is_near else None
        for feed, held in zip(self.block.feeds, self.block.held, strict=True):
            values = session.run({**feed, **held})
            if far is not None:
                values |= far.run({**feed, **held, **values})
            yield {name: values[name] for name in self.block.outputs}
