"""What replaces a layer runs fused: no activation, sum, normalisation or change of layout is left over."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from plain_layers import linear

import onnx_lrsd
from onnx_lrsd.measure.speedup import placeholder
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.order_sums import order_sums
from onnx_lrsd.passes.split import split
from onnx_lrsd.runtime.session import onnxruntime, open_session
from onnx_lrsd.types import CHANNEL, CHANNEL_IN, SPATIAL, TUCKER, Form, whole_channels

C, SIDE = 64, 16
FORMS = {
    "channel": Form(CHANNEL, 16),
    "channel-in": Form(CHANNEL_IN, 16),
    "spatial": Form(SPATIAL, 32),
    "tucker": Form(TUCKER, 16, outer=32),
}
LAYOUT = ("ReorderInput", "ReorderOutput")


def _tensor(name: str, *shape: int) -> onnx.TensorProto:
    values = np.random.default_rng(0).uniform(0.5, 1, shape) / 10
    return numpy_helper.from_array(values.astype(np.float32), name)


def _model(
    nodes: list[onnx.NodeProto], shape: list[int | str], tensors: list[onnx.TensorProto]
) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _block(extent: int, residual: bool, norm: bool) -> onnx.ModelProto:
    """Conv, Relu, then the layer (with a norm and a skip, if so), Relu, Conv; all C channels."""
    pads = [extent // 2] * 4
    nodes = [
        helper.make_node("Conv", ["x", "first w"], ["f"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["f"], ["h"], "relu 1"),
        helper.make_node("Conv", ["h", "layer w"], ["c"], "layer", pads=pads),
    ]
    end = "c"
    if norm:
        nodes.append(helper.make_node("BatchNormalization", [end, "g", "b", "mu", "var"], ["n"], "norm"))
        end = "n"
    if residual:
        nodes.append(helper.make_node("Add", [end, "h"], ["s"], "skip"))
        end = "s"
    nodes += [
        helper.make_node("Relu", [end], ["r"], "relu 2"),
        helper.make_node("Conv", ["r", "last w"], ["y"], "last", pads=[1, 1, 1, 1]),
    ]
    tensors = [_tensor(f"{name} w", C, C, 3, 3) for name in ("first", "last")]
    tensors.append(_tensor("layer w", C, C, extent, extent))
    tensors += [_tensor(name, C) for name in ("g", "b", "mu", "var")]
    return _model(nodes, [1, C, SIDE, SIDE], tensors)


def _optimised(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that ONNX Runtime runs in place of those of ``proto``."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(onnx.load(options.optimized_model_filepath).graph.node)


def _run_as(proto: onnx.ModelProto, form: Form | None) -> list[onnx.NodeProto]:
    """The nodes that ONNX Runtime runs once "layer" has taken ``form``; None leaves it as it is."""
    model = onnx_lrsd.load(proto)
    graph = model.graph()
    if form is not None:
        (layer,) = (found for found in find_layers(graph)[0] if found.name == "layer")
        split(graph, layer, placeholder(layer, form))
    return _optimised(model.splice(graph).proto)


def _activated(nodes: list[onnx.NodeProto]) -> list[bool]:
    """For each convolution or product, whether a Relu is fused into it."""
    return [
        any(a.name == "activation" and a.s == b"Relu" for a in node.attribute) or "Relu" in node.op_type
        for node in nodes
        if node.op_type in ("Conv", "FusedConv", "FusedGemm", "Gemm", "MatMul")
    ]


@pytest.fixture(scope="module")
def blocked() -> None:
    """Skips where this machine has no blocked layout."""
    if "ReorderInput" not in [node.op_type for node in _run_as(_block(3, False, False), None)]:
        pytest.skip("ONNX Runtime has no blocked layout (NCHWc) for this processor")


@pytest.mark.parametrize("residual", [False, True], ids=["chain", "residual"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("kind", FORMS)
def test_the_last_factor_takes_norm_sum_and_activation_and_no_layout_changes_between(
    blocked: None, kind: str, norm: bool, residual: bool
) -> None:
    nodes = _run_as(_block(3, residual, norm), FORMS[kind])
    factors = 3 if kind == TUCKER else 2
    assert [node.op_type for node in nodes] == ["ReorderInput", *["Conv"] * (factors + 2), "ReorderOutput"]
    assert _activated(nodes) == [True, *[False] * (factors - 1), True, False]
    assert [len(node.input) for node in nodes].count(4) == residual  # the fourth is the sum's other side


def test_factors_of_fewer_channels_than_a_block_change_the_layout_as_their_price_says(blocked: None) -> None:
    nodes = [node.op_type for node in _run_as(_block(3, True, True), Form(CHANNEL_IN, 4))]
    assert nodes == ["ReorderInput", "Conv", "Conv", "ReorderOutput", "Conv", "Conv", "ReorderOutput"]


@pytest.mark.parametrize("kept", [8, 16])
def test_beside_factors_of_a_1_x_1_convolution_s_is_summed_by_the_last_one(blocked: None, kept: int) -> None:
    nodes = _run_as(_block(1, False, True), Form(CHANNEL, 16, whole_channels(kept)))
    kinds = [node.op_type for node in nodes if node.op_type not in LAYOUT]
    assert sorted(kinds) == sorted(["Conv"] * 5 + ["Gather"])
    assert _activated(nodes).count(True) == 2
    assert [len(node.input) for node in nodes].count(4) == 1


@pytest.mark.parametrize("kept", [8, 16])
@pytest.mark.parametrize("skip_first", [False, True])
def test_in_a_residual_block_s_is_summed_last_and_everything_fuses(
    blocked: None, kept: int, skip_first: bool
) -> None:
    proto = _block(1, True, False)
    (skip,) = (node for node in proto.graph.node if node.name == "skip")
    if skip_first:
        skip.input[:] = ["h", "c"]
    model, feed = onnx_lrsd.load(proto), {"x": np.random.default_rng(1).standard_normal((1, C, SIDE, SIDE))}
    graph = model.graph()
    (layer,) = (found for found in find_layers(graph)[0] if found.name == "layer")
    form = Form(CHANNEL, C - kept, whole_channels(kept))
    split(graph, layer, onnx_lrsd.decompose(onnx_lrsd.pose(layer, *read_weight(graph, layer), None), form))
    assert order_sums(graph, ["c"]) == 1
    rewritten = model.splice(graph)
    onnx.checker.check_model(rewritten.proto, full_check=True)
    nodes = _optimised(rewritten.proto)
    kinds = [node.op_type for node in nodes if node.op_type not in LAYOUT]
    assert sorted(kinds) == sorted(["Conv"] * 5 + ["Gather"])
    assert [len(node.input) for node in nodes].count(4) == 2 and _activated(nodes).count(True) == 2
    values = {name: value.astype(np.float32) for name, value in feed.items()}
    old, new = (open_session(each.proto).run(values)["y"] for each in (model, rewritten))
    assert np.allclose(old, new, atol=1e-3 * np.abs(old).max())


@pytest.mark.parametrize("read_by", ["an output", "another node", "a bias"])
def test_a_sum_that_others_read_or_that_adds_a_bias_stays_as_it_was(read_by: str) -> None:
    proto = _block(1, True, False)
    if read_by == "an output":
        proto.graph.output.add().CopyFrom(helper.make_tensor_value_info("c", TensorProto.FLOAT, None))
    if read_by == "another node":
        proto.graph.node.append(helper.make_node("Relu", ["c"], ["more"], "more"))
    if read_by == "a bias":
        (skip,) = (node for node in proto.graph.node if node.name == "skip")
        proto.graph.initializer.append(_tensor("scalar", 1))
        skip.input[:] = ["c", "scalar"]
    graph = onnx_lrsd.load(proto).graph()
    (layer,) = (found for found in find_layers(graph)[0] if found.name == "layer")
    split(graph, layer, placeholder(layer, Form(CHANNEL, 16, whole_channels(8))))
    assert order_sums(graph, [layer.output]) == 0


def _dense(op: str, residual: bool) -> onnx.ModelProto:
    """Relu, the layer on (8, C) or (2, 8, C), with bias and skip, Relu."""
    nodes = [helper.make_node("Relu", ["x"], ["h"], "relu 1")]
    if op == "Gemm":
        nodes.append(helper.make_node("Gemm", ["h", "w", "b"], ["c"], "layer"))
    else:
        nodes.append(helper.make_node("MatMul", ["h", "w"], ["p"], "layer"))
        nodes.append(helper.make_node("Add", ["p", "b"], ["c"], "bias"))
    if residual:
        nodes.append(helper.make_node("Add", ["c", "h"], ["s"], "skip"))
    nodes.append(helper.make_node("Relu", ["s" if residual else "c"], ["y"], "relu 2"))
    shape: list[int | str] = [8, C] if op == "Gemm" else [2, 8, C]
    return _model(nodes, shape, [_tensor("w", C, C), _tensor("b", C)])


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
@pytest.mark.parametrize("kept", [0, 8])
def test_products_take_bias_s_and_the_activation_that_the_dense_one_takes(op: str, kept: int) -> None:
    form = Form(CHANNEL, 16, whole_channels(kept))
    nodes = _run_as(_dense(op, residual=False), form)
    kinds = [node.op_type for node in nodes]
    dense = [node.op_type for node in _run_as(_dense(op, residual=False), None)]
    assert "Add" not in kinds and kinds.count("Relu") == dense.count("Relu")
    assert _activated(nodes)[-1] == (op == "Gemm")  # a Reshape parts Gemm and Relu of three axes, before too
    beside = {"Gemm": ["Gather", "Gemm"], "MatMul": ["Gather", "Concat"]}[op] if kept else []
    products = [kind for kind in kinds if "Gemm" in kind or kind == "MatMul"]
    assert len(products) == 2 + beside.count("Gemm")
    assert [kind for kind in kinds if kind in ("Gather", "Concat")] == [k for k in beside if k != "Gemm"]


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_a_product_in_a_residual_block_costs_no_more_nodes_than_its_factors(op: str) -> None:
    before = [node.op_type for node in _run_as(_dense(op, residual=True), None)]
    after = [node.op_type for node in _run_as(_dense(op, residual=True), Form(CHANNEL, 16))]
    assert len(after) == len(before) + 1
    assert after.count("Add") == before.count("Add") and after.count("Relu") == before.count("Relu")


def test_layers_alike_are_timed_with_factors_of_their_own() -> None:
    query, key = (linear(C, C, name, weight=name) for name in ("q", "k"))
    one, same, other = (placeholder(layer, Form(CHANNEL, 16)) for layer in (query, query, key))
    for first, again, beside in zip(one.kernels, same.kernels, other.kernels, strict=True):
        assert np.array_equal(first, again) and np.abs(first - beside).min() > 0
