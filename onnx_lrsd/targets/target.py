"""What a target is: the forms it takes, what they cost there, and when a split pays.

Adding a target is adding a row to ``TARGETS`` and, where its storage differs, an encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from onnx_lrsd.types import CHANNEL, CHANNEL_IN, DENSE, SPATIAL, Form, Layer, Price

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Target:
    """``forms(layer, kinds)`` are the forms worth trying; ``cost(layer, form)`` is predicted time, in MACs."""

    name: str
    forms: Callable[[Layer, tuple[str, ...]], tuple[Form, ...]]
    cost: Callable[[Layer, Form], float]


def price(layer: Layer, form: Form) -> Price:
    """What ``form`` costs for one sample, exact but for rows and columns lost at borders."""
    nodes = node_shapes(layer, form)
    parameters = sum(out * inner for out, inner, _ in nodes) + layer.n
    macs = sum(out * inner * times for out, inner, times in nodes)
    return Price(round(macs), parameters, parameters * BYTES[layer.dtype])


def node_shapes(layer: Layer, form: Form) -> list[tuple[int, int, float]]:
    """(outputs, inputs of one output, times it is applied in a sample) of every node the form needs.

    A factor before a stride runs at the higher resolution.
    """
    taps, positions = prod(layer.kernel), max(layer.positions, 1)
    rank, channels = form.rank, layer.channels
    nodes: list[tuple[int, int, float]] = []
    if form.kind == DENSE:
        return [(layer.n, layer.m, positions)]
    if rank and form.kind == CHANNEL:
        nodes = [(rank, layer.m, positions), (layer.n, rank, positions)]
    elif rank and form.kind == CHANNEL_IN:
        nodes = [(rank, channels, positions * prod(layer.strides)), (layer.n, rank * taps, positions)]
    elif rank and form.kind == SPATIAL:
        rows, columns = layer.kernel
        nodes = [
            (rank, channels * rows, positions * layer.strides[1]),
            (layer.n, rank * columns, positions),
        ]
    if form.channels:
        nodes.append((layer.n, form.channels * taps, positions))
    return nodes
