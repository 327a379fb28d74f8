"""A dense layer with far fewer rows than inputs (VGG-16's fc6): seconds and peak memory of its fit.

    python benchmarks/few_rows.py [--outputs 4096] [--inputs 25088] [--rows 2000] [--sparse SHARE]

Rank an eighth of the outputs; with --sparse, half of that and this share of the entries. Weight and inputs
are made up, of decaying spectrum: their error says nothing, time and memory do.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

import onnx_lrsd
from onnx_lrsd.types import CHANNEL, UNSTRUCTURED, Form, Layer, Moments, Pattern


def main() -> None:
    """Fit the layer once and print what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=25088)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--sparse", type=float, default=0.0)
    given = parser.parse_args()
    n, m, count = given.outputs, given.inputs, given.rows
    rng = np.random.default_rng(0)

    def correlated(rows: int, noise: float) -> np.ndarray:
        common = rng.standard_normal((rows, 256), np.float32) @ rng.standard_normal((256, m), np.float32)
        return common / 16 + noise * rng.standard_normal((rows, m), np.float32)

    layer = Layer(
        output="y", name="fc6", op="Gemm", input="x", weight="w", shape=(n, m), dtype="float32", n=n, m=m
    )
    weight, rows = correlated(n, 0.05), np.maximum(correlated(count, 0.3), 0)
    mean = rows.mean(axis=0, dtype=np.float64)
    rows -= mean.astype(np.float32)
    rank, entries = n // 8, round(given.sparse * n * m)
    form = Form(CHANNEL, rank // 2, Pattern(UNSTRUCTURED, entries)) if entries else Form(CHANNEL, rank)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    problem = onnx_lrsd.pose(layer, weight, np.zeros(n), Moments(name="y", count=count, mean=mean, rows=rows))
    onnx_lrsd.decompose(problem, form, effort="fast")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{n} x {m} from {count} rows, {form}: {time.perf_counter() - start:.0f} s, "
        f"peak {peak / 1e6:.1f} GB ({before / 1e6:.1f} GB of it before the fit)"
    )


if __name__ == "__main__":
    main()
