"""Whether what the tool says about outputs holds on samples that it never saw.

    python -m benchmarks honesty MODEL... [--samples N] [--judges N] [--goal default] [--timeout S]
                                          [--json FILE]
    python -m benchmarks honesty --show FILE

A MODEL is a folder with model.onnx, calib.npz and eval.npz, or an .onnx file, with a .npz of the same name
beside it or on samples that are made up, or a folder that holds such. Of files that are alike the one with
samples is taken. The model with the fewest MACs is first. With --json each row is written as it comes, and
rows that came to an end in an earlier call are kept: the same command goes on where it was cut off.

The tool gets the calibration samples alone (of one .npz, the first
half) and is asked for nothing (*default*: outputs change by at most 1 %), and for --ratio 1.5. Its result is
then compared with the original on the samples kept apart. A row has what was asked and got, the exit code of
the command line, the error that the report states, the upper end of its interval, the error on the samples
kept apart (both of the output, or group of its channels, that changed most), and the seconds. *Inside* says
whether the error apart is within the interval; where the original was handed back there is nothing to say.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import onnx_lrsd
from benchmarks.corpus import ROOT
from benchmarks.options import JSON, LIMIT, heading
from onnx_lrsd.cli.group import BROKEN_PROMISE
from onnx_lrsd.data.made_up import GUESSES, random_samples
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.errors import DataError, LrsdError
from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.compare import compare, total_price
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.types import Values

OPTIONS = (LIMIT, JSON)
GOALS: dict[str, dict[str, Any]] = {"default": {}, "1.5": {"ratio": 1.5}}
"""What the tool is asked for, by the name of the goal."""
MADE_UP = 60
"""Samples made up for either side."""
HIGHEST = (1000, 100, 10, 2)
"""Whole numbers that are made up are below these, tried in turn: a table ends somewhere."""


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


def row(path: Path, goal: str, limit: int | None, judges: int) -> dict[str, Any]:
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
        "apart": compare(source, result, apart, latency=False).error,
        "judges": apart.count,
        "warnings": [said.replace(f"{path.parent}/", "") for said in report.warnings],  # rows are published
    }


def inside(row: dict[str, Any]) -> bool | None:
    """Whether the error apart is within the interval; None where nothing changed or there is none."""
    if row.get("apart") is None or row["same"] or not row.get("interval"):
        return None
    return bool(row["apart"] <= row["interval"][1])


def line(row: dict[str, Any]) -> str:
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


HEADING = heading(
    *("model", "asked", "exit", "came out", "MACs", "latency", "error said", "at most", "error apart"),
    *("inside", "s"),
)


def counts(rows: list[dict[str, Any]]) -> str:
    """How many gave a changed model, and how many intervals hold."""
    judged = [known for known in map(inside, rows) if known is not None]
    changed = sum("says" not in row and not row["same"] for row in rows)
    held = f"{sum(judged)} of {len(judged)} intervals hold"
    return f"\n{len(rows)} runs, {changed} gave a changed model; {held}."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--judges", type=int, default=400, help="samples kept apart, at most")
    parser.add_argument("--goal", choices=list(GOALS), action="append", help="[default: all]")
    parser.add_argument("--timeout", type=float, default=1800)
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of what --json wrote")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)


def run(given: argparse.Namespace) -> None:
    """Run every model and goal in a process of its own, and print the table."""
    if given.show is not None:
        rows = json.loads(given.show.read_text())
        print("\n".join([HEADING, *map(line, rows), counts(rows)]))
        return
    if given.here:
        print(json.dumps(row(given.models[0], given.goal[0], given.samples, given.judges)))
        return
    rows = kept_rows(given.json)
    print("\n".join([HEADING, *map(line, rows)]), flush=True)
    done = {(row["model"], row["asked"]) for row in rows}
    for path in models(given.models):
        for goal in given.goal or GOALS:
            if (name_of(path), goal) in done:
                continue
            rows.append(apart_from_us(path, goal, given))
            print(line(rows[-1]), flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(counts(rows))


def kept_rows(file: Path | None) -> list[dict[str, Any]]:
    """The rows in ``file`` that came to an end."""
    if file is None or not file.exists():
        return []
    return [row for row in json.loads(file.read_text()) if row["code"] is not None]


def apart_from_us(path: Path, goal: str, given: argparse.Namespace) -> dict[str, Any]:
    """``row`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "honesty", str(path.resolve()), "--here", "--goal", goal]
    command += ["--judges", str(given.judges)]
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
