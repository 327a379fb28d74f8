"""One module an operator: all that is particular to it. ``Operator`` says what a module must have."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from onnx_lrsd.passes.nodes import DOMAIN, domain_of
from onnx_lrsd.passes.operators import conv, conv_transpose, gemm, matmul
from onnx_lrsd.passes.operators.operator import Operator
from onnx_lrsd.types import Layer

OPERATORS: Mapping[tuple[str, str], Operator] = {
    (DOMAIN, "Conv"): conv,
    (DOMAIN, "ConvTranspose"): conv_transpose,
    (DOMAIN, "Gemm"): gemm,
    (DOMAIN, "MatMul"): matmul,
}
"""By domain and type of node. A line here and its module add an operator."""


def operator_at(node: gs.Node) -> Operator | None:
    """The operator of ``node``, if it is one whose weight can be written in another form."""
    return OPERATORS.get((domain_of(node.domain), node.op))


def operator_of(layer: Layer) -> Operator:
    """The operator of ``layer``."""
    return OPERATORS[DOMAIN, layer.op]
