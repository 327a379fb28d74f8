"""Behind a rectifier only what passes has to be right: the fit is better there, and never worse."""

from __future__ import annotations

from math import inf

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from plain_layers import conv, linear

from onnx_lrsd.passes.rectifiers import rectifiers
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.layout import expand
from onnx_lrsd.solver.problem import Problem, pose
from onnx_lrsd.solver.rectified import Rectified
from onnx_lrsd.types import (
    CHANNEL,
    CHANNEL_IN,
    NONE,
    SPATIAL,
    TUCKER,
    UNSTRUCTURED,
    Factors,
    Form,
    Moments,
    Pattern,
)

LAYER = conv(16, 8)
ENTRIES = Pattern(UNSTRUCTURED, 40)
FORMS = (
    Form(CHANNEL, 6),
    Form(CHANNEL_IN, 1),
    Form(SPATIAL, 5),
    Form(TUCKER, 4, outer=8),
    Form(CHANNEL, 0, ENTRIES),
    Form(CHANNEL, 2, ENTRIES),
    Form(SPATIAL, 2, ENTRIES),
)
LIMITS = ((0.0, inf), (0.0, 1.0), (-inf, inf))


def problem() -> tuple[Problem, np.ndarray, np.ndarray]:
    """Correlated inputs of another network than the one whose outputs are wanted."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((72, 72)) * 0.9 ** np.arange(72)
    rows = (rng.standard_normal((3000, 72)) @ mixing.T + 0.3).astype(np.float32)
    weight, bias = rng.standard_normal((16, 72)) / 20, rng.standard_normal(16)
    seen = rows + 0.1 * rng.standard_normal(rows.shape).astype(np.float32)
    outputs = (rows @ weight.T + bias).astype(np.float32)
    mean, middle = seen.mean(axis=0, dtype=np.float64), outputs.mean(axis=0, dtype=np.float64)
    centred, wanted = seen - mean, outputs - middle
    moments = Moments(
        name="y",
        count=len(rows),
        mean=mean,
        second=(centred.T @ centred / len(rows)).astype(np.float32),
        cross=wanted.T @ centred / len(rows),
        output_mean=middle,
        output_energy=float((wanted**2).sum()) / len(rows),
    )
    return pose(LAYER, weight, bias, moments), seen, outputs


def passed(factors: Factors, rows: np.ndarray, outputs: np.ndarray, low: float, high: float) -> float:
    found = rows @ expand(LAYER, factors).T + factors.bias
    return float(np.square(outputs.clip(low, high) - found.clip(low, high)).sum())


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_what_passes_is_nearer_and_the_reported_error_is_that_of_the_factors(
    form: Form, limits: tuple[float, float]
) -> None:
    posed, rows, outputs = problem()
    plain = decompose(posed, form)
    refined = decompose(posed, form, rectified=Rectified(rows, outputs, *limits))
    before, after = (passed(factors, rows, outputs, *limits) for factors in (plain, refined))
    assert after <= before * (1 + 1e-4)
    if np.isfinite(limits[0]):
        gained = 0.97 if form.pattern == NONE else 0.999  # beside S the factors stay, of S its support
        assert after < gained * before and refined.error > plain.error
    missed = outputs - rows @ expand(LAYER, refined).T - refined.bias
    spread = np.square(outputs - outputs.mean(axis=0)).sum()
    assert refined.error == pytest.approx(np.square(missed).sum() / spread, rel=1e-3)


def test_a_fit_that_loses_next_to_nothing_is_left_as_it_is() -> None:
    posed, rows, outputs = problem()
    form = Form(CHANNEL, 16)
    refined = decompose(posed, form, rectified=Rectified(rows, outputs, 0.0, inf))
    np.testing.assert_array_equal(refined.bias, decompose(posed, form).bias)


def test_a_wide_layer_of_few_rows_is_never_given_a_matrix_of_its_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an (m, m) matrix of a layer with few rows")

    monkeypatch.setattr("onnx_lrsd.solver.problem.Metric.matrix", refuse)
    n, m, count = 12, 3000, 40
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((count, m))
    weight = rng.standard_normal((n, m)) / m**0.5
    outputs = rows @ weight.T
    moments = Moments(name="y", count=count, mean=np.zeros(m), rows=rows.astype(np.float32))
    seen = Rectified(rows.astype(np.float32), outputs.astype(np.float32), 0.0, inf)
    posed = pose(linear(n, m), weight, np.zeros(n), moments)
    for form in (Form(CHANNEL, 3), Form(CHANNEL, 3, weights=(("fp16", 3),))):
        assert 0 < decompose(posed, form, rectified=seen).error < 1


def test_only_a_rectifier_that_alone_reads_the_tensor_counts() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4] a, float top) => (float[n, 4] out, float[n, 4] seen)
        <float low = {0.0}, float high = {6.0}, float none = {1.0}> {
            relu_in = Neg(a)  relu_out = Relu(relu_in)
            clip_in = Neg(relu_out)  clip_out = Clip(clip_in, low, high)
            below_in = Neg(clip_out)  below_out = Clip(below_in, , high)
            open_in = Neg(below_out)  open_out = Clip(open_in, low, top)
            shared = Neg(open_out)  shared_out = Relu(shared)  also = Neg(shared)
            seen = Neg(also)  seen_out = Relu(seen)
            sum = Add(shared_out, seen_out)  out = Sigmoid(sum)
        }"""
    )
    graph = gs.import_onnx(model)
    names = ["relu_in", "clip_in", "below_in", "open_in", "shared", "seen", "sum"]
    assert rectifiers(graph, names) == {"relu_in": (0, inf), "clip_in": (0, 6), "below_in": (-inf, 6)}
