"""Plain use on the command line: no goal, no samples, a terminal that watches or none."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_lrsd import cli
from onnx_lrsd.measure.compare import Pace
from onnx_lrsd.report.progress import BarProgress, PlainProgress

Values = npt.NDArray[Any]
CHANNELS, SIDE = 32, 12


def model_of(rank: int, noise: float) -> onnx.ModelProto:
    """A 3 x 3 convolution whose weight is of this rank, but for noise of this share of its energy."""
    rng = np.random.default_rng(0)
    n, m = CHANNELS, 9 * CHANNELS
    weight = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, m)) / np.sqrt(rank * m)
    weight += np.sqrt(noise / m) * rng.standard_normal((n, m))
    tensor = numpy_helper.from_array(weight.reshape(n, CHANNELS, 3, 3).astype(np.float32), "w")
    ends = [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["N", CHANNELS, SIDE, SIDE]) for x in "xy"]
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1, 1, 1, 1])
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def images(count: int, seed: int) -> Values:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, CHANNELS, SIDE, SIDE)).astype(np.float32)


def outputs(path: Path, x: Values) -> Values:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is timed is clearly faster: these tests are about outputs and words."""
    pace = Pace(ratio=2.0, interval=(1.9, 2.1), before_ms=2.0, after_ms=1.0)
    monkeypatch.setattr("onnx_lrsd.measure.compare._pace", lambda *_, **__: pace)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with model.onnx, nearly of low rank, and calib.npz."""
    onnx.save(model_of(8, 0.001), tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=images(40, 1))
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def relative_error(folder: Path, name: str) -> float:
    """Squared change of the outputs over their variance, on samples that the tool never saw."""
    x = images(30, 2)
    before, after = outputs(folder / "model.onnx", x), outputs(folder / name, x)
    return float(np.mean((before - after) ** 2) / np.var(before))


def test_without_a_goal_the_outputs_change_by_at_most_a_hundredth(folder: Path, fast: None) -> None:
    report = folder / "report.json"
    result = run("optimize", folder / "model.onnx", "--calib", folder / "calib.npz", "--json", report)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(report.read_text())
    assert facts["promise"]["kind"] == "max_error" and facts["promise"]["asked"] == 0.01
    assert facts["promise"]["kept"]
    assert facts["after"]["macs"] < 0.7 * facts["before"]["macs"]
    assert 0 < relative_error(folder, "model.lrsd.onnx") <= 0.01
    assert "error" in result.stderr and "kept" in result.stderr


def test_max_error_is_what_may_change(folder: Path, fast: None) -> None:
    command = "optimize", folder / "model.onnx", "--calib", folder / "calib.npz", "--max-error"
    for most in (0.3, 0.02):
        result = run(*command, most, "-o", folder / f"{most}.onnx")
        assert result.exit_code == 0, result.stderr
        assert relative_error(folder, f"{most}.onnx") <= most
    sizes = [(folder / f"{most}.onnx").stat().st_size for most in (0.3, 0.02)]
    assert sizes[0] < sizes[1] < (folder / "model.onnx").stat().st_size


def test_a_model_that_bears_nothing_comes_back_as_it_was(tmp_path: Path, fast: None) -> None:
    onnx.save(model_of(CHANNELS, 1.0), tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=images(40, 1))
    command = "optimize", tmp_path / "model.onnx", "--calib", tmp_path / "calib.npz", "--max-error", 1e-6
    result = run(*command)
    assert result.exit_code in (0, 3), result.stderr
    assert relative_error(tmp_path, "model.lrsd.onnx") <= 1e-6


def test_a_model_without_layers_is_told_what_may_help(folder: Path) -> None:
    found = run("optimize", folder / "model.onnx", "--ratio", "2", "--include", "stem")
    assert found.exit_code == 1 and "name layers as `onnx-lrsd inspect` lists them" in found.stderr
    table = numpy_helper.from_array(np.ones((300, 64), np.float32), "table")
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["N"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 64])
    graph = helper.make_graph([helper.make_node("Gather", ["table", "ids"], ["y"])], "g", [ids], [y], [table])
    path = folder / "table.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    found = run("optimize", path, "--ratio", "2")
    assert found.exit_code == 1 and found.stderr.endswith("or make its file smaller with --target size.\n")


def test_without_samples_the_weights_decide_and_a_warning_says_so(folder: Path, fast: None) -> None:
    result = run("optimize", folder / "model.onnx", "--ratio", 2)
    assert result.exit_code == 0, result.stderr
    assert "--calib" in result.stderr and "Warning" in result.stderr
    onnx.checker.check_model(str(folder / "model.lrsd.onnx"), full_check=True)
    x = images(4, 2)
    before, after = outputs(folder / "model.onnx", x), outputs(folder / "model.lrsd.onnx", x)
    assert np.mean((before - after) ** 2) < 0.5 * np.var(before)


@pytest.mark.slow
def test_without_a_terminal_nothing_is_drawn(folder: Path) -> None:
    command = [sys.executable, "-m", "onnx_lrsd", "compare", *2 * ["model.onnx"], "--data", "calib.npz"]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b""
    assert b"\r" not in done.stderr.replace(os.linesep.encode(), b"") and b"\x1b" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("quiet", [False, True])
def test_on_a_terminal_a_bar_is_drawn_and_wiped_unless_quiet(folder: Path, quiet: bool) -> None:
    import pty

    command = [sys.executable, "-m", "onnx_lrsd", "compare", *2 * ["model.onnx"], "--data", "calib.npz"]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [*command, *["--quiet"] * quiet], cwd=folder, stderr=theirs, stdout=subprocess.PIPE, env=environment
    ) as process:
        os.close(theirs)
        seen = read_all(ours)
        assert process.stdout is not None and process.stdout.read() == b""
    os.close(ours)
    assert process.returncode == 0, seen
    if quiet:
        assert not seen
    else:
        drawn, _, after = seen.rpartition("verify")  # the stage
        assert "\r" in drawn
        assert re.search(r"\x1b\[2?K", after[: after.index("latency")]), (
            "the bar is wiped before the table comes"
        )


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds pass between any two reports of progress."""
    ticks = itertools.count(step=2)
    monkeypatch.setattr("onnx_lrsd.report.progress.monotonic", lambda: float(next(ticks)))


LINE = re.compile(r"(.+?)(?: (\d+) %(?:, about \d+ (?:s|min) left)?)?")


def test_without_a_terminal_stages_steps_and_time_left_are_plain_lines(
    folder: Path, fast: None, slow_clock: None
) -> None:
    result = run("optimize", folder / "model.onnx", "--calib", folder / "calib.npz", "--int8")
    assert result.exit_code == 0, result.stderr
    head = result.stderr[: result.stderr.index("model.onnx")].splitlines()
    stages = {match[1] for line in head if (match := LINE.fullmatch(line))}
    assert {"calibrate", "curves", "sensitivity", "decompose", "int8", "verify"} <= stages
    assert any(stage.startswith("fit 1 of at most 6: ") for stage in stages)
    assert "verify 100 %" in head
    quiet = run("optimize", folder / "model.onnx", "--calib", folder / "calib.npz", "--int8", "-q")
    assert quiet.stderr == ""


def test_a_stage_is_a_line_each_tenth_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [0.0], list[str]()
    monkeypatch.setattr("onnx_lrsd.report.progress.monotonic", lambda: now[0])
    progress = PlainProgress(lines.append)
    for done in range(101):
        now[0] += 0.5
        progress("calibrate", done, 100)
    percents = [int(line.split()[1]) for line in lines]
    assert [percent // 10 for percent in percents] == list(range(11))
    assert lines[3] == f"calibrate 30 %, about {70 * 0.5:.0f} s left" and lines[-1] == "calibrate 100 %"
    now[0] += 3000
    progress("verify", 1, 3)
    now[0] += 600
    progress("verify", 2, 3)
    assert lines[-2:] == ["verify 33 %", "verify 66 %, about 10 min left"]


@given(
    st.lists(
        st.tuples(st.sampled_from(["fit", "verify"]), st.integers(0, 5), st.integers(5, 8), st.floats(0, 3))
    )
)
def test_no_two_lines_come_within_a_second(reports: list[tuple[str, int, int, float]]) -> None:
    now, said = 0.0, [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnx_lrsd.report.progress.monotonic", lambda: now)
        progress = PlainProgress(lambda line: said.append(now))
        for stage, done, total, pause in reports:
            now += pause
            progress(stage, done, total)
    assert all(later - earlier >= 1 for earlier, later in itertools.pairwise(said))


def test_a_step_that_comes_too_soon_is_said_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [10.0], list[str]()
    monkeypatch.setattr("onnx_lrsd.report.progress.monotonic", lambda: now[0])
    progress = PlainProgress(lines.append)
    progress("fit 2 of at most 6: 1.5 x", 0, 1)
    progress("decompose", 1, 10)
    assert not lines
    now[0] += 1.5
    progress("decompose", 2, 10)
    now[0] += 1.5
    progress("decompose", 3, 10)
    assert lines == ["fit 2 of at most 6: 1.5 x", "decompose 30 %, about 10 s left"]


def test_the_bar_has_the_step_the_stage_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn = [0.0], list[tuple[str, int, int, str]]()
    monkeypatch.setattr("onnx_lrsd.report.progress.monotonic", lambda: now[0])
    progress = BarProgress(lambda *what: drawn.append(what))
    progress("fit 2 of at most 6: 1.5 x", 0, 1)
    progress("decompose", 1, 4)
    now[0] += 3
    progress("decompose", 2, 4)
    assert drawn == [
        ("fit 2 of at most 6: 1.5 x", 0, 1, ""),
        ("fit 2 of at most 6: 1.5 x, decompose", 1, 4, ""),
        ("fit 2 of at most 6: 1.5 x, decompose", 2, 4, "about 6 s left"),
    ]


def read_all(terminal: int) -> str:
    """What is written to a terminal until its other side is closed."""
    parts, end = [], time.monotonic() + 120
    while time.monotonic() < end:
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # Linux says so that the other side is closed
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts).decode()
