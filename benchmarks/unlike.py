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
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np

import onnx_lrsd
from models import outputs
from onnx_lrsd.dataset import Samples, read_samples
from onnx_lrsd.model import load
from onnx_lrsd.runtime import inputs_of
from onnx_lrsd.solver import whiten
from onnx_lrsd.types import Plan

DAMPINGS = (3, 6, 12, 24)
ORIGINALS = {"no original rows": 1 << 40, "every third": 3, "every second": 2}
JUDGES = 300
"""Samples that judge, at most."""


@contextmanager
def damped(each: float) -> Iterator[None]:
    """The rule of the damping with ``each`` / samples in place of 6 / samples."""

    def rule(inputs: int, rows: int, samples: int) -> float:
        return min(0.3, max(0.01, 0.06 * inputs / max(rows, 1), each / max(samples, 1)))

    with patch.object(whiten, "relative_damping", rule):
        yield


def errors(folder: Path, fit: Samples, judge: Samples, ratio: float) -> Iterator[tuple[str, float]]:
    """Each rule with the output error on ``judge``, all with the plan that the tool makes on ``fit``."""
    plan: Plan = onnx_lrsd.optimize(
        folder / "model.onnx", fit, evaluation=judge, ratio=ratio, dry_run=True
    ).plan

    def error() -> float:
        found = onnx_lrsd.optimize(folder / "model.onnx", fit, evaluation=judge, plan=plan)
        assert found.report.verification is not None
        return found.report.verification.error

    for each in DAMPINGS:
        with damped(each):
            yield f"damping {each}", error()
    for name, every in ORIGINALS.items():
        with patch.object(sys.modules["onnx_lrsd.calibrate"], "ORIGINAL", every):
            yield name, error()


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
    print("| judged on | " + " | ".join([*(f"damping {d}" for d in DAMPINGS), *ORIGINALS]) + " |")
    print("|---" * (len(DAMPINGS) + len(ORIGINALS) + 1) + "|")
    for way, (fit, judge) in ways.items():
        parts = samples.take(np.sort(fit)), samples.take(np.sort(judge[:JUDGES]))
        print(
            f"| {way} | "
            + " | ".join(f"{error:.4f}" for _, error in errors(given.folder, *parts, given.ratio)),
            "|",
        )


if __name__ == "__main__":
    main()
