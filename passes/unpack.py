"""Dense weights in place of those in codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.nodes import domain_of, label
from onnx_lrsd.passes.operators import OPERATORS, operator_at
from onnx_lrsd.passes.pack import PACKED_PREFIX
from onnx_lrsd.passes.tidy import remove_node


def coded_weights(proto: onnx.ModelProto) -> list[str]:
    """Names of the weights that nodes of the model decode; no input of the model is needed for them.

    A constant that is the weight of no layer has kept its name.
    """
    names = list[str]()
    for node in proto.graph.node:
        if _decodes(node):
            continue
        if node.input and all(name.startswith(PACKED_PREFIX) for name in node.input):
            names.extend(node.output)
        elif (domain_of(node.domain), node.op_type) in OPERATORS:
            names.extend(name for name in node.input if name.startswith(PACKED_PREFIX))
    return list(dict.fromkeys(names))


def replace_coded_weights(working: WorkingGraph, weights: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Let nodes read ``weights``, by the name of the tensor that was decoded; decoding nodes go."""
    constants = {
        name: gs.Constant(name, np.ascontiguousarray(values))
        for name, values in weights.items()
        if not name.startswith(PACKED_PREFIX)
    }
    for node in working.nodes:
        for index, given in enumerate(node.inputs):
            if given.name in constants:
                node.inputs[index] = constants[given.name]
            elif given.name in weights and operator_at(node) is not None:
                name = f"{label(node)}/weight"
                node.inputs[index] = gs.Constant(name, np.ascontiguousarray(weights[given.name]))
    for node in list(working.nodes):
        if any(output.name in constants for output in node.outputs):
            node.inputs.clear()
            node.outputs.clear()
            remove_node(working, node)
    for node in reversed(list(working.nodes)):
        if all(output.name.startswith(PACKED_PREFIX) and not output.outputs for output in node.outputs):
            node.inputs.clear()
            node.outputs.clear()
            remove_node(working, node)


def _decodes(node: onnx.NodeProto) -> bool:
    return bool(node.output) and all(name.startswith(PACKED_PREFIX) for name in node.output)
