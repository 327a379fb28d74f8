"""How singular values of trained layers fall, and how smooth their kernels are, as in models/published.py.

    python -m benchmarks spectra MODEL.onnx...

Of every layer's weight (n, m) with k = min(n, m) singular values σ_1 >= σ_2 ..., log σ_i is fitted by
c - a log i - b i / k; the smallest tenth, where rounding and dead channels show, is left out. Of a k x k
kernel the root mean square of its cosine coefficients is given along one axis, by frequency, relative to
frequency 0. The table has the median over the layers of a kind, with quartiles of a and b.
"""

from __future__ import annotations

import argparse
from math import prod
from pathlib import Path

import numpy as np

from benchmarks.options import heading
from onnx_lrsd.graph.model import load
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.types import Array, Layer

OPTIONS = ()
FEWEST = 16
"""Singular values that a fit of two slopes needs at least."""


def kind(layer: Layer) -> str:
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("models", nargs="+", type=Path)


def run(given: argparse.Namespace) -> None:
    """Print a row for each kind of layer."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    smooth: dict[str, list[Array]] = {}
    for path in given.models:
        graph = load(path).graph()
        for layer in find_layers(graph)[0]:
            weight = read_weight(graph, layer)[0]
            if min(weight.shape) >= FEWEST:
                found.setdefault(kind(layer), []).append(slopes(weight))
            if layer.kernel[:1] == layer.kernel[1:] == (3,):
                smooth.setdefault(kind(layer), []).append(smoothness(weight, 3))
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
