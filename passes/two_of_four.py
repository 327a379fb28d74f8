"""Which nodes carry a 2:4 weight: what sparse tensor cores ask for, read from the file itself."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.constants import constant_value, overridable
from onnx_lrsd.passes.nodes import label
from onnx_lrsd.passes.operators import operator_at

BLOCK, _KEPT = 4, 2


class SparseNode(NamedTuple):
    """A node by name, and the dtype of its 2:4 weight."""

    name: str
    dtype: str


def two_of_four(working: WorkingGraph) -> tuple[SparseNode, ...]:
    """Nodes of the main graph whose constant weight is 2:4 along the input channels.

    Of every four consecutive input channels at most two are not zero, for each output channel and each
    kernel position.
    Source: TensorRT documentation, Sparsity.
    """
    found = []
    for node in working.nodes:
        operator = operator_at(node)
        axis = operator.sparse_axis(node) if operator is not None else None
        if axis is None:
            continue
        value = constant_value(node.inputs[1])
        if value is None or overridable(node.inputs[1], working.overridable):
            continue
        if _is_two_of_four(np.moveaxis(value, axis, -1)):
            found.append(SparseNode(label(node), value.dtype.name))
    return tuple(found)


def _is_two_of_four(weight: npt.NDArray[np.generic]) -> bool:
    """Whether each four consecutive entries of the last axis hold two zeros; it is looked at row by row."""
    if weight.shape[-1] % BLOCK:
        return False
    return all(bool((np.count_nonzero(row.reshape(-1, BLOCK), axis=1) <= _KEPT).all()) for row in weight)
