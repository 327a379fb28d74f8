"""Fold a BatchNormalization into the layer before it.

With g = gamma / sqrt(var + epsilon), one value for each output channel, the pair is one layer: its
weight is g W and its bias g (b - mean) + beta. The fold happens only in layers that are split, so
that a layer left as it is stays so to the byte.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.constants import constant_bias, overridable
from onnx_lrsd.passes.nodes import is_op

_Matrix = npt.NDArray[np.float64]


def foldable_batchnorm(node: gs.Node, working: WorkingGraph) -> gs.Node | None:
    """The inference BatchNormalization of finite values that alone reads the output of ``node``, or None."""
    output = node.outputs[0]
    if len(output.outputs) != 1 or any(output is o for o in working.outputs):
        return None
    norm = output.outputs[0]
    if not is_op(norm, "BatchNormalization") or len(norm.outputs) != 1 or norm.attrs.get("training_mode", 0):
        return None
    if norm.inputs[0] is not output or not norm.attrs.get("spatial", 1):
        return None
    for given in norm.inputs[1:]:
        if constant_bias(given) is None or overridable(given, working.overridable):
            return None
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # of a variance below zero, say
        finite = all(np.isfinite(values).all() for values in _scale_and_shift(norm))
    return norm if finite else None


def fold(last: gs.Node, weight: _Matrix, bias: _Matrix) -> tuple[_Matrix, _Matrix]:
    """``weight`` (channels, m) and ``bias`` (channels,) with ``last`` folded in, if it is a normalisation."""
    if is_op(last, "BatchNormalization"):
        scale, shift = _scale_and_shift(last)
        weight, bias = scale[:, None] * weight, scale * bias + shift
    return np.ascontiguousarray(weight), np.array(bias, dtype=np.float64)


def _scale_and_shift(norm: gs.Node) -> tuple[_Matrix, _Matrix]:
    """g and h (channels,), float64, such that the normalisation is g y + h."""
    gamma, beta, mean, variance = (np.asarray(constant_bias(t), dtype=np.float64) for t in norm.inputs[1:])
    scale = gamma / np.sqrt(variance + norm.attrs.get("epsilon", 1e-5))
    return scale, beta - scale * mean
