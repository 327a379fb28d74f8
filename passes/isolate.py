"""One layer as a model of its own, to be timed before and after its rewrite."""

from __future__ import annotations

import onnx

from onnx_lrsd.types import Layer

ELEMENTS = {
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float32": onnx.TensorProto.FLOAT,
    "float64": onnx.TensorProto.DOUBLE,
}


def isolate(proto: onnx.ModelProto, layer: Layer, shape: tuple[int, ...]) -> onnx.ModelProto:
    """The nodes of ``proto`` from ``layer.input``, of that concrete ``shape``, to ``layer.name``.

    Works on the original and on the rewritten model alike, since a rewrite keeps the names of the
    tensors at both ends.
    """
    producers = {name: node for node in proto.graph.node for name in node.output}
    needed, waiting, kept = set[str](), [layer.output], set[int]()
    while waiting:
        name = waiting.pop()
        if name in needed or name == layer.input:
            continue
        needed.add(name)
        node = producers.get(name)
        if node is not None:
            kept.add(id(node))
            waiting.extend(node.input)
    elem_type = ELEMENTS[layer.dtype]
    graph = onnx.GraphProto(name=layer.output)
    graph.node.extend(node for node in proto.graph.node if id(node) in kept)
    graph.initializer.extend(tensor for tensor in proto.graph.initializer if tensor.name in needed)
    graph.input.append(onnx.helper.make_tensor_value_info(layer.input, elem_type, shape))
    graph.output.append(onnx.ValueInfoProto(name=layer.output))
    part = onnx.ModelProto(ir_version=max(proto.ir_version, 4), graph=graph)
    part.opset_import.extend(proto.opset_import)
    return part
