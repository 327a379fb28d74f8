"""Predicted times come from the machine's own table where it is valid, and measurement has the last word."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from plain_layers import conv, linear

import onnx_lrsd
from onnx_lrsd import cli
from onnx_lrsd.cli import upkeep
from onnx_lrsd.commands import doctor, profile
from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.errors import BudgetError, OptionError
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.speedup import speedups_within
from onnx_lrsd.passes.kernel_owners import kernel_owners
from onnx_lrsd.plan import planner
from onnx_lrsd.plan.planner import LAVISH, SPARE, Planner, _stays
from onnx_lrsd.plan.units import Curves
from onnx_lrsd.run import Options, start
from onnx_lrsd.runtime.kernel_times import kernels
from onnx_lrsd.targets import TARGETS, built_in, machine, price
from onnx_lrsd.targets.machine import COLUMN, MATRIX, NODES, POINT, ROW, SQUARE, from_json, to_json
from onnx_lrsd.targets.target import Node
from onnx_lrsd.types import (
    CHANNEL,
    COSTS,
    DENSE,
    SPATIAL,
    TUCKER,
    ErrorCurve,
    Form,
    Layer,
    Point,
    Price,
    whole_channels,
)

MODELS = Path(__file__).parents[1] / "models"
MINE = replace(built_in(), processor=machine.processor(), runtime=machine.runtime())


def image_conv(n: int = 128, channels: int = 128, side: int = 28, extent: int = 3) -> Layer:
    pads, positions = (extent // 2,) * 4, side * side
    return conv(n, channels, (extent, extent), pads=pads, positions=positions, size=(side, side))


def stored(text: str) -> None:
    path = machine.stored_at()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_the_kind_of_a_node_is_that_of_its_kernel() -> None:
    kernels_of = {(3, 3): SQUARE, (5, 1): COLUMN, (1, 3): ROW, (1, 1): POINT, (): MATRIX, (3,): MATRIX}
    assert {kernel: machine.kind_of(kernel) for kernel in kernels_of} == kernels_of


def test_rates_are_met_on_the_grid_and_held_beyond_it() -> None:
    grid = built_in().rates[SQUARE]
    for i, out in enumerate(grid.outputs):
        for j, channels in enumerate(grid.channels):
            for k, positions in enumerate(grid.positions):
                stands = grid.macs[(i * len(grid.channels) + j) * len(grid.positions) + k]
                assert grid.at(out, channels, positions) == pytest.approx(stands)
    assert grid.at(10**6, 10**6, 10**9) == pytest.approx(grid.macs[-1])
    assert grid.at(1, 1, 1) == pytest.approx(grid.macs[0])


def test_outputs_are_paid_for_in_blocks_and_nodes_by_the_piece() -> None:
    table = built_in()
    node = Node(17, 64, (3, 3), 784)
    assert table.seconds(node) == table.seconds(node._replace(outputs=32))
    dense = TARGETS["onnxruntime"].predicted_time(image_conv(), Form(DENSE))
    slow = TARGETS["onnxruntime"].on
    expensive = slow(replace(table, node=1.0)).predicted_time
    assert expensive(image_conv(), Form(DENSE)) == pytest.approx(1 + dense, rel=1e-3)
    assert expensive(image_conv(), Form(SPATIAL, 32)) == pytest.approx(2, rel=1e-2)
    # A change of the layout stands between.
    assert expensive(image_conv(), Form(CHANNEL, 8)) == pytest.approx(3, rel=1e-2)
    product = linear(128, 128, op="Gemm", axis=1, positions=1)
    assert expensive(product, Form(CHANNEL, 16, whole_channels(8))) == pytest.approx(4, rel=1e-2)  # Gather


def test_more_rank_takes_more_time_in_every_kind() -> None:
    cost = TARGETS["onnxruntime"].predicted_time
    for kind in (CHANNEL, SPATIAL):
        times = [cost(image_conv(), Form(kind, rank)) for rank in range(16, 129, 16)]
        assert times == sorted(times)


def test_where_every_node_is_slow_no_form_is_offered() -> None:
    on = TARGETS["onnxruntime"].on
    assert on(built_in()).forms(image_conv(), (CHANNEL, SPATIAL))
    assert not on(replace(built_in(), node=1.0)).forms(image_conv(), (CHANNEL, SPATIAL))
    narrow = on(replace(built_in(), block=8)).forms(image_conv(), (SPATIAL,))
    assert all(form.rank % 8 == 0 for form in narrow) and any(form.rank % 16 for form in narrow)


def test_a_table_is_read_back_as_it_was_written() -> None:
    again = from_json(to_json(MINE))
    assert to_json(again) == to_json(MINE)
    assert again.rates[POINT].macs == pytest.approx(MINE.rates[POINT].macs, rel=1e-2)


@pytest.mark.parametrize("broken", ["", "{}", "[]", '{"schema": 2}', to_json(MINE).replace(MATRIX, "m")])
def test_what_is_no_table_is_refused(broken: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_json(broken)
    for number in ("-1.0", "NaN", '"x"'):
        with pytest.raises(ValueError, match=r"positive|no table"):
            from_json(to_json(MINE).replace(f'"block": {MINE.block}', f'"block": {number}'))


def test_the_users_table_is_used_where_it_was_made_here() -> None:
    assert start(Options()).machine == built_in()
    stored(to_json(replace(MINE, node=0.5)))
    run = start(Options())
    assert run.machine is not None and run.machine.node == 0.5
    assert run.table.startswith("measured on this machine") and not run.journal.warnings
    assert run.target.predicted_time(image_conv(), Form(DENSE)) > 0.5


@pytest.mark.parametrize("field", ["processor", "runtime"])
def test_a_table_made_elsewhere_is_not_used_and_the_report_says_so(field: str) -> None:
    stored(to_json(replace(MINE, **{field: "another"})))  # type: ignore[arg-type]
    run = start(Options())
    assert run.machine == built_in()
    assert run.journal.warnings[0].endswith("and was not used: run `onnx-lrsd profile` again.")
    stored("spoiled")
    assert "is no table of a machine" in start(Options()).journal.warnings[0]


def test_profile_writes_the_table_that_optimize_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(upkeep, "measure", lambda progress, device: replace(MINE, node=0.25))
    result = CliRunner().invoke(cli.main, ["profile"])
    assert result.exit_code == 0 and result.stdout == ""
    assert f"Written to {machine.stored_at()}." in result.stderr and "GMAC/s" in result.stderr
    found = start(Options()).machine
    assert found is not None and found.node == 0.25
    elsewhere = CliRunner().invoke(cli.main, ["profile", "-q", "-o", str(tmp_path / "table.json")])
    assert elsewhere.exit_code == 0 and elsewhere.output == ""
    assert from_json((tmp_path / "table.json").read_text()).node == 0.25


def test_doctor_says_which_table_is_used() -> None:
    def said() -> tuple[bool | None, str]:
        found = next(finding for finding in doctor.examine() if finding.name == "times")
        return found.good, found.said

    assert said()[0] is None and said()[1].endswith("run `onnx-lrsd profile`.")
    stored(to_json(MINE))
    assert said() == (True, f"Times are predicted with the table measured here ({machine.stored_at()}).")
    stored("spoiled")
    assert said()[0] is None and "was not used" in said()[1]


def test_latency_is_refused_for_a_target_without_times(monkeypatch: pytest.MonkeyPatch) -> None:
    timeless = replace(TARGETS["onnxruntime"], with_table=None)
    monkeypatch.setitem(TARGETS, "onnxruntime", timeless)
    result = CliRunner().invoke(cli.main, ["optimize", "m.onnx", "--cost", "latency", "--ratio", "2"])
    assert result.exit_code == 2 and "--cost latency cannot go with --target onnxruntime" in result.stderr
    with pytest.raises(OptionError, match=r"cost='latency' .* no table of times"):
        Options(cost="latency")
    run = start(Options())
    assert run.machine is None and run.table == ""


def test_profile_says_before_it_measures_that_it_cannot_write(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[object] = []
    monkeypatch.setattr(upkeep, "measure", lambda *given: measured.append(given))
    folder = machine.stored_at().parent
    folder.write_text("a file where the folder should be")
    result = CliRunner().invoke(cli.main, ["profile"])
    assert result.exit_code == 1 and measured == []
    assert result.stderr.startswith(f"Error: The folder {folder} cannot be made")
    assert "--output" in result.stderr


def test_measuring_fills_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in (
        *(("SIDES", (7, 14)), ("_CHANNELS", (8, 32)), ("TIMED_PASSES", 1), ("_SECONDS", 0.01)),
        *(("MATRIX_ROWS", (1, 4)), ("MATRIX_INPUTS", (16, 32)), ("MATRIX_OUTPUTS", (16, 64))),
        ("MOST_MACS", 8_000_000),
    ):
        monkeypatch.setattr(profile, name, small)
    told: list[tuple[str, int, int]] = []
    found = profile.measure(lambda *said: told.append(said))
    assert found.block in profile._BLOCKS and set(found.rates) == set(NODES)
    assert from_json(to_json(found)).block == found.block  # no gap, all positive
    assert told[-1] == ("profile", 8, 8)
    assert 1e-8 < found.node < 1e-3 and 1e-12 < found.value < 1e-6


def test_each_node_of_a_run_has_its_time() -> None:
    proto = onnx_lrsd.load(MODELS / "digits.onnx").proto
    images = np.load(MODELS / "digits_calib.npz")["image"][:1]
    nodes = kernels(proto, {"image": images}, runs=5)
    busy = [node for node in nodes if "Conv" in node.op]
    assert len(busy) == 6 and all(node.seconds > 0 and node.fastest > 0 for node in busy)
    assert sum(node.seconds for node in busy) > 0.5 * sum(node.seconds for node in nodes)


# Planning in milliseconds


def curves(count: int = 4) -> list[ErrorCurve]:
    """Layers of 1 ms whose forms of k tenths of that lose 1 / k."""
    found = []
    for i in range(count):
        layer = replace(image_conv(), output=f"l{i}", name=f"l{i}")
        points = [Point(Form(SPATIAL, k), 1 / k, Price(k, k, k, k * 1e-4), k * 1e-4) for k in range(1, 10)]
        dense = Point(Form(DENSE), 0.0, Price(10, 10, 10, 1e-3), 1e-3)
        found.append(ErrorCurve(layer, (dense, *points)))
    return found


WITHOUT = 1.1
"""How many times faster the whole model is without the forms that are slower within it."""


def latency_planner(monkeypatch: pytest.MonkeyPatch, truth: float) -> tuple[Planner, list[float]]:
    """A planner on a machine where every saving is ``truth`` of what was predicted; and what it measured."""
    measured: list[float] = []

    def whole_speedup(
        _: Any, layers: Any, forms: dict[str, Form], *more: Any, over: Any = None, **named: Any
    ) -> float:
        if over is not None:
            return WITHOUT
        saved = sum(1e-3 - form.rank * 1e-4 for form in forms.values())
        measured.append(5e-3 / (5e-3 - truth * saved))
        return measured[-1]

    monkeypatch.setattr(planner, "whole_speedup", whole_speedup)
    monkeypatch.setattr(planner, "speedups", lambda model, layers, forms, *more: dict.fromkeys(forms, 9.0))
    monkeypatch.setattr(planner, "speedups_within", lambda *_: {})
    run = start(Options(cost="latency", ratio=2.0))
    total = Price(50, 50, 50, 5e-3)
    source: Any = SimpleNamespace(parted=False)
    return Planner(run, source, Curves(tuple(curves())), total, {}, None), measured  # type: ignore[arg-type]


@pytest.mark.parametrize("truth", [0.8, 1.0, 1.15])
def test_a_plan_for_latency_is_corrected_until_the_model_is_measured_to_meet_it(
    monkeypatch: pytest.MonkeyPatch, truth: float
) -> None:
    made, measured = latency_planner(monkeypatch, truth)
    ratio = 1.8
    forms = made.for_ratio(ratio)
    got = 5e-3 / (5e-3 - truth * sum(1e-3 - form.rank * 1e-4 for form in forms.values()))
    assert SPARE * ratio <= got <= LAVISH * ratio * 1.05  # ranks are steps
    assert got in measured


def test_a_layer_that_is_slower_within_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = latency_planner(monkeypatch, 1.0)

    def within(_: Any, layers: Any, forms: dict[str, Form], samples: Any) -> dict[str, float]:
        return dict.fromkeys(forms, 1.1) | {"l0": 0.9}

    monkeypatch.setattr(planner, "speedups_within", within)
    assert set(made.for_ratio(1.8)) == {"l1", "l2", "l3"}
    assert "0.90 times as fast as before within the model" in made.run.journal.reasons["l0"]


@pytest.mark.parametrize("with_them", [1.03, 0.99])
def test_the_whole_model_decides_on_forms_of_short_layers_that_are_a_little_slower_alone(
    monkeypatch: pytest.MonkeyPatch, with_them: float
) -> None:
    made, _ = latency_planner(monkeypatch, 1.0)
    asked: list[set[str]] = []

    def whole_speedup(
        _: Any, layers: Any, forms: dict[str, Form], *more: Any, over: Any = None, **named: Any
    ) -> float:
        if over is None:
            return 5e-3 / (5e-3 - sum(1e-3 - form.rank * 1e-4 for form in forms.values()))
        asked.append(set(forms) - set(over))
        return with_them

    def alone(_: Any, layers: Any, forms: dict[str, Form], *more: Any) -> dict[str, float]:
        return dict.fromkeys(forms, 1.1) | ({"l0": 0.9, "l1": 0.95} if "l0" in forms else {})

    monkeypatch.setattr(planner, "SHORT", 2e-3)
    monkeypatch.setattr(planner, "whole_speedup", whole_speedup)
    monkeypatch.setattr(planner, "speedups", alone)
    found = made.for_ratio(1.4)
    assert asked[0] == {"l0", "l1"}
    if with_them > 1:
        assert {"l0", "l1"} <= set(found)
        assert len(asked) == 1, "what gained is not timed again"
    else:
        assert "l0" not in found
        assert "0.90 times as fast as before" in made.run.journal.reasons["l0"]


def test_long_layers_are_judged_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = latency_planner(monkeypatch, 1.0)
    monkeypatch.setattr(f"{__name__}.WITHOUT", 2.0)
    monkeypatch.setattr(
        planner, "speedups", lambda model, layers, forms, *more: dict.fromkeys(forms, 1.1) | {"l0": 0.99}
    )
    assert "l0" not in made.for_ratio(1.4)


def test_a_layer_stays_rewritten_where_the_whole_model_is_slower_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, _ = latency_planner(monkeypatch, 1.0)
    monkeypatch.setattr(f"{__name__}.WITHOUT", 0.97)
    monkeypatch.setattr(
        planner, "speedups_within", lambda model, layers, forms, *_: dict.fromkeys(forms, 0.9)
    )
    assert set(made.for_ratio(1.8)) == {"l0", "l1", "l2", "l3"}


def test_a_slow_form_takes_no_form_of_another_kind_with_it() -> None:
    layer = image_conv()
    forms = [Form(SPATIAL, 16), Form(SPATIAL, 64), Form(TUCKER, 16, outer=16), Form(TUCKER, 64, outer=64)]
    points = tuple(Point(form, 0.1, price(layer, form)) for form in (Form(DENSE), *forms))
    left = [point.form for point in points if _stays([layer], Form(TUCKER, 48, outer=48))(point)]
    assert left == [Form(DENSE), Form(SPATIAL, 16), Form(SPATIAL, 64), Form(TUCKER, 16, outer=16)]


def test_what_a_layer_gains_within_the_model_is_read_from_its_kernels() -> None:
    shapes = "(float[1, 64, 32, 32] x) => (float[1, 64, 32, 32] y)"
    body = "a = Conv <pads = [1, 1, 1, 1]> (x, v) b = Relu (a) y = Conv <pads = [1, 1, 1, 1]> (b, w)"
    graph = onnx.parser.parse_graph(f"g {shapes} {{ {body} }}")
    rng = np.random.default_rng(0)
    for name in "vw":
        values = rng.standard_normal((64, 64, 3, 3)).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx_lrsd.load(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8))
    layers, _ = onnx_lrsd.find_layers(model.graph())
    samples = read_samples({"x": np.ones((2, 64, 32, 32), np.float32)}, inputs_of(model.proto))
    forms = {"a": Form(SPATIAL, 16), "y": Form(SPATIAL, 192)}
    found = speedups_within(model, layers, forms, samples)
    assert found["a"] > 1.3 and found["y"] < 0.9


def test_the_kernels_of_a_layer_are_its_own_wherever_they_stand() -> None:
    """A branch that moves in the order of the run is not compared with its neighbour there."""
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "v"], ["a"], "left"),
        onnx.helper.make_node("Relu", ["a"], ["b"], "relu"),
        onnx.helper.make_node("MatMul", ["b", "w"], ["c"], "right/lrsd/V"),
        onnx.helper.make_node("MatMul", ["c", "w"], ["y"], "right/lrsd/U"),
        onnx.helper.make_node("Softmax", ["y"], ["z"], "softmax"),
    ]
    value = onnx.helper.make_tensor_value_info
    ends = [value(name, onnx.TensorProto.FLOAT, [4, 4]) for name in "xz"]
    proto = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:]))
    left, right = (
        replace(image_conv(), name=name, output=output) for name, output in (("left", "a"), ("right", "y"))
    )
    names = ["right/lrsd/U", "left/MatMulAddFusion", "b", "softmax", "right/lrsd/V", "ReorderInput"]
    assert kernel_owners(proto, [left, right], names) == ["y", "a", "a", None, "y", None]
    assert kernel_owners(proto, [right], names) == ["y", None, None, None, "y", None]


def test_a_latency_out_of_reach_is_a_budget_error_or_the_fastest_that_was_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(BudgetError, match="at most"):
        latency_planner(monkeypatch, 1.0)[0].for_ratio(5.0)
    made, measured = latency_planner(monkeypatch, 0.5)
    made.for_ratio(2.5)
    assert len(measured) >= 1 and max(measured) < 2.5


def test_cost_latency_promises_what_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(planner, "WHOLE_SECONDS", 0.2)
    monkeypatch.setattr("onnx_lrsd.measure.compare.COMPARE_SECONDS", 0.2)
    plan = tmp_path / "plan.json"
    report = tmp_path / "report.json"
    asked = ["optimize", MODELS / "digits.onnx", "--calib", MODELS / "digits_calib.npz", "--samples", 60]
    asked += [
        "--cost",
        "latency",
        "--ratio",
        1.2,
        "--forms",
        "channel",
        "--save-plan",
        plan,
        "--json",
        report,
    ]
    asked += ["-o", tmp_path / "out.onnx"]
    result = CliRunner().invoke(cli.main, [str(word) for word in asked])
    assert result.exit_code in (0, 3), result.stderr  # another job may slow one model down
    facts = json.loads(report.read_text())
    assert facts["cost"] == "latency"
    assert facts["promise"]["got"] == facts["ratio"]["latency"]["median"]
    assert facts["predicted"]["latency"] > 1 and "built in" in facts["predicted"]["table"]
    assert "predicted" in result.stderr and "fewer" not in result.stderr
    entries = json.loads(plan.read_text())["layers"].values()
    changed = [entry for entry in entries if entry["kind"] != "dense" or entry["after"] != entry["before"]]
    assert changed and all(entry["after"]["seconds"] < entry["before"]["seconds"] for entry in changed)
    again = onnx_lrsd.plan_from_json(plan.read_text())
    assert again.cost == "latency"
    assert {c.after.seconds for c in again.choices.values() if c.form.kind != DENSE} != {None}


def test_latency_is_a_cost_of_points_that_have_seconds() -> None:
    point = curves(1)[0].points[1]
    assert COSTS["latency"](point) == pytest.approx(1e-4)
    assert (point.price + point.price).seconds == pytest.approx(2e-4)


@pytest.mark.parametrize(("close", "measurements"), [(1.5, 2), (10.0, 1)])
def test_a_sensitivity_is_measured_again_only_at_another_error(
    monkeypatch: pytest.MonkeyPatch, close: float, measurements: int
) -> None:
    made, _ = latency_planner(monkeypatch, 1.0)
    monkeypatch.setattr(planner, "count_post_dominators", lambda graph, layers: defaultdict(int))
    monkeypatch.setattr(planner, "CLOSE", close)
    made.source = SimpleNamespace(graph=lambda: None)  # type: ignore[assignment]
    asked: list[Mapping[str, Form]] = []

    def measure(forms: Mapping[str, Form]) -> dict[str, float]:
        asked.append(forms)
        return dict.fromkeys(forms, 1.0)

    made.weigh(measure)
    assert len(asked) == measurements and set(asked[0]) == set(made.sensitivity)
    error = {point.form: point.error for point in made.curves.layers[0].points}
    assert all(error[form] > close * error[asked[0][name]] for name, form in asked[-1].items() if asked[1:])
