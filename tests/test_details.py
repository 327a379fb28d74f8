"""What the report page draws is what the numbers say, and small."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from plain_layers import linear

import onnx_lrsd
from onnx_lrsd import cli
from onnx_lrsd.commands.optimize import Result
from onnx_lrsd.facts import LoadCost
from onnx_lrsd.report import report_to_json
from onnx_lrsd.report.details import (
    BINS,
    COLUMNS,
    POINTS,
    RANKS,
    ROWS,
    curve_of,
    histogram,
    picture,
    spectrum,
)
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.problem import pose
from onnx_lrsd.types import (
    CHANNEL,
    CHANNELS,
    N_OF_M,
    UNSTRUCTURED,
    ErrorCurve,
    Factors,
    Form,
    Moments,
    Pattern,
    Point,
    Price,
)


def test_singular_values_are_those_of_the_whitened_weight() -> None:
    rng = np.random.default_rng(0)
    weight, rows = rng.standard_normal((20, 30)), rng.standard_normal((500, 30)) * np.linspace(1, 3, 30)
    rows -= rows.mean(axis=0)
    second = rows.T @ rows / len(rows)
    known = Moments(name="y", count=len(rows), mean=np.zeros(30), second=second.astype(np.float32))
    problem = pose(linear(20, 30), weight, np.zeros(20), known)
    found = spectrum(problem)
    root = np.linalg.cholesky(problem.metric.matrix(weight))
    values = np.linalg.svd(weight @ root, compute_uv=False)
    ranks = np.array(found.ranks)
    assert ranks[0] == 1 and ranks[-1] == 20 and len(ranks) <= RANKS
    np.testing.assert_allclose(found.values, values[ranks - 1] / values[0], rtol=1e-3)
    left = [np.sum(values[rank:] ** 2) / np.sum(values**2) for rank in ranks]
    np.testing.assert_allclose(found.left, left, rtol=2e-3, atol=1e-9)


def test_a_curve_holds_the_chosen_form_and_at_most_so_many_others() -> None:
    dense = Point(Form(), 0.0, Price(1000, 1000, 4000))
    points = [Point(Form(CHANNEL, rank), 1 / rank, Price(rank, rank, 4 * rank)) for rank in range(1, 500)]
    chosen = Form(CHANNEL, 123)
    found = curve_of(ErrorCurve(linear(600, 600), (dense, *points)), chosen)
    assert str(chosen) in found.forms and len(found.forms) <= POINTS + 1
    assert list(found.macs) == sorted(found.macs)
    at = found.forms.index(str(chosen))
    assert (found.macs[at], found.bytes[at], found.seconds[at]) == (123, 492, None)
    assert found.errors[at] == pytest.approx(1 / 123, rel=1e-3)
    assert set(found.groups) == {CHANNEL}


def test_a_picture_shows_where_s_has_entries() -> None:
    layer = linear(40, 200)
    weight = np.zeros((40, 200))
    weight[30:, 150:] = np.random.default_rng(0).standard_normal((10, 50))
    form = Form(CHANNEL, 0, Pattern(UNSTRUCTURED, 500))
    shown = picture(layer, decompose(pose(layer, weight, np.zeros(40), None), form))
    assert shown is not None and (shown.kind, shown.shape) == ("entries", (40, 200))
    assert len(shown.cells) == ROWS and {len(row) for row in shown.cells} == {COLUMNS}
    filled = np.array([[cell != "0" for cell in row] for row in shown.cells])
    rows, columns = np.nonzero(filled)
    assert rows.min() >= 30 * ROWS // 40 - 1 and columns.min() >= 150 * COLUMNS // 200 - 1
    assert filled[-1].sum() >= 15


def test_a_picture_of_channels_marks_those_that_are_kept() -> None:
    factors = Factors(
        form=Form(CHANNEL, 4, Pattern(CHANNELS, 2)), kernels=(), bias=np.zeros(8), channels=(3, 70)
    )
    shown = picture(linear(8, 100), factors)
    assert shown is not None and shown.kind == "channels"
    cells = "".join(shown.cells)
    assert [index for index, cell in enumerate(cells) if cell != "0"] == [3, 70] and len(cells) == 100


def test_forms_without_s_have_no_picture() -> None:
    layer = linear(8, 8)
    assert picture(layer, Factors(form=Form(CHANNEL, 4), kernels=(), bias=np.zeros(8))) is None


def test_a_pattern_of_two_in_four_is_even_all_over() -> None:
    layer = linear(16, 64)
    weight = np.random.default_rng(0).standard_normal((16, 64))
    form = Form(CHANNEL, 0, Pattern(N_OF_M, 2, 4))
    shown = picture(layer, decompose(pose(layer, weight, np.zeros(16), None), form))
    assert shown is not None
    counts = np.array([[cell == "9" for cell in row] for row in shown.cells]).reshape(16, 16, 4).sum(axis=2)
    assert (counts == 2).all()


def test_histograms_count_all_values_and_agree_where_nothing_changed() -> None:
    values = np.random.default_rng(0).standard_normal(10_000)
    values[0] = 1e6
    found = histogram(values, values)
    assert found is not None and found.before == found.after and len(found.before) == BINS
    assert sum(found.before) == pytest.approx(1, abs=1e-3)
    assert found.high < 10, "one outlier must not squeeze all others into one bin"


def test_values_that_are_constant_or_not_finite_have_a_histogram_or_none() -> None:
    constant = histogram(np.ones(10), np.ones(10))
    assert constant is not None and constant.low < 1 < constant.high
    assert histogram(np.full(3, np.nan), np.full(3, np.nan)) is None


def a_model() -> onnx.ModelProto:
    """Two products of 96 x 96 with a rectifier between them, of rank 12 but for some noise."""
    rng = np.random.default_rng(0)
    low = [rng.standard_normal((96, 12)) @ rng.standard_normal((12, 96)) / 30 for _ in range(2)]
    weights = [(part + rng.standard_normal((96, 96)) / 60).astype(np.float32) for part in low]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 96]) for name in "xy")
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["c"], "first"),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["y"], "second"),
    ]
    tensors = [numpy_helper.from_array(weight, f"w{index}") for index, weight in enumerate(weights)]
    graph = helper.make_graph(nodes, "two", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


SAMPLES = {"x": np.random.default_rng(1).standard_normal((200, 96)).astype(np.float32)}


@pytest.fixture(scope="module", autouse=True)
def opening_untimed() -> Iterator[None]:
    """What opening takes is not measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnx_lrsd.commands.optimize.opening_cost", lambda model: LoadCost(0.1, 1))
        yield


@pytest.fixture(scope="module")
def result(opening_untimed: None) -> Result:
    """A search for an output error of 5 %, with details."""
    return onnx_lrsd.optimize(a_model(), SAMPLES, target="size", max_error=0.05, details=True)


def test_details_are_collected_only_where_they_are_asked_for() -> None:
    report = onnx_lrsd.optimize(a_model(), SAMPLES, target="size", ratio=2, dry_run=True).report
    assert report.details is None and "details" not in json.loads(report_to_json(report))


def test_every_layer_has_its_curve_spectrum_and_histogram(result: Result) -> None:
    details = result.report.details
    assert details is not None and [layer.output for layer in details.layers] == ["c", "y"]
    for layer in details.layers:
        assert layer.curve is not None and layer.planned in layer.curve.forms
        assert layer.spectrum is not None and layer.spectrum.left[11] < 0.3, (
            "twelve directions hold nearly all"
        )
        assert layer.histogram is not None and layer.sensitivity is not None
        assert layer.network_error is not None and 0 < layer.network_error < 0.5


def test_the_trade_off_holds_what_was_predicted_tried_and_chosen(result: Result) -> None:
    details, found = result.report.details, result.report.verification
    assert details is not None and details.trade_off is not None and found is not None
    trade_off = details.trade_off
    assert trade_off.cost == "bytes"
    ratios = [trial.ratio for trial in trade_off.predicted]
    errors = [trial.error for trial in trade_off.predicted]
    assert len(ratios) > 5 and ratios == sorted(ratios)
    assert errors[-1] > errors[0] >= 0
    assert trade_off.tried, "a search measures what it tries"
    assert trade_off.chosen is not None
    assert trade_off.chosen.ratio == pytest.approx(found.before.bytes / found.after.bytes, rel=1e-3)
    assert trade_off.chosen.error == pytest.approx(found.error_bound, rel=1e-3)


def test_the_json_holds_the_details_and_is_read_as_json(result: Result) -> None:
    facts = json.loads(report_to_json(result.report))
    assert [row["output"] for row in facts["layers"]] == [row["output"] for row in facts["details"]["layers"]]
    assert facts["details"]["machine"]["cores"] and facts["versions"]["numpy"]
    assert len(report_to_json(result.report)) < 60_000


def test_a_replay_and_a_dry_run_have_what_they_measured(result: Result) -> None:
    replayed = onnx_lrsd.optimize(a_model(), SAMPLES, plan=result.plan, details=True).report.details
    assert replayed is not None
    assert all(layer.histogram is not None and layer.curve is None for layer in replayed.layers)
    planned = onnx_lrsd.optimize(a_model(), SAMPLES, target="size", ratio=2, dry_run=True, details=True)
    details = planned.report.details
    assert details is not None and details.trade_off is not None and details.trade_off.chosen is None
    assert all(layer.histogram is None and layer.curve is not None for layer in details.layers)


def test_without_samples_no_output_error_is_predicted() -> None:
    report = onnx_lrsd.optimize(a_model(), target="size", ratio=2, details=True).report
    assert report.details is not None and report.details.trade_off is not None
    assert report.details.trade_off.predicted == ()
    assert all(layer.sensitivity is None for layer in report.details.layers)


def test_the_command_line_writes_the_page_and_how_to_make_it_again(tmp_path: Path) -> None:
    onnx.save(a_model(), tmp_path / "net.onnx")
    np.savez(tmp_path / "calib.npz", x=SAMPLES["x"])
    arguments = ["optimize", str(tmp_path / "net.onnx"), "--calib", str(tmp_path / "calib.npz")]
    arguments += ["--target", "size", "--ratio", "3", "--html", str(tmp_path / "a page.html")]
    arguments += ["--json", str(tmp_path / "report.json")]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert shlex.split(facts["details"]["command"]) == ["onnx-lrsd", *arguments]
    again = CliRunner().invoke(cli.main, ["report", str(tmp_path / "report.json")])
    assert again.exit_code == 0, again.output
    written = (tmp_path / "a page.html").read_text(encoding="utf-8")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == written
