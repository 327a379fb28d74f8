"""What the rules of plans and fits are worth on other samples, like those of the fit and unlike them.

    python benchmarks/rules.py FOLDER --ratio R [--about fit|plan|entries] [--samples N]

A FOLDER holds model.onnx and calib.npz of a classifier. Fitted on N samples by several rules and judged on
others: drawn from all alike, or *unlike*, fitted on those of the first half of the classes, as the model
names them, and judged on those of the second. Rules about the fit are compared with one plan, rules about
the plan each with the plan they lead to; *entries* are those of S, where parameters count.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import onnx_lrsd
from models import outputs
from onnx_lrsd.dataset import Samples, read_samples
from onnx_lrsd.model import load
from onnx_lrsd.runtime import inputs_of

FIT, PLAN, ENTRIES = "fit", "plan", "entries"
WHITEN, CALIBRATE, RECONSTRUCT = "onnx_lrsd.solver.whiten", "onnx_lrsd.calibrate", "onnx_lrsd.reconstruct"
RULES: dict[str, dict[str, tuple[str, str, float]]] = {
    FIT: {
        **{f"damping {each}": (WHITEN, "OF_SAMPLES", each) for each in (3, 6, 12, 24)},
        "no original rows": (CALIBRATE, "ORIGINAL", 1 << 40),
        "every second": (CALIBRATE, "ORIGINAL", 2),
        "no refit": (RECONSTRUCT, "ROWS_TO_REFIT", 1e12),
        **{f"pull {each}": (RECONSTRUCT, "PULL", each) for each in (1, 32)},
    },
    PLAN: {f"repaired {each}": ("onnx_lrsd.planner", "REPAIRED", each) for each in (0.0, 0.05, 0.1, 0.2)},
    ENTRIES: {
        **{f"damped {each} times": (WHITEN, "OF_ENTRIES", each) for each in (1, 3, 6, 10)},
        "no rectifier": ("onnx_lrsd.solver.decompose", "RECTIFIED_FROM", 1e9),
    },
}
"""A constant and what it is in place of its value; the tool has 6, a tenth, 6 times and a pull of 8."""
JUDGES = 300
"""Samples that judge, at most."""


def errors(folder: Path, fit: Samples, judge: Samples, ratio: float, about: str) -> Iterator[float]:
    """Output error on ``judge`` by each of the rules."""
    model = folder / "model.onnx"
    goal: dict[str, Any] = {"ratio": ratio}
    if about == ENTRIES:
        goal |= {"target": "size", "cost": "parameters"}
    if about == FIT:
        goal = {"plan": onnx_lrsd.optimize(model, fit, evaluation=judge, dry_run=True, **goal).plan}
    for module, name, value in RULES[about].values():
        with patch.object(sys.modules[module], name, value):
            found = onnx_lrsd.optimize(model, fit, evaluation=judge, **goal)
        assert found.report.verification is not None
        yield found.report.verification.error


def main() -> None:
    """Print one markdown row for each way to draw the samples."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratio", type=float, required=True)
    parser.add_argument("--about", choices=list(RULES), default=FIT)
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
    print("| judged on | " + " | ".join(RULES[given.about]) + " |")
    print("|---" * (len(RULES[given.about]) + 1) + "|")
    for way, (fit, judge) in ways.items():
        parts = samples.take(np.sort(fit)), samples.take(np.sort(judge[:JUDGES]))
        found = errors(given.folder, *parts, given.ratio, given.about)
        print(f"| {way} | " + " | ".join(f"{error:.4f}" for error in found) + " |", flush=True)


if __name__ == "__main__":
    main()
