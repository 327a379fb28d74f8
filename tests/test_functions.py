"""Layers inside the functions of a model are worked on; other functions stay, and so do their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_lrsd
from onnx_lrsd.graph.model import load
from onnx_lrsd.passes.find_layers import find_layers
from onnx_lrsd.passes.functions import without_layers_in_functions
from onnx_lrsd.passes.unfuse import unfuse
from onnx_lrsd.runtime.session import open_session

SIZE, ROWS = 64, 4
OPSET = helper.make_opsetid("", 17)
OWN = helper.make_opsetid("own", 1)
CONTRIB = helper.make_opsetid("com.microsoft", 1)
FULL_RANK = SIZE


def weight(rank: int, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    product = rng.standard_normal((SIZE, rank)) @ rng.standard_normal((rank, SIZE))
    return np.asarray(product / np.sqrt(SIZE * rank), dtype=np.float32)


def function(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    *,
    inputs: Sequence[str] = ("a",),
    opset: int = 17,
    more: Sequence[onnx.OperatorSetIdProto] = (),
) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", opset), *more]
    return helper.make_function("own", name, inputs, ["o"], nodes, opsets)


def own(rank: int) -> list[onnx.NodeProto]:
    """A layer whose weight the function holds."""
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight(rank)))
    return [constant, helper.make_node("MatMul", ["a", "w"], ["o"], "product")]


GIVEN = helper.make_node("MatMul", ["a", "w"], ["o"], "product")
"""A layer whose weight the caller gives."""
RELU = helper.make_node("Relu", ["a"], ["o"])


def call(name: str, *inputs: str, to: str) -> onnx.NodeProto:
    return helper.make_node(name, inputs, [to], domain="own")


def model_of(
    calls: Sequence[onnx.NodeProto], functions: Sequence[onnx.FunctionProto], **weights: Any
) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", ROWS, SIZE]) for name in "xy"]
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(calls, "g", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[OPSET, OWN], functions=functions, ir_version=8)


def two_layers(rank: int) -> onnx.ModelProto:
    """A layer of either sort, an activation that is a function between."""
    calls = [call("Held", "x", to="h"), call("Plain", "h", to="i"), call("Given", "i", "v", to="y")]
    functions = [
        function("Held", own(rank)),
        function("Plain", [RELU]),
        function("Given", [GIVEN], inputs=("a", "w")),
    ]
    return model_of(calls, functions, v=weight(rank, 1))


def feed(count: int = 4) -> dict[str, npt.NDArray[np.float32]]:
    return {"x": np.random.default_rng(2).standard_normal((count, ROWS, SIZE)).astype(np.float32)}


def run(proto: onnx.ModelProto) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = open_session(proto).run(feed())["y"]
    return found


@pytest.mark.slow
def test_layers_inside_functions_are_rewritten_and_other_functions_stay() -> None:
    proto = two_layers(rank=8)
    result = onnx_lrsd.optimize(proto, feed(40), target="size", ratio=1.5)
    assert [layer.left for layer in result.report.layers] == [False, False]
    assert np.var(run(result.model.proto) - run(proto)) < 0.01 * np.var(run(proto))
    assert [f.name for f in result.model.proto.functions] == ["Plain"]
    layers, declined = onnx_lrsd.inspect(proto).layers, onnx_lrsd.inspect(proto).declined
    assert len(layers) + len(declined) == 2 and not any("function" in entry.reason for entry in declined)


def test_where_nothing_is_gained_a_model_with_functions_is_handed_back_byte_for_byte(tmp_path: Path) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    path.write_bytes(two_layers(FULL_RANK).SerializeToString())
    result = onnx_lrsd.optimize(path, feed(40), target="size", max_error=1e-9, output=out)
    assert all(layer.left for layer in result.report.layers)
    assert out.read_bytes() == path.read_bytes()


def test_a_model_without_layers_in_functions_stays_what_it_is() -> None:
    plain = model_of([call("Plain", "x", to="y")], [function("Plain", [RELU])])
    product = function("Square", [helper.make_node("MatMul", ["a", "b"], ["o"])], inputs=("a", "b"))
    turned = helper.make_node("Transpose", ["x"], ["t"])
    square = model_of([turned, call("Square", "x", "t", to="y")], [product])
    for proto in (plain, square):
        model = load(proto)
        assert without_layers_in_functions(model) is model


def test_a_weight_that_a_function_holds_is_stored_once_for_all_calls() -> None:
    calls = [call("Held", "x", to="h"), call("Twice", "h", to="y")]
    inner = [call("Held", "a", to="b"), call("Held", "b", to="o")]
    proto = model_of(calls, [function("Held", own(8)), function("Twice", inner, more=[OWN])])
    model = without_layers_in_functions(load(proto))
    layers, _ = find_layers(model.graph())
    assert len(layers) == 3 and len({layer.weight for layer in layers}) == 1
    assert len(model.proto.SerializeToString()) < len(proto.SerializeToString()) + 1000
    np.testing.assert_allclose(run(model.proto), run(proto), rtol=1e-5, atol=1e-6)
    assert not model.proto.functions


def test_operators_that_only_a_function_imports_come_with_it() -> None:
    nodes = [*own(8)[:1], helper.make_node("FusedMatMul", ["a", "w"], ["o"], domain="com.microsoft")]
    proto = model_of([call("Held", "x", to="y")], [function("Held", nodes, more=[CONTRIB])])
    model = without_layers_in_functions(load(proto))
    np.testing.assert_allclose(run(model.proto), run(proto), rtol=1e-5, atol=1e-6)
    working = model.graph()
    assert unfuse(working) == 1 and len(find_layers(working)[0]) == 1


@pytest.mark.parametrize("opset", [16, 18])
def test_a_function_of_another_opset_is_left_with_the_reason(opset: int) -> None:
    model = load(model_of([call("Held", "x", to="y")], [function("Held", own(8), opset=opset)]))
    assert without_layers_in_functions(model) is model
    ((_, declined),) = [find_layers(model.graph())]
    assert declined[0].reason == "inside the function Held: left as it is"


@pytest.mark.parametrize("opset", [16, 18])
def test_a_function_of_another_opset_keeps_what_it_calls(opset: int) -> None:
    """The others are worked on all the same."""
    calls = [call("Held", "x", to="h"), call("Other", "h", to="y")]
    inner = [call("Held", "a", to="o")]
    functions = [function("Held", own(8)), function("Other", inner, opset=opset, more=[OWN])]
    proto = model_of(calls, functions)
    model = without_layers_in_functions(load(proto))
    assert len(find_layers(model.graph())[0]) == 1 and list(model.proto.functions) == functions
    np.testing.assert_allclose(run(model.proto), run(proto), rtol=1e-5, atol=1e-6)
