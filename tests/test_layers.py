"""Every weight is found however it is stored, or declined with a reason in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lrsd.graph.model import Model, check, load, raised
from onnx_lrsd.passes.count import compute_tensors, node_macs, parameters
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.isolate import isolate
from onnx_lrsd.passes.split import split
from onnx_lrsd.runtime.session import open_session, shapes
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.problem import pose
from onnx_lrsd.targets import price
from onnx_lrsd.types import CHANNEL, Form

Values = npt.NDArray[Any]
W = np.random.default_rng(0).standard_normal((12, 10)).astype(np.float32)


def make(
    nodes: list[onnx.NodeProto],
    tensors: dict[str, Values] | None = None,
    inputs: dict[str, list[int]] | None = None,
    outputs: tuple[str, ...] = ("y",),
    ir_version: int = 8,
    opset: int = 17,
) -> Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(k, TensorProto.FLOAT, v)
            for k, v in (inputs or {"x": [3, 12]}).items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (tensors or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return load(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version))


def split_all(model: Model) -> Model:
    graph = model.graph()
    for layer in find_layers(graph)[0]:
        weight, bias = read_weight(graph, layer)
        split(graph, layer, decompose(pose(layer, weight, bias, None), Form(CHANNEL, min(layer.n, layer.m))))
    return model.splice(graph)


def constant(name: str, value: Values) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))


def reads(weight: str) -> onnx.NodeProto:
    return helper.make_node("MatMul", ["x", weight], ["y"], name="layer")


STORED = {
    "initializer": ([reads("w")], {"w": W}),
    "Constant node": ([constant("w", W), reads("w")], {}),
    "Identity": ([helper.make_node("Identity", ["v"], ["w"]), reads("w")], {"v": W}),
    "Cast": (
        [helper.make_node("Cast", ["v"], ["w"], to=TensorProto.FLOAT), reads("w")],
        {"v": W.astype(np.float64)},
    ),
    "Transpose": (
        [helper.make_node("Transpose", ["v"], ["w"], perm=[1, 0]), reads("w")],
        {"v": np.ascontiguousarray(W.T)},
    ),
    "Reshape": (
        [helper.make_node("Reshape", ["v", "s"], ["w"]), reads("w")],
        {"v": W.reshape(4, 3, 10), "s": np.array([-1, 10])},
    ),
    "Squeeze": (
        [helper.make_node("Squeeze", ["v", "a"], ["w"]), reads("w")],
        {"v": W[None], "a": np.array([0])},
    ),
    "a chain of them": (
        [
            constant("v", np.ascontiguousarray(W.T)),
            helper.make_node("Identity", ["v"], ["u"]),
            helper.make_node("Transpose", ["u"], ["w"]),
            reads("w"),
        ],
        {},
    ),
}


@pytest.mark.parametrize("nodes, tensors", STORED.values(), ids=STORED)
def test_a_weight_is_found_however_it_is_stored(
    nodes: list[onnx.NodeProto], tensors: dict[str, Values]
) -> None:
    model = make(nodes, tensors)
    graph = model.graph()
    layers, declined = find_layers(graph)
    assert [layer.name for layer in layers] == ["layer"] and not declined
    np.testing.assert_allclose(read_weight(graph, layers[0])[0], W.T)
    changed = split_all(model)
    check(changed, model)
    feed = {"x": np.ones((3, 12), np.float32)}
    old, new = (open_session(m.proto).run(feed)["y"] for m in (model, changed))
    np.testing.assert_allclose(new, old, atol=1e-4)
    assert {node.op_type for node in changed.proto.graph.node} == {"MatMul"}, "what fed the weight is gone"
    assert not {"v", "w"} & {tensor.name for tensor in changed.proto.graph.initializer}


def test_a_shared_weight_is_split_for_each_node_that_reads_it() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["x2", "w"], ["z"])]
    model = make(nodes, {"w": W}, {"x": [3, 12], "x2": [2, 12]}, ("y", "z"))
    assert len(find_layers(model.graph())[0]) == 2
    assert "w" not in {tensor.name for tensor in split_all(model).proto.graph.initializer}


def test_a_weight_listed_among_the_inputs_is_a_callers_to_override() -> None:
    model = make([reads("w")], {"w": W}, {"x": [3, 12], "w": [12, 10]})
    layers, declined = find_layers(model.graph())
    assert not layers and "override" in declined[0].reason


def test_before_ir_version_4_every_weight_is_listed_and_none_is_a_callers() -> None:
    model = make([reads("w")], {"w": W}, {"x": [3, 12], "w": [12, 10]}, ir_version=3, opset=9)
    assert len(find_layers(model.graph())[0]) == 1
    model.proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 10]))
    onnx.checker.check_model(model.proto)
    changed = split_all(model).proto
    onnx.checker.check_model(changed)
    names = [tensor.name for tensor in changed.graph.initializer]
    assert [value.name for value in changed.graph.input] == ["x", *names] and "w" not in names
    open_session(changed).run({"x": np.ones((3, 12), np.float32)})


def conv(group: int, channels: int) -> Model:
    weight = np.ones((16, channels // group, 3, 3), np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=group, name="layer")
    return make([node], {"w": weight}, {"x": [1, channels, 8, 8]})


def body() -> onnx.GraphProto:
    return helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["inner"], name="layer")],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )


def quantised() -> Model:
    tensors: dict[str, Values] = {
        "q": np.ones((12, 10), np.int8),
        "s": np.array(0.1, np.float32),
        "z": np.array(0, np.int8),
    }
    dequantise = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"])
    return make([dequantise, reads("w")], tensors)


def recurrent() -> Model:
    tensors = {"w": np.ones((1, 32, 12), np.float32), "r": np.ones((1, 32, 8), np.float32)}
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=8, name="layer")
    return make([node], tensors, {"x": [3, 1, 12]})


def branching() -> Model:
    node = helper.make_node("If", ["flag"], ["y"], then_branch=body(), else_branch=body())
    flag = constant("flag", np.array(True))
    return make([flag, node], {"w": W})


DECLINED = {
    "depthwise convolution": conv(16, 16),
    "grouped convolution": conv(4, 16),
    "already quantised": quantised(),
    "recurrent": recurrent(),
    "inside the body of If": branching(),
    "too small": make([reads("w")], {"w": W[:, :3].copy()}),
    "NaN": make([reads("w")], {"w": np.full((12, 10), np.nan, np.float32)}),
    "its C is not one value for each output": make(
        [helper.make_node("Gemm", ["x", "w", "c"], ["y"])], {"w": W, "c": np.ones((3, 10), np.float32)}
    ),
    "not stored but computed, by ConstantOfShape": make(
        [helper.make_node("ConstantOfShape", ["s"], ["w"]), helper.make_node("Gemm", ["x", "w"], ["y"])],
        {"s": np.array([12, 10])},
    ),
    "not stored but computed, by Mul": make(
        [helper.make_node("Mul", ["v", "v"], ["w"]), reads("w")], {"v": W.copy()}
    ),
    "all that it reads is constant": make(
        [helper.make_node("MatMul", ["v", "w"], ["y"])], {"v": W.T.copy(), "w": W}
    ),
    "computed at run time": make(
        [helper.make_node("Gemm", ["x", "x2"], ["y"])], inputs={"x": [3, 12], "x2": [12, 10]}
    ),
    "its weight has 3 axes": make([reads("w")], {"w": np.ones((3, 12, 10), np.float32)}),
}


@pytest.mark.parametrize("reason, model", DECLINED.items(), ids=DECLINED)
def test_what_is_not_rewritten_is_declined_with_a_reason(reason: str, model: Model) -> None:
    layers, declined = find_layers(model.graph())
    assert not layers and declined
    assert all(reason in entry.reason and entry.name for entry in declined)


def test_a_product_of_activations_is_no_layer() -> None:
    node = helper.make_node("MatMul", ["x", "x2"], ["y"])
    assert find_layers(make([node], {}, {"x": [3, 12], "x2": [12, 10]}).graph()) == ((), ())


def test_batchnorm_and_add_that_others_read_are_not_absorbed() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["y"]),
        helper.make_node("Relu", ["h"], ["z"]),
    ]
    model = make(nodes, {"w": W, "b": np.ones(10, np.float32)}, outputs=("y", "z"))
    assert find_layers(model.graph())[0][0].output == "h"


@pytest.mark.parametrize(("variance", "output"), [(2.0, "n"), (-1.0, "c"), (np.inf, "n"), (np.nan, "c")])
def test_a_batchnorm_whose_values_are_not_finite_stays_behind_its_layer(variance: float, output: str) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "one", "one", "one", "variance"], ["n"]),
        helper.make_node("Relu", ["n"], ["y"]),
    ]
    stored = {"w": np.tile(W[:4, :4], (4, 4))[:, :, None, None], "one": np.ones(16, np.float32)}
    stored["variance"] = np.full(16, variance, np.float32)
    model = make(nodes, stored, inputs={"x": [1, 16, 8, 8]})
    assert find_layers(model.graph())[0][0].output == output


def test_costs_are_counted_from_shapes() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("Gemm", ["f", "g"], ["y"], transB=1),
    ]
    tensors = {"w": np.ones((8, 4, 3, 3), np.float32), "g": np.ones((10, 8 * 16), np.float32)}
    model = make(nodes, tensors, {"x": [1, 4, 8, 8]})
    known = shapes(model.proto, {"x": np.ones((1, 4, 8, 8), np.float32)}, compute_tensors(model.proto))
    assert node_macs(model.proto, known) == {"c": 8 * 16 * 4 * 9, "y": 10 * 128}
    assert parameters(model.proto) == 8 * 4 * 9 + 10 * 128


def test_a_weight_may_have_leading_axes_of_one() -> None:
    for node, shape in (
        (helper.make_node("MatMul", ["x", "w"], ["y"]), [3, 12]),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), [12]),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), [2, 5, 3, 12]),
        (helper.make_node("MatMul", ["w", "x"], ["y"]), [10, 3]),
    ):
        model = make([node], {"w": W[None]}, {"x": shape})
        changed = split_all(model)
        feed = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        old, new = (open_session(m.proto).run(feed)["y"] for m in (model, changed))
        assert len(changed.proto.graph.node) == 2
        np.testing.assert_allclose(new, old, atol=1e-4)


def test_a_bias_that_constants_are_computed_to_is_folded() -> None:
    nodes = [
        helper.make_node("Mul", ["half", "c"], ["d"]),
        helper.make_node("Gemm", ["x", "w", "d"], ["y"]),
    ]
    model = make(nodes, {"w": W, "half": np.array(0.5, np.float32), "c": np.arange(10, dtype=np.float32)})
    working = model.graph()
    (layer,), _ = find_layers(working)
    np.testing.assert_allclose(read_weight(working, layer)[1], np.arange(10) / 2)
    changed = split_all(model)
    assert {node.op_type for node in changed.proto.graph.node} == {"Gemm"}, "what fed the bias is gone"
    feed = {"x": np.ones((3, 12), np.float32)}
    old, new = (open_session(m.proto).run(feed)["y"] for m in (model, changed))
    np.testing.assert_allclose(new, old, atol=1e-4)


def test_a_bias_listed_among_the_inputs_is_a_callers_to_override() -> None:
    node = helper.make_node("Gemm", ["x", "w", "c"], ["y"])
    model = make([node], {"w": W, "c": np.ones(10, np.float32)}, {"x": [3, 12], "c": [10]})
    layers, declined = find_layers(model.graph())
    assert not layers and "override" in declined[0].reason


@pytest.mark.parametrize("flat", [True, False], ids=["flat places", "places by axis"])
def test_a_sparse_weight_is_a_weight(flat: bool) -> None:
    places = np.flatnonzero(W.ravel() > 0) if flat else np.argwhere(W > 0)
    model = make([helper.make_node("Gemm", ["x", "w"], ["y"])], {"w": W})
    del model.proto.graph.initializer[:]
    values = numpy_helper.from_array(W[W > 0], "w")
    indices = numpy_helper.from_array(places.astype(np.int64), "w_places")
    model.proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, W.shape))
    working = model.graph()
    (layer,), _ = find_layers(working)
    assert layer.dtype == "float32"
    np.testing.assert_array_equal(read_weight(working, layer)[0], np.maximum(W, 0).T)
    changed = split_all(model)
    assert not changed.proto.graph.sparse_initializer, "nothing reads it any more"
    feed = {"x": np.ones((3, 12), np.float32)}
    old, new = (open_session(m.proto).run(feed)["y"] for m in (model, changed))
    np.testing.assert_allclose(new, old, atol=1e-4)


def test_a_weight_behind_a_cast_is_priced_as_it_is_stored() -> None:
    cast = helper.make_node("Cast", ["v"], ["w"], to=TensorProto.FLOAT)
    (behind,), _ = find_layers(make([cast, reads("w")], {"v": W.astype(np.float16)}).graph())
    (plain,), _ = find_layers(make([reads("w")], {"w": W}).graph())
    assert price(plain, Form()).bytes - price(behind, Form()).bytes == 2 * W.size
    assert price(plain, Form(CHANNEL, 2)) == price(behind, Form(CHANNEL, 2)), "factors are float32"


def test_the_ir_version_rises_with_the_opset_and_weights_leave_the_inputs() -> None:
    model = make([reads("w")], {"w": W}, {"x": [3, 12], "w": [12, 10]}, ir_version=3, opset=9)
    converted = raised(model, 13, "This").proto
    assert converted.ir_version >= helper.find_min_ir_version_for(converted.opset_import) > 3
    assert [value.name for value in converted.graph.input] == ["x"]
    open_session(converted).run({"x": np.ones((3, 12), np.float32)})


def alike(*attributes: dict[str, Any]) -> bool:
    """Whether Convs of one weight with these attributes count as alike, of one input."""
    weight = np.ones((8, 8, 3, 3), np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], [f"y{index}"], **given) for index, given in enumerate(attributes)
    ]
    outputs = tuple(f"y{index}" for index in range(len(nodes)))
    layers, _ = find_layers(make(nodes, {"w": weight}, {"x": [1, 8, 6, 6]}, outputs).graph())
    return len({layer.unnamed for layer in layers}) == 1


def test_layers_are_alike_in_all_that_their_time_depends_on() -> None:
    assert alike({"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_UPPER"})
    assert not alike({"auto_pad": "SAME_UPPER"}, {"auto_pad": "VALID"}), "36 and 16 positions"
    assert not alike({"pads": [1, 1, 1, 1]}, {})
    assert not alike({"strides": [2, 2]}, {})
    assert not alike({"dilations": [2, 2]}, {})
    single, half = (
        find_layers(make([reads("w")], {"w": W.astype(dtype)}).graph())[0][0]
        for dtype in (np.float32, np.float16)
    )
    assert single.unnamed != half.unnamed


def test_an_operator_of_another_domain_is_not_taken_for_onnxs_own() -> None:
    other = helper.make_node("Add", ["h", "b"], ["y"], domain="other")
    model = make(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), other], {"w": W, "b": np.ones(10, np.float32)}
    )
    assert [layer.output for layer in find_layers(model.graph())[0]] == ["h"]
    product = helper.make_node("MatMul", ["x", "w"], ["y"], domain="other")
    assert find_layers(make([product], {"w": W}).graph())[0] == ()


def test_a_layer_alone_gives_what_it_gives_in_the_model() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    model = make(nodes, {"w": W})
    (layer,), _ = find_layers(model.graph())
    alone = isolate(model.proto, layer, (3, 12))
    x = np.random.default_rng(0).random((3, 12)).astype(np.float32)
    whole = open_session(model.proto).run({"x": x})["y"]
    np.testing.assert_array_equal(open_session(alone).run({"h": x})["y"], whole)
