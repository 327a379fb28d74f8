"""Errors of widths are foreseen on rows that readers were not fitted to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from plain_layers import linear

from onnx_lrsd.solver.cross_validation import width_errors
from onnx_lrsd.solver.problem import Problem, pose
from onnx_lrsd.solver.width import fit_width, widths
from onnx_lrsd.types import Moments

Values = npt.NDArray[Any]

INNER, OUTER = 96, 24
COLUMNS = np.arange(INNER)[:, None]


def rows(count: int, seed: int, loud: float) -> Values:
    """Outputs of a rectified layer; one row in fifty is ``loud`` times as large as the others."""
    weight = np.random.default_rng(7).standard_normal((12, INNER)) / 3
    rng = np.random.default_rng(seed)
    size = np.where(rng.random(count) < 0.02, loud, 1.0)[:, None]
    hidden = size * rng.standard_normal((count, 12)) @ weight
    found: Values = np.maximum(hidden + 0.3 * rng.standard_normal((count, INNER)), 0).astype(np.float32)
    return found


def posed(x: Values) -> Problem:
    weight = np.random.default_rng(3).standard_normal((OUTER, INNER))
    centred = x - x.mean(axis=0)
    thin = 2 * len(x) < INNER
    second = None if thin else centred.T @ centred / len(x)
    moments = Moments(
        name="y", count=len(x), mean=x.mean(axis=0), second=second, rows=centred if thin else None
    )
    return pose(linear(OUTER, INNER), weight, np.zeros(OUTER), moments)


def measured(problem: Problem, kept: tuple[int, ...], x: Values) -> float:
    """The relative error of the reader on the channels ``kept``, on rows ``x``."""
    factors = fit_width(problem, COLUMNS, kept)
    assert factors.sparse is not None
    wanted = x @ problem.weight.T
    missed = wanted - x[:, list(kept)] @ factors.sparse.T - factors.bias
    return float(np.sum(missed**2) / np.sum((wanted - wanted.mean(axis=0)) ** 2))


@pytest.mark.parametrize(("count", "loud"), [(150, 1.0), (150, 8.0), (600, 1.0), (600, 8.0)])
def test_widths_lose_on_other_rows_what_was_foreseen(count: int, loud: float) -> None:
    x = rows(count, 1, loud)
    problem = posed(x)
    found = widths([problem], [COLUMNS], least=INNER // 8)
    errors = width_errors(problem, COLUMNS, found, found.errors[0], x)
    others = rows(20_000, 2, loud)
    for width in (24, 40, 56, 72):
        assert errors[width] == pytest.approx(measured(problem, found.kept(width), others), rel=0.35)


def test_more_channels_never_lose_more() -> None:
    x = rows(100, 1, 8.0)
    problem = posed(x)
    found = widths([problem], [COLUMNS], least=INNER // 8)
    errors = width_errors(problem, COLUMNS, found, found.errors[0], x)
    assert errors[INNER] == 0 and (np.diff(errors[INNER // 8 :]) <= 0).all()
    assert np.isinf(errors[: INNER // 8]).all()


@pytest.mark.parametrize("count", [0, 11])
def test_few_rows_judge_nothing(count: int) -> None:
    problem = posed(rows(100, 1, 1.0))
    found = widths([problem], [COLUMNS], least=INNER // 8)
    errors = width_errors(problem, COLUMNS, found, found.errors[0], rows(count, 1, 1.0))
    np.testing.assert_array_equal(errors, found.errors[0])


def test_fewer_rows_than_inputs_are_judged_as_well() -> None:
    x = rows(40, 1, 1.0)
    problem = posed(x)
    assert problem.metric.rows is not None
    found = widths([problem], [COLUMNS], least=INNER // 8)
    errors = width_errors(problem, COLUMNS, found, found.errors[0], x)
    others = rows(20_000, 2, 1.0)
    assert errors[48] == pytest.approx(measured(problem, found.kept(48), others), rel=0.35)


def test_other_libraries_find_the_same() -> None:
    array_api_strict = pytest.importorskip("array_api_strict")
    x = rows(120, 1, 4.0)
    problem = posed(x)
    found = widths([problem], [COLUMNS], least=INNER // 8)
    metric = replace(problem.metric, second=array_api_strict.asarray(problem.metric.second))
    other = replace(problem, weight=array_api_strict.asarray(problem.weight), metric=metric)
    np.testing.assert_allclose(
        width_errors(other, COLUMNS, found, found.errors[0], x),
        width_errors(problem, COLUMNS, found, found.errors[0], x),
        rtol=1e-3,
    )
