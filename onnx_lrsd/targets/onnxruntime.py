"""ONNX Runtime on a CPU: latency is what counts, and zeros buy nothing.

Its blocked layout pads the outputs of a convolution to blocks (of 16 with AVX-512), so ranks are multiples of
the block. In thin layers, where the first factor is small, smaller multiples of 4 are tried too: other ranks
would leave the blocked layout. The time of a form is the sum over its nodes in the table of a machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from onnx_lrsd.targets.chains import WIDE, Chains
from onnx_lrsd.targets.machine import Machine, built_in
from onnx_lrsd.targets.target import Target, nodes_of
from onnx_lrsd.types import CHANNEL, CHANNELS, DENSE, Form, Layer

_RANK_STEP = 4
"""Ranks that are no multiple of it leave the blocked layout."""
FASTER = 0.9
"""A form is tried if it is predicted to take at most this share of the dense layer's time."""


def seconds(machine: Machine, layer: Layer, form: Form) -> float:
    """Predicted time of one sample in one thread.

    Values are copied to another layout behind a factor of a convolution with fewer outputs than a block, and
    in front of an S, whose channels are gathered in the plain layout.
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


def _pays(machine: Machine, layer: Layer, form: Form) -> bool:
    """Whether the form is predicted to be clearly faster than the dense layer."""
    return seconds(machine, layer, form) <= FASTER * seconds(machine, layer, Form(DENSE))


def _low_ranks(block: int, layer: Layer, kind: str) -> Sequence[int]:
    thin = min(layer.n, layer.channels) < WIDE and (kind != CHANNEL or not layer.kernel)
    return range(_RANK_STEP, block, _RANK_STEP) if thin else ()


def _on(machine: Machine) -> Target:
    """The target with the forms and times of ``machine``."""
    chains = Chains(partial(_pays, machine), partial(_low_ranks, machine.block), machine.block)
    return Target("onnxruntime", chains.forms, partial(seconds, machine), _on, patterns=(CHANNELS,))


ONNXRUNTIME = _on(built_in())
