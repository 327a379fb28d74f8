"""Transposed convolutions are layers like any other: split, stored in codes, counted, judged exactly."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import onnx_lrsd
from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.fit.calibrate import calibrate
from onnx_lrsd.fit.reconstruct import reconstruct
from onnx_lrsd.graph.model import Model, check, load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.int8.quantise import quantise
from onnx_lrsd.passes.count import compute_tensors, node_macs, parameters
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.split import split
from onnx_lrsd.runtime.session import open_session, shapes
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.problem import pose
from onnx_lrsd.targets import TARGETS, price
from onnx_lrsd.types import CHANNEL, DENSE, KINDS, Factors, Form, Layer, Moments, Values, whole_channels

EXACT = 1e-5


def make(nodes: list[onnx.NodeProto], shape: list[Any], tensors: dict[str, Values]) -> Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def run(model: Model, x: Values) -> Values:
    (y,) = open_session(model.proto).run({"x": x}).values()
    return np.asarray(y)


def rewrite(model: Model, form: Form, moments: Moments | None = None) -> tuple[Model, Factors]:
    working = model.graph()
    (layer,), _ = find_layers(working)
    factors = decompose(pose(layer, *read_weight(working, layer), moments), form)
    split(working, layer, factors)
    return model.splice(working), factors


@st.composite
def transposed(draw: st.DrawFn) -> tuple[Model, list[int]]:
    """Any ConvTranspose without groups, with or without a bias and a BatchNormalization behind it."""
    axes = draw(st.integers(1, 2))

    def each(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(axes)]

    kernel, size, channels, outputs = each(1, 4), each(1, 5), 8 + draw(st.integers(0, 3)), 8
    attributes: dict[str, Any] = {"kernel_shape": kernel}
    if draw(st.booleans()):
        attributes["strides"] = each(1, 3)
    if draw(st.booleans()):
        attributes["dilations"] = each(1, 2)
    padding = draw(st.sampled_from(["none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID", "output_shape"]))
    if padding == "pads":
        attributes["pads"] = each(0, 1) + each(0, 1)
    elif padding == "output_shape":
        attributes["output_shape"] = [length + extra for length, extra in zip(size, each(0, 4), strict=True)]
    elif padding != "none":
        attributes["auto_pad"] = padding
    if draw(st.booleans()):
        attributes["output_padding"] = each(0, 1)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    tensors = {"w": rng.standard_normal((channels, outputs, *kernel)).astype(np.float32)}
    inputs = ["x", "w"]
    if draw(st.booleans()):
        tensors["b"], inputs = rng.standard_normal(outputs).astype(np.float32), ["x", "w", "b"]
    nodes = [helper.make_node("ConvTranspose", inputs, ["h"], **attributes)]
    if draw(st.booleans()):
        statistics = {name: rng.random(outputs).astype(np.float32) + 0.5 for name in ("g", "a", "e", "v")}
        nodes.append(helper.make_node("BatchNormalization", ["h", *statistics], ["y"]))
        tensors |= statistics
    else:
        nodes[0].output[0] = "y"
    shape = [2, channels, *size]
    return make(nodes, shape, tensors), shape


@settings(max_examples=40)
@given(transposed(), st.integers(0, 99))
def test_a_transposed_convolution_at_full_rank_is_what_it_was(
    drawn: tuple[Model, list[int]], seed: int
) -> None:
    model, shape = drawn
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    try:
        expected = run(model, x)
    except LrsdError:
        assume(False)  # the drawn attributes do not go together
    (layer,), _ = find_layers(model.graph())
    top = min(layer.n, layer.m - 2)
    everything = (
        Form(CHANNEL, min(layer.n, layer.m)),
        Form(CHANNEL, top, whole_channels(2)),
        Form(DENSE, weights=(("fp16", layer.n),)),
    )
    for form in everything:
        changed, _ = rewrite(model, form)
        check(changed, model)
        room = 1e-2 if form.coded else 1e-4
        np.testing.assert_allclose(run(changed, x), expected, atol=room * max(np.abs(expected).max(), 1))


def apart(rng: np.random.Generator) -> tuple[Model, Values]:
    """A kernel as large as its strides, and inputs whose mean is far from zero."""
    tensors = {
        "w": rng.standard_normal((12, 10, 2, 3)).astype(np.float32),
        "b": rng.standard_normal(10).astype(np.float32),
    }
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], strides=[2, 3])
    x = rng.standard_normal((40, 12, 4, 4)) + 2 * rng.standard_normal((12, 1, 1))
    return make([node], [None, 12, 4, 4], tensors), x.astype(np.float32)


@pytest.mark.parametrize("known", ["second", "rows", "cross"])
@pytest.mark.parametrize(
    "form",
    [Form(CHANNEL, 4), Form(CHANNEL, 4, whole_channels(2)), Form(DENSE, weights=(("int4", 60),))],
    ids=str,
)
def test_the_error_and_the_shared_bias_are_exact_where_nothing_overlaps(form: Form, known: str) -> None:
    if known == "rows" and form.channels:
        pytest.skip("no form that keeps channels is fitted to few rows")
    model, x = apart(np.random.default_rng(0))
    working = model.graph()
    (layer,), _ = find_layers(working)
    weight, bias = read_weight(working, layer)
    rows = np.moveaxis(x, 1, -1).reshape(-1, 12).astype(np.float64)
    mean = rows.mean(axis=0)
    centred = rows - mean
    second = centred.T @ centred / len(rows)
    moments = {
        "second": Moments(name="y", count=len(rows), mean=mean, second=second),
        "rows": Moments(name="y", count=len(rows), mean=mean, rows=centred),
        "cross": Moments(
            name="y",
            count=len(rows),
            mean=mean,
            second=second,
            cross=weight @ second,
            output_mean=weight @ mean + bias,
            output_energy=float(np.sum((centred @ weight.T) ** 2)) / len(rows),
        ),
    }[known]
    changed, factors = rewrite(model, form, moments)
    before, after = run(model, x).astype(np.float64), run(changed, x).astype(np.float64)
    missed = before - after
    variance = np.sum((before - before.mean(axis=(0, 2, 3), keepdims=True)) ** 2)
    assert factors.error == pytest.approx(np.sum(missed**2) / variance, rel=EXACT)
    np.testing.assert_allclose(missed.mean(axis=(0, 2, 3)), 0, atol=EXACT)  # no other bias is better


def decoder(rng: np.random.Generator, stride: int) -> Model:
    """Conv, Relu, ConvTranspose with BatchNormalization, Relu, Conv; channels are of low rank, nearly."""

    def low(*shape: int) -> Values:
        rows, columns = shape[0], prod(shape[1:])
        exact = rng.standard_normal((rows, 6)) @ rng.standard_normal((6, columns))
        noise = 0.1 * rng.standard_normal((rows, columns))
        values: Values = ((exact + noise) / np.sqrt(6 * columns)).reshape(shape).astype(np.float32)
        return values

    tensors = {"w": low(32, 8, 3, 3), "t": low(32, 32, 3, 3), "v": low(8, 32, 3, 3)}
    statistics = {name: (rng.random(32) + 0.5).astype(np.float32) for name in ("g", "a", "e", "s")}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ConvTranspose", ["r", "t"], ["h"], strides=[stride] * 2, name="up"),
        helper.make_node("BatchNormalization", ["h", *statistics], ["n"]),
        helper.make_node("Relu", ["n"], ["q"]),
        helper.make_node("Conv", ["q", "v"], ["y"]),
    ]
    return make(nodes, [None, 8, 8, 8], tensors | statistics)


def inputs(count: int) -> dict[str, Values]:
    return {"x": np.random.default_rng(1).standard_normal((count, 8, 8, 8)).astype(np.float32)}


@pytest.mark.parametrize("stride", [1, 2, 3], ids="strides {0}".format)
def test_layers_around_a_transposed_convolution_are_fitted_to_what_it_gives(stride: int) -> None:
    model = decoder(np.random.default_rng(0), stride)
    working = model.graph()
    layers, _ = find_layers(working)
    assert [layer.op for layer in layers] == ["Conv", "ConvTranspose", "Conv"]
    weight_of = partial(read_weight, working)
    known = calibrate(model, layers, read_samples(inputs(64), inputs_of(model.proto)), weight_of)
    forms = {layer.output: Form(CHANNEL, 6) for layer in layers[:2]}
    changed, factors = reconstruct(model, known.layers, forms, weight_of, known)
    x = np.random.default_rng(2).standard_normal((16, 8, 8, 8)).astype(np.float32)
    old, new = run(model, x), run(changed, x)
    lost = np.sum((old - new) ** 2) / np.sum((old - old.mean(axis=(0, 2, 3), keepdims=True)) ** 2)
    assert 0 < factors["n"].error < 0.1 and lost < 0.1


def counted(model: Model, x: Values) -> int:
    return sum(node_macs(model.proto, shapes(model.proto, {"x": x}, compute_tensors(model.proto))).values())


def test_what_is_priced_is_what_is_counted_in_the_file() -> None:
    model, x = decoder(np.random.default_rng(0), 2), inputs(1)["x"]
    working = model.graph()
    layers, _ = find_layers(working)
    samples = read_samples(inputs(8), inputs_of(model.proto))
    known = calibrate(model, layers, samples, partial(read_weight, working))
    layer = next(layer for layer in known.layers if layer.op == "ConvTranspose")
    assert price(layer, Form()).macs == counted(model, x) - sum(
        price(other, Form()).macs for other in known.layers if other is not layer
    )
    for form in (Form(CHANNEL, 6), Form(CHANNEL, 4, whole_channels(8))):
        changed = model.graph()
        split(changed, layer, decompose(pose(layer, *read_weight(working, layer), None), form))
        spliced = model.splice(changed)
        before, after = price(layer, Form()), price(layer, form)
        assert counted(model, x) - counted(spliced, x) == before.macs - after.macs
        statistics, biases = 4 * 32, 32
        saved = parameters(model.proto) - parameters(spliced.proto)
        assert saved == before.parameters - after.parameters + statistics - biases


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt", "size"])
def test_every_target_has_forms_for_a_wide_transposed_convolution(target: str) -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])
    weight = np.ones((256, 128, 4, 4), np.float32)
    model = make([node], [1, 256, 16, 16], {"w": weight})
    (layer,), _ = find_layers(model.graph())
    forms = TARGETS[target].forms(replace(layer, positions=256, size=(16, 16)), KINDS)
    assert forms and {form.kind for form in forms} <= {CHANNEL, DENSE}


@pytest.mark.slow
def test_target_size_stores_a_transposed_convolution_in_codes() -> None:
    model = decoder(np.random.default_rng(0), 2)
    result = onnx_lrsd.optimize(model.proto, inputs(24), ratio=1.5, target="size", include="^(up|n)$")
    assert result.plan.choices["n"].form.coded
    assert result.report.verification is not None and result.report.verification.error < 0.05
    # Opened, the file has the operators that it had.
    left = [node.op_type for node in result.model.proto.graph.node if "ConvTranspose" in node.op_type]
    assert left == ["ConvTranspose"]


def test_int8_leaves_transposed_convolutions_in_float_and_says_why() -> None:
    model = decoder(np.random.default_rng(0), 2)
    found = quantise(model, read_samples(inputs(48), inputs_of(model.proto)), 1.0)
    assert found.nodes == 2 and list(found.without_kernel.values()) == [1]
    assert all("transposed" in reason for reason in found.without_kernel)


def test_int8_leaves_a_weight_that_is_also_an_output_as_it_is() -> None:
    model = decoder(np.random.default_rng(0), 2)
    model.proto.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [32, 8, 3, 3]))
    found = quantise(model, read_samples(inputs(48), inputs_of(model.proto)), 1.0)
    assert found.nodes == 1
    before, after = (open_session(m.proto).run({"x": inputs(1)["x"]})["w"] for m in (model, found.model))
    np.testing.assert_array_equal(before, after)


def test_transposed_convolutions_with_groups_are_declined() -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=2)
    model = make([node], [1, 16, 4, 4], {"w": np.ones((16, 8, 2, 2), np.float32)})
    layers, declined = find_layers(model.graph())
    assert not layers and "grouped" in declined[0].reason


def test_transposed_convolutions_of_unlike_shapes_are_not_alike() -> None:
    def layer(**attributes: Any) -> Layer:
        node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], **attributes)
        model = make([node], [1, 8, 4, 4], {"w": np.ones((8, 8, 2, 2), np.float32)})
        return find_layers(model.graph())[0][0]

    unlike = [layer(), layer(output_padding=[1, 1], strides=[2, 2]), layer(strides=[2, 2])]
    unlike.append(layer(strides=[2, 2], output_shape=[7, 7]))
    assert len({each.unnamed for each in unlike}) == 4
