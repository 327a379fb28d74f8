"""What the rules of the fit are worth on data unlike the calibration samples.

    python benchmarks/unlike.py FOLDER --ratio R [--samples N]

A FOLDER holds model.onnx and calib.npz of a classifier. One plan, fitted on N samples by several rules and
judged on others: drawn from all alike, or *unlike*, fitted on those of the first half of the classes, as the
model names them, and judged on those of the second.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np

import onnx_lrsd
from models import outputs
from onnx_lrsd.dataset import Samples, read_samples
from onnx_lrsd.model import load
from onnx_lrsd.runtime import inputs_of

RULES: dict[str, tuple[str, str, float]] = {
    **{f"damping {each}": ("onnx_lrsd.solver.whiten", "OF_SAMPLES", each) for each in (3, 6, 12, 24)},
    "no original rows": ("onnx_lrsd.calibrate", "ORIGINAL", 1 << 40),
    "every second": ("onnx_lrsd.calibrate", "ORIGINAL", 2),
}
"""A constant and what it is in place of its value, by name; with damping 6 all is as the tool has it."""
JUDGES = 300
"""Samples that judge, at most."""


def errors(folder: Path, fit: Samples, judge: Samples, ratio: float) -> Iterator[float]:
    """Output error on ``judge`` by each of the rules, all with the plan that the tool makes on ``fit``."""
    model = folder / "model.onnx"
    plan = onnx_lrsd.optimize(model, fit, evaluation=judge, ratio=ratio, dry_run=True).plan
    for module, name, value in RULES.values():
        with patch.object(sys.modules[module], name, value):
            found = onnx_lrsd.optimize(model, fit, evaluation=judge, plan=plan)
        assert found.report.verification is not None
        yield found.report.verification.error


def main() -> None:
    """Print one markdown row for each way to draw the samples."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratio", type=float, required=True)
    parser.add_argument("--samples", type=int, default=200)
    given = parser.parse_args()
    source = load(given.folder / "model.onnx")
    samples = read_samples(given.folder / "calib.npz", inputs_of(source.proto))
    classes = outputs(source, samples).argmax(axis=1)
    order = np.random.default_rng(0).permutation(samples.count)
    first = 2 * classes[order] < classes.max() + 1
    ways = {
        "like": (order[: given.samples], order[given.samples :]),
        "unlike": (order[first][: given.samples], order[~first]),
    }
    print("| judged on | " + " | ".join(RULES) + " |")
    print("|---" * (len(RULES) + 1) + "|")
    for way, (fit, judge) in ways.items():
        parts = samples.take(np.sort(fit)), samples.take(np.sort(judge[:JUDGES]))
        found = errors(given.folder, *parts, given.ratio)
        print(f"| {way} | " + " | ".join(f"{error:.4f}" for error in found) + " |", flush=True)


if __name__ == "__main__":
    main()
