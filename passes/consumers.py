"""The layers that read what a layer gives, through nodes that keep its channels apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import onnx_graphsurgeon as gs

from onnx_lrsd.types import Layer

CHANNELWISE = {
    *("Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Softplus", "HardSigmoid", "HardSwish"),
    *("Sigmoid", "Tanh", "Gelu", "Mish", "Erf", "Add", "Sub", "Mul", "Div", "Identity", "Dropout", "Cast"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Pad", "BatchNormalization"),
    *("Flatten", "Reshape", "Squeeze"),
}
"""Nodes that put no two channels together."""
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


class Reading(NamedTuple):
    """A layer that reads ``channels`` of another, each at ``layer.m // channels`` places.

    The inputs of ``layer`` are ordered (places, channels) where ``last`` is true, else (channels, places).
    """

    layer: Layer
    last: bool


def readers(graph: gs.Graph, of: Iterable[Layer], layers: Sequence[Layer]) -> dict[str, list[Reading]]:
    """Those of ``layers`` that read each layer in ``of``, by its name; none without readers."""
    tensors, by_input = graph.tensors(), dict[str, list[Layer]]()
    for layer in layers:
        by_input.setdefault(layer.input, []).append(layer)
    found = {layer.output: _readers(tensors[layer.output], layer, by_input) for layer in of}
    return {name: readings for name, readings in found.items() if readings}


def _readers(tensor: gs.Tensor, layer: Layer, by_input: dict[str, list[Layer]]) -> list[Reading]:
    found, seen = list[Reading](), {tensor.name}
    waiting = [(tensor, layer.op != "Conv")]
    while waiting:
        tensor, last = waiting.pop()
        for reader in by_input.get(tensor.name, ()):
            same = reader.channels == layer.n if reader.kernel else reader.m % layer.n == 0
            if same and not (reader.kernel and last):
                found.append(Reading(reader, last))
        for node in tensor.outputs:
            after = _channels_last(node, last)
            for output in node.outputs if after is not None else ():
                if output.name not in seen:
                    seen.add(output.name)
                    waiting.append((output, bool(after)))
    return found


def _channels_last(node: gs.Node, last: bool) -> bool | None:
    """Whether channels are the last axis behind ``node``; None where they are no longer what they were."""
    if node.op == "Transpose":
        order = node.attrs.get("perm")
        return True if order == TO_LAST and not last else False if order == TO_FIRST and last else None
    return last if node.op in CHANNELWISE else None
