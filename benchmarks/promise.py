"""Does the promise hold? Random splits, --max-drop D, and the drop on samples that nobody has seen.

    python benchmarks/promise.py FOLDER... [--splits 20] [--drop 1] [--samples N]

A FOLDER holds model.onnx, calib.npz and eval.npz with labels. For each split, N of the calibration samples
fit, half of the evaluation samples go to the tool (which searches on half of these and confirms on the
others), and the rest are held out. A row gives how often the tool kept its promise by its own account, how
often the held-out drop then exceeds D, by how much at most, and how often by more than chance explains (the
95 % interval of the held-out drop lies above D).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import onnx_lrsd
from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.runtime.session import inputs_of
from onnx_lrsd.runtime.timing import pair_latency


def in_a_moment(*runs: Any, **options: Any) -> Any:
    """``pair_latency`` with the fewest rounds: what is judged here is the score."""
    return pair_latency(*runs, **{**options, "seconds": 0.0})


def main() -> None:
    """Print a row for each folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--drop", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=200)
    given = parser.parse_args()
    onnx_lrsd.measure.compare.pair_latency = in_a_moment  # type: ignore[attr-defined]
    print(
        "| model | splits | kept | MACs, mean | held-out drop, mean | above D | worst | beyond chance |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for folder in given.folders:
        source = onnx_lrsd.load(folder / "model.onnx")
        calibration, evaluation = (
            read_samples(folder / f"{part}.npz", inputs_of(source.proto)) for part in ("calib", "eval")
        )
        ratios, drops, sure = [], [], 0
        for seed in range(given.splits):
            fit_on = calibration.split(given.samples, seed)[1]
            shown, held = evaluation.split(0.5, seed)
            result = onnx_lrsd.optimize(
                source.proto, fit_on, evaluation=shown, max_drop=given.drop, seed=seed
            )
            promise, found = result.report.promise, result.report.verification
            assert promise is not None and found is not None
            if not promise.kept:
                continue
            score = onnx_lrsd.compare(source, result.model, held, latency=False).metric
            assert score is not None
            ratios.append(found.before.macs / found.after.macs)
            drops.append(100 * (score.before - score.after))
            sure += -100 * score.interval[1] > given.drop
        above = [drop for drop in drops if drop > given.drop]
        mean_ratio, mean_drop = (f"{np.mean(x):.2f}" if x else "" for x in (ratios, drops))
        worst = f"{max(drops):+.2f}" if drops else ""
        print(
            f"| {folder.name} | {given.splits} | {len(drops)} | {mean_ratio} x | {mean_drop} | {len(above)} "
            f"| {worst} | {sure} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
