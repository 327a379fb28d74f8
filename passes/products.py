"""MACs of operators that multiply but are never rewritten: from the shapes of what they read and give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple, TypeAlias

import onnx

from onnx_lrsd.passes.nodes import DOMAIN, attribute, domain_of
from onnx_lrsd.passes.operators import OPERATORS, conv, gemm, matmul

Shape: TypeAlias = tuple[int, ...]

CONTRIB, NCHWC = "com.microsoft", "com.microsoft.nchwc"
"""Domains of ONNX Runtime's own operators; its optimiser alone writes the second."""
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
OTHERS = (
    *("BeamSearch", "GreedySearch", "Sampling", "MoE", "QMoE", "LongformerAttention", "PackedAttention"),
    *("GroupQueryAttention", "SparseAttention", "PagedAttention", "DecoderAttention", "MatMulBnb4"),
    *("DecoderMaskedSelfAttention", "DecoderMaskedMultiHeadAttention", "PackedMultiHeadAttention"),
    *(
        "DynamicQuantizeLSTM",
        "QLinearConvTranspose",
        "GemmFastGelu",
        "FusedMatMulActivation",
        "QOrderedMatMul",
    ),
    *("QOrderedAttention", "WhisperBeamSearch", "NhwcConv", "NhwcFusedConv", "GemmFloat8"),
)
"""Operators of ONNX Runtime that multiply, but by no rule that is known here."""
KNOWN_DOMAINS = (DOMAIN, "ai.onnx.ml", CONTRIB)


class Product(NamedTuple):
    """How an operator is counted: the inputs whose shapes matter, and MACs from these and the output."""

    inputs: tuple[int, ...]
    macs: Callable[[onnx.NodeProto, Sequence[Shape], Shape], int]


def product_of(node: onnx.NodeProto) -> Product | None:
    """How ``node`` is counted; None where it multiplies nothing, or by no rule that is known."""
    domain = domain_of(node.domain)
    if (domain, node.op_type) in OPERATORS:
        return _two_operands(OPERATORS[domain, node.op_type].macs)
    if node.op_type == "Attention":
        return ATTENTION.get(domain)
    if node.op_type == "MultiHeadAttention" and domain == CONTRIB:
        return ATTENTION[DOMAIN] if len(node.input) > 1 and node.input[1] else None
    if node.op_type == "Einsum" and len(node.input) != 2:
        return None
    found = PRODUCTS.get(node.op_type)
    if found is None or domain not in found.domains:
        return None
    return found.product


def why_not_counted(node: onnx.NodeProto) -> str:
    """Why the MACs of ``node`` cannot be told; empty where they can, or where it has none."""
    domain = domain_of(node.domain)
    if domain == NCHWC and node.op_type == "Conv":
        return "convolutions in a layout of ONNX Runtime's own"
    if domain == DOMAIN and node.op_type == "Einsum" and len(node.input) > 2:
        return "Einsum of more than two operands"
    if domain == CONTRIB and node.op_type == "MultiHeadAttention" and product_of(node) is None:
        return "MultiHeadAttention of packed operands"
    if domain == CONTRIB and node.op_type in OTHERS:
        return f"{node.op_type} of ONNX Runtime"
    if domain not in (*KNOWN_DOMAINS, NCHWC):
        return f"operators of the domain {domain}"
    return ""


def _two_operands(
    macs: Callable[[onnx.NodeProto, Sequence[int], Sequence[int], Sequence[int]], int],
    second: int = 1,
) -> Product:
    return Product((0, second), lambda node, shapes, output: macs(node, shapes[0], shapes[1], output))


def _fused_matmul(node: onnx.NodeProto, shapes: Sequence[Shape], output: Shape) -> int:
    inner = shapes[0][-2 if attribute(node, "transA") else -1]
    return prod(output) * inner


def _few_bits(node: onnx.NodeProto, shapes: Sequence[Shape], output: Shape) -> int:
    return prod(output) * attribute(node, "K")


def _recurrent(node: onnx.NodeProto, shapes: Sequence[Shape], output: Shape) -> int:
    """W is (directions, gates x hidden, input), R (directions, gates x hidden, hidden)."""
    (steps, batch, *_), (directions, rows, inputs) = shapes
    hidden = rows // GATES[node.op_type]
    return steps * batch * directions * rows * (inputs + hidden)


def _packed_attention(node: onnx.NodeProto, shapes: Sequence[Shape], output: Shape) -> int:
    """Input (batch, steps, features), weight (features, queries + keys + values), as many keys as steps."""
    (batch, steps, features), (_, widths) = shapes
    values = output[-1]
    queries = (widths - values) // 2
    return batch * steps * features * widths + batch * steps * steps * (queries + values)


def _attention(node: onnx.NodeProto, shapes: Sequence[Shape], output: Shape) -> int:
    """Queries by keys, and their weights by values; as many keys as are handed in."""
    queries, keys = shapes
    return (prod(queries) + prod(output)) * keys[-2]


def _einsum(node: onnx.NodeProto, shapes: Sequence[Shape], output: Shape) -> int:
    """Of two operands: each output value is a sum over the labels that it lacks."""
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
    given, _, result = equation.partition("->")
    sizes = dict[str, int]()
    for labels, shape in zip(given.split(","), shapes, strict=True):
        before, _, after = labels.partition("...")
        sizes |= dict(zip(before, shape, strict=False))
        sizes |= dict(zip(reversed(after), reversed(shape), strict=False))
    return prod(output) * prod(size for label, size in sizes.items() if label not in result)


class _Entry(NamedTuple):
    domains: tuple[str, ...]
    product: Product


_ANY = (DOMAIN, CONTRIB)
PRODUCTS: Mapping[str, _Entry] = {
    "QLinearConv": _Entry(_ANY, _two_operands(conv.macs, 3)),
    "ConvInteger": _Entry(_ANY, _two_operands(conv.macs)),
    "DeformConv": _Entry(_ANY, _two_operands(conv.macs)),
    "QLinearMatMul": _Entry(_ANY, _two_operands(matmul.macs, 3)),
    "MatMulInteger": _Entry(_ANY, _two_operands(matmul.macs)),
    "MatMulIntegerToFloat": _Entry((CONTRIB,), _two_operands(matmul.macs)),
    "DynamicQuantizeMatMul": _Entry((CONTRIB,), _two_operands(matmul.macs)),
    "QGemm": _Entry((CONTRIB,), _two_operands(gemm.macs, 3)),
    "MatMulNBits": _Entry((CONTRIB,), Product((), _few_bits)),
    "FusedConv": _Entry((CONTRIB,), _two_operands(conv.macs)),
    "FusedGemm": _Entry((CONTRIB,), _two_operands(gemm.macs)),
    "FusedMatMul": _Entry((CONTRIB,), Product((0, 1), _fused_matmul)),
    "TransposeMatMul": _Entry((CONTRIB,), Product((0, 1), _fused_matmul)),
    "LSTM": _Entry((DOMAIN,), Product((0, 1), _recurrent)),
    "GRU": _Entry((DOMAIN,), Product((0, 1), _recurrent)),
    "RNN": _Entry((DOMAIN,), Product((0, 1), _recurrent)),
    "QAttention": _Entry((CONTRIB,), Product((0, 1), _packed_attention)),
    "Einsum": _Entry((DOMAIN,), Product((0, 1), _einsum)),
}
"""By type of node: the domains that it is known in, and how it is counted."""
ATTENTION: Mapping[str, Product] = {
    DOMAIN: Product((0, 1), _attention),
    CONTRIB: Product((0, 1), _packed_attention),
}
"""``Attention`` means another thing in each domain."""
