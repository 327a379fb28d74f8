"""The layers that read what a layer gives, through nodes that keep its channels apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.nodes import is_op
from onnx_lrsd.types import Layer

CHANNELWISE = (
    *("Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Softplus", "HardSigmoid", "HardSwish"),
    *("Sigmoid", "Tanh", "Gelu", "Mish", "Erf", "Add", "Sub", "Mul", "Div", "Identity", "Dropout", "Cast"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Pad", "BatchNormalization"),
    *("Flatten", "Reshape", "Squeeze"),
)
"""Nodes that put no two channels together."""
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


class Reading(NamedTuple):
    """A layer that reads ``channels`` of another, each at ``layer.m // channels`` places.

    The inputs of ``layer`` are ordered (places, channels) where ``channels_last`` is true, otherwise
    (channels, places).
    """

    layer: Layer
    channels_last: bool


def consumers(
    working: WorkingGraph, producers: Iterable[Layer], layers: Sequence[Layer]
) -> dict[str, list[Reading]]:
    """Those of ``layers`` that read each of ``producers``, by its output; left out where none does."""
    tensors, by_input = working.tensors(), dict[str, list[Layer]]()
    for layer in layers:
        by_input.setdefault(layer.input, []).append(layer)
    found = {layer.output: _readings(tensors[layer.output], layer, by_input) for layer in producers}
    return {output: readings for output, readings in found.items() if readings}


def _readings(tensor: gs.Tensor, layer: Layer, by_input: dict[str, list[Layer]]) -> list[Reading]:
    found, seen = list[Reading](), {tensor.name}
    waiting = [(tensor, not layer.channels_first)]
    while waiting:
        tensor, channels_last = waiting.pop()
        for reader in by_input.get(tensor.name, ()):
            if _reads_channels(reader, layer.output_channels, channels_last):
                found.append(Reading(reader, channels_last))
        for node in tensor.outputs:
            behind = _channels_last(node, channels_last)
            if behind is None:
                continue
            for output in node.outputs:
                if output.name not in seen:
                    seen.add(output.name)
                    waiting.append((output, behind))
    return found


def _reads_channels(reader: Layer, channels: int, channels_last: bool) -> bool:
    """Whether the inputs of ``reader`` are those ``channels``, each at as many places as any other."""
    if reader.channels_first:
        return reader.channels == channels and not channels_last
    return reader.m % channels == 0


def _channels_last(node: gs.Node, before: bool) -> bool | None:
    """Whether channels are the last axis behind ``node``; None where they are no longer what they were."""
    if is_op(node, "Transpose"):
        order = node.attrs.get("perm")
        if order == TO_LAST and not before:
            return True
        if order == TO_FIRST and before:
            return False
        return None
    return before if is_op(node, *CHANNELWISE) else None
