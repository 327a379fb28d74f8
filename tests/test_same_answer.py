"""At full rank a rewritten layer gives what the original gave, judged by ONNX Runtime."""

from __future__ import annotations

import sys
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.version_converter
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.fit.calibrate import calibrate, recalibrate
from onnx_lrsd.graph.model import Model, check, load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.operators import operator_of
from onnx_lrsd.passes.split import split
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.layout import shared_groups
from onnx_lrsd.solver.problem import pose
from onnx_lrsd.types import CHANNEL, CHANNEL_IN, SPATIAL, TUCKER, Form, Layer, whole_channels

BACKEND = Path(onnx.__file__).parent / "backend" / "test" / "data"
SHIPPED = sorted(
    path.parent
    for path in BACKEND.glob("pytorch-*/*/model.onnx")
    if {"Conv", "Gemm", "MatMul"} & {node.op_type for node in onnx.load(path).graph.node}
)
Values = npt.NDArray[Any]


def full_rank(layer: Layer, kind: str, channels: int) -> Form:
    groups = shared_groups(layer.kernel, kind)
    kept = layer.channels - channels
    rank = min(layer.n * groups, kept * prod(layer.kernel) // groups)
    outer = min(layer.n, rank * groups) if kind == TUCKER else 0
    return Form(kind, rank, whole_channels(channels), outer)


def kinds(layer: Layer) -> list[str]:
    found = [CHANNEL]
    if prod(layer.kernel) > 1:
        found += [CHANNEL_IN, TUCKER]
    if len(layer.kernel) == 2:
        found.append(SPATIAL)
    return found


def rewrite(model: Model, choose: Any) -> Model:
    graph = model.graph()
    for layer in find_layers(graph)[0]:
        weight, bias = read_weight(graph, layer)
        split(graph, layer, decompose(pose(layer, weight, bias, None), choose(layer)))
    return model.splice(graph)


def outputs(model: Model, feed: dict[str, Values]) -> list[Values]:
    return list(open_session(model.proto).run(feed).values())


def assert_same(model: Model, changed: Model, feed: dict[str, Values], tolerance: float = 1e-4) -> None:
    check(changed, model)
    for old, new in zip(outputs(model, feed), outputs(changed, feed), strict=True):
        assert old.shape == new.shape and old.dtype == new.dtype
        np.testing.assert_allclose(new, old, atol=tolerance * max(float(np.abs(old).max()), 1e-3))


def make(nodes: list[onnx.NodeProto], shape: list[int], tensors: dict[str, Values], opset: int = 17) -> Model:
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Model, list[int]]:
    axes = draw(st.integers(1, 3))
    kernel = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    strides = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    dilations = draw(st.lists(st.integers(1, 2), min_size=axes, max_size=axes))
    size = draw(st.lists(st.integers(6, 9), min_size=axes, max_size=axes))
    auto_pad = draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto_pad.startswith("SAME"):
        dilations = [1] * axes  # not defined together with dilations
    attributes: dict[str, Any] = {"strides": strides, "dilations": dilations}
    if auto_pad == "NOTSET":
        attributes["pads"] = draw(st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes))
    else:
        attributes["auto_pad"] = auto_pad
    if draw(st.booleans()):
        attributes["kernel_shape"] = kernel
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    n, channels = draw(st.integers(8, 12)), draw(st.integers(8, 12))
    tensors = {"w": rng.standard_normal((n, channels, *kernel)).astype(np.float32)}
    if draw(st.booleans()):
        tensors["b"] = rng.standard_normal(n).astype(np.float32)
    norm = draw(st.booleans())
    nodes = [helper.make_node("Conv", ["x", *tensors], ["c" if norm else "y"], **attributes)]
    if norm:
        statistics = {
            name: rng.random(n).astype(np.float32) + 0.5 for name in ("gamma", "beta", "mean", "var")
        }
        nodes.append(helper.make_node("BatchNormalization", ["c", *statistics], ["y"], epsilon=1e-3))
        tensors |= statistics
    shape = [2, channels, *size]
    return make(nodes, shape, tensors), shape


@given(convolutions(), st.integers(0, 99), st.sampled_from([0, 0, 2]))
def test_conv_at_full_rank(drawn: tuple[Model, list[int]], seed: int, channels: int) -> None:
    model, shape = drawn
    feed = {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}
    try:
        outputs(model, feed)
    except LrsdError:
        assume(False)  # the drawn kernel does not fit the drawn size
    (layer,), _ = find_layers(model.graph())
    for kind in kinds(layer):
        assert_same(model, rewrite(model, lambda layer, kind=kind: full_rank(layer, kind, channels)), feed)
    assert_same(
        model,
        rewrite(model, lambda layer: Form(CHANNEL, 0, whole_channels(layer.channels - 1))),
        feed,
        tolerance=10,
    )


@given(convolutions(), st.integers(0, 99))
def test_rows_are_what_the_convolution_reads(drawn: tuple[Model, list[int]], seed: int) -> None:
    model, shape = drawn
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    graph = model.graph()
    (layer,), _ = find_layers(graph)
    try:
        (y,) = outputs(model, {"x": x})
    except LrsdError:
        assume(False)
    total = operator_of(layer).count_rows(layer, x.shape)
    assert total == y.size // layer.n
    positions = np.arange(0, total, 2)
    weight, bias = read_weight(graph, layer)
    rows = np.empty((len(positions), layer.m), np.float32)
    operator_of(layer).input_rows(layer, x, positions, rows)
    given_there = np.moveaxis(y, 1, -1).reshape(-1, layer.n)[positions]
    np.testing.assert_allclose(rows @ weight.T + bias, given_there, atol=1e-3)


@given(
    st.booleans(),
    st.booleans(),
    st.floats(-2, 2, width=32),
    st.floats(-2, 2, width=32),
    st.integers(8, 20),
    st.integers(8, 20),
    st.integers(1, 5),
    st.sampled_from(["none", "()", "(1,)", "(n,)", "(1, n)", "(1, 1)", "(rows, 1)", "(rows, n)"]),
    st.sampled_from([0, 0, 3]),
    st.sampled_from([7, 9, 11, 13, 17]),
)
def test_gemm_at_full_rank(
    trans_a: bool,
    trans_b: bool,
    alpha: float,
    beta: float,
    n: int,
    m: int,
    rows: int,
    c: str,
    channels: int,
    opset: int,
) -> None:
    rng = np.random.default_rng(n)
    tensors = {"w": rng.standard_normal((n, m) if trans_b else (m, n)).astype(np.float32)}
    if c == "none" and opset < 11:
        c = "(n,)"
    if c != "none":
        sizes = {"n": n, "rows": rows, "1": 1}
        shape = [sizes[axis] for axis in c.strip("()").replace(" ", "").split(",") if axis]
        tensors["c"] = rng.standard_normal(shape).astype(np.float32)
    attributes: dict[str, Any] = {
        "transA": int(trans_a),
        "transB": int(trans_b),
        "alpha": alpha,
        "beta": beta,
    }
    shape = [m, rows] if trans_a else [rows, m]
    model = make([helper.make_node("Gemm", ["x", *tensors], ["y"], **attributes)], shape, tensors, opset)
    feed = {"x": rng.standard_normal(shape).astype(np.float32)}
    layers, declined = find_layers(model.graph())
    assert len(layers) + len(declined) == 1
    assert not declined or (c.startswith("(rows") and rows > 1)
    assert_same(model, rewrite(model, lambda layer: full_rank(layer, CHANNEL, channels)), feed)


@given(
    st.booleans(),
    st.lists(st.integers(1, 3), max_size=3),
    st.booleans(),
    st.integers(8, 20),
    st.integers(8, 20),
    st.sampled_from(["none", "add", "add rows", "relu"]),
    st.sampled_from([0, 0, 3]),
)
def test_matmul_at_full_rank(
    left: bool, batch: list[int], vector: bool, n: int, m: int, after: str, channels: int
) -> None:
    rng = np.random.default_rng(n)
    shape = [*batch, m, 5] if left else [*batch, 5, m]
    if vector and not left:
        shape = [m]
    tensors = {"w": rng.standard_normal((n, m) if left else (m, n)).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["w", "x"] if left else ["x", "w"], ["y" if after == "none" else "h"])
    ]
    if after.startswith("add"):
        axes = {"add": (n, 1) if left else (n,), "add rows": (1, n) if not left else (1, 5)}
        tensors["b"] = rng.standard_normal(axes[after]).astype(np.float32)
        nodes.append(helper.make_node("Add", ["b", "h"], ["y"]))
    elif after == "relu":
        nodes.append(helper.make_node("Relu", ["h"], ["y"]))
    model = make(nodes, shape, tensors)
    feed = {"x": rng.standard_normal(shape).astype(np.float32)}
    assert len(find_layers(model.graph())[0]) == 1
    changed = rewrite(model, lambda layer: full_rank(layer, CHANNEL, channels))
    assert_same(model, changed, feed)
    if after == "add":
        assert "b" not in {tensor.name for tensor in changed.proto.graph.initializer}


def stored(folder: Path, end: str) -> list[Values]:
    return [numpy_helper.to_array(onnx.load_tensor(str(file))) for file in sorted(folder.glob(f"{end}_*.pb"))]


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_models_converted_from_pytorch_give_their_stored_outputs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer, however small, in every form of its kernel, with and without a sparse part."""
    monkeypatch.setattr(sys.modules["onnx_lrsd.passes.find_layers"], "SMALLEST", 1)
    proto = onnx.load(folder / "model.onnx")
    if proto.opset_import[0].version < 7:  # ONNX Runtime starts there
        proto = onnx.version_converter.convert_version(proto, 9)
    model = load(proto)
    layers, _ = find_layers(model.graph())
    defaults = {tensor.name for tensor in proto.graph.initializer}
    names = [value.name for value in proto.graph.input if value.name not in defaults]
    for kind in {kind for layer in layers for kind in kinds(layer)}:
        for freed in (0, 1):

            def choose(layer: Layer, kind: str = kind, freed: int = freed) -> Form:
                fits = kind if kind in kinds(layer) else CHANNEL
                return full_rank(layer, fits, freed if layer.channels > freed else 0)

            changed = rewrite(model, choose)
            check(changed, model)
            for data in sorted(folder.glob("test_data_set_*")):
                feed = dict(zip(names, stored(data, "input"), strict=True))
                for wanted, got in zip(stored(data, "output"), outputs(changed, feed), strict=True):
                    scale = max(float(np.abs(wanted).max()), 1)
                    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4 * scale)


def test_the_models_converted_from_pytorch_have_layers_of_every_kind() -> None:
    found = {path.name.split("_")[1] for path in SHIPPED}
    assert found == {"Conv1d", "Conv2d", "Conv3d", "Linear", "operator"}


def test_calibration_repeats_to_the_bit_and_passes_over_what_nobody_asked_for() -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "v": rng.standard_normal((12, 8, 3, 3)).astype(np.float32),
        "w": rng.standard_normal((9, 12, 1, 1)).astype(np.float32),
    }
    nodes = [helper.make_node("Conv", ["x", "v"], ["h"]), helper.make_node("Conv", ["h", "w"], ["y"])]
    model = make(nodes, [2, 8, 9, 9], tensors)
    graph = model.graph()
    layers, _ = find_layers(graph)
    assert len(layers) == 2
    data = {"x": rng.standard_normal((300, 8, 9, 9)).astype(np.float32)}
    samples = read_samples(data, inputs_of(model.proto))
    once, again = (calibrate(model, layers, samples, partial(read_weight, graph)) for _ in range(2))
    for layer in once.layers:
        count = len(once.kept[layer.output])
        assert count == min(4096, 300 * layer.positions)  # a bound on rows, however many samples
        assert np.array_equal(once.kept[layer.output], again.kept[layer.output])
        one, two = once.moments[layer.output].second, again.moments[layer.output].second
        assert one is not None and two is not None and np.array_equal(one, two)
    names = [layer.output for layer in layers]
    second, pairs = recalibrate(model, once.layers, once, partial(read_weight, graph), names)
    for layer in once.layers:  # an unchanged network: cross moment = W times the second moment
        found, (weight, bias) = second[layer.output], read_weight(graph, layer)
        rows, outputs = pairs[layer.output]
        np.testing.assert_allclose(outputs, rows @ weight.T + bias, atol=1e-3)
        assert found.count == len(once.kept[layer.output])
        assert found.second is not None and found.cross is not None
        np.testing.assert_allclose(found.cross, weight @ found.second, atol=1e-3)
    last = layers[-1].output
    some = calibrate(
        model, layers, samples, partial(read_weight, graph), asked=lambda layer: layer.output == last
    )
    assert {*some.moments} == {*some.kept} == {last} and len(some.layers) == 2


def test_the_outputs_that_calibration_keeps_of_a_convolution_are_its_own() -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.standard_normal((8, 16, 3, 3)).astype(np.float32),
        "b": rng.standard_normal(8).astype(np.float32),
    }
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"]), helper.make_node("Relu", ["c"], ["y"])]
    model = make(nodes, [2, 16, 7, 7], tensors)
    graph = model.graph()
    layers, _ = find_layers(graph)
    data = {"x": rng.standard_normal((10, 16, 7, 7)).astype(np.float32)}
    samples = read_samples(data, inputs_of(model.proto))
    known = calibrate(model, layers, samples, partial(read_weight, graph))
    _, pairs = recalibrate(model, known.layers, known, partial(read_weight, graph), [layers[0].output])
    rows, outputs = pairs[layers[0].output]
    weight, bias = read_weight(graph, layers[0])
    assert outputs.shape == (250, 8) and rows.shape == (250, 144)  # every position of so few samples
    np.testing.assert_allclose(outputs, rows @ weight.T + bias, atol=1e-4)


@pytest.mark.parametrize("outputs", [8, 40])  # outputs are kept of few, inputs of many
def test_every_third_row_behind_rewritten_layers_is_the_original_one(outputs: int) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "v": rng.standard_normal((16, 8, 1, 1)).astype(np.float32),
        "w": rng.standard_normal((outputs, 16, 3, 3)).astype(np.float32),
    }
    nodes = [helper.make_node("Conv", ["x", "v"], ["h"]), helper.make_node("Conv", ["h", "w"], ["y"])]
    before = make(nodes, [2, 8, 7, 7], tensors)
    after = make(nodes, [2, 8, 7, 7], tensors | {"v": 2 * tensors["v"]})
    graph = before.graph()
    layers, _ = find_layers(graph)
    data = {"x": rng.standard_normal((200, 8, 7, 7)).astype(np.float32)}
    samples, weight_of = read_samples(data, inputs_of(before.proto)), partial(read_weight, graph)
    known = calibrate(before, layers, samples, weight_of)
    last = known.layers[-1]
    moments, pairs = recalibrate(after, [last], known, weight_of, [last.output])
    rows, wanted = pairs[last.output]
    scale = np.full((len(rows), 1), 2.0)
    scale[::3] = 1
    weight, _ = weight_of(last)
    np.testing.assert_allclose(rows @ weight.T, scale * wanted, atol=1e-3)
    np.testing.assert_allclose(moments[last.output].mean, rows.mean(axis=0), atol=1e-3)
