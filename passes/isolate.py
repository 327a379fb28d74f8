"""One layer as a model of its own, to be timed before and after its rewrite."""

from __future__ import annotations

import numpy as np
import onnx

from onnx_lrsd.graph.subgraph import extract
from onnx_lrsd.types import Layer


def isolate(proto: onnx.ModelProto, layer: Layer, shape: tuple[int, ...]) -> onnx.ModelProto:
    """The nodes of ``proto`` from ``layer.input``, of that concrete ``shape``, to ``layer.output``.

    Works on the original and on the rewritten model alike, since a rewrite keeps the names of the
    tensors at both ends.
    """
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(layer.dtype))
    given = onnx.helper.make_tensor_value_info(layer.input, element, shape)
    part = extract(proto, [layer.output], [given])
    for output in part.graph.output:
        output.ClearField("type")
    return part
