"""U, V and a sparse part in place of the weight of a Gemm or MatMul."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnx_lrsd.passes.writer import Writer
from onnx_lrsd.types import Factors, Layer


def split_gemm(write: Writer, layer: Layer, source: gs.Tensor, factors: Factors) -> gs.Tensor:
    """A chain of Gemms; the sparse branch is the C of the last one, so that no Add is left over."""
    transposed = layer.axis == 0
    addend = write.constant("bias", factors.bias)
    if factors.sparse is not None:
        picked = write.gather(source, factors.channels, axis=0 if transposed else 1, total=layer.m)
        inputs = [picked, write.constant("S", factors.sparse), addend]
        addend = write.node("Gemm", "S", inputs, {"transA": int(transposed), "transB": 1})
        if not factors.kernels:
            return addend
    first, last = factors.kernels
    hidden = write.node(
        "Gemm",
        "V",
        [source, write.constant("V", first)],
        {"transA": int(transposed), "transB": 1},
        optional_c=True,
    )
    return write.node("Gemm", "U", [hidden, write.constant("U", last), addend], {"transB": 1})


def split_matmul(write: Writer, layer: Layer, source: gs.Tensor, factors: Factors) -> gs.Tensor:
    """A chain of MatMuls. S reads its inputs beside the hidden values: Concat keeps one last MatMul."""
    left = layer.axis == -2
    tensor = source
    if factors.kernels:
        tensor = _product(write, "V", factors.kernels[0], source, left)
    last = factors.kernels[1] if factors.kernels else None
    if factors.sparse is not None:
        picked = write.gather(source, factors.channels, axis=layer.axis, total=layer.m)
        if last is None:
            tensor, last = picked, factors.sparse
        else:
            tensor = write.node("Concat", "concat", [tensor, picked], {"axis": layer.axis})
            last = np.concatenate([last, factors.sparse], axis=1)
    assert last is not None
    tensor = _product(write, "U", last, tensor, left)
    if not np.any(factors.bias):
        return tensor
    bias = write.constant("bias", factors.bias[:, None] if left else factors.bias)
    return write.node("Add", "bias", [tensor, bias], {})


def _product(write: Writer, name: str, matrix: np.ndarray, source: gs.Tensor, left: bool) -> gs.Tensor:
    constant = write.constant(name, matrix if left else matrix.T)
    return write.node("MatMul", name, [constant, source] if left else [source, constant], {})
