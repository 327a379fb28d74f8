"""A layer counts by what its error does to the outputs."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper
from plain_layers import linear

from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.fit.calibrate import calibrate
from onnx_lrsd.fit.sensitivity import logits, sensitivities
from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.post_dominators import count_post_dominators
from onnx_lrsd.plan.planner import Planner
from onnx_lrsd.plan.units import Curves
from onnx_lrsd.run import Options, start
from onnx_lrsd.types import CHANNEL, UNSTRUCTURED, ErrorCurve, Form, Moments, Pattern, Point, Price

RNG = np.random.default_rng(3)


def two_branches(shares: tuple[float, float], dtype: int = TensorProto.FLOAT) -> Model:
    """y = shares[0] x A + shares[1] x B, with A and B of the same spectrum."""
    weights = {n: RNG.standard_normal((12, 12)).astype(np.float32) for n in "AB"}
    weights |= {f"s{n}": np.array(v, np.float32) for n, v in zip("AB", shares, strict=True)}
    nodes = [helper.make_node("MatMul", ["x", n], [f"m{n}"]) for n in "AB"]
    nodes += [helper.make_node("Mul", [f"m{n}", f"s{n}"], [f"b{n}"]) for n in "AB"]
    nodes += [helper.make_node("Add", ["bA", "bB"], ["sum"])]
    nodes += [helper.make_node("Cast", ["sum"], ["y"], to=dtype)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 12])],
        [helper.make_tensor_value_info("y", dtype, ["N", 3, 12])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def measured(model: Model) -> dict[str, float]:
    graph = model.graph()
    layers, _ = find_layers(graph)
    weight_of = partial(read_weight, graph)
    data = np.random.default_rng(1).standard_normal((400, 3, 12)).astype(np.float32)
    samples = read_samples({"x": data}, inputs_of(model.proto))
    known = calibrate(model, layers, samples, weight_of)
    forms = {layer.output: Form(CHANNEL, 6) for layer in layers}
    return sensitivities(model, known.layers, forms, weight_of, known.moments, samples)


def test_an_output_without_axes_does_not_get_in_the_way() -> None:
    model = two_branches((2.0, 1.0))
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.node.append(helper.make_node("ReduceMean", ["y"], ["loss"], keepdims=0))
    proto.graph.output.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, []))
    found = measured(load(proto))
    assert len(found) == 2 and all(value > 0 for value in found.values())


def test_a_sensitivity_is_the_share_of_the_output_that_a_layer_makes() -> None:
    found = measured(two_branches((2.0, 1.0)))
    assert sum(found.values()) == pytest.approx(1.0, rel=0.25)
    assert found["mA"] / found["mB"] == pytest.approx(4.0, rel=0.5)


def test_a_layer_without_effect_weighs_least_and_one_without_numbers_nothing() -> None:
    found = measured(two_branches((1.0, 1e-4)))
    assert found["mB"] < 0.05 * found["mA"]
    assert measured(two_branches((1.0, 1.0), TensorProto.INT64)) == {}


def test_sensitivities_may_be_orders_of_magnitude_apart() -> None:
    """As in transformers, where a few tokens carry nearly all energy of some layers."""
    found = measured(two_branches((1.0, 0.01)))
    assert found["mA"] / found["mB"] == pytest.approx(1e4, rel=0.5)


def test_single_entries_are_measured_by_rounding_where_rows_are_few_and_not_at_all_elsewhere() -> None:
    model = two_branches((2.0, 1.0))
    graph = model.graph()
    layers, _ = find_layers(graph)
    rows = np.random.default_rng(1).standard_normal((400, 12)).astype(np.float32)
    samples = read_samples({"x": np.repeat(rows[:, None], 3, axis=1)}, inputs_of(model.proto))
    entries = Form(CHANNEL, 0, Pattern(UNSTRUCTURED, 72))

    def found(moments: Moments) -> dict[str, float]:
        known = {layer.output: moments for layer in layers}
        forms = dict.fromkeys(known, entries)
        return sensitivities(model, layers, forms, partial(read_weight, graph), known, samples)

    few = found(Moments(name="", count=400, mean=np.zeros(12), rows=rows))
    assert few["mA"] / few["mB"] == pytest.approx(4.0, rel=0.5)
    assert found(Moments(name="", count=400, mean=np.zeros(12), second=rows.T @ rows / 400)) == {}


def test_layers_are_behind_another_where_no_path_leads_past_them() -> None:
    graph = gs.import_onnx(
        onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 17]>
            g (float[n, 4] x, bool ask) => (float[n, 4] out, float[n, 4] seen)
            <float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}> {
                first = MatMul(x, w)
                inner = MatMul(first, w)  block = MatMul(inner, w)  sum = Add(block, first)
                left = MatMul(sum, w)  right = MatMul(sum, w)  both = Add(left, right)
                seen = MatMul(both, w)  late = MatMul(seen, w)
                out = If(ask) <
                    then_branch = yes () => (float[n, 4] a) { a = MatMul(late, w) },
                    else_branch = no () => (float[n, 4] b) { b = Neg(late) }
                >
            }"""
        )
    )
    names = ["first", "inner", "block", "left", "right", "seen", "late"]
    layers = [linear(4, 4, name) for name in names]
    expected = {"first": 1, "inner": 2, "block": 1, "left": 1, "right": 1, "seen": 0, "late": 0}
    assert count_post_dominators(graph, layers) == expected


def test_probabilities_and_logits_say_the_same() -> None:
    scores = RNG.standard_normal((5, 4))
    powers = np.exp(scores)
    expected = scores - scores.mean(axis=1, keepdims=True)
    assert np.allclose(logits(powers / powers.sum(axis=1, keepdims=True)), expected)
    assert np.allclose(logits(scores + 3), expected)


def test_an_error_counts_less_the_more_layers_are_refitted_behind_it() -> None:
    model = load(
        onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 2] x) => (float[n, 2] y)
            <float[2, 2] w = {1, 2, 3, 4}> { a = MatMul(x, w)  b = MatMul(a, w)  y = MatMul(b, w) }"""
        )
    )
    layers = [linear(2, 2, name) for name in "aby"]
    points = Point(Form(), 0.0, Price(4, 4, 16)), Point(Form(CHANNEL, 1), 0.03, Price(2, 2, 8))
    curves = Curves(tuple(ErrorCurve(layer, points) for layer in layers))
    samples = read_samples({"x": np.ones((8, 2), np.float32)}, inputs_of(model.proto))
    planner = Planner(start(Options(ratio=1.5)), model, curves, Price(12, 12, 48), {}, samples)
    planner.weigh(lambda forms: dict.fromkeys(forms, 1.0))
    assert planner.sensitivity["a"] < planner.sensitivity["b"] < planner.sensitivity["y"] == 1.0
