"""Whether what the tool says about a model holds on samples that it never saw, and what a user sees of it.

    python -m benchmarks honesty errors MODEL... [--samples N] [--judges N] [--goal default] [--timeout S]
                                                 [--json FILE]
    python -m benchmarks honesty drops FOLDER... [--drop 1] [--splits 20] [--samples N]
    python -m benchmarks honesty spread FOLDER... --ratio R [--int8] [--splits 5] [--samples N] [--json FILE]
    python -m benchmarks honesty errors|spread --show FILE
    python -m benchmarks honesty seen BEFORE.onnx AFTER.onnx DATA.npz [--first 4] [--threshold .25] [--lines]

*errors*: a MODEL is a folder with model.onnx, calib.npz and eval.npz, or an .onnx file, with a .npz of the
same name beside it or on samples that are made up, or a folder that holds such. Of files that are alike the
one with samples is taken. The model with the fewest MACs is first. With --json each row is written as it
comes, and rows that came to an end in an earlier call are kept: the same command goes on where it was cut
off. The tool gets the calibration samples alone (of one .npz, the first half) and is asked for nothing
(*default*: outputs change by at most 1 %), and for --ratio 1.5. Its result is then compared with the
original on the samples kept apart. A row has what was asked and got, the exit code of the command line, the
error that the report states, the upper end of its interval, the error on the samples kept apart (both of
the output, or group of its channels, that changed most), and the seconds. *Inside* says whether the error
apart is within the interval; where the original was handed back there is nothing to say.

*drops*: does --max-drop D hold? For each split, N of the calibration samples fit, half of the evaluation
samples go to the tool (which searches on half of these and confirms on the others), and the rest are held
out. A row gives how often the tool kept its promise by its own account, how often the held-out drop then
exceeds D, by how much at most, and how often by more than chance explains (the 95 % interval of the
held-out drop lies above D).

*spread*: how far results scatter. Each split draws the samples to fit on and seeds what the tool draws; all
evaluation samples are held out. A row has the median over the splits and, in parentheses, the range of
MACs, latency, points of score lost, the error that the tool says and that on the held-out samples.

*seen*: how many detections of a detector stay, or, with --lines, how many lines of text are read as before.
Detections are anchors whose best score is above a threshold in both models, of the same class. For models
whose one output is (samples, channels, anchors), boxes first, scores from channel FIRST on, as YOLO exports
are (prepare.py nudenet_photos). Lines are those of models that read text, with one output of scores
(samples, steps, characters): the best character of each step, repeats and the blank 0 dropped, is what is
read (prepare.py ppocrv4_rec_lines).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

import onnx_lrsd
from benchmarks.corpus import ROOT
from benchmarks.options import FOLDERS, JSON, LIMIT, heading
from benchmarks.prepared import Prepared, read
from onnx_lrsd.cli.group import BROKEN_PROMISE
from onnx_lrsd.data.made_up import GUESSES, random_samples
from onnx_lrsd.data.padding import without_padding
from onnx_lrsd.data.samples import Samples, batch_to_run, read_samples
from onnx_lrsd.errors import DataError, LrsdError
from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.compare import compare, total_price
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.runtime.timing import pair_latency
from onnx_lrsd.types import Values

OPTIONS = ()
GOALS: dict[str, dict[str, Any]] = {"default": {}, "1.5": {"ratio": 1.5}}
"""What the tool is asked for, by the name of the goal."""
MADE_UP = 60
"""Samples made up for either side."""
HIGHEST = (1000, 100, 10, 2)
"""Whole numbers that are made up are below these, tried in turn: a table ends somewhere."""
FITTED_ON = 200
"""Calibration samples of each split, unless --samples says otherwise."""


def invented(model: Model, count: int, seed: int) -> Samples:
    """Random samples that the model runs on, whole numbers included. Raises DataError if there are none."""
    session = open_session(model.proto, folder=model.folder)
    for size in GUESSES:
        for highest in HIGHEST:
            samples = varied(random_samples(session.inputs, count, seed, size=size), highest, seed)
            try:
                for feed in samples.batches(1):
                    session.run(feed)
            except LrsdError:
                continue
            return samples
    raise DataError("The model runs on no data that can be made up: put a .npz beside it.")


def varied(samples: Samples, highest: int, seed: int) -> Samples:
    """``samples`` with random whole numbers below ``highest`` in place of equal ones."""
    rng = np.random.default_rng(seed)

    def other(values: Values) -> Values:
        whole = values.dtype.kind in "iu"
        return rng.integers(0, highest, values.shape).astype(values.dtype) if whole else values

    groups = [{name: other(values) for name, values in group.items()} for group in samples.groups]
    return replace(samples, groups=groups)


def parts(path: Path) -> tuple[Path, Samples, Samples, str]:
    """The model's file, samples for the tool, samples kept apart, and where they come from."""
    if path.is_dir():
        model = path / "model.onnx"
        inputs = inputs_of(load(model).proto)
        if (path / "calib.npz").exists():
            calibration, apart = (read_samples(path / f"{part}.npz", inputs) for part in ("calib", "eval"))
            return model, calibration, apart, "given"
        path = model
    source = load(path)
    beside = path.with_suffix(".npz")
    if beside.exists():
        every = read_samples(beside, inputs_of(source.proto))
        half = every.count // 2
        return path, every.take(slice(half)), every.take(slice(half, None)), "given"
    return path, invented(source, MADE_UP, 0), invented(source, MADE_UP, 1), "made up"


def models(paths: Iterable[Path]) -> list[Path]:
    """The models at ``paths`` and in the folders there, each once, by their MACs; those without layers go."""
    found = dict[str, tuple[bool, Path]]()
    for path in paths:
        for each in [path] if path.is_file() or (path / "model.onnx").exists() else sorted(path.iterdir()):
            file = each / "model.onnx" if each.is_dir() else each
            if file.suffix != ".onnx" or not file.exists():
                continue
            given = (each / "calib.npz").exists() or file.with_suffix(".npz").exists()
            key = hashlib.sha256(file.read_bytes()).hexdigest()
            if key not in found or given > found[key][0]:
                found[key] = given, each
    return sorted((path for _, path in found.values()), key=_macs)


def _macs(path: Path) -> int:
    """MACs of one sample; all that cannot be counted is last."""
    model = load(path / "model.onnx" if path.is_dir() else path)
    try:
        given = path / "calib.npz" if path.is_dir() else path.with_suffix(".npz")
        few = (
            read_samples(given, inputs_of(model.proto), limit=64) if given.exists() else invented(model, 2, 0)
        )
        return total_price(model, few).macs
    except LrsdError:
        return sys.maxsize


def name_of(path: Path) -> str:
    """What tables call a model."""
    return path.parent.name if path.name == "model.onnx" else path.name


def errors_of(path: Path, goal: str, limit: int | None, judges: int) -> dict[str, Any]:
    """What the tool says, and what is found on samples kept apart."""
    facts: dict[str, Any] = {"model": name_of(path), "asked": goal}
    try:
        model, calibration, apart, origin = parts(path)
    except LrsdError as error:
        return facts | {"code": None, "says": str(error)}
    if limit is not None:
        calibration = calibration.take(slice(limit))
    apart = apart.take(slice(judges))
    source = load(model)
    facts |= {"samples": calibration.count, "data": origin}
    start = time.perf_counter()
    try:
        result, report, _ = onnx_lrsd.optimize(model, calibration, **GOALS[goal])
    except LrsdError as error:
        said = str(error).replace(f"{path.parent}/", "")
        return facts | {"code": error.code, "says": said, "seconds": round(time.perf_counter() - start, 1)}
    facts["seconds"] = round(time.perf_counter() - start, 1)
    found, promise = report.verification, report.promise
    assert found is not None and promise is not None
    return facts | {
        "code": 0 if promise.kept else BROKEN_PROMISE,
        "kept": promise.kept,
        "got": promise.got,
        "macs": found.before.macs / max(found.after.macs, 1),
        "latency": found.latency_ratio,
        "same": result.proto.SerializeToString() == source.proto.SerializeToString(),
        "error": found.error,
        "interval": found.error_interval,
        "apart": compare(source, result, without_padding(source, apart), latency=False).error,
        "judges": apart.count,
        "warnings": [said.replace(f"{path.parent}/", "") for said in report.warnings],  # rows are published
    }


def inside(row: dict[str, Any]) -> bool | None:
    """Whether the error apart is within the interval; None where nothing changed or there is none."""
    if row.get("apart") is None or row["same"] or not row.get("interval"):
        return None
    return bool(row["apart"] <= row["interval"][1])


def errors_line(row: dict[str, Any]) -> str:
    """One row of the table."""
    start = f"| {row['model']} | {row['asked']} |"
    if "says" in row:
        return f"{start} {row['code']} | {row['says']} | | | | | | | {row.get('seconds', '')} |"
    kept = "handed back" if row["same"] else "kept" if row["kept"] else "not kept"
    upper = "" if not row["interval"] else f"{row['interval'][1]:.3g}"
    within = {None: "", True: "yes", False: "NO"}[inside(row)]
    latency = "" if row["latency"] is None else f"{row['latency']:.2f} x"
    return (
        f"{start} {row['code']} | {kept} | {row['macs']:.2f} x | {latency} | {row['error']:.3g} | {upper} "
        f"| {row['apart']:.3g} | {within} | {row['seconds']} |"
    )


ERRORS = heading(
    *("model", "asked", "exit", "came out", "MACs", "latency", "error said", "at most", "error apart"),
    *("inside", "s"),
)


def counts(rows: list[dict[str, Any]]) -> str:
    """How many gave a changed model, and how many intervals hold."""
    judged = [known for known in map(inside, rows) if known is not None]
    changed = sum("says" not in row and not row["same"] for row in rows)
    held = f"{sum(judged)} of {len(judged)} intervals hold"
    return f"\n{len(rows)} runs, {changed} gave a changed model; {held}."


def run_errors(given: argparse.Namespace) -> None:
    """Run every model and goal in a process of its own, and print the table."""
    if given.show is not None:
        rows = json.loads(given.show.read_text())
        print("\n".join([ERRORS, *map(errors_line, rows), counts(rows)]))
        return
    if given.here:
        print(json.dumps(errors_of(given.models[0], given.goal[0], given.samples, given.judges)))
        return
    rows = kept_rows(given.json)
    print("\n".join([ERRORS, *map(errors_line, rows)]), flush=True)
    done = {(row["model"], row["asked"]) for row in rows}
    for path in models(given.models):
        for goal in given.goal or GOALS:
            if (name_of(path), goal) in done:
                continue
            rows.append(apart_from_us(path, goal, given))
            print(errors_line(rows[-1]), flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(counts(rows))


def kept_rows(file: Path | None) -> list[dict[str, Any]]:
    """The rows in ``file`` that came to an end."""
    if file is None or not file.exists():
        return []
    return [row for row in json.loads(file.read_text()) if row["code"] is not None]


def apart_from_us(path: Path, goal: str, given: argparse.Namespace) -> dict[str, Any]:
    """``errors_of`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "honesty", "errors", str(path.resolve()), "--here"]
    command += ["--goal", goal, "--judges", str(given.judges)]
    if given.samples is not None:
        command += ["--samples", str(given.samples)]
    failed = {"model": name_of(path), "asked": goal, "code": None}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=given.timeout, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return failed | {"says": f"not done after {given.timeout:g} s"}
    if done.returncode:
        sys.stderr.write(done.stderr)
        return failed | {"says": f"FAILED: {done.stderr.strip().splitlines()[-1:]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def in_a_moment(*runs: Any, **options: Any) -> Any:
    """``pair_latency`` with the fewest rounds: what is judged here is the score."""
    return pair_latency(*runs, **{**options, "seconds": 0.0})


def drops_of(case: Prepared, splits: int, fitted_on: int, allowed: float) -> str:
    """The row of one model."""
    ratios, drops, sure = [], [], 0
    for seed in range(splits):
        fit_on = case.calibration.split(fitted_on, seed)[1]
        shown, held = case.evaluation.split(0.5, seed)
        result = onnx_lrsd.optimize(case.source.proto, fit_on, evaluation=shown, max_drop=allowed, seed=seed)
        promise, found = result.report.promise, result.report.verification
        assert promise is not None and found is not None
        if not promise.kept:
            continue
        score = onnx_lrsd.compare(case.source, result.model, held, latency=False).metric
        assert score is not None
        ratios.append(found.before.macs / found.after.macs)
        drops.append(100 * (score.before - score.after))
        sure += -100 * score.interval[1] > allowed
    above = sum(drop > allowed for drop in drops)
    means = " | ".join(f"{np.mean(values):.2f}" if values else "" for values in (ratios, drops))
    worst = f"{max(drops):+.2f}" if drops else ""
    return f"| {case.name} | {splits} | {len(drops)} | {means} | {above} | {worst} | {sure} |"


def scattered(case: Prepared, seed: int, fitted_on: int, ratio: float, int8: bool) -> dict[str, Any]:
    """What one split gives."""
    fit_on = case.calibration.split(fitted_on, seed)[1]
    model, report, _ = onnx_lrsd.optimize(case.source.proto, fit_on, ratio=ratio, int8=int8, seed=seed)
    found = report.verification
    assert found is not None
    return {
        "model": case.name,
        "asked": f"--ratio {ratio:g}{' --int8' if int8 else ''}",
        "samples": fitted_on,
        "seed": seed,
        "macs": found.before.macs / found.after.macs,
        "latency": found.latency_ratio,
        "bytes": found.before.bytes / found.after.bytes,
        "lost": 100 * (case.score_before - case.score(model)),
        "error": found.error,
        "bound": found.error_bound,
        "apart": onnx_lrsd.compare(case.source, model, case.evaluation, latency=False).error,
    }


SPREAD = heading(
    *("model", "asked", "samples", "splits", "MACs", "latency", "points lost", "error said", "at most"),
    *("error apart", "inside"),
)


def spread(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    """A line for each model and goal in ``rows``: medians and ranges."""
    for key in dict.fromkeys((row["model"], row["asked"], row["samples"]) for row in rows):
        own = [row for row in rows if (row["model"], row["asked"], row["samples"]) == key]

        def figure(name: str, shape: str, own: Sequence[dict[str, Any]] = own) -> str:
            values = [row[name] for row in own]
            middle, low, high = (
                f"{value:{shape}}" for value in (np.median(values), min(values), max(values))
            )
            return f"{middle} ({low} to {high})"

        shapes = {
            "macs": ".2f",
            "latency": ".2f",
            "lost": ".2f",
            "error": ".2g",
            "bound": ".2g",
            "apart": ".2g",
        }
        inside = sum(row["apart"] <= row["bound"] for row in own)
        figures = " | ".join(figure(name, shape) for name, shape in shapes.items())
        yield f"| {' | '.join(map(str, key))} | {len(own)} | {figures} | {inside} of {len(own)} |"


def run_spread(given: argparse.Namespace) -> None:
    """Print medians and ranges for each model, of new splits or of rows that are there."""
    if given.show is not None:
        print("\n".join([SPREAD, *spread(json.loads(given.show.read_text()))]))
        return
    if given.ratio is None:
        raise SystemExit("there is nothing to scatter: give --ratio")
    rows = json.loads(given.json.read_text()) if given.json is not None and given.json.exists() else []
    start = len(rows)
    print(SPREAD)
    for folder in given.folders:
        case = read(folder)
        for seed in range(given.splits):
            rows.append(scattered(case, seed, given.samples or FITTED_ON, given.ratio, given.int8))
            if given.json is not None:
                given.json.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(spread(rows[start:])))


def run_drops(given: argparse.Namespace) -> None:
    """Print a row for each folder."""
    titles = "model", "splits", "kept", "MACs, mean", "held-out drop, mean", "above D", "worst"
    print(heading(*titles, "beyond chance"))
    with patch("onnx_lrsd.measure.compare.pair_latency", in_a_moment):
        for folder in given.folders:
            fitted_on = given.samples or FITTED_ON
            print(drops_of(read(folder), given.splits, fitted_on, given.drop), flush=True)


class Detections(NamedTuple):
    """Anchors above the threshold in the first model, in both, and in the second."""

    before: int
    stay: int
    after: int


def detections(old: npt.NDArray[Any], new: npt.NDArray[Any], threshold: float) -> Detections:
    """Count them in scores (samples, classes, anchors) of both models; the class must be the same too."""
    found, still = (scores.max(axis=1) > threshold for scores in (old, new))
    same = found & still & (old.argmax(axis=1) == new.argmax(axis=1))
    return Detections(*(int(np.sum(which)) for which in (found, same, still)))


def read_lines(scores: npt.NDArray[Any]) -> list[tuple[int, ...]]:
    """The characters that scores (samples, steps, characters) are read as, greedily.

    Source: Graves et al., Connectionist temporal classification, ICML 2006, section 3.2.
    """
    best = scores.argmax(axis=-1)
    changed = np.diff(best, axis=1, prepend=-1) != 0
    return [tuple(map(int, line[new & (line > 0)])) for line, new in zip(best, changed, strict=True)]


def run_seen(given: argparse.Namespace) -> None:
    """Print the counts."""
    before, after = (onnx_lrsd.load(path) for path in given.files[:2])
    samples = read_samples(given.files[2], inputs_of(before.proto))
    one, two = (open_session(model.proto, folder=model.folder) for model in (before, after))
    feeds = samples.batches(batch_to_run(samples))
    pairs = ((next(iter(one.run(feed).values())), next(iter(two.run(feed).values()))) for feed in feeds)
    if given.lines:
        same = [
            line == other
            for old, new in pairs
            for line, other in zip(*map(read_lines, (old, new)), strict=True)
        ]
        print(f"{len(same)} lines: {sum(same)} are read as before ({np.mean(same):.1%}).")
        return
    total = np.zeros(3, int)
    for old, new in pairs:
        total += detections(old[:, given.first :], new[:, given.first :], given.threshold)
    found = Detections(*map(int, total))
    print(f"{found.before} detections above {given.threshold:g}: {found.stay} stay, {found.after} after.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The parts and what each takes."""
    show = argparse.ArgumentParser(add_help=False)
    show.add_argument("--show", type=Path, metavar="FILE", help="print the table of what --json wrote")
    kinds = parser.add_subparsers(required=True)
    errors = kinds.add_parser("errors", parents=[LIMIT, JSON, show], help="errors of outputs")
    errors.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    errors.add_argument("--judges", type=int, default=400, help="samples kept apart, at most")
    errors.add_argument("--goal", choices=list(GOALS), action="append", help="[default: all]")
    errors.add_argument("--timeout", type=float, default=1800)
    errors.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    errors.set_defaults(part=run_errors)
    drops = kinds.add_parser("drops", parents=[FOLDERS, LIMIT], help="the promise of --max-drop")
    drops.add_argument("--splits", type=int, default=20)
    drops.add_argument("--drop", type=float, default=1.0)
    drops.set_defaults(part=run_drops)
    splits = kinds.add_parser("spread", parents=[LIMIT, JSON, show], help="how far results scatter")
    splits.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="a prepared model")
    splits.add_argument("--ratio", type=float, metavar="R")
    splits.add_argument("--int8", action="store_true", help="int8 as well")
    splits.add_argument("--splits", type=int, default=5)
    splits.set_defaults(part=run_spread)
    seen = kinds.add_parser("seen", help="detections that stay, or lines of text as they were read")
    seen.add_argument("files", type=Path, nargs=3, metavar="FILE")
    seen.add_argument("--first", type=int, default=4, help="first channel of scores")
    seen.add_argument("--threshold", type=float, default=0.25)
    seen.add_argument("--lines", action="store_true", help="compare lines of text")
    seen.set_defaults(part=run_seen)


def run(given: argparse.Namespace) -> None:
    """Run one of them."""
    given.part(given)
