"""The bodies of If, Loop and Scan: how often they run, and the shapes inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from onnx_lrsd.graph.external_data import subgraphs
from onnx_lrsd.graph.subgraph import reads
from onnx_lrsd.passes.nodes import attribute
from onnx_lrsd.passes.products import Shape

SMALL = 64
"""Constants of at most so many numbers are handed on with their values, which may be a shape."""


def repetitions(node: onnx.NodeProto, shapes: Mapping[str, Shape], proto: onnx.ModelProto) -> int | None:
    """How often the body of ``node`` runs, by what it gives or reads; None where that is not known."""
    if node.op_type == "If":
        return 1
    body = next(iter(subgraphs(node)), None)
    if body is None or node.op_type not in ("Loop", "Scan") or len(node.input) != len(body.input):
        return None  # a Scan of opset 8 has one more input, and sequences of their own length
    if node.op_type == "Scan":
        first = node.input[len(node.input) - attribute(node, "num_scan_inputs")]
        return shapes[first][_scan_axes(node)[0]] if first in shapes else None
    states = len(body.input) - 2
    stacked = [name for name in node.output[states:] if name in shapes]
    if stacked:
        return shapes[stacked[0]][0]
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    constants |= {
        other.output[0]: a.t
        for other in proto.graph.node
        if other.op_type == "Constant"
        for a in other.attribute
    }
    # A condition that the body does not change leaves the count to the first input.
    if node.input[0] not in constants or not _goes_on(body):
        return None
    return int(onnx.numpy_helper.to_array(constants[node.input[0]]).reshape(-1)[0])


def _scan_axes(node: onnx.NodeProto) -> list[int]:
    """The axis along which a Scan takes each of its scanned inputs apart."""
    given = next((list(a.ints) for a in node.attribute if a.name == "scan_input_axes"), None)
    return [0] * attribute(node, "num_scan_inputs") if given is None else given


def _goes_on(body: onnx.GraphProto) -> bool:
    """Whether the condition that ``body`` gives is the one it got, or a constant."""
    name = body.output[0].name
    for node in reversed(body.node):
        if name in node.output:
            if node.op_type == "Constant":
                return True
            if node.op_type != "Identity":
                return False
            name = node.input[0]
    return name == body.input[1].name or name in {tensor.name for tensor in body.initializer}


def body_shapes(
    node: onnx.NodeProto, body: onnx.GraphProto, shapes: Mapping[str, Shape], proto: onnx.ModelProto
) -> dict[str, Shape]:
    """Shapes inside ``body`` of ``node`` as far as they can be inferred, from those of the graph around it.

    What a loop carries is taken to keep its shape.
    """
    given = dict(zip((value.name for value in body.input), _handed_in(node, body, shapes), strict=True))
    types = {value.name: value.type.tensor_type.elem_type for value in proto.graph.value_info}
    types |= {value.name: value.type.tensor_type.elem_type for value in proto.graph.input}
    types |= {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    own = {value.name: value.type.tensor_type.elem_type for value in body.input}
    graph = onnx.GraphProto(name="body", node=body.node, initializer=body.initializer)
    outside = {name for inner in body.node for name in reads(inner)} - {t.name for t in body.initializer}
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name in sorted(outside & (shapes.keys() | given.keys() | stored.keys())):
        tensor = stored.get(name)
        if tensor is not None and tensor.data_type == onnx.TensorProto.INT64 and _count(tensor) <= SMALL:
            graph.initializer.append(tensor)
            continue
        shape = given[name] if name in given else shapes.get(name)
        if shape is None and tensor is not None:
            shape = tuple(tensor.dims)
        kind = own.get(name) or types.get(name) or onnx.TensorProto.FLOAT
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in body.output)
    part = onnx.ModelProto(ir_version=max(proto.ir_version, 4), graph=graph, opset_import=proto.opset_import)
    try:
        inferred = onnx.shape_inference.infer_shapes(part, data_prop=True).graph
    except Exception:  # it raises RuntimeError and more for what it does not know
        return {}
    found = {tensor.name: tuple(tensor.dims) for tensor in body.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            found[value.name] = tuple(dim.dim_value for dim in dims)
    return found


def _handed_in(
    node: onnx.NodeProto, body: onnx.GraphProto, shapes: Mapping[str, Shape]
) -> Sequence[Shape | None]:
    """Shapes of the inputs of ``body``, None where they are not known.

    A Scan hands in its states, and of each scanned input a slice along its axis.
    """
    if node.op_type == "Loop":
        return [(), (), *(shapes.get(name) for name in node.input[2:])]
    if node.op_type != "Scan":
        return [None] * len(body.input)
    states = node.input[: len(node.input) - attribute(node, "num_scan_inputs")]
    slices = list[Shape | None]()
    for name, axis in zip(node.input[len(states) :], _scan_axes(node), strict=True):
        shape = shapes.get(name)
        if shape is None:
            slices.append(None)
        else:
            scanned = axis % len(shape)
            slices.append((*shape[:scanned], *shape[scanned + 1 :]))
    return [*(shapes.get(name) for name in states), *slices]


def _count(tensor: onnx.TensorProto) -> int:
    """How many numbers ``tensor`` has; more than SMALL where they are stored in another file."""
    return int(onnx.numpy_helper.to_array(tensor).size) if not tensor.external_data else SMALL + 1
