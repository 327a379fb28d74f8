"""The largest speed-up that --max-drop allows, beside simple decompositions at the same measured latency.

    python -m benchmarks largest FOLDER... [--drop 1] [--samples N]

Half of the evaluation samples go to the tool, which searches on half of these
and confirms on the others; all rows are scored on the other half, which nothing has seen. *Plain SVD* and
*whitened SVD* give every layer the same keep rate, *Tucker-2* as well (both ranks by one share; whitened SVD
where a layer has no kernel positions), fitted in the metric of the data. Their keep rate is bisected until
the whole model is measured to be as fast as ours, or, where ours is the original, as fast as the least that
is handed out. Drops of minilm_sts are hundredths of Spearman's correlation.
"""

from __future__ import annotations

import argparse
from functools import partial
from math import prod, sqrt
from typing import Any

import numpy as np

import onnx_lrsd
from benchmarks.models import Uniform, fitted, uniform
from benchmarks.options import FOLDERS, LIMIT, heading
from benchmarks.prepared import TOP1, Prepared, outputs, read, score, spearman
from onnx_lrsd.data.padding import without_padding
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.fit.calibrate import calibrate
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.compare import compare
from onnx_lrsd.measure.speedup import CLEARLY, whole_speedup
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.types import TUCKER, Form, Layer

OPTIONS = (FOLDERS, LIMIT)
STEPS = 7
"""Bisections of a keep rate."""
SECONDS = 2.0
"""How long each step is timed."""


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


def rows(case: Prepared, drop: float) -> list[str]:
    """Markdown rows: ours, then the baselines."""
    kind, source = case.scored_by, case.source
    calibration = without_padding(source, case.calibration)
    evaluation = without_padding(source, read_samples(case.folder / "eval.npz", inputs_of(source.proto)))
    shown, held = evaluation.split(0.5, 0)
    metric: Any = TOP1 if kind == TOP1 else spearman
    result = onnx_lrsd.optimize(source.proto, calibration, evaluation=shown, max_drop=drop, metric=metric)
    found = result.report.verification
    assert found is not None and held.labels is not None
    labels = held.labels
    before = score(kind, outputs(source, held), labels)

    def row(method: str, model: Model, ratio: float, interval: tuple[float, float] | None) -> str:
        after = score(kind, outputs(model, held), labels)
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
    parser.add_argument("--drop", type=float, default=1.0)


def run(given: argparse.Namespace) -> None:
    """Print one markdown row for each method and model."""
    print(heading("model", "method", "latency (95 %)", "score before", "after", "points", "output error"))
    for folder in given.folders:
        for line in rows(read(folder, given.samples), given.drop):
            print(line, flush=True)
