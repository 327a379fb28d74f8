"""Does the promise hold? Random splits, --max-drop D, and the drop on samples that nobody has seen.

    python -m benchmarks promise FOLDER... [--splits 20] [--drop 1] [--samples N]
    python -m benchmarks promise FOLDER... --ratio R [--int8] [--splits 5] [--samples N] [--json FILE]
    python -m benchmarks promise --show FILE

For each split, N of the calibration samples
fit, half of the evaluation samples go to the tool (which searches on half of these and confirms on the
others), and the rest are held out. A row gives how often the tool kept its promise by its own account, how
often the held-out drop then exceeds D, by how much at most, and how often by more than chance explains (the
95 % interval of the held-out drop lies above D).

With --ratio: how far results scatter. Each split draws the samples to fit on and seeds what the tool draws;
all evaluation samples are held out. A row has the median over the splits and, in parentheses, the range of
MACs, latency, points of score lost, the error that the tool says and that on the held-out samples.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import onnx_lrsd
from benchmarks.options import JSON, LIMIT, heading
from benchmarks.prepared import Prepared, read
from onnx_lrsd.runtime.timing import pair_latency

OPTIONS = (LIMIT, JSON)
FITTED_ON = 200
"""Calibration samples of each split, unless --samples says otherwise."""


SPLITS, SEEDS = 20, 5
"""Splits of a promise, and of a ratio."""


def in_a_moment(*runs: Any, **options: Any) -> Any:
    """``pair_latency`` with the fewest rounds: what is judged here is the score."""
    return pair_latency(*runs, **{**options, "seconds": 0.0})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="a prepared model")
    parser.add_argument("--splits", type=int, help="[default: 20; with --ratio 5]")
    parser.add_argument("--drop", type=float, default=1.0)
    parser.add_argument("--ratio", type=float, metavar="R", help="how far results for --ratio R scatter")
    parser.add_argument("--int8", action="store_true", help="with --ratio: int8 as well")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of what --json wrote")


def row(case: Prepared, splits: int, fitted_on: int, allowed: float) -> str:
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


def run(given: argparse.Namespace) -> None:
    """Print a row for each folder."""
    if given.show is not None:
        print("\n".join([SPREAD, *spread(json.loads(given.show.read_text()))]))
    elif given.ratio is not None:
        _run_spread(given)
    else:
        _run_promise(given)


def _run_spread(given: argparse.Namespace) -> None:
    rows = json.loads(given.json.read_text()) if given.json is not None and given.json.exists() else []
    start = len(rows)
    print(SPREAD)
    for folder in given.folders:
        case = read(folder)
        for seed in range(given.splits or SEEDS):
            rows.append(scattered(case, seed, given.samples or FITTED_ON, given.ratio, given.int8))
            if given.json is not None:
                given.json.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(spread(rows[start:])))


def _run_promise(given: argparse.Namespace) -> None:
    titles = "model", "splits", "kept", "MACs, mean", "held-out drop, mean", "above D", "worst"
    print(heading(*titles, "beyond chance"))
    with patch("onnx_lrsd.measure.compare.pair_latency", in_a_moment):
        for folder in given.folders:
            fitted_on = given.samples or FITTED_ON
            print(row(read(folder), given.splits or SPLITS, fitted_on, given.drop), flush=True)
