"""Constants that are the weight of no layer but can be stored in codes: tables, recurrent weights and others.

A runtime decodes them as it opens the model, so the nodes that read them run as before. Whatever reads a
constant, it is stored once: a layer that shares its weight with another kind of node, or with a layer that
applies it otherwise, is no layer of its own.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.constants import constant_value, overridable
from onnx_lrsd.passes.find_layers import FLOATS
from onnx_lrsd.passes.nodes import DOMAIN, domain_of, is_op, label
from onnx_lrsd.passes.products import CONTRIB
from onnx_lrsd.passes.shared_weights import share_weights
from onnx_lrsd.passes.tidy import LAYOUTS, captured_names
from onnx_lrsd.types import Declined, Layer

READERS: Mapping[tuple[str, str], tuple[int, ...]] = {
    (DOMAIN, "Gather"): (0,),
    (DOMAIN, "LSTM"): (1, 2),
    (DOMAIN, "GRU"): (1, 2),
    (DOMAIN, "RNN"): (1, 2),
    (DOMAIN, "Conv"): (1,),
    (DOMAIN, "ConvTranspose"): (1,),
    (DOMAIN, "Gemm"): (0, 1, 2),
    (DOMAIN, "MatMul"): (0, 1),
    (DOMAIN, "Einsum"): (0, 1, 2, 3),
    (DOMAIN, "Add"): (0, 1),
    (DOMAIN, "Sub"): (0, 1),
    (DOMAIN, "Mul"): (0, 1),
    (CONTRIB, "Attention"): (1,),
    (CONTRIB, "EmbedLayerNormalization"): (2, 3, 4),
}
"""Nodes and those of their inputs that may be read out of codes: values enter linearly, one by one."""
FEWEST = 4096
"""Numbers of a constant from which the nodes that decode it are worth their bytes."""
_LARGEST = 65504.0
"""The largest number of fp16. Beyond it lie masks, whose size has no meaning."""
SHARED = "its weight is read by other nodes too, and stored once as the constant {}"


def find_constants(
    working: WorkingGraph,
    layers: Sequence[Layer],
    declined: Sequence[Declined],
    named: Container[str] | None = None,
) -> tuple[tuple[Layer, ...], tuple[Declined, ...]]:
    """The constants that can be stored in codes, followed by ``layers``; and what remains declined.

    A layer whose weight is one of the constants is declined; what was declined for a weight that is now
    stored is not any more. Only the constants ``named`` are looked at, if it is not None.
    """
    weights = dict[str, list[Layer]]()
    for layer in share_weights(working, layers):
        for name in _stored_names(working.tensors()[layer.weight]):
            weights.setdefault(name, []).append(layer)
    found, taken = list[Layer](), set[int]()
    shut = captured_names(working.graph) | {output.name for output in working.outputs}
    for tensor in _constants(working):
        if named is not None and tensor.name not in named:
            continue
        if any(not layer.also_read for layer in weights.get(tensor.name, ())):
            continue
        readers = list(_readers(tensor))
        if tensor.name in shut or not all(_is_known(node, index) for node, index in readers):
            continue
        constant = _read(tensor, [node for node, _ in readers], working)
        if constant is not None:
            found.append(constant)
            taken |= {id(node) for node, _ in readers}
    shared = {layer.output: x.name for x in found for layer in weights.get(x.output, ())}
    out = [Declined(x.name, x.op, SHARED.format(shared[x.output])) for x in layers if x.output in shared]
    served = {(label(node), node.op) for node in working.nodes if id(node) in taken}
    kept = [entry for entry in declined if (entry.name, entry.op) not in served]
    return (*found, *(layer for layer in layers if layer.output not in shared)), (*kept, *out)


def _constants(working: WorkingGraph) -> Iterator[gs.Tensor]:
    """Every stored tensor that nodes read, in the order they do."""
    seen = set[str]()
    for node in working.nodes:
        for tensor in node.inputs:
            if tensor.name not in seen and _is_stored(tensor):
                seen.add(tensor.name)
                yield tensor


def _is_stored(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) or (
        len(tensor.inputs) == 1 and is_op(tensor.inputs[0], "Constant")
    )


def _stored_names(tensor: gs.Tensor) -> Iterator[str]:
    """Names of the stored tensors that ``tensor`` is computed from."""
    if _is_stored(tensor):
        yield tensor.name
        return
    for node in tensor.inputs:
        for given in node.inputs:
            yield from _stored_names(given)


def _readers(tensor: gs.Tensor) -> Iterator[tuple[gs.Node, int]]:
    """The nodes that read ``tensor``, perhaps in another layout, and the number of the input."""
    for node in tensor.outputs:
        for index, given in enumerate(node.inputs):
            if given is not tensor:
                continue
            if is_op(node, *LAYOUTS) and index == 0:
                yield from _readers(node.outputs[0])
            else:
                yield node, index


def _read(tensor: gs.Tensor, readers: Iterable[gs.Node], working: WorkingGraph) -> Layer | None:
    """The constant ``tensor``; None where codes would save nothing or cannot hold it.

    Its rows are the last axis, of a convolution the weights of one channel. A vector is left: it has few
    numbers for the nodes that decode it, and biases and scales bear little.
    """
    value = constant_value(tensor)
    nodes = list(readers)
    if value is None or not nodes or value.dtype.name not in FLOATS or value.size < FEWEST:
        return None
    if sum(size > 1 for size in value.shape) < 2 or overridable(tensor, working.overridable):
        return None
    if not np.abs(value.astype(np.float32)).max() <= _LARGEST:
        return None
    convolution = any(is_op(node, "Conv", "ConvTranspose") for node in nodes)
    n = value.shape[0] if convolution else prod(value.shape[:-1])
    return Layer(
        output=tensor.name,
        name=tensor.name,
        op=nodes[0].op,
        input="",
        weight=tensor.name,
        shape=tuple(value.shape),
        dtype=value.dtype.name,
        n=n,
        m=value.size // n,
        constant=True,
    )


def _is_known(node: gs.Node, index: int) -> bool:
    return index in READERS.get((domain_of(node.domain), node.op), ())
