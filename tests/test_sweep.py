"""A sweep: models for several ratios from one calibration, each measured, and the last within the promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from onnx_lrsd import OptionError, cli
from onnx_lrsd.cli import making
from onnx_lrsd.commands.sweep import SweepOptions, sweep
from onnx_lrsd.facts import ModelCost, OutputError, Promise, Sweep, SweepPoint, Verification
from onnx_lrsd.report import report_page, sweep_table, sweep_to_json
from onnx_lrsd.runtime.timing import pair_latency

RATIOS = (1.5, 3.0, 500.0)


def a_model() -> onnx.ModelProto:
    """Two 3 x 3 convolutions of 64 channels, whose weights have a falling spectrum."""
    rng = np.random.default_rng(0)
    nodes, tensors = [], []
    for index in range(2):
        left = rng.standard_normal((64, 64)) * 0.8 ** np.arange(64)
        weight = (left @ rng.standard_normal((64, 576)) / 20).reshape(64, 64, 3, 3)
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"w{index}"))
        ends = f"t{index}", "y" if index else "t1"
        nodes.append(
            helper.make_node("Conv", [ends[0], f"w{index}"], [ends[1]], f"conv{index}", pads=[1] * 4)
        )
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 64, 12, 12]) for name in ("t0", "y")
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def hasty() -> Any:
    """Latency is measured for a moment only, and comes out as fewer MACs would have it."""
    patch = pytest.MonkeyPatch()

    def for_a_moment(*runs: Any, **options: Any) -> Any:
        return pair_latency(*runs, **{**options, "seconds": 0.05, "min_rounds": 1})

    patch.setattr("onnx_lrsd.measure.compare.pair_latency", for_a_moment)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("sweep")
    onnx.save(a_model(), found / "net.onnx")
    np.savez(
        found / "calib.npz", t0=np.random.default_rng(1).standard_normal((40, 64, 12, 12)).astype(np.float32)
    )
    return found


@pytest.fixture(scope="module")
def found(folder: Path, hasty: None) -> Sweep:
    options = SweepOptions(ratios=RATIOS, int8=True, cost="parameters", max_error=0.2)
    return sweep(folder / "net.onnx", folder / "calib.npz", folder=folder, options=options)


def named(found: Sweep) -> dict[str, SweepPoint]:
    return {Path(point.output).name: point for point in found.points}


def test_there_is_a_valid_model_for_each_ratio_with_and_without_int8(found: Sweep, folder: Path) -> None:
    points = named(found)
    assert list(points) == [
        "net.1.5x.onnx",
        "net.3x.onnx",
        "net.int8.onnx",
        "net.1.5x.int8.onnx",
        "net.3x.int8.onnx",
    ]
    for name, point in points.items():
        onnx.checker.check_model(str(folder / name), full_check=True)
        assert point.int8 == ("int8" in name)
        if point.ratio is not None and not point.int8:
            seen = point.verification
            assert seen.before.parameters / seen.after.parameters >= point.ratio
    assert any("at most" in said and "times cheaper" in said for said in found.warnings), "500 x is beyond it"


def test_each_model_is_measured_beside_the_original(found: Sweep) -> None:
    for point in found.points:
        seen = point.verification
        assert seen.latency_ratio is not None and seen.latency_interval is not None
        assert seen.before.latency_ms == found.points[0].verification.before.latency_ms
        before, after = seen.before.latency_ms, seen.after.latency_ms
        assert before is not None and after is not None
        assert before / after == pytest.approx(seen.latency_ratio)
        low, high = seen.error_interval
        assert 0 < low <= seen.error <= high
        assert point.promise.kind == "max_error" and point.promise.kept == (high <= 0.2)
    errors = {name: point.verification.error for name, point in named(found).items()}
    assert errors["net.1.5x.onnx"] < errors["net.3x.onnx"] < errors["net.3x.int8.onnx"]


def test_the_best_is_the_one_that_gains_most_of_those_that_keep_the_promise(found: Sweep) -> None:
    assert found.gains == "parameters" and found.best is not None
    best = found.points[found.best]

    def gain(point: SweepPoint) -> float:
        return point.verification.before.parameters / point.verification.after.parameters

    kept = [point for point in found.points if point.promise.kept]
    assert best.promise.kept and gain(best) == max(map(gain, kept))
    assert Path(best.output).name in sweep_table(found).split("gains most")[1]


def test_one_ratio_is_not_asked_of_a_sweep(folder: Path) -> None:
    with pytest.raises(OptionError, match="ratio=2 cannot go with a sweep: give ratios"):
        SweepOptions(ratio=2)
    for wrong in ((), (0.5,), ("2",), 2):
        with pytest.raises(OptionError, match="no list of numbers of at least 1"):
            SweepOptions(ratios=wrong)  # type: ignore[arg-type]


# The command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, ["sweep", *map(str, arguments)])


def a_point(ratio: float | None, int8: bool, speed: float, error: float, most: float = 0.01) -> SweepPoint:
    before, after = ModelCost(4000, 1000, 10**6, 2.0), ModelCost(2000, 500, 10**6, 2.0 / speed)
    output = OutputError("y", error, error_interval=(error / 2, error * 2))
    seen = Verification(
        before=before,
        after=after,
        latency_ratio=speed,
        latency_interval=(speed * 0.9, speed * 1.1),
        outputs=(output,),
        samples=50,
    )
    kept = Promise("max_error", most, error * 2, 2 * error <= most)
    return SweepPoint(ratio=ratio, int8=int8, output="m.onnx", verification=seen, promise=kept)


def a_sweep(best: int | None = 1) -> Sweep:
    points = (
        a_point(1.5, False, 1.4, 0.001),
        a_point(2, False, 1.8, 0.003),
        a_point(3, False, 2.5, 0.05),
        a_point(None, True, 2.0, 0.02),
        a_point(1.5, True, 3.0, 0.02),
    )
    return Sweep(
        input="net.onnx",
        target="onnxruntime",
        cost="macs",
        gains="latency",
        calibration_samples=40,
        calibration_source="calib.npz",
        points=points,
        best=best,
        warnings=("Few samples: give more.",),
    )


@pytest.mark.parametrize("best", [1, None])
def test_the_command_writes_json_and_a_page_and_exits_3_where_nothing_is_gained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int | None
) -> None:
    asked = {}

    def instead(model: Path, calibration: str, **options: Any) -> Sweep:
        asked.update(options)
        return a_sweep(best)

    monkeypatch.setattr(making, "sweep", instead)
    place = tmp_path / "new" / "folder"
    result = run(
        "net.onnx", "--calib", "c.npz", "--ratios", "1.2, 2", "--int8", "--max-error", 0.05, "-o", place
    )
    assert result.exit_code == (0 if best is not None else 3), result.stderr
    assert asked["options"] == SweepOptions(ratios=(1.2, 2.0), int8=True, max_error=0.05)
    facts = json.loads((place / "sweep.json").read_text())
    assert facts["best"] == best and len(facts["points"]) == 5
    assert (place / "sweep.html").read_text().startswith("<!")
    assert "Few samples" in result.stderr and result.stdout == ""


def test_a_sweep_may_stand_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def instead(model: Path, calibration: str, **options: Any) -> Sweep:
        asked.update(options)
        return a_sweep()

    monkeypatch.setattr(making, "sweep", instead)
    typed = ["net.onnx", "--ratios", "1.25,4", "-o", tmp_path / "out"]
    printed = run(*typed, "--print-config")
    assert printed.exit_code == 0 and "ratios = [1.25, 4.0]" in printed.stdout
    assert not (tmp_path / "out").exists()
    (tmp_path / "lrsd.toml").write_text(printed.stdout)
    assert run("-c", tmp_path / "lrsd.toml").exit_code == 0
    assert asked["options"] == SweepOptions(ratios=(1.25, 4.0))


@pytest.mark.parametrize("wrong", ["--ratio 2", "--ratios a", "--ratios 0.5", "--ratios 2 --int8"])
def test_wrong_usage_of_a_sweep_exits_2(tmp_path: Path, wrong: str) -> None:
    result = run("net.onnx", "-o", tmp_path / "out", *wrong.split())
    assert result.exit_code == 2 and "Error: " in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_report_page_of_a_sweep_is_small_and_loads_nothing() -> None:
    page = report_page(sweep_to_json(a_sweep()))
    assert len(page) < 200_000
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "")
