"""Real models through the whole tool: MACs, latency and score before and after, beside simple baselines.

    python -m benchmarks models FOLDER... [--ratio R] [--cost C] [--samples N] [--int8] [--baselines]
                                          [--json FILE]
    python -m benchmarks models FOLDER... --drop D [--samples N]

With --baselines, truncated SVD of the plain weights and of the whitened weights, each at one keep rate for
all layers and the same MACs, are fitted and scored on the same samples. With --int8, low rank and int8 alone
have rows. *Predicted* is the latency ratio that the table of this machine, or the built-in one, promised.

With --drop: the largest speed-up that --max-drop D allows, beside simple decompositions at the same measured
latency. Half of the evaluation samples go to the tool, which searches on half of these and confirms on the
others; all rows are scored on the other half, which nothing has seen. *Plain SVD* and *whitened SVD* give
every layer the same keep rate, *Tucker-2* as well (both ranks by one share; whitened SVD where a layer has no
kernel positions), fitted in the metric of the data. Their keep rate is bisected until the whole model is
measured to be as fast as ours, or, where ours is the original, as fast as the least that is handed out. Drops
of minilm_sts are hundredths of Spearman's correlation.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from math import prod, sqrt
from typing import Any

import numpy as np

import onnx_lrsd
from benchmarks.options import FOLDERS, JSON, LIMIT, heading
from benchmarks.prepared import TOP1, Prepared, outputs, read, score, spearman_of
from onnx_lrsd.data.padding import without_padding
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.facts import Verification
from onnx_lrsd.fit.calibrate import Calibration, calibrate
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.compare import compare, total_price
from onnx_lrsd.measure.speedup import CLEARLY, whole_speedup
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.split import split
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.problem import pose
from onnx_lrsd.types import CHANNEL, COSTS, TUCKER, Form, Layer

OPTIONS = (FOLDERS, LIMIT, JSON)
Uniform = Callable[[Layer, float], Form | None]
"""A layer's form by keep rate."""
STEPS = 7
"""Bisections of a keep rate."""
SECONDS = 2.0
"""How long each step is timed."""


def uniform(layer: Layer, keep: float) -> Form | None:
    """The channel form that keeps this share of a layer's MACs; None where that is no gain."""
    rank = round(keep * layer.n * layer.m / (layer.n + layer.m))
    return Form(CHANNEL, rank) if 0 < rank < min(layer.n, layer.m) else None


def fitted(source: Model, known: Calibration, form_of: Uniform, keep: float, whitened: bool) -> Model:
    """Every layer in its form, one by one, biases refitted where the data are known."""
    graph = source.graph()
    for layer in known.layers:
        form = form_of(layer, keep)
        if form is not None:
            moments = known.moments[layer.output] if whitened else None
            split(graph, layer, decompose(pose(layer, *read_weight(graph, layer), moments), form))
    return source.splice(graph)


def baseline(source: Model, known: Calibration, samples: Samples, most_macs: float, whitened: bool) -> Model:
    """Truncated SVD of every layer at one keep rate, as large as ``most_macs`` allows."""
    total = total_price(source, samples).macs
    rest = total - sum(layer.n * layer.m * layer.positions for layer in known.layers)

    def cost(keep: float) -> float:
        taken = ((layer, uniform(layer, keep)) for layer in known.layers)
        return rest + sum((form.rank * (x.n + x.m) if form else x.n * x.m) * x.positions for x, form in taken)

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= most_macs else (low, middle)
    return fitted(source, known, uniform, low, whitened)


def facts(case: Prepared, method: str, ratio: float | None, found: Verification) -> dict[str, Any]:
    """What every row says, before the score."""
    return {
        "model": case.name,
        "method": method,
        "ratio": ratio,
        "macs": found.before.macs / found.after.macs,
        "latency": found.latency_ratio,
        "interval": found.latency_interval,
    }


def rows(case: Prepared, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for the tool, one for each step of int8, and one for each baseline."""
    ratio, cost = given.ratio, given.cost
    start = time.perf_counter()
    try:
        result = onnx_lrsd.optimize(
            case.model,
            case.folder / "calib.npz",
            evaluation=case.evaluation,
            output=case.folder / "out.onnx",
            ratio=ratio,
            cost=cost,
            samples=given.samples,
            int8=given.int8,
        )
    except LrsdError as error:
        return [{"model": case.name, "method": "onnx-lrsd", "ratio": ratio, "says": str(error)}]
    seconds = time.perf_counter() - start
    found = result.report.verification
    assert found is not None
    if found.metric is not None:
        before, after = found.metric.before, found.metric.after
    else:
        before, after = case.score_before, case.score(result.model)
    found_rows = [
        {
            **facts(case, "onnx-lrsd", ratio, found),
            "cost": cost,
            "predicted": result.report.predicted,
            "bytes": found.before.bytes / found.after.bytes,
            "score": case.scored_by,
            "before": before,
            "after": after,
            "change": found.metric.interval if found.metric is not None else None,
            "output_error": found.error,
            "samples": len(case.labels),
            "seconds": round(seconds, 1),
            "stages": {stage: round(value, 1) for stage, value in result.report.seconds.items()},
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "split": sum(layer.form != "dense" for layer in result.report.layers),
            "left": sum(layer.form == "dense" for layer in result.report.layers),
        }
    ]
    if result.report.int8 is not None:
        found_rows[0]["method"] += f" --int8: {result.report.int8.kept}"
        for name, step in result.report.int8.steps.items():
            found_rows.append(
                {
                    **facts(case, f"{name} alone" if name != "both" else name, ratio, step),
                    "bytes": step.before.bytes / step.after.bytes,
                    "before": before,
                    "after": step.metric.after if step.metric is not None else float("nan"),
                    "output_error": step.error,
                }
            )
    if given.baselines:
        graph = case.source.graph()
        known = calibrate(case.source, find_layers(graph)[0], case.calibration, partial(read_weight, graph))
        for whitened in (False, True):
            method = "whitened SVD" if whitened else "plain SVD"
            other = baseline(case.source, known, case.evaluation, found.after.macs, whitened)
            measured = compare(case.source, other, case.evaluation.take(np.arange(8)))
            found_rows.append(
                {
                    **facts(case, f"{method}, one keep rate", ratio, measured),
                    "score": case.scored_by,
                    "before": before,
                    "after": case.score(other),
                    "samples": len(case.labels),
                }
            )
    return found_rows


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    if "says" in row:
        return f"| {row['model']} | {row['method']} | {row['ratio']} | {row['says']} | | | | | | | |"
    low, high = row["interval"]
    paired = (
        "" if not row.get("change") else " ({:+.2f} to {:+.2f})".format(*(100 * x for x in row["change"]))
    )
    predicted = "" if row.get("predicted") is None else f"{row['predicted']:.2f} x"
    return (
        f"| {row['model']} | {row['method']} | {row['ratio']} x | {row['macs']:.2f} x "
        f"| {row['latency']:.2f} x ({low:.2f} to {high:.2f}) "
        f"| {predicted} | {100 * row['before']:.2f} "
        f"| {100 * row['after']:.2f} | {100 * (row['after'] - row['before']):+.2f}{paired} "
        f"| {row.get('seconds', '')} | {row.get('peak_mb', '')} |"
    )


def tucker(layer: Layer, keep: float) -> Form | None:
    """Tucker-2 whose ranks are one share of the channels on either side; SVD for 1 x 1 and dense layers."""
    taps = prod(layer.kernel)
    if taps == 1:
        return uniform(layer, keep)
    # c p + t p q + q n = keep t c n with p = a c, q = a n: a quadratic in a.
    linear = layer.channels**2 + layer.n**2
    square = taps * layer.channels * layer.n
    share = (sqrt(linear**2 + 4 * square**2 * keep) - linear) / (2 * square)
    inner, outer = round(share * layer.channels), round(share * layer.n)
    return Form(TUCKER, inner, outer=min(outer, taps * inner)) if inner and outer and share < 1 else None


BASELINES: dict[str, tuple[Uniform, bool]] = {
    "plain SVD": (uniform, False),
    "whitened SVD": (uniform, True),
    "Tucker-2": (tucker, True),
}
"""A form by keep rate, and whether the fit knows the data."""


def as_fast(source: Model, layers: list[Layer], form_of: Uniform, aim: float, samples: Samples) -> float:
    """The largest keep rate at which the model is ``aim`` times faster; the least tried if none is."""
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        forms = {layer.output: form for layer in layers if (form := form_of(layer, middle)) is not None}
        fast = bool(forms) and whole_speedup(source, layers, forms, samples, SECONDS) >= aim
        low, high = (middle, high) if fast else (low, middle)
    return low or high


def rows_as_fast(case: Prepared, drop: float) -> list[str]:
    """Markdown rows: ours, then the baselines."""
    kind, source = case.scored_by, case.source
    calibration = without_padding(source, case.calibration)
    evaluation = without_padding(source, read_samples(case.folder / "eval.npz", inputs_of(source.proto)))
    shown, held = evaluation.split(0.5, 0)
    metric: Any = TOP1 if kind == TOP1 else spearman_of(case.output)
    result = onnx_lrsd.optimize(source.proto, calibration, evaluation=shown, max_drop=drop, metric=metric)
    found = result.report.verification
    assert found is not None and held.labels is not None
    labels = held.labels
    before = score(kind, outputs(source, held, case.output), labels)

    def row(method: str, model: Model, ratio: float, interval: tuple[float, float] | None) -> str:
        after = score(kind, outputs(model, held, case.output), labels)
        low, high = interval or (ratio, ratio)
        error = compare(source, model, held, latency=False).error
        return (
            f"| {case.name} | {method} | {ratio:.2f} x ({low:.2f} to {high:.2f}) | {100 * before:.2f} "
            f"| {100 * after:.2f} | {100 * (after - before):+.2f} | {error:.4f} |"
        )

    ratio = found.latency_ratio or 1.0
    lines = [row("onnx-lrsd", result.model, ratio, found.latency_interval)]
    ratio = max(ratio, CLEARLY)
    graph = source.graph()
    known = calibrate(source, find_layers(graph)[0], calibration, partial(read_weight, graph))
    layers = list(known.layers)
    for method, (form_of, whitened) in BASELINES.items():
        keep = as_fast(source, layers, form_of, ratio, held)
        other = fitted(source, known, form_of, keep, whitened)
        timed = compare(source, other, held.take(np.arange(2 * held.smallest_batch)))
        lines.append(
            row(f"{method}, keep {keep:.2f}", other, timed.latency_ratio or 1.0, timed.latency_interval)
        )
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("--ratio", type=float)
    parser.add_argument("--cost", choices=tuple(COSTS), default="macs")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("--drop", type=float, metavar="D", help="points that the largest speed-up may cost")


def run(given: argparse.Namespace) -> None:
    """Run the models given and print their markdown rows."""
    if given.drop is not None and (given.ratio or given.int8 or given.baselines or given.json):
        raise SystemExit("--drop goes with --samples alone: leave the other options out")
    print(
        f"Python {platform.python_version()}, {platform.processor() or platform.machine()}", file=sys.stderr
    )
    if given.drop is not None:
        print(heading("model", "method", "latency (95 %)", "score before", "after", "points", "output error"))
        for folder in given.folders:
            for text in rows_as_fast(read(folder, given.samples), given.drop):
                print(text, flush=True)
        return
    titles = "model", "method", "asked", "MACs", "latency (95 %)", "predicted", "score before", "after"
    print(heading(*titles, "points (95 %)", "s", "peak MB"))
    every = []
    for folder in given.folders:
        for row in rows(read(folder, given.samples), given):
            every.append(row)
            print(line(row), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(every, indent=1) + "\n")
