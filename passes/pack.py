"""A weight in codes in place of a dense one: standard operators that a runtime folds when it starts.

Codes come out of bytes by division, all in float32, where whole numbers below 2^24 are exact. Every node
reads constants alone, so ONNX Runtime computes the dense weight once, as it opens the model, and
runs the very layer that stood there before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from onnx_lrsd.passes.operators import operator_of
from onnx_lrsd.passes.operators.operator import WeightLayout
from onnx_lrsd.passes.writer import Writer
from onnx_lrsd.storage import FP16, STORAGES, Storage, gaps, pack_codes
from onnx_lrsd.types import SPATIAL, Codes, Entries, Factors, Layer

OPSET = 13
"""The first in which all that decoding needs reads its numbers from inputs."""
PACKED_PREFIX = "lrsd/"
"""Tensors of decoding are named lrsd/NUMBER/PART: short, since small layers pay for every byte."""


def pack(write: Writer, layer: Layer, source: gs.Tensor, factors: Factors) -> gs.Tensor:
    """Write ``layer`` for the input ``source`` with its weight decoded from ``factors``.

    The operator is the same as before. Raises ValueError where the opset of the graph is too old.
    """
    _check_opset(write)
    weight = write.once("weight", lambda: _Decoder(write).weight(layer, factors))
    return operator_of(layer).write_dense(write, layer, source, weight, factors.bias)


def store(write: Writer, constant: Layer, factors: Factors) -> gs.Tensor:
    """Write what decodes ``constant`` from ``factors``, the tensor that its readers get.

    Raises ValueError where the opset of the graph is too old.
    """
    _check_opset(write)
    return _Decoder(write).weight(constant, factors)


def _layout(layer: Layer) -> WeightLayout:
    """How W (n, m) becomes what nodes read; rows of a constant are consecutive."""
    if not layer.constant:
        return operator_of(layer).weight_layout(layer)
    return WeightLayout(None if layer.shape == (layer.n, layer.m) else layer.shape)


def _check_opset(write: Writer) -> None:
    if write.opset < OPSET:
        raise ValueError(f"codes need opset {OPSET}, the graph has {write.opset}")


class _Decoder:
    """Writes the nodes that compute one weight; constants that all layers need are made once a graph."""

    def __init__(self, write: Writer) -> None:
        self._write, self._tensors = write, write.tensors()
        number = 0
        while any(name.startswith(f"{PACKED_PREFIX}{number}/") for name in self._tensors):
            number += 1
        self._prefix, self._count = f"{PACKED_PREFIX}{number}/", 0

    def weight(self, layer: Layer, factors: Factors) -> gs.Tensor:
        """The weight as the operator of ``layer`` reads it."""
        packed = factors.packed
        assert packed is not None
        matrix, flat = None, (layer.n, layer.m)
        if packed.rows is not None and factors.form.rank:
            groups = layer.kernel[-1] if factors.form.kind == SPATIAL else 1
            matrix = self._product(packed.rows, layer, groups)
            if groups > 1 and packed.sparse is not None:
                matrix = self._reshaped(matrix, flat)
        elif packed.rows is not None:
            matrix = self._scaled(self._rows(packed.rows), packed.rows.steps)
        if packed.sparse is not None:
            sparse = self._sparse(packed.sparse, flat)
            matrix = sparse if matrix is None else self._node("Add", [matrix, sparse])
        assert matrix is not None
        shape, order = _layout(layer)
        if shape is not None:
            matrix = self._reshaped(matrix, shape)
        if order is not None:
            matrix = self._node("Transpose", [matrix], {"perm": list(order)})
        if layer.dtype != "float32":
            element = helper.np_dtype_to_tensor_dtype(np.dtype(layer.dtype))
            matrix = self._node("Cast", [matrix], {"to": element})
        return matrix

    def _product(self, rows: Codes, layer: Layer, groups: int) -> gs.Tensor:
        """U V from feature rows: (n, m), or (n, A, B) where the first factor serves several groups."""
        width = layer.m // groups
        v, h = self._new("v"), self._new("h")
        sizes = self._constant(np.array([width, groups * layer.n], dtype=np.int64))
        self._write.add(gs.Node("Split", "", {"axis": 1}, [self._rows(rows), sizes], [v, h]))
        matrix = self._node("Gemm", [self._scaled(h, rows.steps), v], {"transA": 1})
        if groups == 1:
            return matrix
        grouped = self._reshaped(matrix, (groups, layer.n, width))
        return self._node("Transpose", [grouped], {"perm": [1, 2, 0]})

    def _rows(self, rows: Codes) -> gs.Tensor:
        """Centred codes of all rows, or their values in fp16."""
        parts = []
        for name, codes in rows.blocks:
            if name == FP16.name:
                parts.append(self._cast(codes, TensorProto.FLOAT))
            else:
                storage = STORAGES[name]
                numbers = self._numbers(codes, storage, -(storage.levels - 1) / 2)
                if codes.size % storage.digits:
                    numbers = self._flat(numbers, codes.size, storage)
                parts.append(self._reshaped(numbers, codes.shape))
        return parts[0] if len(parts) == 1 else self._node("Concat", parts, {"axis": 0})

    def _sparse(self, entries: Entries, shape: tuple[int, int]) -> gs.Tensor:
        """S (n, m): distances add up to positions, from -1 on."""
        storage, apart = STORAGES[entries.storage], gaps(entries.reach)
        steps = np.diff(entries.positions, prepend=-1) - 1
        distances = self._flat(self._numbers(steps.astype(np.uint8), apart, 1.0), steps.size, apart)
        whole = self._node("Cast", [distances], {"to": TensorProto.INT32})
        axis = self._shared("axis", np.array(0, dtype=np.int64))
        ends = self._node("CumSum", [whole, axis])
        places = self._node("Sub", [ends, self._shared("one", np.array(1, dtype=np.int32))])
        if storage is FP16:
            values = self._cast(entries.codes, TensorProto.FLOAT)
        else:
            numbers = self._numbers(entries.codes, storage, -(storage.levels - 1) / 2)
            values = self._flat(numbers, entries.codes.size, storage)
        size = self._constant(np.array([shape[0] * shape[1]], dtype=np.int64))
        empty = self._node("ConstantOfShape", [size])
        filled = self._node("ScatterElements", [empty, places, values], {"axis": 0})
        matrix = self._reshaped(filled, shape)
        return matrix if storage is FP16 else self._scaled(matrix, entries.steps)

    def _numbers(self, codes: np.ndarray[Any, Any], storage: Storage, shift: float) -> gs.Tensor:
        """Codes plus ``shift`` as float32, in the order of ``codes`` but for what fills the last word."""
        words = self._cast(pack_codes(codes.reshape(-1), storage), TensorProto.FLOAT)
        name = storage.name
        if storage.planes > 1:
            bytes_ = 256.0 ** np.arange(storage.planes)[None, :]
            words = self._node("MatMul", [self._shared(f"{name}/bytes", bytes_), words])
        shifted = self._shared(f"{name}/{shift:g}", np.array([shift]))
        if storage.digits == 1:
            return self._node("Add", [words, shifted])
        powers = float(storage.levels) ** np.arange(storage.digits + 1)[:, None]
        wholes = self._node("Floor", [self._node("Div", [words, self._shared(f"{name}/powers", powers)])])
        digits = np.eye(storage.digits, storage.digits + 1)
        digits -= storage.levels * np.eye(storage.digits, storage.digits + 1, 1)
        return self._node("Gemm", [self._shared(f"{name}/digits", digits), wholes, shifted])

    def _flat(self, numbers: gs.Tensor, count: int, storage: Storage) -> gs.Tensor:
        """The first ``count`` numbers, (count,)."""
        flat = self._node("Reshape", [numbers, self._shared("flat", np.array([-1], dtype=np.int64))])
        if count % storage.digits == 0:
            return flat
        start = self._shared("start", np.array([0], dtype=np.int64))
        return self._node("Slice", [flat, start, self._constant(np.array([count], dtype=np.int64))])

    def _scaled(self, rows: gs.Tensor, steps: np.ndarray[Any, Any]) -> gs.Tensor:
        return self._node("Mul", [rows, self._constant(steps.astype(np.float32)[:, None])])

    def _reshaped(self, tensor: gs.Tensor, shape: tuple[int, ...]) -> gs.Tensor:
        return self._node("Reshape", [tensor, self._constant(np.array(shape, dtype=np.int64))])

    def _cast(self, values: np.ndarray[Any, Any], to: int) -> gs.Tensor:
        return self._node("Cast", [self._constant(values)], {"to": to})

    def _constant(self, values: np.ndarray[Any, Any]) -> gs.Constant:
        return gs.Constant(self._name("c"), np.ascontiguousarray(values))

    def _shared(self, part: str, values: np.ndarray[Any, Any]) -> gs.Tensor:
        name = f"{PACKED_PREFIX}{part}"
        if name not in self._tensors:
            kept = values.astype(np.float32) if values.dtype == np.float64 else values
            self._tensors[name] = gs.Constant(name, kept)
        return self._tensors[name]

    def _node(self, op: str, inputs: list[gs.Tensor], attributes: dict[str, Any] | None = None) -> gs.Tensor:
        output = self._new("t")
        self._write.add(gs.Node(op, "", attributes or {}, inputs, [output]))
        return output

    def _new(self, part: str) -> gs.Variable:
        return gs.Variable(self._name(part))

    def _name(self, part: str) -> str:
        self._count += 1
        return f"{self._prefix}{part}{self._count}"
