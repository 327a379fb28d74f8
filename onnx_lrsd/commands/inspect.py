"""The layers of a model, before anything is done to it."""

from __future__ import annotations

from pathlib import Path

import onnx

from onnx_lrsd.data.made_up import made_up_samples
from onnx_lrsd.facts import Inspection
from onnx_lrsd.fit.calibrate import input_shapes, locate
from onnx_lrsd.graph.model import load
from onnx_lrsd.measure.compare import total_price
from onnx_lrsd.passes.find_layers import find_layers
from onnx_lrsd.passes.shared_weights import share_weights
from onnx_lrsd.run import DEFAULT_TARGET, NO_FORM
from onnx_lrsd.targets import TARGETS, price
from onnx_lrsd.types import DENSE, KINDS, Declined, Form


def inspect(model: str | Path | onnx.ModelProto) -> Inspection:
    """The layers of ``model`` that a smaller form is predicted to speed up, with the price of each as it is.

    Also the nodes that were declined, with the reason, and the price of the whole model. Shapes come from one
    run on made-up data.
    """
    source = load(model)
    graph = source.graph()
    layers, declined = find_layers(graph)
    layers = share_weights(graph, layers)
    samples = made_up_samples(source)
    located = locate(layers, input_shapes(source, layers, samples), samples)
    forms = TARGETS[DEFAULT_TARGET].forms
    useful = [layer for layer in located if forms(layer, KINDS)]
    useless = [Declined(layer.name, layer.op, NO_FORM) for layer in located if layer not in useful]
    return Inspection(
        tuple((layer, price(layer, Form(DENSE))) for layer in useful),
        (*declined, *useless),
        total_price(source, samples),
    )
