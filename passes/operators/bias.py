"""The bias that a node adds by its third input."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.constants import constant_bias, constant_float64, overridable
from onnx_lrsd.passes.operators.operator import Matrix


def bias_input(node: gs.Node) -> gs.Tensor | None:
    """The tensor that ``node`` adds, if there is one."""
    return node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None


def bias_of(node: gs.Node, channels: int) -> Matrix:
    """The constant that ``node`` adds, as it is stored; (channels,) zeros where there is none."""
    bias = bias_input(node)
    return np.zeros(channels) if bias is None else constant_float64(bias)


def why_no_bias(node: gs.Node, working: WorkingGraph) -> str | None:
    """Why what ``node`` adds is no bias that could be written anew; None where it is one, or nothing."""
    bias = bias_input(node)
    if bias is None:
        return None
    if constant_bias(bias) is None:
        return "its bias is computed at run time"
    if overridable(bias, working.overridable):
        return "its bias is an input that a caller may override"
    return None
