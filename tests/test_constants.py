"""The target size: tables, recurrent weights and other constants in codes, decoded as the model is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import onnx_lrsd
from onnx_lrsd.errors import DataError
from onnx_lrsd.graph.model import Model, check, load, model_bytes
from onnx_lrsd.passes.find_constants import FEWEST, find_constants
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.split import split
from onnx_lrsd.report.table import report_table
from onnx_lrsd.runtime.session import open_session, simplified
from onnx_lrsd.solver.codes.curve import coded_errors
from onnx_lrsd.solver.codes.fit import decode
from onnx_lrsd.solver.codes.rounding import nearest, round_rows, steps_of
from onnx_lrsd.solver.problem import pose
from onnx_lrsd.storage import INT4, STORAGES
from onnx_lrsd.targets import price
from onnx_lrsd.types import KINDS, Declined, Form, Layer, Width

Values = npt.NDArray[Any]
INTS, FLOATS = TensorProto.INT64, TensorProto.FLOAT
VOCABULARY, WIDTH, HIDDEN = 300, 32, 80
SOME = ("fp16", "uint8", "int6", "int4", "int3", "ternary")


def random(*shape: int) -> Values:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def make(
    nodes: list[onnx.NodeProto],
    tensors: dict[str, Values],
    inputs: Mapping[str, tuple[int, Sequence[Any]]],
    outputs: tuple[str, ...] = ("y",),
    dtype: int = FLOATS,
    domains: Sequence[str] = (),
) -> Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return load(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def table_model(table: Values, axis: int = 0) -> Model:
    node = helper.make_node("Gather", ["table", "ids"], ["y"], axis=axis)
    kind = helper.np_dtype_to_tensor_dtype(table.dtype)
    return make([node], {"table": table}, {"ids": (INTS, ["n", 5])}, dtype=kind)


def recurrent(op: str, gates: int) -> Model:
    directions = 2
    tensors = {
        "W": random(directions, gates * HIDDEN, WIDTH) / 4,
        "R": random(directions, gates * HIDDEN, HIDDEN) / 4,
    }
    node = helper.make_node(op, ["x", "W", "R"], ["y"], hidden_size=HIDDEN, direction="bidirectional")
    return make([node], tensors, {"x": (FLOATS, ["t", "n", WIDTH])})


def from_a_node() -> Model:
    nodes = [
        helper.make_node("Constant", [], ["table"], value=numpy_helper.from_array(random(VOCABULARY, WIDTH))),
        helper.make_node("Gather", ["table", "ids"], ["y"]),
    ]
    return make(nodes, {}, {"ids": (INTS, ["n", 5])})


def convolution(op: str, shape: tuple[int, ...], groups: int, channels: int) -> Model:
    node = helper.make_node(op, ["x", "w"], ["y"], group=groups)
    return make([node], {"w": random(*shape)}, {"x": (FLOATS, ["n", channels, 12, 12])})


def elementwise(op: str) -> Model:
    node = helper.make_node(op, ["x", "c"], ["y"])
    return make([node], {"c": random(1, 64, 80)}, {"x": (FLOATS, ["n", 64, 80])})


def batched_product() -> Model:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return make([node], {"w": random(4, 32, 40)}, {"x": (FLOATS, ["n", 4, 6, 32])})


def tied() -> Model:
    """The table of a language model, which turns ids to vectors and, transposed, vectors to scores."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["h"], name="embedding"),
        helper.make_node("Transpose", ["table"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "t"], ["y"], name="head"),
    ]
    return make(nodes, {"table": random(VOCABULARY, WIDTH)}, {"ids": (INTS, ["n", 5])})


def both_ways() -> Model:
    """A weight that a MatMul applies, and another one transposed, as tied autoencoders do."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="there"),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "t"], ["y"], name="back"),
    ]
    return make(nodes, {"w": random(64, 80)}, {"x": (FLOATS, ["n", 64])})


def einsum() -> Model:
    node = helper.make_node("Einsum", ["x", "w"], ["y"], equation="bsi,ihd->bhsd")
    return make([node], {"w": random(64, 4, 20)}, {"x": (FLOATS, ["n", 6, 64])})


def fused_attention() -> Model:
    """Attention as the transformer optimiser writes it, queries, keys and values in one weight."""
    node = helper.make_node("Attention", ["x", "w", "b"], ["y"], num_heads=4, domain="com.microsoft")
    tensors = {"w": random(64, 192) / 8, "b": random(192)}
    return make([node], tensors, {"x": (FLOATS, ["n", 6, 64])}, domains=("com.microsoft",))


@cache
def models() -> dict[str, Model]:
    return {
        "table": table_model(random(VOCABULARY, WIDTH)),
        "columns of a table": table_model(random(WIDTH, VOCABULARY), axis=1),
        "half precision": table_model(random(VOCABULARY, WIDTH).astype(np.float16)),
        "constant node": from_a_node(),
        "LSTM": recurrent("LSTM", 4),
        "GRU": recurrent("GRU", 3),
        "RNN": recurrent("RNN", 1),
        "depthwise": convolution("Conv", (512, 1, 3, 3), 512, 512),
        "groups": convolution("Conv", (64, 16, 3, 3), 4, 64),
        "transposed groups": convolution("ConvTranspose", (64, 16, 3, 3), 4, 64),
        "sum": elementwise("Add"),
        "product": elementwise("Mul"),
        "batched product": batched_product(),
        "einsum": einsum(),
        "fused attention": fused_attention(),
        "tied": tied(),
        "both ways": both_ways(),
    }


def found_in(model: Model) -> tuple[tuple[Layer, ...], tuple[Declined, ...]]:
    graph = model.graph()
    return find_constants(graph, *find_layers(graph))


def feed_of(model: Model, count: int = 3) -> dict[str, Values]:
    rng, feed = np.random.default_rng(7), dict[str, Values]()
    for value in model.proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = [dim.dim_value or count for dim in dims]
        ids = value.type.tensor_type.elem_type == INTS
        feed[value.name] = rng.integers(0, WIDTH, shape) if ids else rng.standard_normal(shape).astype("f4")
    return feed


def stored(model: Model, name: str) -> tuple[Model, dict[str, Values]]:
    """``model`` with all of its constants in one storage, and what they should decode to."""
    graph, values = model.graph(), dict[str, Values]()
    for layer in found_in(model)[0]:
        form = Form("dense", weights=((name, layer.n),))
        factors = onnx_lrsd.decompose(pose(layer, *read_weight(model.graph(), layer), None), form)
        assert factors.packed is not None
        values[layer.weight] = decode(layer, form, factors.packed).reshape(layer.shape).astype(layer.dtype)
        split(graph, layer, factors)
    return model.splice(graph), values


def replaced(model: Model, values: dict[str, Values]) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.output[0] in values:
            value = numpy_helper.from_array(values[node.output[0]])
            node.attribute[0].t.CopyFrom(value)
    return proto


@pytest.mark.parametrize("kind", list(models()))
@pytest.mark.parametrize("storage", SOME)
def test_nodes_read_what_was_rounded_and_nothing_else_changes(kind: str, storage: str) -> None:
    model = models()[kind]
    coded, values = stored(model, storage)
    check(coded, model)
    assert values and not {tensor.name for tensor in coded.proto.graph.initializer} & set(values)
    feed = feed_of(model)
    (expected,) = open_session(replaced(model, values)).run(feed).values()
    (got,) = open_session(coded.proto).run(feed).values()
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("kind", [kind for kind in models() if kind not in ("tied", "both ways")])
def test_a_runtime_decodes_as_it_opens_the_model(kind: str) -> None:
    def kinds(proto: onnx.ModelProto) -> Counter[str]:
        return Counter(node.op_type for node in simplified(proto).graph.node)

    model = models()[kind]
    for storage in SOME:
        assert kinds(stored(model, storage)[0].proto) == kinds(model.proto)


@given(
    st.integers(2, 300),
    st.integers(2, 300),
    st.sampled_from(list(STORAGES)),
    st.sampled_from([1, 3, 1000, 1 << 26]),
)
def test_tables_of_any_shape_in_any_pieces(rows: int, width: int, storage: str, piece: int) -> None:
    table = random(rows, width)
    table[0] = 0
    layer = Layer(
        output="table",
        name="table",
        op="Gather",
        input="",
        weight="table",
        shape=table.shape,
        dtype="float32",
        n=rows,
        m=width,
        constant=True,
    )
    form = Form("dense", weights=((storage, rows),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnx_lrsd.solver.codes.fit.PIECE", max(piece, rows * width // 5))
        factors = onnx_lrsd.decompose(pose(layer, table.astype(np.float64), np.zeros(rows), None), form)
    assert factors.packed is not None and factors.packed.rows is not None
    assert sum(codes.shape[0] for _, codes in factors.packed.rows.blocks) == rows
    model = table_model(table)
    graph = model.graph()
    split(graph, layer, factors)
    ids = np.arange(5)[None] % rows
    (got,) = open_session(model.splice(graph).proto).run({"ids": ids}).values()
    expected = decode(layer, form, factors.packed)[ids]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(table).max())


@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 4, 8, 16, 64]), st.floats(-12, 4))
def test_steps_fit_their_rows(seed: int, levels: int, size: float) -> None:
    rows = np.random.default_rng(seed).standard_t(4, (9, 50)) * 10**size
    codes, steps = round_rows(rows, levels)
    counts = np.full((9, 1), float(levels))
    first = steps_of(rows, np.ones(50), counts)

    def missed(codes: Values, steps: Values) -> Values:
        return np.asarray(np.sum((rows - codes.astype(float) * steps.astype(float)) ** 2, axis=1))

    best = missed(codes, steps)
    assert np.all(best <= missed(nearest(rows, first, counts), first) * (1 + 1e-4))
    for factor in (0.99, 1.01):
        assert np.all(best <= missed(codes, factor * steps) * (1 + 1e-5))
    assert np.all(np.abs(codes) <= (levels - 1) / 2)


def test_more_levels_lose_less_and_a_part_of_the_rows_tells_how_much() -> None:
    model = table_model(random(9000, 16))
    (layer,) = found_in(model)[0]
    problem = pose(layer, *read_weight(model.graph(), layer), None)
    curve = coded_errors(problem, KINDS, None)
    assert [form.weights[0][0] for form in curve] == list(STORAGES)
    assert list(curve.values()) == sorted(curve.values())
    form = Form("dense", weights=(("int4", 9000),))
    assert curve[form] == pytest.approx(onnx_lrsd.decompose(problem, form).error, rel=0.02)
    assert list(coded_errors(problem, KINDS, "int3")) == [Form("dense", weights=(("int3", 9000),))]
    assert not coded_errors(problem, ("channel",), None)


def test_w_and_r_of_a_node_are_two_constants_with_their_bytes_and_no_macs() -> None:
    layers, declined = found_in(models()["LSTM"])
    assert [(layer.output, layer.op, layer.n, layer.m) for layer in layers] == [
        ("W", "LSTM", 2 * 4 * HIDDEN, WIDTH),
        ("R", "LSTM", 2 * 4 * HIDDEN, HIDDEN),
    ]
    assert not declined
    for layer in layers:
        whole = price(layer, Form())
        assert (whole.macs, whole.parameters, whole.bytes) == (0, layer.n * layer.m, 4 * layer.n * layer.m)
        assert price(layer, Form("dense", weights=(("int4", layer.n),))).macs == 0


@pytest.mark.parametrize("kind", ["LSTM", "depthwise", "table"])
def test_other_targets_see_what_they_saw(kind: str) -> None:
    layers, declined = find_layers(models()[kind].graph())
    assert not layers and len(declined) == (0 if kind == "table" else 1)


def test_a_table_that_is_also_a_weight_is_stored_once() -> None:
    model = models()["tied"]
    layers, declined = found_in(model)
    assert [layer.name for layer in layers] == ["table"]
    ((name, reason),) = [(entry.name, entry.reason) for entry in declined]
    assert name == "head" and "table" in reason
    coded, _ = stored(model, "int4")
    assert model_bytes(coded) < 0.5 * VOCABULARY * WIDTH + 4 * VOCABULARY + 1500


def test_what_codes_would_not_serve_is_left() -> None:
    assert not found_in(table_model(random(FEWEST // WIDTH - 1, WIDTH)))[0]
    assert found_in(table_model(random(FEWEST // WIDTH, WIDTH)))[0]
    masks = random(VOCABULARY, WIDTH)
    masks[3, 3] = -1e9
    assert not found_in(table_model(masks))[0]
    masks[3, 3] = np.nan
    assert not found_in(table_model(masks))[0]
    assert not found_in(table_model(random(1, VOCABULARY * WIDTH)))[0]


def test_a_constant_that_others_may_see_or_change_is_left() -> None:
    table = {"table": random(VOCABULARY, WIDTH)}
    node = helper.make_node("Gather", ["table", "ids"], ["y"])
    ids = {"ids": (INTS, ["n", 5])}
    assert not found_in(make([node], table, ids, ("y", "table")))[0]
    assert not found_in(make([node], table, {**ids, "table": (FLOATS, [VOCABULARY, WIDTH])}))[0]
    odd = helper.make_node("ReduceSum", ["table"], ["z"], keepdims=0)
    assert not found_in(make([node, odd], table, ids, ("y", "z")))[0]


def samples_of(model: Model) -> dict[str, Values]:
    return {"x": np.random.default_rng(3).standard_normal((60, 4, 6, 32)).astype(np.float32)}


def mixed() -> Model:
    """A table in a sum, a layer, and a product with a constant of three axes."""
    nodes = [
        helper.make_node("Add", ["x", "places"], ["a"], name="places"),
        helper.make_node("MatMul", ["a", "w"], ["h"], name="layer"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "heads"], ["y"], name="heads"),
    ]
    tensors = {
        "places": np.tile(random(1, 4, 1, 32) / 2, (1, 1, 6, 1)),
        "w": random(32, 48),
        "heads": random(4, 48, 400),
    }
    return make(nodes, tensors, {"x": (FLOATS, ["n", 4, 6, 32])})


@pytest.mark.slow
def test_constants_are_planned_with_the_layers_replayed_and_unpacked() -> None:
    model = mixed()
    found = onnx_lrsd.optimize(model.proto, samples_of(model), target="size", ratio=4)
    assert found.report.promise is not None and found.report.promise.kept
    choices = found.plan.choices
    assert set(choices) == {"heads", "h"} and choices["heads"].form.coded  # 768 places are too few
    assert model.proto.ByteSize() / model_bytes(found.model) >= 4 * 0.98
    assert any(
        line.split()[:2] == ["heads", "MatMul"] and choices["heads"].form.weights[0][0] in line
        for line in report_table(found.report).splitlines()
    )
    kept = onnx_lrsd.plan_from_json(onnx_lrsd.plan_to_json(found.plan))
    again = onnx_lrsd.optimize(model.proto, samples_of(model), plan=kept)
    assert again.model.proto == found.model.proto
    plain = onnx_lrsd.unpack(found.model.proto)
    assert [node.op_type for node in plain.proto.graph.node][:1] == ["Add"]
    assert not any(name.startswith("lrsd/") for node in plain.proto.graph.node for name in node.input)
    assert "heads" in {tensor.name for tensor in plain.proto.graph.initializer}
    feed = {"x": samples_of(model)["x"][:3]}
    (one,), (two,) = (open_session(m.proto).run(feed).values() for m in (found.model, plain))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


def test_a_row_for_many_tells_all_their_storages() -> None:
    found = onnx_lrsd.optimize(models()["tied"].proto, target="size", ratio=2)
    (row,) = [row for row in found.report.layers if row.weights]
    storages = ("uint8", "int4", "uint8", "int4", "uint8")
    rows = tuple(replace(row, name=f"table {i}", weights={name: 300}) for i, name in enumerate(storages))
    assert "uint8, int4 " in report_table(replace(found.report, layers=rows))


def test_a_model_without_any_layer_gets_smaller_too() -> None:
    model = models()["GRU"]
    x = np.random.default_rng(3).standard_normal((8, 50, WIDTH)).astype(np.float32)
    found = onnx_lrsd.optimize(
        model.proto, [{"x": x[:, i : i + 1]} for i in range(50)], target="size", ratio=3
    )
    assert found.report.verification is not None
    assert found.report.verification.error < 0.01
    assert model.proto.ByteSize() / model_bytes(found.model) >= 3 * 0.98


def test_weights_alone_decide_without_samples() -> None:
    found = onnx_lrsd.optimize(models()["tied"].proto, target="size", ratio=3)
    assert found.report.promise is not None and found.report.promise.kept


def test_a_constant_takes_no_factors() -> None:
    model = mixed()
    plan = onnx_lrsd.optimize(model.proto, samples_of(model), target="size", ratio=3, dry_run=True).plan
    form = Form("channel", 4, weights=((INT4.name, 4),))
    plan = replace(plan, choices={**plan.choices, "heads": replace(plan.choices["heads"], form=form)})
    with pytest.raises(DataError, match="heads is a constant"):
        onnx_lrsd.optimize(model.proto, samples_of(model), plan=plan)


def pairs_and_constants() -> Model:
    """Two pairs of layers, one with a depthwise convolution in between, and a constant in front."""
    nodes = [
        helper.make_node("Add", ["x", "places"], ["a"]),
        helper.make_node("Conv", ["a", "w1"], ["h1"], name="one"),
        helper.make_node("Relu", ["h1"], ["r1"]),
        helper.make_node("Conv", ["r1", "deep"], ["d"], group=512, pads=[1] * 4, name="deep"),
        helper.make_node("Relu", ["d"], ["r2"]),
        helper.make_node("Conv", ["r2", "w2"], ["h2"], name="two"),
        helper.make_node("Conv", ["h2", "w3"], ["h3"], name="three"),
        helper.make_node("Relu", ["h3"], ["r3"]),
        helper.make_node("Conv", ["r3", "w4"], ["y"], name="four"),
    ]
    tensors = {
        "places": random(1, 64, 8, 9),
        "w1": random(512, 64, 1, 1) / 8,
        "deep": random(512, 1, 3, 3) / 3,
        "w2": random(32, 512, 1, 1) / 23,
        "w3": random(96, 32, 1, 1) / 6,
        "w4": random(16, 96, 1, 1) / 10,
    }
    return make(nodes, tensors, {"x": (FLOATS, ["n", 64, 8, 9])})


def test_channels_are_cut_beside_constants_but_not_those_of_one() -> None:
    model = pairs_and_constants()
    x = np.random.default_rng(0).standard_normal((40, 64, 8, 9)).astype(np.float32)
    planned = onnx_lrsd.optimize(model.proto, {"x": x}, target="size", ratio=4, dry_run=True).plan
    assert {"places", "deep"} <= set(planned.choices)
    assert not any("h1" in key for key in planned.widths)
    narrow = replace(
        planned,
        widths={"h3 -> y": Width(48, 96, 0.1)},
        choices={name: choice for name, choice in planned.choices.items() if name not in ("h3", "y")},
    )
    found = onnx_lrsd.optimize(model.proto, {"x": x}, plan=narrow)
    inner = open_session(found.model.proto, outputs=["h3", "d"]).run({"x": x[:2]})
    sizes = {name: value.shape for name, value in inner.items()}
    assert sizes["h3"] == (2, 48, 8, 9) and sizes["d"] == (2, 512, 8, 9)
    assert planned.choices["deep"].form.coded
