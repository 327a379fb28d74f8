"""What is known of each node of a model, for viewers of graphs."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from onnx_lrsd.data.samples import Samples
from onnx_lrsd.facts import NodeData, Report
from onnx_lrsd.graph.model import Model
from onnx_lrsd.measure.drift import drift
from onnx_lrsd.passes.kernel_owners import kernel_nodes
from onnx_lrsd.passes.writer import PART
from onnx_lrsd.report.forms import form_of
from onnx_lrsd.runtime.kernel_times import kernels
from onnx_lrsd.types import Progress

FUSED_PREFIX = "fused "
"""What ONNX Runtime puts in front of the name of a Gemm that it fuses with the rectifier behind."""
FUSED_AT_MOST = 3
"""Nodes in a row that one kernel does the work of: a convolution, its sum or scale, and its rectifier."""


def node_data(
    before: Model,
    after: Model,
    samples: Samples,
    report: Report | None = None,
    *,
    progress: Progress | None = None,
) -> NodeData:
    """Time and error of each node of ``after``, which was made of ``before``, and its form by ``report``.

    Nodes without a name are left out: viewers name them as they please. A kernel that does the work of
    several nodes counts to the first of them. Errors are those of
    tensors that have one name in both. Raises VerificationError where they share none.
    """
    nodes = [node for node in after.proto.graph.node if node.name]
    producers = {name: node for node in nodes for name in node.output if name}
    errors = dict[str, float]()
    for tensor in drift(before, after, samples, progress=progress).tensors:
        if tensor.name in producers:
            key = producers[tensor.name].name
            errors[key] = max(tensor.error, errors.get(key, 0.0))
    feed = samples.example()
    ran = kernels(after.proto, feed, folder=after.folder)
    seconds = dict[str, float]()
    names = [kernel.name.removeprefix(FUSED_PREFIX) for kernel in ran]
    for kernel, node in zip(ran, kernel_nodes(after.proto, names), strict=True):
        if node is not None and node.name:
            key = _worker(node, kernel.op, producers).name
            seconds[key] = seconds.get(key, 0.0) + kernel.seconds / samples.size_of(feed)
    forms = dict[str, str]()
    if report is not None:
        made = {layer.name: form_of(layer) for layer in report.layers if layer.output}
        outputs = {layer.output: layer.name for layer in report.layers if layer.output}
        for node in nodes:
            own = node.name.rpartition(PART)[0] or next(
                (outputs[name] for name in node.output if name in outputs), node.name
            )
            if own in made:
                forms[node.name] = made[own]
    return NodeData(seconds=seconds, errors=errors, forms=forms)


def _worker(node: onnx.NodeProto, op: str, producers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto:
    """The nearest node in front of ``node`` whose operator a kernel ``op`` runs, else ``node`` itself.

    A kernel that does what several nodes did has the name of the last one, and the operator of the first.
    """
    found = node
    for _ in range(FUSED_AT_MOST):
        if found.op_type == op.removeprefix("Fused"):
            return found
        before = [producers[name] for name in found.input if name in producers]
        if len(before) != 1:
            break
        found = before[0]
    return node
