"""ONNX Runtime on a CPU: latency is what counts, and zeros buy nothing.

Its blocked layout pads the outputs of a convolution to blocks (of 16 with AVX-512) and is left for ranks off
4, so that ranks are multiples of the block (4 and up in thin layers, where the first factor is small). What a
form takes is the sum of its nodes in the table of a machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import numpy as np

from onnx_lrsd.targets.machine import Machine, built_in
from onnx_lrsd.targets.target import Target, nodes_of
from onnx_lrsd.types import CHANNEL, CHANNEL_IN, CHANNELS, DENSE, SPATIAL, TUCKER, Form, Layer, Pattern

WIDE = 64
SMALLEST = 4
"""Ranks off it leave the blocked layout."""
FASTER = 0.9
"""Share of the dense layer's predicted time from which a split is not worth trying."""
RANKS = 20
"""Ranks tried for each kind: more would cost time and change no plan."""
TUCKER_RANKS, OUTER_SHARES = 8, (0.75, 1.0, 1.5)
"""Ranks tried for Tucker-2, up to half the channels, and outer ranks relative to rank x outputs / inputs."""
SPARSE_CHANNELS = (8, 16)
"""Channels tried for S beside factors of a layer without kernel positions: up to 16 its node is unpadded.
Beside the spatial form of a k x k convolution S never paid at equal MACs (benchmarks/RESULTS.md)."""


def seconds(machine: Machine, layer: Layer, form: Form) -> float:
    """Predicted time of one sample in one thread.

    A factor of a convolution with fewer outputs than a block hands them on in the plain layout; so is the
    input of S read, after its channels were gathered.
    """
    nodes = nodes_of(layer, form)
    total = sum(machine.seconds(node) for node in nodes)
    blocked = len(layer.kernel) == 2
    if blocked:
        chain = nodes[:-1] if form.channels else nodes
        total += sum(machine.copying(x.outputs * x.times) for x in chain[:-1] if x.outputs < machine.block)
    if form.channels:
        total += machine.copying(form.channels * nodes[-1].times)
        total += machine.copying(layer.channels * nodes[-1].times) if blocked else 0.0
    return total


def pays(machine: Machine, layer: Layer, form: Form) -> bool:
    """Whether the split is predicted to be clearly faster."""
    return seconds(machine, layer, form) <= FASTER * seconds(machine, layer, Form(DENSE))


def forms(machine: Machine, layer: Layer, kinds: tuple[str, ...]) -> tuple[Form, ...]:
    """Every form worth trying, of the given kinds, that is predicted to pay."""
    taps = prod(layer.kernel)
    found: list[Form] = []
    for kind in kinds:
        if kind == DENSE or (kind == CHANNEL_IN and taps == 1):
            continue
        if kind in (SPATIAL, TUCKER) and not _square(layer):
            continue
        if kind == TUCKER:
            found += _tucker(machine, layer)
            continue
        top = {
            CHANNEL: min(layer.n, layer.m),
            CHANNEL_IN: layer.channels,
            SPATIAL: min(layer.n, layer.channels) * 3,
        }[kind]
        ranks = [r for r in _ranks(layer, kind, top, machine.block) if pays(machine, layer, Form(kind, r))]
        ranks = _spread(ranks, RANKS)
        found += [Form(kind, r) for r in ranks]
        if taps == 1 and layer.channels >= WIDE:
            with_s = [
                Form(kind, r, Pattern(CHANNELS, j))
                for j in SPARSE_CHANNELS
                for r in ranks
                if j * 4 <= layer.channels
            ]
            found += [form for form in with_s if pays(machine, layer, form)]
    return tuple(found)


def _tucker(machine: Machine, layer: Layer) -> list[Form]:
    """Tucker-2 with outer ranks about in the proportion of outputs to inputs."""
    if min(layer.n, layer.channels) < WIDE:
        return []  # a third node costs more there than its MACs save
    block = machine.block
    pairs = {
        (rank, max(block, round(share * rank * layer.n / layer.channels / block) * block))
        for rank in _spread(range(block, layer.channels // 2 + 1, block), TUCKER_RANKS)
        for share in OUTER_SHARES
    }
    forms = (Form(TUCKER, rank, outer=outer) for rank, outer in sorted(pairs) if outer < layer.n)
    return [form for form in forms if pays(machine, layer, form)]


def _spread(ranks: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of ``ranks``, denser where they are small."""
    if len(ranks) <= most:
        return list(ranks)
    return [ranks[i - 1] for i in np.unique(np.geomspace(1, len(ranks), most).round().astype(int))]


def _ranks(layer: Layer, kind: str, top: int, block: int) -> list[int]:
    thin = min(layer.n, layer.channels) < WIDE and (kind != CHANNEL or not layer.kernel)
    return [*(range(SMALLEST, block, SMALLEST) if thin else ()), *range(block, top + 1, block)]


def _square(layer: Layer) -> bool:
    return len(layer.kernel) == 2 and min(layer.kernel) > 1


def on(machine: Machine) -> Target:
    """The target with forms and times as ``machine`` has them."""
    return Target("onnxruntime", partial(forms, machine), partial(seconds, machine), on)


ONNXRUNTIME = on(built_in())
