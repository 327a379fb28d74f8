"""Does the promise hold? Random splits, --max-drop D, and the drop on samples that nobody has seen.

    python -m benchmarks promise FOLDER... [--splits 20] [--drop 1] [--samples N]

For each split, N of the calibration samples
fit, half of the evaluation samples go to the tool (which searches on half of these and confirms on the
others), and the rest are held out. A row gives how often the tool kept its promise by its own account, how
often the held-out drop then exceeds D, by how much at most, and how often by more than chance explains (the
95 % interval of the held-out drop lies above D).
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest.mock import patch

import numpy as np

import onnx_lrsd
from benchmarks.options import FOLDERS, LIMIT, heading
from benchmarks.prepared import Prepared, read
from onnx_lrsd.runtime.timing import pair_latency

OPTIONS = (FOLDERS, LIMIT)
FITTED_ON = 200
"""Calibration samples of each split, unless --samples says otherwise."""


def in_a_moment(*runs: Any, **options: Any) -> Any:
    """``pair_latency`` with the fewest rounds: what is judged here is the score."""
    return pair_latency(*runs, **{**options, "seconds": 0.0})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--drop", type=float, default=1.0)


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


def run(given: argparse.Namespace) -> None:
    """Print a row for each folder."""
    titles = "model", "splits", "kept", "MACs, mean", "held-out drop, mean", "above D", "worst"
    print(heading(*titles, "beyond chance"))
    with patch("onnx_lrsd.measure.compare.pair_latency", in_a_moment):
        for folder in given.folders:
            fitted_on = given.samples or FITTED_ON
            print(row(read(folder), given.splits, fitted_on, given.drop), flush=True)
