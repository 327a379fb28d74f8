"""Patch moments of k x k convolutions three ways: sampled positions, Toeplitz structure, every patch.

    python benchmarks/patches.py FOLDER... [--samples N] [--share .25]

Away from the borders E[x_p x_q^T] of two kernel positions depends on their displacement alone: 13 products
of C x C over the whole maps, instead of 45, give the moment of a 3 x 3 patch. Sampling positions, as
calibrate does, needs m x m products of far fewer rows. A FOLDER holds model.onnx and calib.npz. Each layer's
moment is formed from one half of the samples in each way, its spatial form is fitted at ``share`` of the
dense MACs, and judged on sampled patches of the other half. Seconds are those of the moments alone, without
the network, on one thread.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1"))

import argparse
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.fit.calibrate import input_shapes, locate
from onnx_lrsd.graph.model import load
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.runtime.session import inputs_of, open_session
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.layout import expand
from onnx_lrsd.solver.moments import MomentAccumulator, input_rows, pads_of, positions_of, sample_positions
from onnx_lrsd.solver.problem import pose
from onnx_lrsd.targets import price
from onnx_lrsd.types import SPATIAL, Form, Layer, Moments

Maps = npt.NDArray[np.float32]
ROWS_PER_INPUT, FEWEST, MOST, PART = 8, 4096, 20_000, 8192


def sampled(layer: Layer, maps: Maps) -> Moments:
    """From as many positions as calibrate draws."""
    total = positions_of(layer, maps.shape)
    wanted = min(max(ROWS_PER_INPUT * layer.m, FEWEST), MOST, total)
    return _of_positions(layer, maps, sample_positions(total, wanted, np.random.default_rng(0)))


def every(layer: Layer, maps: Maps) -> Moments:
    """From all patches."""
    return _of_positions(layer, maps, np.arange(positions_of(layer, maps.shape)))


def _of_positions(layer: Layer, maps: Maps, positions: npt.NDArray[np.int64]) -> Moments:
    accumulator = MomentAccumulator(layer, len(positions))
    for start in range(0, len(positions), PART):
        accumulator.add(input_rows(layer, maps, positions[start : start + PART]))
    return accumulator.result()


def toeplitz(layer: Layer, maps: Maps) -> Moments:
    """From one product for each displacement of two kernel positions, over the padded maps."""
    rows, columns = layer.kernel
    (top, bottom), (left, right) = pads_of(layer, maps.shape[2:])
    mean = maps.mean(axis=(0, 2, 3))
    padded = np.pad(maps - mean[:, None, None], ((0, 0), (0, 0), (top, bottom), (left, right)))
    channels = np.ascontiguousarray(padded.transpose(1, 0, 2, 3))
    height, width = channels.shape[2:]
    lag: dict[tuple[int, int], Maps] = {}
    for dy in range(rows):
        for dx in range(1 - columns if dy else 0, columns):
            one = channels[:, :, : height - dy, max(-dx, 0) : width - max(dx, 0)].reshape(layer.channels, -1)
            two = channels[:, :, dy:, max(dx, 0) : width + min(dx, 0)].reshape(layer.channels, -1)
            lag[dy, dx] = one @ two.T / np.float32(one.shape[1])
            lag[-dy, -dx] = lag[dy, dx].T
    taps = [(y, x) for y in range(rows) for x in range(columns)]
    blocks = [[lag[q[0] - p[0], q[1] - p[1]] for q in taps] for p in taps]
    second = np.ascontiguousarray(np.array(blocks).transpose(2, 0, 3, 1)).reshape(layer.m, layer.m)
    return Moments(
        name=layer.output,
        count=padded[:, 0].size,
        mean=np.repeat(mean, len(taps)).astype(np.float64),
        second=second,
    )


WAYS: dict[str, Callable[[Layer, Maps], Moments]] = {
    "sampled": sampled,
    "Toeplitz": toeplitz,
    "every patch": every,
}


def activations(folder: Path, layer: Layer, samples: Samples) -> Maps:
    """The layer's input over all samples."""
    model = load(folder / "model.onnx")
    fed = layer.input in samples.arrays
    session = None if fed else open_session(model.proto, folder=model.folder, outputs=[layer.input])
    feeds = samples.batches(samples.batch_size(1 << 24, 1 << 26))
    return np.concatenate(
        [feed[layer.input] if session is None else session.run(feed)[layer.input] for feed in feeds]
    )


def main() -> None:
    """Print a row for each 3 x 3 convolution, and the totals."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.25)
    given = parser.parse_args()
    titles = [f"{way}: s | error" for way in WAYS]
    print(f"| model, layer | {' | '.join(titles)} |\n|---|{'---|' * 2 * len(WAYS)}")
    seconds, errors = {way: 0.0 for way in WAYS}, {way: list[float]() for way in WAYS}
    for folder in given.folders:
        model = load(folder / "model.onnx")
        graph = model.graph()
        samples = read_samples(folder / "calib.npz", inputs_of(model.proto), limit=given.samples)
        found, _ = find_layers(graph)
        layers = [x for x in found if x.kernel == (3, 3) and set(x.strides) == {1} and x.channels >= 16]
        fit, held = samples.split(0.5, 0)
        for layer in locate(layers, input_shapes(model, layers, samples), samples):
            weight = read_weight(graph, layer)
            most = given.share * price(layer, Form()).macs
            rank = max(r for r in range(1, layer.channels) if price(layer, Form(SPATIAL, r)).macs <= most)
            judge = pose(layer, *weight, sampled(layer, activations(folder, layer, held)))
            maps = activations(folder, layer, fit)
            cells = []
            for way, moments_of in WAYS.items():
                start = time.process_time()
                moments = moments_of(layer, maps)
                spent = time.process_time() - start
                fitted = decompose(pose(layer, *weight, moments), Form(SPATIAL, rank))
                missed = judge.error(expand(layer, fitted))
                seconds[way] += spent
                errors[way].append(missed)
                cells.append(f"{spent:.2f} | {missed:.5f}")
            shape = f"{layer.n}x{layer.channels}, {prod(layer.size)} px"
            print(f"| {folder.name}, {shape} | {' | '.join(cells)} |", flush=True)
    totals = [f"{seconds[way]:.2f} | {np.exp(np.mean(np.log(errors[way]))):.5f}" for way in WAYS]
    print(f"| sum, geometric mean | {' | '.join(totals)} |")


if __name__ == "__main__":
    main()
