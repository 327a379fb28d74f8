"""What the rules of plans and fits are worth on other samples, like those of the fit and unlike them.

    python benchmarks/rules.py FOLDER --ratio R [--about fit|plan|entries] [--samples N]

A FOLDER holds model.onnx and calib.npz of a classifier. Fitted on N samples by several rules and judged on
others: drawn from all alike, or *unlike*, fitted on those of the first half of the classes, as the model
names them, and judged on those of the second. Rules about the fit are compared with one plan, rules about
the plan each with the plan they lead to; *entries* are those of S, where parameters count. Each gives
the output error and, in parentheses, the share of samples whose top class is another than the original's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import onnx_lrsd
from models import Values, outputs
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.graph.model import load
from onnx_lrsd.runtime.session import inputs_of


def divergence(before: Sequence[Sequence[Values]], after: Sequence[Sequence[Values]]) -> float:
    """Kullback-Leibler divergence of the probabilities of classes, from batches of logits by output."""
    one, two = (np.concatenate(batches[0]).astype(np.float64) for batches in (before, after))
    one, two = (x - x.max(axis=1, keepdims=True) for x in (one, two))
    one, two = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (one, two))
    return float((np.exp(one) * (one - two)).sum(axis=1).mean())


FIT, PLAN, ENTRIES = "fit", "plan", "entries"
WHITEN, CALIBRATE, RECONSTRUCT = (
    "onnx_lrsd.solver.problem",
    "onnx_lrsd.fit.calibrate",
    "onnx_lrsd.fit.reconstruct",
)
RULES: dict[str, dict[str, tuple[str, str, Any]]] = {
    FIT: {
        **{f"damping {each}": (WHITEN, "OF_SAMPLES", each) for each in (3, 6, 12, 24)},
        "no original rows": (CALIBRATE, "ORIGINAL", 1 << 40),
        "every second": (CALIBRATE, "ORIGINAL", 2),
        "no refit": (RECONSTRUCT, "ROWS_TO_REFIT", 1e12),
        **{f"pull {each}": (RECONSTRUCT, "PULL", each) for each in (1, 32)},
    },
    PLAN: {
        **{
            f"repaired {each}": ("onnx_lrsd.plan.planner", "REPAIRED", each) for each in (0.0, 0.05, 0.1, 0.2)
        },
        "divergence": ("onnx_lrsd.fit.sensitivity", "movement", divergence),
    },
    ENTRIES: {
        **{f"damped {each} times": (WHITEN, "OF_ENTRIES", each) for each in (1, 3, 6, 10)},
        "no rectifier": ("onnx_lrsd.solver.decompose", "RECTIFIED_FROM", 1e9),
    },
}
"""A constant or a function and what is in its place; the tool has 6, a tenth, 6 times and a pull of 8."""
JUDGES = 300
"""Samples that judge, at most."""


def judged(
    folder: Path, fit: Samples, judge: Samples, ratio: float, about: str
) -> Iterator[tuple[float, float]]:
    """Output error and share of changed classes on ``judge`` by each of the rules."""
    model = folder / "model.onnx"
    goal: dict[str, Any] = {"ratio": ratio}
    if about == ENTRIES:
        goal |= {"target": "size", "cost": "parameters"}
    if about == FIT:
        goal = {"plan": onnx_lrsd.optimize(model, fit, evaluation=judge, dry_run=True, **goal).plan}
    before = outputs(load(model), judge).argmax(axis=1)
    for module, name, value in RULES[about].values():
        with patch.object(sys.modules[module], name, value):
            found = onnx_lrsd.optimize(model, fit, evaluation=judge, **goal)
        assert found.report.verification is not None
        after = outputs(found.model, judge).argmax(axis=1)
        yield found.report.verification.error, float(np.mean(before != after))


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
        found = judged(given.folder, *parts, given.ratio, given.about)
        print(
            f"| {way} | " + " | ".join(f"{error:.4f} ({other:.1%})" for error, other in found) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
