"""Parts of a graph: what a tensor is computed from, and what a change of some tensors reaches.

``onnx.utils.Extractor`` is not used: it does not follow what the bodies of If and Loop read from the graph
around them, asks for the type of every tensor at which a part ends, and copies all weights into the part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import onnx

from onnx_lrsd.errors import ModelError
from onnx_lrsd.graph.external_data import subgraphs
from onnx_lrsd.types import InputSpec


def reads(node: onnx.NodeProto) -> list[str]:
    """Names of the tensors that ``node`` reads, those read inside its subgraphs included."""
    names = [name for name in node.input if name]
    for graph in subgraphs(node):
        names.extend(name for inner in graph.node for name in reads(inner))
        names.extend(output.name for output in graph.output)
    return names


def extract(
    proto: onnx.ModelProto,
    outputs: Sequence[str],
    given: Sequence[onnx.ValueInfoProto] = (),
    *,
    stored: Callable[[onnx.TensorProto], onnx.TensorProto] | None = None,
) -> onnx.ModelProto:
    """The part of ``proto`` that computes ``outputs``, which may be any tensors of the main graph.

    ``given`` are tensors that become inputs of the part instead of being computed. Inputs and weights that
    the part does not read are left out. An output that ``proto`` does not declare stays untyped: a runtime
    infers its type. ``stored(tensor)``, if given, is kept in place of each weight. Raises ValueError for an
    output that is no tensor of the main graph.
    """
    source = proto.graph
    names = {value.name for value in given}
    nodes = _needed(proto, outputs, names)
    used = {name for node in nodes for name in reads(node)} | set(outputs)
    inputs = [value for value in source.input if value.name in used - names]
    listed = {value.name for value in inputs}
    declared = {value.name: value for value in source.output}
    graph = onnx.GraphProto(name=source.name, node=nodes, input=[*inputs, *given])
    graph.output.extend(declared.get(name, onnx.ValueInfoProto(name=name)) for name in outputs)
    for tensor in source.initializer:
        if tensor.name in used - names:
            if stored is not None and tensor.name not in listed:  # a caller may override a listed one
                tensor = stored(tensor)
            graph.initializer.append(tensor)
    graph.sparse_initializer.extend(t for t in source.sparse_initializer if t.values.name in used - names)
    part = onnx.ModelProto(ir_version=proto.ir_version, graph=graph)
    part.opset_import.extend(proto.opset_import)
    part.functions.extend(proto.functions)
    return part


def _needed(proto: onnx.ModelProto, outputs: Sequence[str], given: Collection[str]) -> list[onnx.NodeProto]:
    """The nodes that ``outputs`` depend on, but for what is ``given``, in the order of the graph."""
    producers = {name: index for index, node in enumerate(proto.graph.node) for name in node.output if name}
    known = {value.name for value in proto.graph.input} | {tensor.name for tensor in proto.graph.initializer}
    known |= {tensor.values.name for tensor in proto.graph.sparse_initializer}
    for name in outputs:
        if name not in producers and name not in known:
            raise ValueError(f"{name} is no tensor of the main graph")
    kept: set[int] = set()
    waiting = list(outputs)
    while waiting:
        name = waiting.pop()
        index = None if name in given else producers.get(name)
        if index is not None and index not in kept:
            kept.add(index)
            waiting.extend(reads(proto.graph.node[index]))
    return [proto.graph.node[index] for index in sorted(kept)]


def frontier(proto: onnx.ModelProto, changing: Collection[str]) -> list[str]:
    """Tensors that are read by what depends on ``changing``, but do not depend on it themselves.

    ``changing`` are names of tensors. Inputs of the model and tensors computed from constants alone are
    left out.
    """
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = {value.name for value in proto.graph.input} - constants
    varying, late, found = set(inputs), affected(proto, changing), dict[str, None]()
    for node in proto.graph.node:
        read = reads(node)
        if not late.isdisjoint(node.output):
            found |= dict.fromkeys(name for name in read if name in varying)
        elif not varying.isdisjoint(read):
            varying.update(node.output)
    return [name for name in found if name not in inputs]


def affected(proto: onnx.ModelProto, changing: Collection[str]) -> set[str]:
    """Names of the tensors that differ once those named ``changing`` do, these included.

    A node that reads or gives one of them is taken to change all of its outputs.
    """
    late = set(changing)
    for node in proto.graph.node:
        if not late.isdisjoint(reads(node)) or not late.isdisjoint(node.output):
            late.update(name for name in node.output if name)
    return late


def inputs_of(proto: onnx.ModelProto) -> list[InputSpec]:
    """What a caller must feed; an initializer that is listed among the inputs has a default.

    Raises ModelError for an input that is no tensor.
    """
    defaults = {tensor.name for tensor in proto.graph.initializer}
    defaults |= {tensor.values.name for tensor in proto.graph.sparse_initializer}
    return [_spec(value) for value in proto.graph.input if value.name not in defaults]


def _spec(value: onnx.ValueInfoProto) -> InputSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.elem_type:
        raise ModelError(
            f"Input {value.name} is a sequence, a map or an optional, which cannot be fed from samples: "
            "export the model with tensors as inputs."
        )
    shape = tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or None
        for d in tensor.shape.dim
    )
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return InputSpec(value.name, dtype, shape, tensor.HasField("shape"))
