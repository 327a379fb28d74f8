"""Activations handed on from one run of a network to the next, which then need not start at its inputs.

Once the layers up to some point are rewritten for good, what passes that point stays the same. It is held
batch by batch, within a budget of memory; where it does not fit, the point before is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

MOST_HELD = 768 << 20
"""Bytes of activations that are held between two runs, at most."""

Values = dict[str, Any]


class Relay:
    """What the last run left for the next one: the values of some tensors in every batch."""

    def __init__(self, most: int = MOST_HELD) -> None:
        self._most = most
        self._held: list[Values] = []
        self._next: list[Values] | None = None

    @property
    def types(self) -> dict[str, npt.DTypeLike]:
        """Types of the tensors that are held, by name."""
        return {name: value.dtype for name, value in self._held[0].items()} if self._held else {}

    def feed(self, index: int) -> Values:
        """The values of batch ``index``."""
        return self._held[index] if self._held else {}

    def offer(self, index: int, batches: int, values: Mapping[str, Any], names: Sequence[str]) -> None:
        """Take ``names`` of one of ``batches``, in order, in place of what is held of it.

        Nothing is taken where that would be too much, which the first batch tells.
        """
        if index == 0:
            picked = [values[name] for name in names]
            fits = all(isinstance(value, np.ndarray) for value in picked)
            fits = fits and sum(value.nbytes for value in picked) * batches <= self._most
            self._next = [] if fits and names else None
        if self._next is None:
            return
        self._next.append({name: values[name] for name in names})
        if self._held:
            self._held[index] = {}
        if index == batches - 1:
            self._held, self._next = self._next, None
