"""Real models through the whole tool: MACs, latency and score before and after, beside simple baselines.

    python benchmarks/models.py FOLDER... [--ratio R] [--cost C] [--samples N] [--int8] [--baselines]
                                [--json FILE]

A FOLDER holds model.onnx, calib.npz, and eval.npz with the model's inputs and ``labels``; an about.json
with {"score": "spearman"} marks sentence embeddings (rows 2i and 2i+1 are a pair). With --baselines,
truncated SVD of the plain weights and of the whitened weights, each at one keep rate for all layers and
the same MACs, are fitted and scored on the same samples. With --int8, low rank and int8 alone have rows.
*Predicted* is the latency ratio that the table of this machine (or the built-in one) led to expect.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import onnx_lrsd
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.facts import Verification
from onnx_lrsd.fit.calibrate import Calibration, calibrate
from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.measure.compare import compare, total_price
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.split import split
from onnx_lrsd.runtime.session import inputs_of, open_session
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.problem import pose
from onnx_lrsd.types import CHANNEL, COSTS, Form, Layer

Values = npt.NDArray[Any]
Uniform = Callable[[Layer, float], Form | None]
"""A layer's form by keep rate."""


def outputs(model: Model, samples: Samples) -> Values:
    """The first output over all samples; embeddings of tokens are averaged over the mask."""
    session = open_session(model.proto, folder=model.folder)
    parts = []
    for feed in samples.batches(samples.batch_size(1 << 22, 1 << 25)):
        value = pooled(session.run(feed)[session.outputs[0]], feed)
        parts.append(value.reshape(len(value), -1))
    return np.concatenate(parts)


def pooled(value: Values, inputs: Mapping[str, Values]) -> Values:
    """Embeddings of tokens (samples, tokens, n) averaged over the attention mask; anything else as it is."""
    if value.ndim != 3 or "attention_mask" not in inputs:
        return value
    mask = inputs["attention_mask"][..., None].astype(np.float32)
    return np.asarray((value * mask).sum(axis=1) / np.maximum(mask.sum(axis=1), 1e-9))


def score(kind: str, values: Values, labels: Values) -> float:
    """Top-1, or Spearman's rank correlation of the cosine of pairs with their labels."""
    if kind == "top1":
        return float(np.mean(values.argmax(axis=1) == labels))
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    cosine = np.sum(unit[0::2] * unit[1::2], axis=1)
    return float(np.corrcoef(ranks(cosine), ranks(labels))[0, 1])


def ranks(values: Values) -> Values:
    """Ranks of ``values``, ties at their mean."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    end = np.cumsum(count)
    return np.asarray(((end - count + end - 1) / 2)[inverse])


def kind_of(folder: Path) -> str:
    """How a folder's model is scored: 'top1', or what its about.json says."""
    about = folder / "about.json"
    return str(json.loads(about.read_text()).get("score", "top1")) if about.exists() else "top1"


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


def facts(folder: Path, method: str, ratio: float | None, found: Verification) -> dict[str, Any]:
    """What every row says, before the score."""
    return {
        "model": folder.name,
        "method": method,
        "ratio": ratio,
        "macs": found.before.macs / found.after.macs,
        "latency": found.latency_ratio,
        "interval": found.latency_interval,
    }


def run(
    folder: Path, ratio: float | None, cost: str, count: int | None, int8: bool, with_baselines: bool
) -> list[dict[str, Any]]:
    """One row for the tool, one for each step of int8, and one for each baseline."""
    kind = kind_of(folder)
    source = load(folder / "model.onnx")
    with np.load(folder / "eval.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    labels = arrays["labels"] if kind == "top1" else arrays.pop("labels")
    evaluation = read_samples(arrays, inputs_of(source.proto))
    start = time.perf_counter()
    try:
        result = onnx_lrsd.optimize(
            folder / "model.onnx",
            folder / "calib.npz",
            evaluation=evaluation,
            output=folder / "out.onnx",
            ratio=ratio,
            cost=cost,
            samples=count,
            int8=int8,
        )
    except LrsdError as error:
        return [{"model": folder.name, "method": "onnx-lrsd", "ratio": ratio, "says": str(error)}]
    seconds = time.perf_counter() - start
    found = result.report.verification
    assert found is not None
    if found.metric is not None:
        before, after = found.metric.before, found.metric.after
    else:
        before, after = (score(kind, outputs(model, evaluation), labels) for model in (source, result.model))
    rows = [
        {
            **facts(folder, "onnx-lrsd", ratio, found),
            "cost": cost,
            "predicted": result.report.predicted,
            "bytes": found.before.bytes / found.after.bytes,
            "score": kind,
            "before": before,
            "after": after,
            "change": found.metric.interval if found.metric is not None else None,
            "output_error": found.error,
            "samples": len(labels),
            "seconds": round(seconds, 1),
            "stages": {stage: round(value, 1) for stage, value in result.report.seconds.items()},
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "split": sum(layer.form != "dense" for layer in result.report.layers),
            "left": sum(layer.form == "dense" for layer in result.report.layers),
        }
    ]
    if result.report.int8 is not None:
        rows[0]["method"] += f" --int8: {result.report.int8.kept}"
        for name, step in result.report.int8.steps.items():
            rows.append(
                {
                    **facts(folder, f"{name} alone" if name != "both" else name, ratio, step),
                    "bytes": step.before.bytes / step.after.bytes,
                    "before": before,
                    "after": step.metric.after if step.metric is not None else float("nan"),
                    "output_error": step.error,
                }
            )
    if with_baselines:
        calibration = read_samples(folder / "calib.npz", inputs_of(source.proto), limit=count)
        graph = source.graph()
        known = calibrate(source, find_layers(graph)[0], calibration, partial(read_weight, graph))
        for whitened in (False, True):
            method = "whitened SVD" if whitened else "plain SVD"
            other = baseline(source, known, evaluation, found.after.macs, whitened)
            measured = compare(source, other, evaluation.take(np.arange(8)))
            rows.append(
                {
                    **facts(folder, f"{method}, one keep rate", ratio, measured),
                    "score": kind,
                    "before": before,
                    "after": score(kind, outputs(other, evaluation), labels),
                    "samples": len(labels),
                }
            )
    return rows


def main() -> None:
    """Run the models given and print one markdown row each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--ratio", type=float)
    parser.add_argument("--cost", choices=tuple(COSTS), default="macs")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print(
        f"Python {platform.python_version()}, {platform.processor() or platform.machine()}", file=sys.stderr
    )
    rows = []
    print(
        "| model | method | asked | MACs | latency (95 %) | predicted | score before | after | points (95 %) "
        "| s | peak MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for folder in given.folders:
        for row in run(folder, given.ratio, given.cost, given.samples, given.int8, given.baselines):
            rows.append(row)
            print(line(row), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


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


if __name__ == "__main__":
    main()
