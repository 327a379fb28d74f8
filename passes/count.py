"""What a model costs: multiply-accumulates from concrete shapes, and parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod

import numpy as np
import onnx
import onnx.inliner

from onnx_lrsd.graph.external_data import subgraphs
from onnx_lrsd.graph.subgraph import reads
from onnx_lrsd.passes.bodies import body_shapes, repetitions
from onnx_lrsd.passes.products import Product, Shape, product_of, why_not_counted

Shapes = Mapping[str, Shape]

WEIGHTS = ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int4", "uint4", "int2", "uint2")


def without_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """``proto`` with the bodies of its functions in place of each call; itself where it has none.

    Tensors of the main graph keep their names.
    """
    return onnx.inliner.inline_local_functions(proto) if proto.functions else proto


def compute_tensors(proto: onnx.ModelProto) -> list[str]:
    """Tensors of the main graph whose shapes ``node_macs`` needs; ``proto`` has no functions."""
    names: list[str] = []
    folded = _folded(proto)
    for node in proto.graph.node:
        if folded.issuperset(node.output):
            continue
        product = product_of(node)
        if product is not None:
            names.extend(_needed(node, product))
        elif any(_multiplies(graph) for graph in subgraphs(node)):
            inner = {name for graph in subgraphs(node) for name in _named(graph)}
            names.extend(name for name in reads(node) if name not in inner)
            names.extend(node.output)
    others = _no_tensors(proto)
    return [name for name in dict.fromkeys(names) if name and name not in others]


def node_macs(proto: onnx.ModelProto, shapes: Shapes) -> dict[str, int]:
    """First output of every counted node of the main graph -> its multiply-accumulates.

    Convolutions, products (of activations too), Gemm, attention and recurrent operators are counted, in the
    bodies of control flow as often as these run: of If the dearer branch. What reads constants alone is not,
    since a runtime computes it once. ``proto`` has no functions; ``not_counted`` says what is left out.
    """
    return _count(proto, shapes)[0]


def not_counted(proto: onnx.ModelProto, shapes: Shapes) -> tuple[str, ...]:
    """What ``node_macs`` leaves out since it cannot be told, in words with the number of nodes."""
    missed = Counter(_count(proto, shapes)[1])
    return tuple(f"{count} x {what}" for what, count in missed.items())


def parameters(proto: onnx.ModelProto) -> int:
    """Elements of all stored tensors of a weight's type: floating point and 8 bits or fewer."""
    total = 0
    for tensor in _stored(proto):
        if onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name in WEIGHTS:
            total += prod(tensor.dims)
    return total


def _folded(proto: onnx.ModelProto) -> set[str]:
    """Tensors of the main graph that are computed from constants alone, and these."""
    listed = {value.name for value in proto.graph.input} if proto.ir_version >= 4 else set()
    known = {tensor.name for tensor in proto.graph.initializer} - listed | {""}
    for node in proto.graph.node:
        # Without inputs a node is a constant or draws at random, which no counted node does.
        if known.issuperset(node.input) and not any(a.HasField("g") for a in node.attribute):
            known.update(node.output)
    return known


def _no_tensors(proto: onnx.ModelProto) -> set[str]:
    """Sequences and optionals of the main graph, which have no shape."""
    found = {value.name for value in proto.graph.input if not value.type.HasField("tensor_type")}
    for node in proto.graph.node:
        if node.op_type in ("SequenceAt", "SequenceLength", "ConcatFromSequence", "OptionalHasElement"):
            continue
        if "Sequence" in node.op_type or node.op_type == "Optional":
            found.update(node.output)
        for graph in subgraphs(node):
            given = graph.output[1:] if node.op_type == "Loop" else graph.output
            pairs = zip(node.output, given, strict=False)
            found.update(
                name for name, value in pairs if value.type.WhichOneof("value") not in (None, "tensor_type")
            )
    return found


def _count(proto: onnx.ModelProto, shapes: Shapes) -> tuple[dict[str, int], list[str]]:
    folded = _folded(proto)
    found, missed = dict[str, int](), list[str]()
    for node in proto.graph.node:
        if folded.issuperset(node.output):
            continue
        total, left = _cost(node, shapes, proto)
        if total is not None:
            found[node.output[0]] = total
        missed.extend(left)
    return found, missed


def _cost(node: onnx.NodeProto, shapes: Shapes, proto: onnx.ModelProto) -> tuple[int | None, list[str]]:
    """MACs of ``node``, None where it has none or they are not known, and what was left out of them."""
    product = product_of(node)
    if product is not None:
        needed = _needed(node, product)
        if not all(name in shapes for name in needed):
            return None, [f"{node.op_type} whose shapes are not known"]
        given = [shapes[node.input[index]] for index in product.inputs]
        return product.macs(node, given, shapes[node.output[0]] if node.output[0] else ()), []
    bodies = [graph for graph in subgraphs(node) if _multiplies(graph)]
    if not bodies:
        reason = why_not_counted(node)
        return None, [reason] if reason else []
    times = repetitions(node, shapes, proto)
    if times is None:
        return None, [f"the body of {node.op_type}, which runs as often as its inputs say"]
    totals, missed = list[int](), list[str]()
    for graph in bodies:
        inside = {**shapes, **body_shapes(node, graph, shapes, proto)}
        costs = [_cost(inner, inside, proto) for inner in graph.node]
        totals.append(times * sum(total or 0 for total, _ in costs))
        missed.extend(said for _, left in costs for said in left)
    return max(totals), missed


def _needed(node: onnx.NodeProto, product: Product) -> list[str]:
    """Names of the tensors whose shapes tell the MACs of ``node``."""
    return [name for name in (*(node.input[index] for index in product.inputs), node.output[0]) if name]


def _multiplies(graph: onnx.GraphProto) -> bool:
    """Whether anything in ``graph`` or the bodies inside it multiplies, as far as is known."""
    return any(
        product_of(node) is not None
        or bool(why_not_counted(node))
        or any(_multiplies(inner) for inner in subgraphs(node))
        for node in graph.node
    )


def _named(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that ``graph`` gives to tensors of its own."""
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    for node in graph.node:
        yield from node.output
        for inner in subgraphs(node):
            yield from _named(inner)


def _stored(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers and Constant nodes of all graphs and functions, sparse ones by their values."""
    graphs: list[onnx.GraphProto] = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            yield from (sparse.values for sparse in graph.sparse_initializer)
            nodes.extend(graph.node)
            continue
        node = nodes.pop()
        for attribute in node.attribute:
            if attribute.HasField("t") and node.op_type == "Constant":
                yield attribute.t
            elif attribute.floats and node.op_type == "Constant":
                yield onnx.numpy_helper.from_array(np.asarray(attribute.floats, dtype=np.float32))
            graphs.extend(attribute.graphs)
            if attribute.HasField("g"):
                graphs.append(attribute.g)
