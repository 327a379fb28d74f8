"""Half-precision models stay half precision; what is quantised already comes back as it was, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import onnx_lrsd
from onnx_lrsd.cli import main
from onnx_lrsd.commands.prepare import find
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.graph.model import Model, check, load
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.split import split
from onnx_lrsd.run import Options, start
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.layout import expand
from onnx_lrsd.solver.problem import pose
from onnx_lrsd.types import (
    CHANNEL,
    CHANNEL_IN,
    CHANNELS,
    N_OF_M,
    SPATIAL,
    TUCKER,
    UNSTRUCTURED,
    Choice,
    Factors,
    Form,
    Pattern,
    Plan,
    Price,
)

ELEMENTS = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float32": TensorProto.FLOAT}
EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of one rounding."""
S = [Pattern(), Pattern(CHANNELS, 4), Pattern(N_OF_M, 2, 4), Pattern(UNSTRUCTURED, 300)]
CONV = [
    *(Form(kind, 8, pattern) for kind in (CHANNEL, CHANNEL_IN, SPATIAL) for pattern in S),
    *(Form(TUCKER, 8, pattern, 8) for pattern in S),
    *(Form(CHANNEL, 0, pattern) for pattern in S[1:]),
]
LINEAR = [form for form in CONV if form.kind == CHANNEL]
CASES = [
    *(("Conv", form) for form in CONV),
    *((op, form) for op in ("Gemm", "MatMul", "MatMul left") for form in LINEAR),
]
Values = npt.NDArray[Any]


def one_layer(op: str, dtype: str, scale: float = 1.0) -> tuple[Model, Values]:
    """A model of one layer with a bias, and an input for it, both in ``dtype``."""
    rng = np.random.default_rng(0)
    numpy_type = helper.tensor_dtype_to_np_dtype(ELEMENTS[dtype])
    weight, bias = rng.standard_normal((24, 16)) / 4, rng.standard_normal(24)
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "layer", transB=1)]
    shape: list[int | str] = ["n", 16]
    if op == "Conv":
        weight, shape = rng.standard_normal((24, 16, 3, 3)) / 12, ["n", 16, 6, 6]
        nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], "layer", pads=[1] * 4)]
    elif op == "MatMul":
        weight = weight.T
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "layer")]
        nodes += [helper.make_node("Add", ["h", "b"], ["y"])]
    elif op == "MatMul left":
        shape, bias = ["n", 16, 5], bias[:, None]
        nodes = [helper.make_node("MatMul", ["w", "x"], ["h"], "layer")]
        nodes += [helper.make_node("Add", ["h", "b"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", ELEMENTS[dtype], shape)],
        [helper.make_tensor_value_info("y", ELEMENTS[dtype], None)],
        [
            numpy_helper.from_array((scale * value).astype(numpy_type), name)
            for name, value in (("w", weight), ("b", bias))
        ],
    )
    x = rng.standard_normal([4, *(size for size in shape[1:] if isinstance(size, int))])
    # BFLOAT16 is an operand of Conv and Gemm from opset 22 and 13 on.
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    return load(proto), x.astype(numpy_type)


def rewrite(model: Model, form: Form) -> tuple[Model, Factors]:
    graph = model.graph()
    (layer,), _ = find_layers(graph)
    found = decompose(pose(layer, *read_weight(graph, layer), None), form)
    split(graph, layer, found)
    changed = model.splice(graph)
    check(changed, model)
    return changed, found


def run(model: Model, x: Values) -> Values:
    """The output, by ONNX Runtime, or by ONNX's reference where it has no kernel for bfloat16 on a CPU."""
    if x.dtype == helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16):
        return np.asarray(next(iter(ReferenceEvaluator(model.proto).run(None, {"x": x}))))
    return np.asarray(open_session(model.proto).run({"x": x})["y"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op, form", CASES, ids=lambda value: str(value))
def test_every_form_keeps_the_dtype_and_is_the_exact_solution_rounded_last(
    op: str, form: Form, dtype: str
) -> None:
    model, x = one_layer(op, dtype)
    changed, found = rewrite(model, form)
    elements = {tensor.data_type for tensor in changed.proto.graph.initializer}
    assert elements <= {ELEMENTS[dtype], TensorProto.INT64} and ELEMENTS[dtype] in elements
    assert not {node.op_type for node in changed.proto.graph.node} & {"Cast", "CastLike"}
    inferred = onnx.shape_inference.infer_shapes(changed.proto, strict_mode=True, data_prop=True)
    floats = {
        value.type.tensor_type.elem_type for value in (*inferred.graph.value_info, *inferred.graph.output)
    }
    assert floats == {ELEMENTS[dtype]}
    got = run(changed, x)
    assert got.dtype == x.dtype
    # The same factors in float32, where nothing is rounded to speak of.
    exact_model, _ = one_layer(op, "float32")
    graph = exact_model.graph()
    (layer,), _ = find_layers(graph)
    split(graph, layer, found)
    exact = run(exact_model.splice(graph), x.astype(np.float32))
    missed = np.linalg.norm(got.astype(np.float64) - exact) / np.linalg.norm(exact)
    assert missed < 4 * EPSILON[dtype]


@pytest.mark.parametrize("scale", [1e-2, 30.0])
@pytest.mark.parametrize("form", [f for f in CONV if f.pattern.kind != UNSTRUCTURED], ids=str)
def test_no_factor_leaves_the_range_of_half_precision(form: Form, scale: float) -> None:
    model, _ = one_layer("Conv", "float16", scale)
    changed, found = rewrite(model, form)
    (layer,), _ = find_layers(model.graph())
    whole = expand(layer, found)
    rounded = [numpy_helper.to_array(t).astype(np.float64) for t in changed.proto.graph.initializer]
    rounded = [values for values in rounded if values.ndim == 4]
    kernels = tuple(rounded[: len(found.kernels)])
    again = Factors(
        form=found.form, kernels=kernels, bias=found.bias, sparse=found.sparse, channels=found.channels
    )
    assert np.linalg.norm(expand(layer, again) - whole) < 2 * EPSILON["float16"] * np.linalg.norm(whole)


def test_the_whole_tool_keeps_half_precision() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((256, 8)) @ rng.standard_normal((8, 256)) / 50).astype(np.float16)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "layer")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", 512, 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", 512, 256])],
        [numpy_helper.from_array(weight, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = rng.standard_normal((20, 512, 256)).astype(np.float16)
    found = onnx_lrsd.optimize(proto, {"x": x}, ratio=1.5, target="tensorrt")
    assert [layer.form for layer in found.report.layers] == [CHANNEL]
    assert {t.data_type for t in found.model.proto.graph.initializer} == {TensorProto.FLOAT16}
    assert found.model.proto.graph.output == proto.graph.output
    assert found.report.verification is not None
    assert found.report.verification.outputs[0].relative_error < 1e-5


def test_bfloat16_that_onnx_runtime_has_no_kernel_for_is_one_sentence() -> None:
    model, x = one_layer("Conv", "bfloat16")
    with pytest.raises(LrsdError, match="it must run there before it can be optimised"):
        onnx_lrsd.optimize(model.proto, {"x": np.repeat(x, 10, axis=0)}, ratio=1.5)


SCALE: dict[str, Values] = {
    "s": np.array(0.05, np.float32),
    "z": np.array(0, np.uint8),
    "zi": np.array(0, np.int8),
}


def _int8(*shape: int) -> Values:
    return np.random.default_rng(1).integers(-100, 100, shape).astype(np.int8)


def qdq() -> tuple[list[onnx.NodeProto], dict[str, Values]]:
    """Quantised weight and activation, dequantised before a Conv of floats."""
    return [
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["a"]),
        helper.make_node("DequantizeLinear", ["a", "s", "z"], ["b"]),
        helper.make_node("DequantizeLinear", ["q", "s", "zi"], ["w"]),
        helper.make_node("Conv", ["b", "w"], ["y"], "quantised"),
    ], SCALE | {"q": _int8(16, 32, 1, 1)}


def qlinear() -> tuple[list[onnx.NodeProto], dict[str, Values]]:
    return [
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["a"]),
        helper.make_node("QLinearConv", ["a", "s", "z", "q", "s", "zi", "s", "z"], ["c"], "quantised"),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"]),
    ], SCALE | {"q": _int8(16, 32, 1, 1)}


def dynamic_conv() -> tuple[list[onnx.NodeProto], dict[str, Values]]:
    return [
        helper.make_node("DynamicQuantizeLinear", ["r"], ["a", "as", "az"]),
        helper.make_node("ConvInteger", ["a", "q", "az"], ["c"], "quantised"),
        helper.make_node("Cast", ["c"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "as"], ["y"]),
    ], {"q": _int8(16, 32, 1, 1).view(np.uint8)}


def dynamic_matmul() -> tuple[list[onnx.NodeProto], dict[str, Values]]:
    return [
        helper.make_node("DynamicQuantizeLinear", ["r"], ["a", "as", "az"]),
        helper.make_node("MatMulInteger", ["a", "q", "az"], ["c"], "quantised"),
        helper.make_node("Cast", ["c"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "as"], ["y"]),
    ], {"q": _int8(8, 16)}


def nbits() -> tuple[list[onnx.NodeProto], dict[str, Values]]:
    """Four bits a weight, in blocks of 32 with a scale each."""
    rng = np.random.default_rng(2)
    packed = rng.integers(0, 256, (16, 1, 16)).astype(np.uint8)
    scales = rng.random((16, 1)).astype(np.float32)
    attributes: dict[str, Any] = {"K": 32, "N": 16, "bits": 4, "block_size": 32}
    return [
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node(
            "MatMulNBits", ["t", "q", "qs"], ["y"], "quantised", domain="com.microsoft", **attributes
        ),
    ], {"q": packed, "qs": scales}


QUANTISED = [qdq, qlinear, dynamic_conv, dynamic_matmul, nbits]


def model_with(quantised: Callable[[], Any], floats: bool) -> onnx.ModelProto:
    """The quantised nodes, behind a float Conv that gains by a split or alone."""
    rng = np.random.default_rng(0)
    nodes, tensors = quantised()
    shape: list[str | int | None] = ["n", 64, 8, 8] if floats else ["n", 32, 8, 8]
    if floats:
        narrow = rng.standard_normal((32, 4)) @ rng.standard_normal((4, 64 * 9)) / 40
        tensors = tensors | {"v": narrow.reshape(32, 64, 3, 3).astype(np.float32)}
        nodes = [
            helper.make_node("Conv", ["x", "v"], ["h"], "float", pads=[1] * 4),
            helper.make_node("Relu", ["h"], ["r"]),
            *nodes,
        ]
    else:
        nodes = [helper.make_node("Relu", ["x"], ["r"]), *nodes]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize("quantised", QUANTISED, ids=lambda made: made.__name__)
def test_a_quantised_layer_is_named_and_comes_back_to_the_byte(quantised: Callable[[], Any]) -> None:
    proto = model_with(quantised, floats=True)
    x = np.random.default_rng(3).standard_normal((40, 64, 8, 8)).astype(np.float32)
    free = Price(0, 0, 0)
    plan = Plan("tensorrt", "macs", {"h": Choice(Form(CHANNEL, 8), 0.0, free, free)})
    found = onnx_lrsd.optimize(proto, {"x": x}, plan=plan)
    forms = {layer.name: (layer.form, layer.reason) for layer in found.report.layers}
    assert forms["quantised"] == ("dense", "already quantised") and forms["float"] == (CHANNEL, "")
    nodes, tensors = quantised()
    kept = {node.SerializeToString(deterministic=True) for node in found.model.proto.graph.node}
    assert {node.SerializeToString(deterministic=True) for node in nodes} <= kept
    stored = {t.name: t.SerializeToString(deterministic=True) for t in found.model.proto.graph.initializer}
    for name, value in tensors.items():
        assert stored[name] == numpy_helper.from_array(value, name).SerializeToString(deterministic=True)
    assert found.report.verification is not None
    assert found.report.verification.outputs[0].relative_error < 1e-2


@pytest.mark.parametrize("quantised", QUANTISED, ids=lambda made: made.__name__)
def test_a_model_that_is_quantised_throughout_is_refused_with_the_reason(
    quantised: Callable[[], Any], tmp_path: Path
) -> None:
    path = tmp_path / "quantised.onnx"
    onnx.save(model_with(quantised, floats=False), path)
    before = path.read_bytes()
    done = CliRunner().invoke(main, ["optimize", str(path), "--ratio", "2"])
    assert done.exit_code == 1 and "already quantised" in done.output and "use it as it is" in done.output
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("made", "bears"), [(qdq, False), (qlinear, False), (dynamic_matmul, False), (nbits, True)]
)
def test_int8_is_not_named_where_a_model_is_quantised_already(made: Callable[[], Any], bears: bool) -> None:
    x = np.random.default_rng(3).standard_normal((4, 64, 8, 8)).astype(np.float32)
    found = find(start(Options(ratio=2)), model_with(made, floats=True), {"x": x}, None)
    assert found.run.bears_int8 is bears
