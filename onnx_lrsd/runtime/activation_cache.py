"""Activations kept between two runs of a network, so the second need not start at the network's inputs.

Once all layers up to some point have their final weights, the activations at that point stay the same. They
are kept batch by batch within a memory budget. Where they do not fit, those of an earlier point are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lrsd.graph.model import Model
from onnx_lrsd.types import Feed

MOST_HELD = 768 << 20
"""Bytes of activations that are kept between two runs, at most."""


def most_held(model: Model) -> int:
    """Bytes of activations of ``model`` that are kept between two runs, at most."""
    return MOST_HELD if model.most_bytes is None else min(model.most_bytes, MOST_HELD)


class Relay:
    """The values of some tensors in every batch, kept from the last run for the next one."""

    def __init__(self, most: int = MOST_HELD) -> None:
        self._most = most
        self._held: list[Feed] = []
        self._next: list[Feed] | None = None

    @property
    def types(self) -> dict[str, npt.DTypeLike]:
        """Types of the tensors that are kept, by name."""
        return {name: value.dtype for name, value in self._held[0].items()} if self._held else {}

    def feed(self, index: int) -> Feed:
        """The values of batch ``index``."""
        return self._held[index] if self._held else {}

    def offer(
        self, index: int, batches: int, values: Mapping[str, Any], names: Sequence[str], largest: float = 1.0
    ) -> None:
        """Keep the tensors ``names`` of batch ``index`` in place of what was kept of it.

        Batches come in order. If the first one shows that all ``batches`` would exceed the budget, nothing is
        kept of any; samples of other batches may be ``largest`` times as large.
        """
        if index == 0:
            picked = [values[name] for name in names]
            fits = all(isinstance(value, np.ndarray) for value in picked)
            fits = fits and sum(value.nbytes for value in picked) * batches * largest <= self._most
            self._next = [] if fits and names else None
        if self._next is None:
            return
        self._next.append({name: values[name] for name in names})
        if self._held:
            self._held[index] = {}
        if index == batches - 1:
            self._held, self._next = self._next, None
