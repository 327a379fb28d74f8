"""An error that was measured on some samples says how sure it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from scipy import stats

from onnx_lrsd.data.holdout import fit_and_check
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.errors import DataError
from onnx_lrsd.facts import Verification
from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.compare import compare
from onnx_lrsd.measure.confidence import MOST_UNITS, ratio_interval, student
from onnx_lrsd.runtime.divergence import Divergence

Draw = Callable[[np.random.Generator, int], np.ndarray]
TAILS: dict[str, Draw] = {  # per-sample errors with mean 1
    "lognormal": lambda rng, n: rng.lognormal(0, 1, n) / np.exp(0.5),
    "pareto": lambda rng, n: (rng.pareto(2, n) + 1) / 2,
    "chi-squared": lambda rng, n: rng.chisquare(1, n),
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("count", [10, 30, pytest.param(200, marks=pytest.mark.slow)])
def test_the_upper_end_holds_93_times_in_100_where_errors_have_long_tails(tail: str, count: int) -> None:
    rng = np.random.default_rng(count)
    found = [ratio_interval(TAILS[tail](rng, count), rng.gamma(2, 0.5, count)) for _ in range(300)]
    assert np.mean([high >= 1 for _, high in found]) >= 0.93
    assert np.mean([low <= 1 for low, _ in found]) >= 0.93
    assert np.median([high for _, high in found]) < 1 + 8 / np.sqrt(count)


def test_more_samples_make_the_interval_narrower_and_one_sample_is_no_certainty() -> None:
    widths = []
    for count in (1, 2, 8, 40, 200, 2000):
        low, high = ratio_interval(np.ones(count), np.ones(count))
        assert low < 1 < high
        widths.append(high / low)
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 100 and widths[-1] < 1.2


def test_many_samples_are_put_together_without_changing_the_ratio() -> None:
    rng = np.random.default_rng(0)
    above, below = rng.random(10 * MOST_UNITS), rng.random(10 * MOST_UNITS)
    low, high = ratio_interval(above, below)
    assert low < above.sum() / below.sum() < high < 1.1 * low


def test_nothing_lost_is_sure_and_what_is_not_finite_never_passes() -> None:
    assert ratio_interval(np.zeros(40), np.ones(40)) == (0, 0)
    assert ratio_interval(np.zeros(0), np.zeros(0)) == (0, 0)
    assert ratio_interval(np.array([1, np.inf]), np.ones(2)) == (np.inf, np.inf)
    assert ratio_interval(np.ones(2), np.zeros(2)) == (np.inf, np.inf)


def test_student_is_students_distribution() -> None:
    for degrees in (4, 5, 8, 20, 300):
        assert student(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-3)


def test_the_parts_of_samples_add_up_to_the_error_however_they_are_batched() -> None:
    rng = np.random.default_rng(0)
    old = 1e4 + rng.standard_normal((50, 7))
    new = old + 0.1 * rng.standard_normal((50, 7))
    expected = np.sum((new - old) ** 2) / np.sum((old - old.mean(axis=0)) ** 2)
    for size in (1, 3, 50):
        stream = Divergence()
        for start in range(0, 50, size):
            batch = slice(start, start + size)
            stream.add(old[batch], new[batch], size=len(old[batch]))
        above, below = stream.by_sample()
        assert len(above) == len(below) == 50
        assert np.allclose(above, ((new - old) ** 2).sum(axis=1))
        assert above.sum() / below.sum() == pytest.approx(expected) == pytest.approx(stream.relative())


def test_rows_that_belong_to_one_sample_are_one_part() -> None:
    stream = Divergence()
    old = np.arange(24.0).reshape(12, 2)
    stream.add(old, old + 1, size=4)
    assert np.allclose(stream.by_sample()[0], 6)
    masked = Divergence()
    real = np.array([[1, 1, 0], [1, 0, 0]], bool)
    values = np.random.default_rng(0).standard_normal((2, 3, 5))
    masked.add(values, values + 1, real)
    assert np.allclose(masked.by_sample()[0], [10, 5])


def linear(weight: np.ndarray, ending: str = "y = Identity (z)") -> Model:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 6] x) => (float[n, 6] y) {{ z = MatMul (x, w)  {ending} }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), "w"))
    return load(proto)


RNG = np.random.default_rng(2)
WEIGHT = RNG.standard_normal((6, 6))
NEAR = WEIGHT + 0.05 * RNG.standard_normal((6, 6))


def data(model: Model, x: np.ndarray) -> Samples:
    return read_samples({"x": x.astype(np.float32)}, inputs_of(model.proto))


def compared(x: np.ndarray, ending: str = "y = Identity (z)", after: np.ndarray = NEAR) -> Verification:
    before = linear(WEIGHT, ending)
    return compare(before, linear(after, ending), data(before, x), latency=False)


def test_the_error_on_other_samples_lies_in_the_interval() -> None:
    truth = compared(RNG.standard_normal((4000, 6))).error
    for count in (8, 30, 100):
        found = compared(RNG.standard_normal((count, 6)))
        low, high = found.error_interval
        assert low < truth < high == found.error_bound
        assert low < found.error < high


def test_few_samples_are_said() -> None:
    assert compared(RNG.standard_normal((200, 6))).warnings == ()
    (said,) = compared(RNG.standard_normal((8, 6))).warnings
    assert "on 8 samples only" in said and "give at least 30" in said


def test_outputs_that_hardly_vary_are_said() -> None:
    x = np.ones((40, 6))
    (said,) = compared(x).warnings
    assert "y is the same for all" in said and "give samples as varied" in said
    (said,) = compared(x + 1e-4 * RNG.standard_normal((40, 6))).warnings
    assert "nearly the same" in said
    (said,) = compared(np.abs(x + 0.1 * RNG.standard_normal((40, 6))), "y = Softmax (z)").warnings
    assert "one class" in said


def test_a_model_that_gave_nothing_away_needs_no_warning() -> None:
    assert compared(np.ones((5, 6)), after=WEIGHT).warnings == ()


@pytest.mark.parametrize(("count", "checked"), [(20, 7), (60, 20), (100, 30), (150, 30), (400, 80)])
def test_a_fifth_is_kept_to_check_on_or_enough_for_an_interval(count: int, checked: int) -> None:
    found = fit_and_check(linear(WEIGHT), {"x": RNG.standard_normal((count, 6)).astype(np.float32)}, None)
    assert found.fit_on is not None
    assert (found.check_on.count, found.fit_on.count) == (checked, count - checked)


def test_samples_that_are_all_the_same_are_refused() -> None:
    model = linear(WEIGHT)
    with pytest.raises(DataError, match=r"The 40 samples of .* are all the same.*: give samples as varied"):
        fit_and_check(model, {"x": np.ones((40, 6), np.float32)}, None)
    x = np.ones((40, 6), np.float32)
    x[39, 5] = 2
    assert not data(model, x).all_alike and data(model, x[:39]).all_alike


def test_values_that_are_not_finite_any_more_make_the_error_and_its_bound_infinite(
    recwarn: pytest.WarningsRecorder,
) -> None:
    x = RNG.standard_normal((40, 6))
    for ending in ("y = Identity (z)", "y = Softmax (z)"):
        found = compared(x, ending, after=np.where(np.eye(6) > 0, np.inf, NEAR))
        assert found.error == found.error_bound == np.inf
        assert not found.finite
    assert compared(x).finite
    assert not [said for said in recwarn if "encountered" in str(said.message)]
