"""Shapes of tensors as far as the model alone tells them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

OpenShape = tuple[int | str | None, ...]


def inferred_shapes(proto: onnx.ModelProto) -> Mapping[str, OpenShape]:
    """Shapes of the tensors of the main graph that ONNX can infer, symbols for sizes that are open."""
    try:
        graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    except Exception:  # it raises RuntimeError and more for what ONNX Runtime may still run
        return {}
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
            for dim in value.type.tensor_type.shape.dim
        )
        for value in (*graph.value_info, *graph.input, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }
