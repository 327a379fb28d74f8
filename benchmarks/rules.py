"""What the parts and rules of plans and fits are worth on other samples, like those of the fit and unlike.

    python -m benchmarks rules FOLDER... --ratio R [--about fit|plan|entries|parts] [--samples N]

For classifiers. Fitted on N calibration samples by several rules and judged on others: drawn from all alike,
or *unlike*, fitted on those of the first half of the classes, as the model names them, and judged on those
of the second. Rules about the fit are compared with one plan, all others each with the plan they lead to;
*entries* are those of S, where parameters count. Each gives the output error and, in parentheses, the share
of samples whose top class is another than the original's.

*Parts* leaves out one part at a time. *Sensitivity*: layers weighed by what their error does to the outputs.
*Sequential*: layers fitted for the inputs that the rewritten layers before them give. *Rectifier*: layers
behind a Relu or Clip fitted for what passes. *Readers*: errors of outputs weighed by what the layers that
read them make of them. *Original rows*: a third of the rows of the sequential fit are those of the original
network. *Refit*: layers that stay dense are fitted for their new inputs. *Repair*: an error counts less the
more layers are fitted behind it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from math import inf
from typing import Any
from unittest.mock import patch

import numpy as np

import onnx_lrsd
from benchmarks.options import FOLDERS, LIMIT, heading
from benchmarks.prepared import Prepared, outputs, read
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.fit.sensitivity import Reference, final_outputs
from onnx_lrsd.graph.model import Model

OPTIONS = (FOLDERS, LIMIT)


def divergence(reference: Reference, other: Model) -> float:
    """Kullback-Leibler divergence of the probabilities of classes, whose logits are the first output."""
    models = (reference.model, other)
    found = (next(iter(final_outputs(each, reference.samples).values())).batches for each in models)
    one, two = (np.concatenate(batches).astype(np.float64) for batches in found)
    one, two = (x - x.max(axis=1, keepdims=True) for x in (one, two))
    one, two = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (one, two))
    return float((np.exp(one) * (one - two)).sum(axis=1).mean())


FIT, PLAN, ENTRIES, PARTS = "fit", "plan", "entries", "parts"
PROBLEM = "onnx_lrsd.solver.problem"
DECOMPOSE = "onnx_lrsd.solver.decompose"
CALIBRATE = "onnx_lrsd.fit.calibrate"
RECONSTRUCT = "onnx_lrsd.fit.reconstruct"
PLANNER = "onnx_lrsd.plan.planner"
NO_ORIGINAL = (f"{CALIBRATE}.EVERY_ORIGINAL", 1 << 40)
NO_REFIT = (f"{RECONSTRUCT}.ROWS_TO_REFIT", inf)
NO_RECTIFIER = (f"{DECOMPOSE}.RECTIFIED_FROM", inf)
RULES: dict[str, dict[str, tuple[str, Any] | None]] = {
    FIT: {
        **{f"damping {each}": (f"{PROBLEM}.OF_SAMPLES", each) for each in (3, 6, 12, 24)},
        "no original rows": NO_ORIGINAL,
        "every second": (f"{CALIBRATE}.EVERY_ORIGINAL", 2),
        "no refit": NO_REFIT,
        **{f"pull {each}": (f"{RECONSTRUCT}.PULL", each) for each in (1, 32)},
    },
    PLAN: {
        **{f"repaired {each}": (f"{PLANNER}.REPAIRED", each) for each in (0.0, 0.05, 0.1, 0.2)},
        "divergence": ("onnx_lrsd.fit.sensitivity.Reference.movement", divergence),
    },
    ENTRIES: {
        **{f"damped {each} times": (f"{PROBLEM}.OF_ENTRIES", each) for each in (1, 3, 6, 10)},
        "no rectifier": NO_RECTIFIER,
    },
    PARTS: {
        "all": None,
        "without sensitivity": (f"{PLANNER}.Planner.weigh", lambda planner, measure: None),
        "without sequential": (f"{RECONSTRUCT}.STAGES", 1),
        "without rectifier": NO_RECTIFIER,
        "without readers": (f"{RECONSTRUCT}.consumers", lambda *_: {}),
        "without original rows": NO_ORIGINAL,
        "without refit": NO_REFIT,
        "without repair": (f"{PLANNER}.REPAIRED", 0.0),
    },
}
"""A constant or a function and what is in its place; the tool has 6, a tenth, 6 times and a pull of 8."""
JUDGES = 300
"""Samples that judge, at most."""
FITTED_ON = 200
"""Samples fitted on, unless --samples says otherwise."""


def judged(
    case: Prepared, fit: Samples, judge: Samples, ratio: float, about: str
) -> Iterator[tuple[float, float]]:
    """Output error and share of changed classes on ``judge`` by each of the rules."""
    goal: dict[str, Any] = {"ratio": ratio}
    if about == ENTRIES:
        goal |= {"target": "size", "cost": "parameters"}
    if about == FIT:
        goal = {"plan": onnx_lrsd.optimize(case.model, fit, evaluation=judge, dry_run=True, **goal).plan}
    before = outputs(case.source, judge).argmax(axis=1)
    for rule in RULES[about].values():
        with patch(*rule) if rule is not None else nullcontext():
            found = onnx_lrsd.optimize(case.model, fit, evaluation=judge, **goal)
        assert found.report.verification is not None
        after = outputs(found.model, judge).argmax(axis=1)
        yield found.report.verification.error, float(np.mean(before != after))


def ways(case: Prepared, fitted_on: int) -> Iterator[tuple[str, Samples, Samples]]:
    """How the samples are drawn: those to fit on and those that judge."""
    samples = case.calibration
    classes = outputs(case.source, samples).argmax(axis=1)
    order = np.random.default_rng(0).permutation(samples.count)
    first = 2 * classes[order] < classes.max() + 1
    for way, fit, judge in (
        ("like", order[:fitted_on], order[fitted_on:]),
        ("unlike", order[first][:fitted_on], order[~first]),
    ):
        yield way, samples.take(np.sort(fit)), samples.take(np.sort(judge[:JUDGES]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("--ratio", type=float, required=True)
    parser.add_argument("--about", choices=list(RULES), default=FIT)


def run(given: argparse.Namespace) -> None:
    """Print one markdown row for each model and way to draw the samples."""
    print(heading("model, ratio", "judged on", *RULES[given.about]))
    for case in map(read, given.folders):
        for way, fit, judge in ways(case, given.samples or FITTED_ON):
            found = judged(case, fit, judge, given.ratio, given.about)
            cells = " | ".join(f"{error:.4f} ({other:.1%})" for error, other in found)
            print(f"| {case.name}, {given.ratio:g} | {way} | {cells} |", flush=True)
