"""The comparison of the paper that the tool follows, on models and images that are at hand.

    python -m benchmarks paper samples FOLDER [--keep .2,.0667] [--counts 1000,500,...] [--layers RE]
    python -m benchmarks paper networks MODEL... --rate R,... [--images FILE.npz] [--samples N] [--share S]
                                        [--methods NAME,...]
    python -m benchmarks paper full MODEL.onnx --images FILE.npz [--ratio 4] [--samples 32]
    python -m benchmarks paper spectra MODEL.onnx...

Yu, Liu, Wang, Tao, On Compressing Deep Models by Low Rank and Sparse Decomposition, CVPR 2017. Parameters of
a layer are those of its two factors and the non-zeros of S. The error of a layer is that of its feature maps,
relative to their variance: of the samples that it was fitted to, and of others that nothing was fitted to.
Nothing is retrained. Every layer is fitted to the inputs that the original network gives it.

*samples*: the layers named, as the samples to fit on get fewer. *networks*: every layer at one keep rate,
such that the whole model has R times fewer parameters; U V + S is put back as one dense weight, so that only
the weights differ; among the methods may be those of methods.py, which leave layers with few rows to U V + S.
*full*: `onnx-lrsd optimize` in a process of its own.

FOLDER holds model.onnx, calib.npz and eval.npz. A MODEL is a FOLDER, or a file of models/published.py, which
is then fed the images of --images, in the size that it wants, half of them to fit on.

*spectra*: of trained layers, which the weights of models/published.py are made like. Of every layer's weight
(n, m) with k = min(n, m) singular values σ_1 >= σ_2 ..., log σ_i is fitted by c - a log i - b i / k; the
smallest tenth, where rounding and dead channels show, is left out. Of a k x k kernel the root mean square of
its cosine coefficients is given along one axis, by frequency, relative to frequency 0. The table has the
median over the layers of a kind, with quartiles of a and b.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime

from benchmarks.layer_problems import LayerProblem, layer_rows
from benchmarks.methods import EFFORTS, METHODS, SHARE, chosen, spend
from benchmarks.options import comma_separated, heading
from benchmarks.reference.magnitude import magnitude
from benchmarks.reference.patterns import largest
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.fit.sampling import FEWEST_ROWS, MOST_ROWS, ROWS_PER_INPUT, input_shapes, locate
from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.compare import compare
from onnx_lrsd.passes.count import parameters
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.split import split
from onnx_lrsd.solver.admm import low_rank_plus_sparse
from onnx_lrsd.solver.effort import Effort
from onnx_lrsd.solver.lowrank import low_rank
from onnx_lrsd.solver.problem import Metric
from onnx_lrsd.types import CHANNEL, NONE, UNSTRUCTURED, Array, Factors, Form, Layer, Pattern

OPTIONS = ()
OURS, SVD, WHITENED, MAGNITUDE = "U V + S", "plain SVD", "whitened SVD", "magnitude"
NAMES = (OURS, WHITENED, MAGNITUDE, SVD)
DATA_FREE = (SVD, MAGNITUDE)
COUNTS = (1000, 500, 200, 100, 50, 20, 10, 5)
KEEPS = (0.2, 1 / 15)
LAYERS = "block(2_conv2|3_conv1|3_conv3|4_conv1)"
FEWEST = 16
"""Singular values that a fit of two slopes needs at least."""
HELD_ROWS = 4096
"""Rows of every layer that errors on unseen samples are taken of."""


@dataclass(frozen=True)
class Fit:
    """A weight (n, m) in place of a layer's, the parameters it is written with, and seconds of CPU."""

    weight: Array
    parameters: int
    seconds: float


def fit(problem: LayerProblem, method: str, keep: float, share: float | None, effort: Effort) -> Fit:
    """``keep`` of the layer's parameters, by ``method``; ``share`` None has a fold choose the split."""
    n, m = problem.weight.shape
    start = time.process_time()
    peer = None if method in NAMES else METHODS[method]
    if peer is not None and problem.moments.second is not None:
        budget = spend(n, m, keep, SHARE if peer[0] is None else peer[0])
        weight, size = peer[1](problem, budget), int(keep * n * m)
    elif method == OURS or peer is not None:
        if share is None:
            posed, rank, pattern = chosen(problem, keep)
        else:
            posed, rank = problem.posed(), spend(n, m, keep, share).rank
            pattern = Pattern(UNSTRUCTURED, int(keep * n * m) - rank * (n + m))
        found = low_rank_plus_sparse(
            posed.weight, posed.metric, rank, pattern, taps=problem.taps, effort=effort
        )
        weight = found.left @ found.right + found.sparse
        size = rank * (n + m) + int(np.count_nonzero(found.sparse))
    elif method == MAGNITUDE:
        budget = spend(n, m, keep, 0)
        weight = magnitude(problem.weight, partial(largest, density=budget.density))
        size = int(np.count_nonzero(weight))
    else:
        # The best of its rank: with moments of the inputs the whitened SVD, without them the plain one.
        metric = problem.posed().metric if method == WHITENED else Metric(None, None, 0.0)
        both, rank = low_rank(problem.weight, metric), spend(n, m, keep, 1).rank
        weight, size = both.left[:, :rank] @ both.right[:rank], rank * (n + m)
    return Fit(weight, size, time.process_time() - start)


def rows_wanted(layer: Layer) -> int:
    """As many rows as the tool fits a layer to."""
    return min(max(ROWS_PER_INPUT * layer.m, FEWEST_ROWS), MOST_ROWS)


def rows_held(_: Layer) -> int:
    """As many rows as errors on unseen samples are taken of."""
    return HELD_ROWS


def geometric(values: Sequence[float]) -> float:
    """Their geometric mean."""
    return float(np.exp(np.mean(np.log(np.maximum(values, 1e-12)))))


def run_samples(given: argparse.Namespace) -> None:
    """Errors of the feature maps over the number of samples fitted on."""
    model = load(given.folder / "model.onnx")
    graph, inputs = model.graph(), inputs_of(model.proto)
    arrays: dict[str, list[Array]] = {}
    for part in ("calib", "eval"):
        for name, values in read_samples(given.folder / f"{part}.npz", inputs).by_input().items():
            arrays.setdefault(name, []).append(np.asarray(values))
    every = read_samples({name: np.concatenate(parts) for name, parts in arrays.items()}, inputs)
    training, unseen = every.split(given.unseen, 0)
    shuffled = training.take(np.random.default_rng(0).permutation(training.count))
    found = [x for x in find_layers(graph)[0] if re.search(given.layers, x.name)]
    layers = locate(found, input_shapes(model, found, unseen), unseen)
    held = layer_rows(model, layers, unseen, rows_held)
    counts = sorted({min(count, training.count) for count in given.counts}, reverse=True)
    errors: dict[tuple[float, str, str, int], tuple[float, float]] = {}
    seconds: dict[tuple[float, str, int], float] = {}
    for count in counts:
        rows = layer_rows(model, layers, shuffled.take(slice(count)), rows_wanted)
        for layer in layers:
            weight = read_weight(graph, layer)[0]
            problem = LayerProblem(layer, weight, rows.pop(layer.output), held[layer.output], count)
            for keep in given.keep:
                for method in NAMES:
                    done = fit(problem, method, keep, given.share, EFFORTS[given.effort])
                    errors[keep, layer.name, method, count] = problem.errors(done.weight)
                    key = keep, method, count
                    seconds[key] = seconds.get(key, 0.0) + done.seconds
                    print(
                        f"{count} {layer.name} {method} {errors[keep, layer.name, method, count]}",
                        file=sys.stderr,
                    )
    print(f"\n{given.folder.name}, {len(layers)} layers, {unseen.count} unseen samples\n")
    heading = " | ".join(f"{count} samples" for count in counts)
    for keep in given.keep:
        print(f"\n{1 / keep:.3g} x fewer parameters; error on the samples fitted to / on unseen ones\n")
        print(f"| layer | method | {heading} |\n|---|---|{'---|' * len(counts)}")
        for name in (*(layer.name for layer in layers), "geometric mean"):
            for method in NAMES if name == "geometric mean" else (OURS, WHITENED):
                cells = []
                for count in counts:
                    of = [layer.name for layer in layers] if name == "geometric mean" else [name]
                    pairs = [errors[keep, layer, method, count] for layer in of]
                    unseen_error, own = (geometric(column) for column in zip(*pairs, strict=True))
                    cells.append(f"{own:.4f} / {unseen_error:.4f}")
                print(f"| {short(name)} | {method} | {' | '.join(cells)} |")
        cells = [f"{seconds[keep, OURS, count]:.0f}" for count in counts]
        print(f"| seconds, all layers | {OURS} | {' | '.join(cells)} |")


def short(name: str) -> str:
    """The part of a node's name that tells it from others."""
    return name.removeprefix("functional_1/").removesuffix("/BiasAdd")


def read_model(path: Path, images: Path | None, limit: int | None) -> tuple[Model, Samples, Samples]:
    """A model, the samples to fit on and those to judge by."""
    if path.is_dir():
        model = load(path / "model.onnx")
        inputs = inputs_of(model.proto)
        return (
            model,
            read_samples(path / "calib.npz", inputs, limit=limit),
            read_samples(path / "eval.npz", inputs),
        )
    if images is None:
        raise SystemExit(f"{path} is a file: name the images to feed it with --images.")
    model = load(path)
    (spec,) = inputs_of(model.proto)
    side = spec.shape[2]
    assert isinstance(side, int)
    wanted = 2 * limit if limit else None
    samples = read_samples({spec.name: resized(images, side, wanted)}, inputs_of(model.proto))
    half = samples.count // 2
    return model, samples.take(slice(half)), samples.take(slice(half, None))


def resized(path: Path, side: int, limit: int | None) -> Array:
    """Images (N, 3, side, side), mean 0 and variance 1 over all, of the first array of a .npz."""
    with np.load(path) as stored:
        images = np.asarray(stored[stored.files[0]][:limit], np.float32)
    if images.shape[-1] == 3:
        images = images.transpose(0, 3, 1, 2)
    for axis in (2, 3):
        length = images.shape[axis]
        at = np.clip((np.arange(side) + 0.5) * length / side - 0.5, 0, length - 1)
        low = np.minimum(at.astype(int), length - 2)
        share = (at - low).astype(np.float32).reshape(-1, *[1] * (3 - axis))
        images = (1 - share) * images.take(low, axis) + share * images.take(low + 1, axis)
    return np.ascontiguousarray((images - images.mean()) / images.std(), np.float32)


def keep_rate(model: Model, layers: Sequence[Layer], rate: float) -> float:
    """The share that all layers keep for the model to have ``rate`` times fewer parameters."""
    total = parameters(model.proto)
    ours = sum(layer.n * layer.m for layer in layers)
    keep = (total / rate - (total - ours)) / ours
    if keep <= 0:
        raise SystemExit(f"{1 - ours / total:.0%} of the parameters lie outside the layers: ask for less.")
    return keep


def run_networks(given: argparse.Namespace) -> None:
    """Whole models at the same parameters: errors of layers and outputs, and the score before retraining."""
    print("| model | fitted on | method | parameters | fewer | layers, fitted to | layers, unseen "
          "| worst layer, unseen | outputs, unseen | score before | after | s | peak MB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for path in given.models:
        model, fit_on, judge_by = read_model(path, given.images, given.samples)
        graph = model.graph()
        found = find_layers(graph)[0]
        layers = locate(found, input_shapes(model, found, fit_on), fit_on)
        rows = layer_rows(model, layers, fit_on, rows_wanted)
        held = layer_rows(model, layers, judge_by, rows_held)
        problems = [
            LayerProblem(x, read_weight(graph, x)[0], rows.pop(x.output), held.pop(x.output), fit_on.count)
            for x in layers
        ]
        for rate in given.rate:
            keep = keep_rate(model, layers, rate)
            for method in given.methods:
                edited = model.graph()
                spent, seconds, errors = parameters(model.proto), 0.0, []
                for layer, problem in zip(layers, problems, strict=True):
                    weight, bias = read_weight(edited, layer)
                    done = fit(problem, method, keep, given.share, EFFORTS[given.effort])
                    errors.append(problem.errors(done.weight))
                    spent += done.parameters - weight.size
                    seconds += done.seconds
                    if method not in DATA_FREE:
                        bias = bias + (weight - done.weight) @ problem.moments.mean
                    put(edited, layer, done.weight, bias)
                metric = None if judge_by.labels is None else "top1"
                measured = compare(model, model.splice(edited), judge_by, metric=metric, latency=False)
                unseen, own = (geometric(column) for column in zip(*errors, strict=True))
                outputs = measured.error
                scores = ["", ""]
                if measured.metric is not None:
                    scores = [f"{100 * x:.2f}" for x in (measured.metric.before, measured.metric.after)]
                print(
                    f"| {path.name if path.is_dir() else path.stem} | {fit_on.count} | {method} "
                    f"| {spent / 1e6:.3f} M | {parameters(model.proto) / spent:.2f} x | {own:.4f} "
                    f"| {unseen:.4f} | {max(e for e, _ in errors):.3f} | {outputs:.4f} "
                    f"| {' | '.join(scores)} | {seconds:.0f} | {peak(resource.RUSAGE_SELF)} |",
                    flush=True,
                )


def put(graph: gs.Graph, layer: Layer, weight: Array, bias: Array) -> None:
    """Give ``layer`` the dense ``weight`` (n, m) and ``bias`` (n,)."""
    wide = weight.reshape(layer.n, layer.channels, *layer.kernel).astype(np.float32)
    everything = tuple(range(layer.channels))
    split(
        graph,
        layer,
        Factors(
            form=Form(CHANNEL, 0, NONE),
            kernels=(),
            bias=bias.astype(np.float32),
            sparse=wide,
            channels=everything,
        ),
    )


def run_full(given: argparse.Namespace) -> None:
    """Size, stages, memory of the command line tool on one large model."""
    proto = onnx.load(given.model, load_external_data=False)
    side = proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    with tempfile.TemporaryDirectory() as folder:
        calib, output, report = (Path(folder) / name for name in ("calib.npz", "out.onnx", "report.json"))
        np.savez(calib, resized(given.images, side, given.samples))
        command = [sys.executable, "-m", "onnx_lrsd", "optimize", str(given.model), "-o", str(output)]
        command += ["--calib", str(calib), "--ratio", str(given.ratio), "--json", str(report)]
        start = time.perf_counter()
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if not report.exists():
            raise SystemExit(done.stderr)
        facts = json.loads(report.read_text())
    before, after, ratio = facts["before"], facts["after"], facts["ratio"]
    print(done.stderr, file=sys.stderr)
    print("| | before | after | ratio |\n|---|---|---|---|")
    for name, unit, word in (("bytes", 1e6, "MB"), ("parameters", 1e6, "M"), ("macs", 1e9, "G")):
        old, new = before[name] / unit, after[name] / unit
        print(f"| {name} | {old:.1f} {word} | {new:.1f} {word} | {ratio[name]:.2f} x |")
    print(f"| latency | {before['latency_ms']:.0f} ms | {after['latency_ms']:.0f} ms "
          f"| {ratio['latency']['median']:.2f} x |")  # fmt: skip
    print(f"\nOutput error {max(o['relative_error'] for o in facts['outputs']):.2%} on samples kept apart.")
    stages = ", ".join(f"{name} {value:.1f}" for name, value in facts["seconds"].items())
    print(f"{seconds:.0f} s ({stages}); peak memory {peak(resource.RUSAGE_CHILDREN)} MB.")


def kind_of(layer: Layer) -> str:
    """What layers are told apart by: what they read and how far they look."""
    if layer.op != "Conv":
        return "dense"
    if layer.channels <= 4:
        return "first convolution"
    return "convolution, 1 x 1" if prod(layer.kernel) == 1 else "convolution, k x k"


def slopes(weight: Array) -> tuple[float, float, float]:
    """a, b, and the root mean square error of the fit, in log σ."""
    values = np.linalg.svd(weight, compute_uv=False)
    count = len(values)
    i = np.arange(1, 1 + count * 9 // 10)
    logs = np.log(values[: len(i)])
    terms = np.stack([np.ones(len(i)), -np.log(i), -i / count], axis=1)
    # In log i equally many points a decade, or the tail alone would decide.
    weights = 1 / np.sqrt(i)
    found = np.linalg.lstsq(terms * weights[:, None], logs * weights, rcond=None)[0]
    missed = (terms @ found - logs) * weights
    return float(found[1]), float(found[2]), float(np.sqrt(np.sum(missed**2) / np.sum(weights**2)))


def smoothness(weight: Array, size: int) -> Array:
    """Amplitudes (size,) of the cosine coefficients of k x k kernels along one axis; the first is 1."""
    at = (np.arange(size) + 0.5) / size
    basis = np.cos(np.pi * np.arange(size)[:, None] * at)
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    kernels = weight.reshape(-1, size, size)
    energy = np.mean((basis @ kernels @ basis.T) ** 2, axis=0)
    along = np.sqrt((energy[0] + energy[:, 0]) / 2)
    return np.asarray(along / along[0])


def run_spectra(given: argparse.Namespace) -> None:
    """Print a row for each kind of layer."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    smooth: dict[str, list[Array]] = {}
    for path in given.models:
        graph = load(path).graph()
        for layer in find_layers(graph)[0]:
            weight = read_weight(graph, layer)[0]
            if min(weight.shape) >= FEWEST:
                found.setdefault(kind_of(layer), []).append(slopes(weight))
            if layer.kernel[:1] == layer.kernel[1:] == (3,):
                smooth.setdefault(kind_of(layer), []).append(smoothness(weight, 3))
    titles = "layers", "how many", "a (quartiles)", "b (quartiles)", "error of the fit"
    print(heading(*titles, "kernel amplitudes"))
    for name, rows in found.items():
        low, middle, high = np.quantile(rows, (0.25, 0.5, 0.75), axis=0)
        cells = [f"{middle[j]:.2f} ({low[j]:.2f} to {high[j]:.2f})" for j in (0, 1)]
        along: list[float] = np.median(smooth[name], axis=0).tolist() if name in smooth else []
        print(
            f"| {name} | {len(rows)} | {cells[0]} | {cells[1]} | {middle[2]:.2f} "
            f"| {', '.join(f'{value:.2f}' for value in along)} |"
        )


def peak(who: int) -> int:
    """Largest resident memory so far, in MB."""
    return resource.getrusage(who).ru_maxrss // 1024


def versions() -> Iterator[str]:
    """What the tables depend on."""
    yield f"Python {platform.python_version()}"
    yield from (f"{module.__name__} {module.__version__}" for module in (np, onnx, onnxruntime))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The parts and what each takes."""
    parts = parser.add_subparsers(required=True)
    samples = parts.add_parser("samples", help="errors over the number of samples")
    samples.add_argument("folder", type=Path)
    samples.add_argument("--keep", type=comma_separated, default=list(KEEPS))
    samples.add_argument(
        "--counts", type=lambda text: [int(x) for x in text.split(",")], default=list(COUNTS)
    )
    samples.add_argument("--unseen", type=int, default=100)
    samples.add_argument("--layers", default=LAYERS, help="a regular expression over names of nodes")
    samples.set_defaults(part=run_samples)
    networks = parts.add_parser("networks", help="whole models at the same parameters")
    networks.add_argument("models", nargs="+", type=Path)
    networks.add_argument("--rate", type=comma_separated, required=True)
    networks.add_argument("--images", type=Path)
    networks.add_argument("--samples", type=int)
    networks.add_argument("--methods", type=lambda text: text.split(","), default=list(NAMES))
    networks.set_defaults(part=run_networks)
    for part in (samples, networks):
        part.add_argument("--share", type=float, help="of the factors in the budget (default: by a fold)")
        part.add_argument("--effort", default="standard", choices=list(EFFORTS))
    full = parts.add_parser("full", help="the command line tool on a large model")
    full.add_argument("model", type=Path)
    full.add_argument("--images", type=Path, required=True)
    full.add_argument("--ratio", type=float, default=4)
    full.add_argument("--samples", type=int, default=32)
    full.set_defaults(part=run_full)
    spectra = parts.add_parser("spectra", help="how singular values and kernels of trained layers fall")
    spectra.add_argument("models", nargs="+", type=Path)
    spectra.set_defaults(part=run_spectra)


def run(given: argparse.Namespace) -> None:
    """Run one of them."""
    print(f"{', '.join(versions())}, one thread of the solver\n")
    given.part(given)
