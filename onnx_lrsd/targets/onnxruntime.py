"""ONNX Runtime on a CPU: latency is what counts, and zeros buy nothing.

Its blocked layout pads the outputs of a convolution to blocks (of 16 with AVX-512) and is left for ranks off
4, so that ranks are multiples of the block (4 and up in thin layers, where the first factor is small). What a
form takes is the sum of its nodes in the table of a machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from onnx_lrsd.targets.chains import WIDE, Chains
from onnx_lrsd.targets.machine import Machine, built_in
from onnx_lrsd.targets.target import Target, nodes_of
from onnx_lrsd.types import CHANNEL, CHANNELS, DENSE, Form, Layer

SMALLEST = 4
"""Ranks off it leave the blocked layout."""
FASTER = 0.9
"""Share of the dense layer's predicted time from which a split is not worth trying."""


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


def _low_ranks(block: int, layer: Layer, kind: str) -> Sequence[int]:
    thin = min(layer.n, layer.channels) < WIDE and (kind != CHANNEL or not layer.kernel)
    return range(SMALLEST, block, SMALLEST) if thin else ()


def on(machine: Machine) -> Target:
    """The target with forms and times as ``machine`` has them."""
    chains = Chains(partial(pays, machine), partial(_low_ranks, machine.block), machine.block)
    return Target("onnxruntime", chains.forms, partial(seconds, machine), on, patterns=(CHANNELS,))


ONNXRUNTIME = on(built_in())
