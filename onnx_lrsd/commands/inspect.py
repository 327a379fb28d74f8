"""The layers of a model, before anything is done to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from onnx_lrsd.data.input_layout import input_layout_of
from onnx_lrsd.data.made_up import InputShapes, check_shapes, made_up_samples, named_sizes
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.errors import OptionError
from onnx_lrsd.facts import Inspection
from onnx_lrsd.fit.narrow import left_whole, planned_pairs
from onnx_lrsd.fit.sampling import input_shapes, locate
from onnx_lrsd.graph.model import Model, load, model_bytes
from onnx_lrsd.graph.shapes import inferred_shapes
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.measure.compare import cost
from onnx_lrsd.passes.bytes_outside import bytes_outside
from onnx_lrsd.passes.find_layers import find_layers
from onnx_lrsd.passes.functions import without_layers_in_functions
from onnx_lrsd.passes.pairs import End, find_pairs
from onnx_lrsd.passes.shared_weights import groups, share_weights
from onnx_lrsd.passes.unfuse import optimised_by_runtime, unfuse
from onnx_lrsd.run import DEFAULT_TARGET, NO_FORM
from onnx_lrsd.runtime.session import sound
from onnx_lrsd.targets import TARGETS, price
from onnx_lrsd.types import DENSE, KINDS, Declined, Form, InputSpec, Layer, Price

SESSION_BYTES = 1 << 30
"""Weights that are open at once; of a larger model shapes are found part by part."""
_READ = 64
"""Samples that are read to see the first: some may share a label."""


def inspect(
    model: str | Path | onnx.ModelProto, calibration: Any = None, *, shapes: InputShapes | None = None
) -> Inspection:
    """The layers of ``model`` that a smaller form, or fewer channels, may speed up, each with its price.

    Also the nodes that were declined, with the reason, and the price of the whole model. MACs are those of
    one run: on the first sample of ``calibration``, anything that ``read_samples`` takes, or on made-up data
    with inputs of ``shapes``, batch and all. Sizes that neither gives are assumed, and the result says which.
    Raises OptionError for shapes that the model does not take.
    """
    if calibration is not None and shapes:
        raise OptionError("{calibration} and {shapes} exclude each other: give one.")
    original = replace(load(model), most_bytes=SESSION_BYTES)
    with sound(original.proto, original.folder):
        source = without_layers_in_functions(original)
        graph = source.graph()
        fused = optimised_by_runtime(graph)
        if unfuse(graph):
            source = source.splice(graph)
            graph = source.graph()
        every, declined = find_layers(graph)
        layers = share_weights(graph, every)
        widths, stay, cut = _widths(source, graph, every, layers)
    check_shapes(shapes or {}, inputs_of(source.proto))
    samples = made_up_samples(source, shapes) if calibration is None else _first(calibration, source)
    located = locate(layers, input_shapes(source, layers, samples), samples)
    forms = TARGETS[DEFAULT_TARGET].forms
    useful = [layer for layer in located if layer.output in cut or forms(layer, KINDS)]
    useless = [Declined(layer.name, layer.op, NO_FORM) for layer in located if layer not in useful]
    feed = samples.example()
    whole = cost(original, model_bytes(original), feed, samples.size_of(feed))
    return Inspection(
        tuple((layer, price(layer, Form(DENSE))) for layer in useful),
        (*declined, *useless),
        Price(whole.macs, whole.parameters, whole.bytes),
        {name: value.shape for name, value in samples.example().items()},
        "" if calibration is None else samples.source,
        _assumed(source, shapes or {}) if calibration is None else (),
        whole.not_counted,
        tuple(said for said in (fused, bytes_outside(graph, layers)) if said),
        widths,
        stay,
    )


def _widths(
    source: Model, graph: WorkingGraph, every: Sequence[Layer], layers: Sequence[Layer]
) -> tuple[dict[str, int], tuple[Declined, ...], set[str]]:
    """The channels that may be cut, by who gives and reads them, and the layers whose channels must stay.

    And the outputs of the layers that become smaller by a cut.
    """
    found, stay = find_pairs(graph, every, inferred_shapes(source.proto))
    own = {group[0].output for group in groups(layers) if len(group) == 1 and not group[0].also_read}
    chosen, left = planned_pairs(found, own, {layer.output for layer in every} - own)
    by_output = {layer.output: layer for layer in every}

    def names(ends: Sequence[End]) -> str:
        return ", ".join(dict.fromkeys(by_output[e.output].name for e in ends if e.output in by_output))

    widths = {
        f"{names(p.producers)} -> {names(p.consumers) or 'their product'}": p.channels * max(p.heads, 1)
        for p in chosen.values()
    }
    cut = {end.output for p in chosen.values() for end in (*p.producers, *p.consumers)}
    return widths, left_whole(stay, left, every), cut


def _first(calibration: Any, model: Model) -> Samples:
    """The first samples that fill a batch."""
    inputs = inputs_of(model.proto)
    batch = input_layout_of(inputs).fixed or 1
    samples = read_samples(calibration, inputs, limit=max(_READ, batch), fewest=1)
    return samples.take(slice(samples.smallest_batch))


def _assumed(model: Model, given: InputShapes) -> tuple[str, ...]:
    """The inputs with open axes beside the batch of which ``given`` says nothing."""
    inputs = inputs_of(model.proto)
    slots = input_layout_of(inputs).slots
    named = named_sizes(given, inputs)

    def guessed(spec: InputSpec) -> bool:
        axis = slots[spec.name].axis
        rest = [size for place, size in enumerate(spec.shape) if place != axis]
        return any(not isinstance(size, int) and size not in named for size in rest)

    return tuple(spec.name for spec in inputs if spec.name not in given and guessed(spec))
