"""Forms that are chains of the layer's own operators, which every engine runs.

Engines differ in the ranks that suit them and in when a form pays; both are parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from onnx_lrsd.types import CHANNEL, CHANNEL_IN, CHANNELS, DENSE, SPATIAL, TUCKER, WIDTH, Form, Layer, Pattern

WIDE = 64
"""Channels from which a layer is wide: a third factor, or a sparse branch beside factors, may pay."""
RANK_MULTIPLE = 16
"""Ranks are multiples of it, unless an engine says otherwise."""
RANKS_TRIED = 20
"""Ranks tried for each kind: more would cost time and change no plan."""
TUCKER_RANKS, OUTER_SHARES = 8, (0.75, 1.0, 1.5)
"""Ranks tried for Tucker-2, up to half the channels, and outer ranks relative to rank x outputs / inputs."""
SPARSE_CHANNELS = (8, 16)
"""Whole channels tried for S beside factors of a layer without taps: a node with up to 16 inputs needs no
padding. Beside the spatial form of a k x k convolution S never paid at equal MACs (results/forms.md)."""


@dataclass(frozen=True)
class Chains:
    """``forms(layer, kinds)``: every form worth trying, of the given kinds, that ``pays(layer, form)``.

    Ranks are multiples of ``block``; ``low_ranks(layer, kind)`` are those below it that the engine takes too.
    """

    pays: Callable[[Layer, Form], bool]
    low_ranks: Callable[[Layer, str], Sequence[int]]
    block: int = RANK_MULTIPLE

    def forms(self, layer: Layer, kinds: tuple[str, ...]) -> tuple[Form, ...]:
        """Forms that are predicted to pay, kind by kind."""
        taps = prod(layer.kernel)
        found: list[Form] = []
        for kind in kinds:
            if kind in (DENSE, WIDTH) or (kind == CHANNEL_IN and taps == 1):
                continue
            if kind in (SPATIAL, TUCKER) and not _square(layer):
                continue
            if kind == TUCKER:
                found += self._tucker(layer)
                continue
            top = {
                CHANNEL: min(layer.n, layer.m),
                CHANNEL_IN: layer.channels,
                SPATIAL: min(layer.n, layer.channels) * 3,
            }[kind]
            every = [*self.low_ranks(layer, kind), *range(self.block, top + 1, self.block)]
            ranks = _spread([r for r in every if self.pays(layer, Form(kind, r))], RANKS_TRIED)
            found += [Form(kind, r) for r in ranks]
            if taps == 1 and layer.channels >= WIDE:
                with_s = [
                    Form(kind, r, Pattern(CHANNELS, j))
                    for j in SPARSE_CHANNELS
                    for r in ranks
                    if j * 4 <= layer.channels
                ]
                found += [form for form in with_s if self.pays(layer, form)]
        return tuple(found)

    def _tucker(self, layer: Layer) -> list[Form]:
        """Tucker-2 with outer ranks about in the proportion of outputs to inputs."""
        if min(layer.n, layer.channels) < WIDE:
            return []  # a third node costs more there than its MACs save
        block = self.block
        pairs = {
            (rank, max(block, round(share * rank * layer.n / layer.channels / block) * block))
            for rank in _spread(range(block, layer.channels // 2 + 1, block), TUCKER_RANKS)
            for share in OUTER_SHARES
        }
        forms = (Form(TUCKER, rank, outer=outer) for rank, outer in sorted(pairs) if outer < layer.n)
        return [form for form in forms if self.pays(layer, form)]


def _spread(ranks: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of ``ranks``, denser where they are small."""
    if len(ranks) <= most:
        return list(ranks)
    return [ranks[i - 1] for i in np.unique(np.geomspace(1, len(ranks), most).round().astype(int))]


def _square(layer: Layer) -> bool:
    return len(layer.kernel) == 2 and min(layer.kernel) > 1
