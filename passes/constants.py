"""The constant behind a tensor: an initializer, a Constant node, or a chain of shape and type changes."""

from __future__ import annotations

from collections.abc import Callable, Set

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from onnx_lrsd.passes.nodes import is_op
from onnx_lrsd.types import Values

DEQUANTISERS = ("DequantizeLinear",)
"""Of ONNX's own domain or of ONNX Runtime's."""


def constant_value(tensor: gs.Tensor, *, arithmetic: bool = False) -> Values | None:
    """The value of ``tensor`` if it does not depend on any input of the model, else None.

    Looks through Identity, Cast, Transpose, Reshape, Flatten, Squeeze and Unsqueeze, and with
    ``arithmetic`` through sums, products and the like. Weights are asked for without it: one that is
    computed may be stored in few bits.
    """
    if isinstance(tensor, gs.Constant):
        return stored_values(tensor)
    if len(tensor.inputs) != 1:
        return None
    node = tensor.inputs[0]
    if is_op(node, "Constant"):
        return _constant_node(node)
    if not is_op(node, *_FOLDS) and not (arithmetic and is_op(node, *ARITHMETIC)):
        return None
    inputs = [constant_value(given, arithmetic=arithmetic) for given in node.inputs]
    values = [value for value in inputs if value is not None]
    if not values or len(values) < len(inputs):
        return None
    if is_op(node, *_FOLDS):
        return _FOLDS[node.op](node, values)
    return np.asarray(ARITHMETIC[node.op](*values)).astype(values[0].dtype)


def constant_bias(tensor: gs.Tensor) -> Values | None:
    """The value of ``tensor`` if it does not depend on any input of the model, however it is computed."""
    return constant_value(tensor, arithmetic=True)


def constant_float64(tensor: gs.Tensor) -> npt.NDArray[np.float64]:
    """The value of ``tensor``, which must be constant, in float64."""
    return np.asarray(constant_bias(tensor)).astype(np.float64)


def derived(tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is computed, by whatever nodes, from constants alone."""
    seen: set[int] = set()
    waiting = [tensor]
    while waiting:
        reached = waiting.pop()
        if isinstance(reached, gs.Constant) or id(reached) in seen or reached.is_empty():
            continue
        seen.add(id(reached))
        if not reached.inputs or any(isinstance(a, gs.Graph) for a in reached.inputs[0].attrs.values()):
            return False  # an input of the model, or a node whose body may read one
        waiting.extend(reached.inputs[0].inputs)
    return True


def stored_values(tensor: gs.Constant) -> Values:
    """Values of a constant without replacing the stored TensorProto (``.values`` would)."""
    values = tensor._values
    if isinstance(values, np.ndarray):
        return values
    return np.asarray(values.load())


def is_view(node: gs.Node) -> bool:
    """Whether ``node`` gives the values of its first input in another shape, order or type."""
    return is_op(node, *_FOLDS)


def stored_tensor(tensor: gs.Tensor) -> gs.Tensor:
    """The stored tensor behind the constant ``tensor``: itself, or the one that it is a view of."""
    while not isinstance(tensor, gs.Constant) and is_view(tensor.inputs[0]):
        tensor = tensor.inputs[0].inputs[0]
    return tensor


def stored_itemsize(tensor: gs.Tensor) -> int:
    """Bytes that each number of the constant ``tensor`` takes where it is stored, before any Cast."""
    value = constant_value(stored_tensor(tensor))
    assert value is not None
    return value.itemsize


def overridable(tensor: gs.Tensor, names: Set[str]) -> bool:
    """Whether the constant behind ``tensor`` is one of those ``names`` that a caller may override."""
    if isinstance(tensor, gs.Constant):
        return tensor.name in names
    return any(overridable(given, names) for node in tensor.inputs for given in node.inputs)


def quantised(tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` comes out of a DequantizeLinear, perhaps reshaped on the way."""
    return any(
        node.op in DEQUANTISERS or (is_op(node, *_FOLDS) and quantised(node.inputs[0]))
        for node in tensor.inputs
    )


def _constant_node(node: gs.Node) -> Values | None:
    for name, value in node.attrs.items():
        if name == "value":
            return stored_values(value)
        if name in ("value_float", "value_floats"):
            return np.asarray(value, dtype=np.float32)
        if name in ("value_int", "value_ints"):
            return np.asarray(value, dtype=np.int64)
    return None


def _cast(node: gs.Node, inputs: list[Values]) -> Values | None:
    to = node.attrs["to"]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(to) if isinstance(to, int) else np.dtype(to)
    return inputs[0].astype(dtype)


def _transpose(node: gs.Node, inputs: list[Values]) -> Values | None:
    return np.transpose(inputs[0], node.attrs.get("perm"))


def _reshape(node: gs.Node, inputs: list[Values]) -> Values | None:
    shape = [int(d) for d in (inputs[1] if len(inputs) > 1 else node.attrs["shape"])]
    if not node.attrs.get("allowzero", 0):
        shape = [inputs[0].shape[i] if d == 0 else d for i, d in enumerate(shape)]
    return inputs[0].reshape(shape)


def _flatten(node: gs.Node, inputs: list[Values]) -> Values | None:
    axis = node.attrs.get("axis", 1) % (inputs[0].ndim + 1)
    return inputs[0].reshape(int(np.prod(inputs[0].shape[:axis], dtype=np.int64)), -1)


def _axes(node: gs.Node, inputs: list[Values]) -> tuple[int, ...] | None:
    axes = inputs[1] if len(inputs) > 1 else node.attrs.get("axes")
    return None if axes is None else tuple(int(axis) for axis in axes)


def _squeeze(node: gs.Node, inputs: list[Values]) -> Values | None:
    return np.squeeze(inputs[0], _axes(node, inputs))


def _unsqueeze(node: gs.Node, inputs: list[Values]) -> Values | None:
    return np.expand_dims(inputs[0], _axes(node, inputs) or ())


ARITHMETIC: dict[str, Callable[..., Values]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Neg": np.negative,
    "Sqrt": np.sqrt,
}
"""What biases and statistics are computed by where an exporter left it to the runtime."""
_FOLDS: dict[str, Callable[[gs.Node, list[Values]], Values | None]] = {
    "Identity": lambda node, inputs: inputs[0],
    "Cast": _cast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}
