"""Everything that multiplies is counted, or named where it cannot be; what was fused is worked on."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_lrsd
from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.measure.compare import cost
from onnx_lrsd.passes.bytes_outside import bytes_outside
from onnx_lrsd.passes.count import not_counted
from onnx_lrsd.passes.find_layers import find_layers
from onnx_lrsd.passes.shared_weights import share_weights
from onnx_lrsd.passes.unfuse import optimised_by_runtime, unfuse
from onnx_lrsd.report import inspection_table, report_table
from onnx_lrsd.runtime.session import open_session

RNG = np.random.default_rng(0)
CONTRIB = "com.microsoft"
FLOAT = TensorProto.FLOAT


def values(*shape: int) -> np.ndarray:
    return np.asarray(RNG.standard_normal(shape) / 4, dtype=np.float32)


def model_of(
    nodes: list[onnx.NodeProto], given: dict[str, tuple[Any, ...]], weights: dict[str, np.ndarray]
) -> Model:
    """A model of ``nodes``, the last of which gives y, with inputs of these shapes."""
    inputs = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in given.items()]
    y = helper.make_empty_tensor_value_info("y")
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, [y], stored)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(CONTRIB, 1), helper.make_opsetid("own", 1)]
    return load(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def parsed(text: str, ends: str, weights: dict[str, np.ndarray]) -> Model:
    graph = onnx.parser.parse_graph(f"g {ends} {{ {text} }}")
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def counted(model: Model, **feed: np.ndarray) -> tuple[int, tuple[str, ...]]:
    found = cost(model, 0, feed)
    return found.macs, found.not_counted


def fused(op: str, inputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, ["y"], name="it", domain=CONTRIB, **attributes)


IMAGE, ROWS = (2, 8, 6, 6), (3, 16)
CONV_WEIGHT, CONV_BIAS, MATRIX = values(12, 8, 3, 3), values(12), values(16, 24)
FUSED = {
    "conv": (fused("FusedConv", ["x", "w", "b"], activation="Relu", pads=[1] * 4), IMAGE),
    "conv, leaky": (
        fused("FusedConv", ["x", "w", "b"], activation="LeakyRelu", activation_params=[0.2], strides=[2, 2]),
        IMAGE,
    ),
    "conv, clipped": (
        fused("FusedConv", ["x", "w", "b"], activation="Clip", activation_params=[-0.3, 0.3]),
        IMAGE,
    ),
    "gemm": (fused("FusedGemm", ["x", "w", "b"], activation="Relu", alpha=0.5), ROWS),
    "matmul": (fused("FusedMatMul", ["x", "w"], alpha=0.5), ROWS),
    "transposed": (fused("FusedMatMul", ["x", "w"], transB=1), ROWS),
    "einsum": (helper.make_node("Einsum", ["x", "w"], ["y"], name="it", equation="bi,io->bo"), ROWS),
    "einsum, turned": (
        helper.make_node("Einsum", ["w", "x"], ["y"], name="it", equation="oi,...i -> ...o"),
        ROWS,
    ),
}


def fused_model(kind: str) -> Model:
    node, shape = FUSED[kind]
    if "conv" in kind:
        return model_of([node], {"x": ("n", *shape[1:])}, {"w": CONV_WEIGHT, "b": CONV_BIAS})
    turned = kind in ("transposed", "einsum, turned")
    weight = np.ascontiguousarray(MATRIX.T) if turned else MATRIX
    weights = {"w": weight, "b": values(24)} if kind == "gemm" else {"w": weight}
    return model_of([node], {"x": ("n", *shape[1:])}, weights)


@pytest.mark.parametrize("kind", FUSED)
def test_fused_operators_compute_the_same_as_plain_ones_and_are_layers_under_their_name(kind: str) -> None:
    model, x = fused_model(kind), values(*FUSED[kind][1])
    working = model.graph()
    assert unfuse(working) == 1
    plain = model.splice(working)
    before, after = (open_session(m.proto).run({"x": x})["y"] for m in (model, plain))
    assert np.allclose(before, after, atol=1e-5)
    (layer,), declined = find_layers(plain.graph())
    assert layer.name == "it" and not declined
    assert counted(model, x=x) == counted(plain, x=x)
    assert counted(model, x=x)[0] > 0


def test_a_fused_layer_is_rewritten_with_its_activation_behind() -> None:
    node = fused("FusedGemm", ["x", "w", "b"], activation="Relu")
    weight = np.outer(np.linspace(1, 2, 128), np.linspace(-1, 1, 128)).astype(np.float32)
    model = model_of([node], {"x": ("n", 128)}, {"w": weight, "b": np.ones(128, np.float32)})
    x = values(200, 128)
    result = onnx_lrsd.optimize(model.proto, {"x": x}, ratio=2)
    assert [row.op for row in result.report.layers] == ["Gemm"]
    assert any("give the model as it was before" in said for said in result.report.warnings)
    after = open_session(result.model.proto).run({"x": x[:9]})["y"]
    assert np.allclose(after, np.maximum(x[:9] @ weight + 1, 0), atol=1e-3) and after.min() == 0


@pytest.mark.parametrize("equation", ["bi,io->ob", "bi,io->o", "bi,bi->b", "bi,ii->bi", "bi,io"])
def test_an_einsum_that_is_no_plain_product_is_left_and_named(equation: str) -> None:
    node = helper.make_node("Einsum", ["x", "w"], ["y"], equation=equation)
    model = model_of([node], {"x": (16, 16)}, {"w": values(16, 16)})
    working = model.graph()
    assert not unfuse(working)
    assert "equation" in find_layers(working)[1][0].reason


def test_an_einsum_is_counted_by_its_labels() -> None:
    node = helper.make_node("Einsum", ["x", "z"], ["y"], equation="bhid,bhjd->bhij")
    model = model_of([node], {"x": (2, 3, 4, 5), "z": (2, 3, 6, 5)}, {})
    assert counted(model, x=values(2, 3, 4, 5), z=values(2, 3, 6, 5)) == (2 * 3 * 4 * 5 * 6, ())


def test_fused_attention_is_counted_and_named() -> None:
    node = fused("Attention", ["x", "w", "b"], num_heads=2)
    model = model_of([node], {"x": (2, 5, 16)}, {"w": values(16, 48), "b": values(48)})
    assert counted(model, x=values(2, 5, 16)) == (2 * 5 * 16 * 48 + 2 * (2 * 5 * 5 * 16), ())
    ((_, declined),) = [find_layers(model.graph())]
    assert "as it was before" in declined[0].reason
    assert "Attention" not in optimised_by_runtime(model.graph())  # some exporters write it


def test_calls_of_a_function_are_counted_each() -> None:
    inner = helper.make_node("MatMul", ["a", "w"], ["o"])
    linear = helper.make_function("own", "Linear", ["a", "w"], ["o"], [inner], [helper.make_opsetid("", 17)])
    calls = [helper.make_node("Linear", [a, "w"], [o], domain="own") for a, o in (("x", "h"), ("h", "y"))]
    model = model_of(calls, {"x": ("n", 16)}, {"w": values(16, 16)})
    model.proto.functions.append(linear)
    assert counted(model, x=values(3, 16)) == (2 * 3 * 16 * 16, ())


def test_of_if_the_dearer_branch_is_counted() -> None:
    text = "y = If (c) <then_branch = a () => (float[3, 16] p) { p = MatMul (x, w) },"
    text += " else_branch = b () => (float[3, 16] q) { h = MatMul (x, w) q = MatMul (h, w) }>"
    model = parsed(text, "(float[3, 16] x, bool c) => (float[3, 16] y)", {"w": values(16, 16)})
    assert counted(model, x=values(3, 16), c=np.array(True)) == (2 * 3 * 16 * 16, ())


def loop(trips: str, condition: str = "t = Identity (k)") -> Model:
    body = "body = b (int64 i, bool k, float[3, 16] s) => (bool t, float[3, 16] u)"
    body += f" {{ {condition} u = MatMul (s, w) }}"
    text = f"y = Loop ({trips}, yes, x) <{body}>"
    ends = "(float[3, 16] x, int64 m) => (float[3, 16] y)"
    constants = {"w": values(16, 16), "five": np.array(5), "yes": np.array(True)}
    return parsed(text, ends, constants)


def test_the_body_of_a_loop_is_counted_as_often_as_it_runs() -> None:
    feed = {"x": values(3, 16), "m": np.array(5)}
    assert counted(loop("five"), **feed) == (5 * 3 * 16 * 16, ())


def test_a_loop_whose_count_is_not_known_is_named() -> None:
    feed = {"x": values(3, 16), "m": np.array(5)}
    for model in (loop("m"), loop("five", "t = Not (k)")):
        total, missed = counted(model, **feed)
        assert total == 0 and len(missed) == 1 and "body of Loop" in missed[0]


def test_the_body_of_a_scan_is_counted_for_each_slice() -> None:
    text = (
        "e, y = Scan <num_scan_inputs = 1, body = b (float[16] s, float[16] v) => (float[16] t, float[16] o)"
    )
    text += " { t = MatMul (v, w) o = Add (t, s) }> (z, x)"
    ends = "(float[16] z, float[7, 16] x) => (float[16] e, float[7, 16] y)"
    model = parsed(text, ends, {"w": values(16, 16)})
    assert counted(model, z=values(16), x=values(7, 16)) == (7 * 16 * 16, ())


def test_packed_attention_is_named() -> None:
    node = fused("MultiHeadAttention", ["x"], num_heads=2)
    assert not_counted(model_of([node], {"x": (2, 5, 2, 3, 8)}, {}).proto, {}) == (
        "1 x MultiHeadAttention of packed operands",
    )


def test_an_operator_of_an_unknown_domain_is_named() -> None:
    nodes = [helper.make_node("Mystery", ["x"], ["y"], domain="own")] * 2
    assert not_counted(model_of(nodes, {"x": (2,)}, {}).proto, {}) == ("2 x operators of the domain own",)


def test_what_cannot_be_counted_is_said_beside_the_figure() -> None:
    body = "body = b (int64 i, bool k, float[n, 96] s) => (bool t, float[n, 96] u) {"
    text = f"h = MatMul (x, w) y = Loop (five, yes, h) <{body} t = Not (k) u = MatMul (s, v) }}>"
    weight = np.outer(np.linspace(1, 2, 96), np.linspace(-1, 1, 96)).astype(np.float32)
    constants = {"w": weight, "v": values(96, 96), "five": np.array(5), "yes": np.array(True)}
    model = parsed(text, "(float[n, 96] x) => (float[n, 96] y)", constants)
    result = onnx_lrsd.optimize(model.proto, {"x": values(200, 96)}, target="tensorrt", ratio=1.3)
    assert result.report.verification is not None
    (missed,) = result.report.verification.not_counted
    assert missed == "1 x the body of Loop, which runs as often as its inputs say"
    assert f"not counted: {missed}" in report_table(result.report)
    assert "of the MACs that are counted" in report_table(result.report)
    assert missed in " ".join(inspection_table(onnx_lrsd.inspect(model.proto), "m.onnx").split())


def test_a_file_that_the_runtime_optimised_is_recognised() -> None:
    assert "FusedConv" in optimised_by_runtime(fused_model("conv").graph())
    reorder = helper.make_node("ReorderInput", ["x"], ["y"], domain="com.microsoft.nchwc")
    assert "ReorderInput" in optimised_by_runtime(model_of([reorder], {"x": (1, 8, 4, 4)}, {}).graph())
    plain = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (1, 8)}, {"w": values(8, 8)})
    assert not optimised_by_runtime(plain.graph())


def said_of(tables: int) -> str:
    text = "e = Gather (t, i) y = MatMul (e, w)"
    ends = "(int64[n] i) => (float[n, 64] y)"
    working = parsed(text, ends, {"t": values(tables, 64), "w": values(64, 64)}).graph()
    return bytes_outside(working, share_weights(working, find_layers(working)[0]))


def test_it_is_said_where_the_bytes_are_that_no_layer_holds() -> None:
    assert said_of(192).startswith(
        "75% of what is stored"
    ) and "tables that Gather reads (most in t)" in said_of(192)
    assert not said_of(16)
