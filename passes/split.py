"""Put the factors of a layer in its place."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.find_layers import producer
from onnx_lrsd.passes.operators import operator_of
from onnx_lrsd.passes.pack import pack, store
from onnx_lrsd.passes.tidy import remove_node, remove_orphans
from onnx_lrsd.passes.writer import Stored, Writer
from onnx_lrsd.types import Factors, Layer


def split(working: WorkingGraph, layer: Layer, factors: Factors, stored: Stored | None = None) -> None:
    """Replace ``layer`` by ``factors`` in ``working``. The tensor ``layer.output`` keeps its name.

    A BatchNormalization or Add that the layer absorbed goes with it; so does what computed a weight
    that nothing reads any more. Layers that share their factors are given one dictionary ``stored``, in the
    order of the graph: what they have in common is then written once. A constant is computed by nodes in
    front of all others, and no reader of it changes.

    >>> import numpy as np, onnx, onnx_lrsd
    >>> from onnx_lrsd.types import Factors, Form
    >>> graph = onnx.parser.parse_graph("g (float[n, 64] x) => (float[n, 64] y) { y = MatMul (x, w) }")
    >>> weight = np.outer(np.arange(64), np.ones(64)).astype(np.float32)
    >>> graph.initializer.extend([onnx.numpy_helper.from_array(weight, "w")])
    >>> opset = onnx.helper.make_opsetid("", 17)
    >>> model = onnx_lrsd.load(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8))
    >>> working = model.graph()
    >>> (layer,), _ = onnx_lrsd.find_layers(working)
    >>> v, u = np.ones((1, 64)), np.ones((64, 1))  # applied first, applied last
    >>> onnx_lrsd.split(working, layer, Factors(form=Form("channel", 1), kernels=(v, u), bias=np.zeros(64)))
    >>> [(node.op_type, list(node.output)) for node in model.splice(working).proto.graph.node]
    [('MatMul', ['y/lrsd/V_out']), ('MatMul', ['y'])]
    """
    if layer.constant:
        _store(working, layer, factors)
        return
    node = producer(working, layer)
    tensors = working.tensors()
    target, source = tensors[layer.output], tensors[layer.input]
    last = target.inputs[0]
    write = Writer(working, layer, stored)
    write_form = operator_of(layer).write_factors if factors.packed is None else pack
    result = write_form(write, layer, source, factors)
    place = next(i for i, other in enumerate(working.nodes) if other is last)
    replaced = [node] if last is node else [node, last]
    old_inputs = [given for gone in replaced for given in gone.inputs if given is not source]
    for gone in replaced:
        gone.inputs.clear()
        gone.outputs.clear()
    final = write.nodes[-1]
    assert final.outputs[0] is result
    final.outputs[0] = target
    working.nodes[place:place] = write.nodes
    for gone in replaced:
        remove_node(working, gone)
    remove_orphans(working, old_inputs)


def _store(working: WorkingGraph, constant: Layer, factors: Factors) -> None:
    """Let nodes compute ``constant``, under the name it has."""
    stored = working.tensors()[constant.weight]
    write = Writer(working, constant)
    decoded = store(write, constant, factors)
    final = write.nodes[-1]
    assert final.outputs[0] is decoded
    computed = gs.Variable(constant.weight, np.dtype(constant.dtype), list(constant.shape))
    for reader in list(stored.outputs):
        for index, given in enumerate(reader.inputs):
            if given is stored:
                reader.inputs[index] = computed
    for node in list(stored.inputs):  # a Constant node
        node.outputs.clear()
        remove_node(working, node)
    final.outputs[0] = computed
    working.nodes[:0] = write.nodes
