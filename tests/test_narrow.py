"""Widths are planned with the forms of the layers on either side, fitted, reported and replayed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from plain_layers import linear

import onnx_lrsd
from onnx_lrsd.commands.prepare import make_planner, prepare
from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.errors import DataError
from onnx_lrsd.fit.calibrate import calibrate
from onnx_lrsd.fit.narrow import Inner, Narrower, drop_order, key_of, order_task, planned_pairs
from onnx_lrsd.graph.model import load
from onnx_lrsd.graph.shapes import inferred_shapes
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.compare import total_price
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.pairs import find_pairs
from onnx_lrsd.plan.allocate import lower_hull
from onnx_lrsd.plan.planner import Planner
from onnx_lrsd.plan.units import Curves, Joint, PairCurve, members_of
from onnx_lrsd.report.table import report_table
from onnx_lrsd.run import Options, start
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.types import CHANNEL, COSTS, DENSE, WIDTH, ErrorCurve, Form, Point, Price

Values = npt.NDArray[Any]
MACS, BYTES = COSTS["macs"], COSTS["bytes"]
INNER = "hb -> y"


def network(inner: int = 128, outer: int = 48, opset: int = 20) -> onnx.ModelProto:
    """Layers with many more channels between them than their input has, and a third one behind a softmax."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["h"], "first"),
        helper.make_node("Add", ["h", "b"], ["hb"]),
        helper.make_node("Gelu", ["hb"], ["g"]),
        helper.make_node("MatMul", ["g", "w"], ["y"], "second"),
        helper.make_node("Softmax", ["y"], ["s"]),
        helper.make_node("MatMul", ["s", "z"], ["out"], "third"),
    ]
    weights = {
        "v": rng.standard_normal((32, inner)) / 6,
        "b": rng.standard_normal(inner) / 2,
        "w": rng.standard_normal((inner, outer)) / 12,
        "z": rng.standard_normal((outer, 16)),
    }
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    shape = {
        name: helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 32), ("out", 16))
    }
    graph = helper.make_graph(nodes, "g", [shape["x"]], [shape["out"]], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def rows(count: int = 600, seed: int = 1) -> dict[str, Values]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 10)) @ np.random.default_rng(7).standard_normal((10, 32)) / 3
    return {"x": (x + 0.05 * rng.standard_normal((count, 32))).astype(np.float32)}


def optimized(ratio: float = 1.5, **options: Any) -> Any:
    return onnx_lrsd.optimize(network(), rows(), ratio=ratio, target="tensorrt", **options)


def sizes(model: Any) -> dict[str, list[int]]:
    return {t.name.partition("/")[0]: list(t.dims) for t in model.proto.graph.initializer}


def test_fewer_channels_are_computed_and_nothing_is_added() -> None:
    result = optimized()
    width = result.plan.widths[INNER]
    assert 16 <= width.kept < width.of == 128 and 0 < width.error < 0.5
    nodes = [node.op_type for node in result.model.proto.graph.node]
    assert sorted(nodes) == sorted(["MatMul", "Add", "Gelu", "MatMul", "Add", "Softmax", "MatMul"])
    assert sizes(result.model)["v"] == [32, width.kept] and sizes(result.model)["b"] == [width.kept]
    assert result.report.promise.kept and result.report.promise.got >= 1.5
    session = open_session(result.model.proto)
    assert session.run(rows(5))["out"].shape == (5, 16)


def test_the_report_says_how_many_channels_are_left() -> None:
    result = optimized()
    kept = result.plan.widths[INNER].kept
    first, second, third = result.report.layers
    assert first.gives == (kept, 128) and first.reads is None and second.reads == (kept, 128)
    assert third.gives is third.reads is None and third.left and not first.left and not second.left
    assert first.macs_after == 32 * kept and second.macs_after == kept * 48
    assert f"width {kept} of 128" in report_table(result.report)


def test_a_plan_with_widths_is_replayed_to_the_byte() -> None:
    result = optimized()
    text = onnx_lrsd.plan_to_json(result.plan)
    assert json.loads(text)["widths"][INNER]["kept"] == result.plan.widths[INNER].kept
    plan = onnx_lrsd.plan_from_json(text)
    assert plan == result.plan
    again = onnx_lrsd.optimize(network(), rows(), plan=plan)
    assert again.model.proto.SerializeToString(deterministic=True) == result.model.proto.SerializeToString(
        deterministic=True
    )
    assert again.plan == plan


@pytest.mark.parametrize("inner", [72, 200])
def test_widths_are_multiples_of_what_runtimes_like(inner: int) -> None:
    for ratio in (1.2, 1.6):
        result = onnx_lrsd.optimize(
            network(inner), rows(), ratio=ratio, target="tensorrt", forms=("width",), dry_run=True
        )
        assert all(width.kept % 16 == 0 for width in result.plan.widths.values())
        assert result.plan.widths


@pytest.mark.parametrize(
    ("key", "entry", "said"),
    [
        (INNER, {"kept": 0}, "whole number"),
        (INNER, {"kept": 2.5}, "whole number"),
        (INNER, {"kept": 128}, "between 16 and 127"),
        ("hb -> out", {"kept": 64}, "not possible in this model"),
    ],
)
def test_a_width_that_the_model_cannot_take_is_refused_in_words(key: str, entry: Any, said: str) -> None:
    facts = json.loads(onnx_lrsd.plan_to_json(optimized(dry_run=True).plan))
    facts["widths"] = {key: entry}
    with pytest.raises(DataError, match=said):
        onnx_lrsd.optimize(network(), rows(), plan=onnx_lrsd.plan_from_json(json.dumps(facts)))


def test_a_plan_may_give_a_narrower_layer_factors() -> None:
    facts = json.loads(onnx_lrsd.plan_to_json(optimized(dry_run=True).plan))
    facts["widths"] = {INNER: {"kept": 64}}
    facts["layers"]["y"] = {"kind": "channel", "rank": 16}
    plan = onnx_lrsd.plan_from_json(json.dumps(facts))
    result = onnx_lrsd.optimize(network(), rows(), plan=plan)
    first, second, _ = result.report.layers
    assert first.macs_after == 32 * 64 and second.macs_after == 16 * (64 + 48)
    assert second.form == CHANNEL and second.reads == (64, 128)
    facts["layers"]["y"]["rank"] = 100  # more than the 48 outputs
    with pytest.raises(DataError, match="rank"):
        onnx_lrsd.optimize(network(), rows(), plan=onnx_lrsd.plan_from_json(json.dumps(facts)))


def test_widths_are_one_of_the_forms_that_may_be_asked_for() -> None:
    assert not optimized(forms=("channel",)).plan.widths
    only = optimized(forms=("width",)).plan
    assert only.widths and all(choice.form.dense for choice in only.choices.values())


def test_layers_that_are_excluded_keep_their_channels() -> None:
    for name in ("first", "second"):
        assert not optimized(exclude=name, dry_run=True).plan.widths


def test_without_data_the_weights_alone_decide() -> None:
    result = onnx_lrsd.optimize(network(), ratio=1.3, target="tensorrt", forms=("width",))
    assert result.plan.widths and result.report.promise is not None and result.report.promise.kept


def test_more_channels_lose_less() -> None:
    errors = []
    facts = json.loads(onnx_lrsd.plan_to_json(optimized(dry_run=True).plan))
    for kept in (32, 64, 96, 127):
        facts["widths"] = {INNER: {"kept": kept}}
        plan = onnx_lrsd.plan_from_json(json.dumps(facts))
        verification = onnx_lrsd.optimize(network(), rows(), plan=plan).report.verification
        assert verification is not None
        errors.append(verification.error)
    assert errors == sorted(errors, reverse=True)


def narrower() -> Narrower:
    model = load(network())
    working = model.graph()
    weight_of = partial(read_weight, working)
    samples = read_samples(rows(), inputs_of(model.proto))
    known = calibrate(model, find_layers(working)[0], samples, weight_of)
    pairs, _ = find_pairs(working, known.layers, inferred_shapes(model.proto))
    plain = Narrower(
        model=model, layers=known.layers, weight_of=weight_of, moments=known.moments, inner={}, device="cpu"
    )
    chosen, _ = planned_pairs(pairs, {layer.output for layer in known.layers}, set())
    inner = {key: Inner(pair, *drop_order(order_task(pair, plain))) for key, pair in chosen.items()}
    return Narrower(
        model=model,
        layers=known.layers,
        weight_of=weight_of,
        moments=known.moments,
        inner=inner,
        device="cpu",
    )


def test_a_narrower_network_loses_what_its_curve_says() -> None:
    """The error of the layer that reads fewer channels, measured on its outputs through ONNX Runtime."""
    cutter = narrower()
    narrow = cutter.narrow({INNER: Form(WIDTH, 48)}, None)
    feed = rows()
    old, new = (
        open_session(model.proto, outputs=["y"]).run(feed)["y"] for model in (cutter.model, narrow.model)
    )
    missed = np.sum((new - new.mean(axis=0) - old + old.mean(axis=0)) ** 2)
    measured = missed / np.sum((old - old.mean(axis=0)) ** 2)
    said = cutter.inner[INNER].widths.errors[0, 48]
    assert measured == pytest.approx(said, rel=0.35) and measured < said  # the curve has damping
    assert [layer.full for layer in narrow.layers] == [(128, 32), (48, 128), None]
    assert narrow.readers == {"y"}


def test_pairs_are_planned_once_for_each_layer_and_side() -> None:
    model = load(network())
    working = model.graph()
    layers = find_layers(working)[0]
    pairs, _ = find_pairs(working, layers, inferred_shapes(model.proto))
    every = {layer.output for layer in layers}
    assert list(planned_pairs(pairs, every, set())[0]) == [INNER]
    assert not planned_pairs(pairs * 2, {"hb"}, set())[0] and not planned_pairs(pairs, every, {"hb"})[0]
    assert list(planned_pairs(pairs * 2, every, set())[0]) == [INNER] == [key_of(pairs[0])]


def layer_curve(name: str, n: int, m: int, points: dict[int, float]) -> ErrorCurve:
    return ErrorCurve(linear(n, m, name), layer_points(n, m, points))


def layer_points(n: int, m: int, points: dict[int, float]) -> tuple[Point, ...]:
    found = [Point(Form(DENSE), 0.0, Price(n * m, n * m, 4 * n * m), float(n * m))]
    for rank, error in points.items():
        macs = rank * (n + m)
        if macs < n * m:
            found.append(Point(Form(CHANNEL, rank), error, Price(macs, macs, 4 * macs), float(macs)))
    return tuple(found)


@st.composite
def two_layers(draw: st.DrawFn) -> Curves:
    """Two layers of random curves, random losses of the channels between them, and MACs spent on these."""
    number = st.floats(0.001, 0.4)
    ranks = (2, 4, 8)

    def errors() -> dict[int, float]:
        found = sorted((draw(number) for _ in ranks), reverse=True)
        return dict(zip(ranks, found, strict=True))

    first, second = layer_curve("a", 32, 16, errors()), layer_curve("b", 16, 32, errors())
    kept = (24, 16, 8)
    lost = sorted(draw(number) for _ in kept)
    between = draw(st.sampled_from([0, 64, 4096]))
    points = (
        Point(Form(DENSE), 0.0, Price(0, 0, 0, 0.0)),
        *(
            Point(Form(WIDTH, w), e, Price(between * (w - 32) // 32, 0, 0, 0.0))
            for w, e in zip(kept, lost, strict=True)
        ),
    )
    pair = PairCurve(key="p", channels=32, producers=("a",), consumers=("b",), points=points)
    narrow = {("a", (w, 0)): layer_points(w, 16, errors()) for w in kept}
    narrow |= {("b", (0, w)): layer_points(16, w, errors()) for w in kept}
    return Curves((first, second), (pair,), narrow)


@settings(max_examples=60)
@given(curves=two_layers(), weights=st.tuples(*[st.floats(0.1, 10)] * 3))
def test_joint_choices_hold_the_lower_hull_of_all_of_them(
    curves: Curves, weights: tuple[float, float, float]
) -> None:
    sensitivity = dict(zip(("a", "b", "p"), weights, strict=True))
    (unit,), counted = curves.joint(sensitivity, [MACS])
    assert counted[unit.layer.output] == 1 and unit.points[0].error == 0
    every = []
    for width in curves.pairs[0].points:
        widths = {"p": width.form.rank} if width.form.rank else {}
        for one, two in product(curves.points("a", widths), curves.points("b", widths)):
            error = sum(p.error * w for p, w in zip((one, two, width), weights, strict=True))
            every.append(Point(Form(), error, one.price + two.price + width.price))
    best, got = lower_hull(every, MACS), lower_hull(unit.points, MACS)
    assert min(map(MACS, got)) == min(map(MACS, best))
    at = np.linspace(min(map(MACS, best)), 1024, 50)
    least, reached = (
        np.interp(at, [MACS(p) for p in hull[::-1]], [p.error for p in hull[::-1]]) for hull in (best, got)
    )
    np.testing.assert_allclose(reached, least, rtol=1e-6, atol=1e-6)


def test_the_members_of_a_joint_choice_are_those_of_its_layers() -> None:
    curves = Curves(
        (layer_curve("a", 32, 16, {}), layer_curve("b", 16, 32, {}), layer_curve("c", 8, 8, {})),
        (
            PairCurve(
                key="p",
                channels=32,
                producers=("a",),
                consumers=("b",),
                points=(
                    Point(Form(DENSE), 0.0, Price(0, 0, 0, 0.0)),
                    Point(Form(WIDTH, 16), 0.1, Price(0, 0, 0, 0.0)),
                ),
            ),
        ),
        {("a", (16, 0)): layer_points(16, 16, {}), ("b", (0, 16)): layer_points(16, 16, {})},
    )
    units, _ = curves.joint({"a": 1.0, "b": 1.0, "c": 1.0, "p": 2.0}, [MACS])
    assert {unit.layer.output for unit in units} == {"a", "c"}
    unit = next(unit for unit in units if unit.layer.output == "a")
    cut = next(point for point in unit.points if MACS(point) < 1024)
    assert isinstance(cut, Joint) and cut.error == pytest.approx(0.2) and MACS(cut) == 512
    members = members_of({"a": cut, "c": units[0].points[0]})
    assert {key: str(point.form) for key, point in members.items()} == {
        "a": "dense",
        "b": "dense",
        "p": "width 16",
        "c": "dense",
    }
    forms = {key: point.form for key, point in members.items() if not point.form.dense}
    assert {key: point.price.macs for key, point in curves.chosen(forms).items()} == {
        "a": 256,
        "b": 256,
        "c": 64,
        "p": 0,
    }


def test_what_narrow_cuts_move_is_not_told_by_one_that_moves_little() -> None:
    """The largest sensitivity of a pair counts; layers with fewer channels are not probed as whole ones."""
    graph = onnx.parser.parse_graph(
        "g (float[n, 16] x) => (float[n, 16] b) { a = MatMul (x, v) r = Relu (a) b = MatMul (r, w) }"
    )
    rng = np.random.default_rng(0)
    for name, shape in (("v", (16, 32)), ("w", (32, 16))):
        graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    opset = helper.make_opsetid("", 17)
    model = load(helper.make_model(graph, opset_imports=[opset], ir_version=8))
    nothing = Price(0, 0, 0, 0.0)
    widths = {24: 0.03, 16: 0.08, 8: 0.2}
    points = (
        Point(Form(DENSE), 0.0, nothing),
        *(Point(Form(WIDTH, w), error, nothing) for w, error in widths.items()),
    )
    factors = {8: 0.4}
    narrow = {("a", (w, 0)): layer_points(w, 16, factors) for w in widths}
    narrow |= {("b", (0, w)): layer_points(16, w, factors) for w in widths}
    layers = layer_curve("a", 32, 16, factors), layer_curve("b", 16, 32, factors)
    pair = PairCurve(key="p", channels=32, producers=("a",), consumers=("b",), points=points)
    run = start(Options(ratio=2.0))
    total = Price(1024, 1024, 4096, 1024.0)
    planner = Planner(run, model, Curves(layers, (pair,), narrow), total, {}, None)  # type: ignore[arg-type]
    asked: list[dict[str, Form]] = []

    def measure(forms: Mapping[str, Form]) -> dict[str, float]:
        asked.append(dict(forms))
        return dict.fromkeys(forms, 1.0 if len(asked) == 1 else 0.05)

    planner.weigh(measure)
    assert asked[0]["p"] == Form(WIDTH, 24) and asked[1] == {"p": Form(WIDTH, 16)}
    assert planner.sensitivity["p"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("lost", "less", "macs", "cut_stays"),
    [
        (0.012, 0.01, 1e6, True),
        (0.02, 0.01, 1e6, False),
        (0.02, 0.01, 1e12, True),
        (0.0009, 0.0001, 1e6, True),  # neither is missed
    ],
)
def test_cut_channels_go_where_other_samples_show_that_they_lose_clearly_more(
    monkeypatch: pytest.MonkeyPatch, lost: float, less: float, macs: float, cut_stays: bool
) -> None:
    """Plans for MACs are fitted with and without cut channels, but for models where a fit takes minutes."""
    pair = PairCurve(key="p", channels=32, producers=("a",), consumers=("b",), points=())
    few = SimpleNamespace(count=100)
    run = start(Options(ratio=2.0))
    total = Price(int(macs), 1024, 4096, 1024.0)
    planner = Planner(run, None, Curves((), (pair,), {}), total, {}, few)  # type: ignore[arg-type]
    with_cut, without = {"p": Form(WIDTH, 16)}, {"a": Form(CHANNEL, 8)}
    monkeypatch.setattr(Planner, "for_ratio", lambda self, ratio: with_cut if self.curves.pairs else without)
    errors = {"p": lost, "a": less}
    monkeypatch.setattr(
        Planner, "_compared", lambda self, model, samples: SimpleNamespace(error=errors[next(iter(model))])
    )
    fitter = SimpleNamespace(fit=lambda forms: SimpleNamespace(model=forms))
    x = read_samples({"x": np.zeros((8, 32), np.float32)}, inputs_of(network()))
    search, _ = planner.search(fitter, x)
    assert search.propose() == (with_cut if cut_stays else without)


def test_what_joint_choices_leave_of_a_budget_goes_to_single_layers() -> None:
    """No layer could take a better form at its width within what was asked for."""
    model = load(network())
    ranks = {rank: 0.5 / rank for rank in range(1, 9)}
    nothing = Price(0, 0, 0, 0.0)
    points = (
        Point(Form(DENSE), 0.0, nothing),
        *(Point(Form(WIDTH, width), 0.3 - width / 100, nothing) for width in (24, 16, 8)),
    )
    narrow = {("a", (width, 0)): layer_points(width, 16, ranks) for width in (24, 16, 8)}
    narrow |= {("b", (0, width)): layer_points(16, width, ranks) for width in (24, 16, 8)}
    pair = PairCurve(key="p", channels=32, producers=("a",), consumers=("b",), points=points)
    curves = Curves((layer_curve("a", 32, 16, ranks), layer_curve("b", 16, 32, ranks)), (pair,), narrow)
    run = start(Options(ratio=2.0, target="tensorrt", cost="bytes"))
    planner = Planner(run, model, curves, Price(1024, 1024, 4096, 1024.0), {}, None)  # type: ignore[arg-type]
    for ratio in (1.3, 1.7, 2.2, 3.1, 3.7, 4.3):
        chosen = planner.curves.chosen(planner.for_ratio(ratio))
        left = 4096 / ratio - sum(BYTES(point) for point in chosen.values())
        widths = {key: point.form.rank for key, point in chosen.items() if point.form.kind == WIDTH}
        assert left >= 0
        for output in ("a", "b"):
            mine = chosen[output]
            better = [p for p in planner.curves.points(output, widths) if p.error < mine.error]
            assert all(BYTES(p) > BYTES(mine) + left for p in better)


def depthwise() -> tuple[onnx.ModelProto, Values]:
    """Two convolutions with a depthwise one between them, and its inputs."""
    graph = onnx.parser.parse_graph(
        """g (float[n, 16, 8, 8] x) => (float[n, 16, 8, 8] y) {
            a = Conv (x, w)
            r = Relu (a)
            d = Conv <pads = [1, 1, 1, 1], group = 64> (r, v)
            s = Relu (d)
            y = Conv (s, u)
        }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in {"w": (64, 16, 1, 1), "v": (64, 1, 3, 3), "u": (16, 64, 1, 1)}.items():
        graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model, rng.standard_normal((40, 16, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("made", [depthwise, lambda: (network(), rows()["x"])])
def test_a_plan_counts_what_a_width_saves_in_its_layers_and_between_them(
    made: Callable[[], tuple[onnx.ModelProto, Values]],
) -> None:
    model, x = made()
    ready = prepare(start(Options(target="tensorrt", ratio=1.2)), model, {"x": x}, None)
    planner, curves, _ = make_planner(ready.found.run, ready)
    (key,) = ready.narrower.inner
    forms = {key: Form(WIDTH, 32)}
    spent = sum(planner.cost(point) for point in curves.chosen(forms).values())
    cut = ready.narrower.cut(forms)[0]
    assert planner.rest + spent == total_price(cut, ready.found.check_on).macs
