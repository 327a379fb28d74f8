"""A run takes the time that it may take, and says what it left out for it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import onnx_lrsd
from onnx_lrsd.cli import main
from onnx_lrsd.plan.search import ErrorLimit, RatioSearch, Search
from onnx_lrsd.report import report_table, report_to_json
from onnx_lrsd.time_limit import OutOfTime, TimeLimit, seconds_of

MODELS = Path(__file__).parent.parent / "models"


class Clock:
    """A clock that each look at it, or each piece of work, moves on."""

    def __init__(self, each: float = 0.0) -> None:
        self.now, self.each = 0.0, each

    def __call__(self) -> float:
        self.now += self.each
        return self.now


def example(**options: Any) -> onnx_lrsd.Result:
    data = {"image": np.load(MODELS / "digits_calib.npz")["image"][:120]}
    return onnx_lrsd.optimize(MODELS / "digits.onnx", data, **options)


def test_a_time_is_read_as_people_write_it() -> None:
    read = [seconds_of(text) for text in ("90s", "10min", "2 h", "45", 7.5)]
    assert read == [90, 600, 7200, 45, 7.5]
    assert [seconds_of(text) for text in ("soon", "-3s", "0", "1d", True, float("inf"))] == [None] * 6


@pytest.mark.parametrize("given", ["soon", 0, -1, True, "3 weeks"])
def test_what_is_no_time_is_one_sentence(given: Any) -> None:
    with pytest.raises(onnx_lrsd.OptionError, match=r"is no time: write it like 90s, 10min or 2h\."):
        example(time=given)


def test_what_is_no_time_is_one_sentence_on_the_command_line() -> None:
    ran = CliRunner().invoke(main, ["optimize", str(MODELS / "digits.onnx"), "--time", "soon"])
    assert ran.exit_code == 2
    assert "--time" in ran.output and "is no time: write it like 90s, 10min or 2h." in " ".join(
        ran.output.split()
    )


def test_a_search_stops_where_another_fit_has_no_room_and_takes_what_it_found() -> None:
    clock = Clock()
    limit, made = TimeLimit(100, clock), list[float]()

    def make(ratio: float) -> float:
        clock.now += 30
        made.append(ratio)
        return ratio

    search = Search(2.0, make, lambda ratio: 1e-6, ErrorLimit(0.01, ""), time=limit)
    assert search.propose() == made[-1]
    assert len(made) == 2 and clock.now <= 80
    assert limit.left_out == ["fits of the search after 2"]


def test_a_fit_that_runs_out_of_time_does_not_lose_what_was_found() -> None:
    made = list[float]()

    def make(ratio: float) -> float:
        if made:
            raise OutOfTime("100 s were not enough: allow more with --time.")
        made.append(ratio)
        return ratio

    search = Search(2.0, make, lambda ratio: 1e-6, ErrorLimit(0.01, ""), time=TimeLimit(100, Clock()))
    assert search.propose() == 2.0
    assert search.propose() is None
    made.append(0.0)
    nothing = Search(2.0, make, lambda ratio: 1e-6, ErrorLimit(0.01, ""))
    assert nothing.propose() is None
    assert nothing.why_nothing().endswith("allow more with --time. The original is handed back.")


@pytest.mark.slow
def test_a_ratio_is_corrected_only_where_there_is_room() -> None:
    clock = Clock()
    limit = TimeLimit(100, clock)
    found = example(ratio=1.3, dry_run=True)
    search = RatioSearch(1.3, lambda ratio: {"a": ratio}, lambda found: 1.29, time=limit)  # type: ignore[dict-item]
    assert search.propose() is not None
    clock.now += 45
    search.refuse(found.report.verification)  # type: ignore[arg-type]
    assert search.propose() is None
    assert limit.left_out == ["a fit that corrects the ratio"]


def test_what_is_under_way_is_given_up_before_the_time_is_over() -> None:
    clock, seen = Clock(), list[str]()
    limit = TimeLimit(100, clock)
    watched = limit.watching(lambda stage, done, total: seen.append(stage))
    assert watched is not None
    clock.now = 87
    watched("decompose", 1, 3)
    clock.now = 89
    watched("verify", 1, 3)
    with pytest.raises(OutOfTime, match=r"100 s were not enough.*decompose had come to 2 of 3; allow more"):
        watched("decompose", 2, 3)
    assert seen == ["decompose", "verify", "decompose"]
    assert TimeLimit().watching(None) is None


@pytest.fixture(scope="module")
def hurried() -> onnx_lrsd.Result:
    """The example, by a clock of which every look takes a second, in a time that is soon over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnx_lrsd.run.TimeLimit", lambda seconds: TimeLimit(seconds, Clock(1.0)))
        return example(time="45s", max_error=0.02)


@pytest.mark.slow
def test_stages_leave_out_what_has_no_time(hurried: onnx_lrsd.Result) -> None:
    said = hurried.report.left_out
    assert any("samples to calibrate on" in what for what in said)
    assert any("smaller forms of" in what or "the channels between" in what for what in said)
    left = [layer for layer in hurried.report.layers if "no time was left" in layer.reason]
    others = [layer for layer in hurried.report.layers if layer not in left]
    assert max(layer.macs_before for layer in left) < max(layer.macs_before for layer in others)


@pytest.mark.slow
def test_what_was_left_out_is_in_the_table_and_the_json(hurried: onnx_lrsd.Result) -> None:
    told = json.loads(report_to_json(hurried.report))["time"]
    assert told == {"limit": 45.0, "left_out": list(hurried.report.left_out)}
    assert "Left out to take at most 45 s: " in " ".join(report_table(hurried.report).split())
    unhurried = example(ratio=1.3, dry_run=True).report
    assert unhurried.time is None and json.loads(report_to_json(unhurried))["time"] is None
    assert "Left out" not in report_table(unhurried)


@pytest.mark.slow
def test_a_run_takes_at_most_what_it_may() -> None:
    start = time.perf_counter()
    result = example(time=8, max_error=0.02)
    assert time.perf_counter() - start < 1.1 * 8
    assert result.report.promise is not None and result.report.verification is not None


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_a_prediction_that_is_off_by_a_factor_leads_a_search_to_its_end_in_few_fits(factor: float) -> None:
    made = list[float]()

    def make(ratio: float) -> float:
        made.append(ratio)
        return ratio

    def predicted(ratio: float) -> float:
        return (ratio - 1) ** 4

    def error(ratio: float) -> float:
        return factor * predicted(ratio)

    for with_prediction in (predicted, None):
        made.clear()
        search = Search(2.0, make, error, ErrorLimit(0.01, ""), predicted=with_prediction)
        found = search.propose()
        assert found is not None and error(found) <= 0.009
        if with_prediction is not None:
            few = len(made)
            assert few <= 3 and error(found) > 0.006
    assert few < len(made)
