"""ONNX Runtime on a CPU: latency is what counts, and zeros buy nothing.

MLAS pads the outputs of a convolution to blocks of 16 and leaves its blocked layout for ranks off
4, so that ranks are multiples of 16 (4 and up in thin layers, where the first factor is small).
Measured with ONNX Runtime 1.32: time follows the padded MACs within 10 % for 64 channels and more;
in thin layers every added node costs a few microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import numpy as np

from onnx_lrsd.targets.target import Target, node_shapes
from onnx_lrsd.types import CHANNEL, CHANNEL_IN, CHANNELS, DENSE, SPATIAL, TUCKER, Form, Layer, Pattern

BLOCK = 16
WIDE = 64
NODE = 200_000
"""MACs that run in the time one more node costs, about 4 microseconds."""
VALUE = 32
"""MACs that run in the time it takes to write one value and read it again, out of the cache."""
RANKS = 20
"""Ranks tried for each kind: more would cost time and change no plan."""
TUCKER_RANKS, OUTER_SHARES = 8, (0.75, 1.0, 1.5)
"""Ranks tried for Tucker-2, up to half the channels, and outer ranks relative to rank x outputs / inputs."""
SPARSE_CHANNELS = (8, 16)
"""Channels tried for S beside factors of a layer without kernel positions: up to 16 its node is unpadded.
Beside the spatial form of a k x k convolution S never paid at equal MACs (benchmarks/RESULTS.md)."""


def cost(layer: Layer, form: Form) -> float:
    """Predicted time of one sample, in MACs: outputs padded to 16, values written, a fixed cost a node."""
    padded = sum(
        ceil(out / BLOCK) * BLOCK * (inner + VALUE) * times + NODE
        for out, inner, times in node_shapes(layer, form)
    )
    return padded + (NODE if form.channels else 0)


def pays(layer: Layer, form: Form) -> bool:
    """Whether the split is predicted to be clearly faster: by a tenth, in thin layers by a quarter."""
    wide = min(layer.n, layer.channels) >= WIDE
    return cost(layer, form) <= (0.9 if wide else 0.75) * cost(layer, Form(DENSE))


def forms(layer: Layer, kinds: tuple[str, ...]) -> tuple[Form, ...]:
    """Every form worth trying, of the given kinds, that is predicted to pay."""
    taps = prod(layer.kernel)
    found: list[Form] = []
    for kind in kinds:
        if kind == DENSE or (kind == CHANNEL_IN and taps == 1):
            continue
        if kind in (SPATIAL, TUCKER) and not _square(layer):
            continue
        if kind == TUCKER:
            found += _tucker(layer)
            continue
        top = {
            CHANNEL: min(layer.n, layer.m),
            CHANNEL_IN: layer.channels,
            SPATIAL: min(layer.n, layer.channels) * 3,
        }[kind]
        ranks = [r for r in _ranks(layer, kind, top) if pays(layer, Form(kind, r))]
        ranks = _spread(ranks, RANKS)
        found += [Form(kind, r) for r in ranks]
        if taps == 1 and layer.channels >= WIDE:
            with_s = [
                Form(kind, r, Pattern(CHANNELS, j))
                for j in SPARSE_CHANNELS
                for r in ranks
                if j * 4 <= layer.channels
            ]
            found += [form for form in with_s if pays(layer, form)]
    return tuple(found)


def _tucker(layer: Layer) -> list[Form]:
    """Tucker-2 with outer ranks about in the proportion of outputs to inputs."""
    if min(layer.n, layer.channels) < WIDE:
        return []  # a third node costs more there than its MACs save
    pairs = {
        (rank, max(BLOCK, round(share * rank * layer.n / layer.channels / BLOCK) * BLOCK))
        for rank in _spread(range(BLOCK, layer.channels // 2 + 1, BLOCK), TUCKER_RANKS)
        for share in OUTER_SHARES
    }
    forms = (Form(TUCKER, rank, outer=outer) for rank, outer in sorted(pairs) if outer < layer.n)
    return [form for form in forms if pays(layer, form)]


def _spread(ranks: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of ``ranks``, denser where they are small."""
    if len(ranks) <= most:
        return list(ranks)
    return [ranks[i - 1] for i in np.unique(np.geomspace(1, len(ranks), most).round().astype(int))]


def _ranks(layer: Layer, kind: str, top: int) -> list[int]:
    thin = min(layer.n, layer.channels) < WIDE and (kind != CHANNEL or not layer.kernel)
    return [*(range(4, BLOCK, 4) if thin else ()), *range(BLOCK, top + 1, BLOCK)]


def _square(layer: Layer) -> bool:
    return len(layer.kernel) == 2 and min(layer.kernel) > 1


ONNXRUNTIME = Target("onnxruntime", forms, cost)
