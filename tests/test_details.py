"""What the report page draws is what the numbers say, and small."""

import numpy as np
import pytest

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
    Layer,
    Moments,
    Pattern,
    Point,
    Price,
)


def matrix(n: int, m: int) -> Layer:
    return Layer(
        output="y", name="dense", op="Gemm", input="x", weight="w", shape=(n, m), dtype="float32", n=n, m=m
    )


def test_singular_values_are_those_of_the_whitened_weight() -> None:
    rng = np.random.default_rng(0)
    weight, rows = rng.standard_normal((20, 30)), rng.standard_normal((500, 30)) * np.linspace(1, 3, 30)
    rows -= rows.mean(axis=0)
    second = rows.T @ rows / len(rows)
    known = Moments(name="y", count=len(rows), mean=np.zeros(30), second=second.astype(np.float32))
    problem = pose(matrix(20, 30), weight, np.zeros(20), known)
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
    found = curve_of(ErrorCurve(matrix(600, 600), (dense, *points)), chosen)
    assert str(chosen) in found.forms and len(found.forms) <= POINTS + 1
    assert list(found.macs) == sorted(found.macs)
    at = found.forms.index(str(chosen))
    assert (found.macs[at], found.bytes[at], found.seconds[at]) == (123, 492, None)
    assert found.errors[at] == pytest.approx(1 / 123, rel=1e-3)
    assert set(found.groups) == {CHANNEL}


def test_a_picture_shows_where_s_has_entries() -> None:
    layer = matrix(40, 200)
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
    shown = picture(matrix(8, 100), factors)
    assert shown is not None and shown.kind == "channels"
    cells = "".join(shown.cells)
    assert [index for index, cell in enumerate(cells) if cell != "0"] == [3, 70] and len(cells) == 100


def test_forms_without_s_have_no_picture() -> None:
    layer = matrix(8, 8)
    assert picture(layer, Factors(form=Form(CHANNEL, 4), kernels=(), bias=np.zeros(8))) is None


def test_a_pattern_of_two_in_four_is_even_all_over() -> None:
    layer = matrix(16, 64)
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
