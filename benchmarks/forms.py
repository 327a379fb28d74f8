"""Which form loses least at equal MACs, layer by layer, on samples the fit has not seen.

    python benchmarks/forms.py FOLDER [--share .25] [--samples N]

A FOLDER holds model.onnx and calib.npz. Every k x k convolution is fitted on one half of the samples at
``share`` of its dense MACs; the error is that of its outputs on the other half, relative to their
variance. ``S 8`` takes its 8 channels out of the same budget. ``Tucker-2`` is the published
distribution-aware one (reference/tucker2.py): the better, on the samples it was fitted to, of a few ratios
of its two ranks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
from reference.tucker2 import expand as expand_tucker
from reference.tucker2 import tucker2

from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.fit.calibrate import calibrate
from onnx_lrsd.graph.model import load
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.runtime.session import inputs_of
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.layout import expand
from onnx_lrsd.solver.problem import Problem, pose
from onnx_lrsd.targets import price
from onnx_lrsd.types import CHANNEL, CHANNEL_IN, SPATIAL, TUCKER, Array, Form, Layer, whole_channels

TRIED = ((CHANNEL, 0), (CHANNEL_IN, 0), (SPATIAL, 0), (SPATIAL, 8))
OUTER = (1.0, 0.5, 0.7, 1.4, 2.0)
"""Share of the outputs that the core gives, over the share of the input channels that it reads."""


def largest(layer: Layer, kind: str, channels: int, share: float) -> Form | None:
    """The form of most rank within the share of the dense MACs."""
    most = share * price(layer, Form()).macs
    ranks = [
        r
        for r in range(1, layer.channels)
        if price(layer, Form(kind, r, whole_channels(channels))).macs <= most
    ]
    return Form(kind, ranks[-1], whole_channels(channels)) if ranks else None


def published_tucker(posed: Problem, share: float) -> tuple[tuple[int, int], Array]:
    """Ranks and weight (n, m) of the best distribution-aware Tucker-2 within the share of the dense MACs."""
    layer, metric = posed.layer, posed.metric
    second = metric.matrix(posed.weight)
    most, tried = share * price(layer, Form()).macs, {}
    for ratio in OUTER:
        pairs = [
            (p, min(max(round(ratio * p * layer.n / layer.channels), 1), layer.n))
            for p in range(1, layer.channels + 1)
        ]
        fitting = [x for x in pairs if price(layer, Form(TUCKER, x[0], outer=x[1])).macs <= most]
        if fitting:
            ranks = fitting[-1]
            tried[ranks] = expand_tucker(*tucker2(posed.weight, second, prod(layer.kernel), ranks, 0.0))
    ranks = min(tried, key=lambda x: posed.error(tried[x]))
    return ranks, tried[ranks]


def halves(folder: Path, count: int | None) -> Iterator[tuple[Problem, Problem]]:
    """Each k x k convolution as posed by half of the samples, and by the other half, to judge."""
    model = load(folder / "model.onnx")
    graph = model.graph()
    layers = [
        x for x in find_layers(graph)[0] if len(x.kernel) == 2 and min(x.kernel) > 1 and x.channels > 16
    ]
    samples = read_samples(folder / "calib.npz", inputs_of(model.proto), limit=count)
    weight_of = partial(read_weight, graph)
    fit, held = (calibrate(model, layers, half, weight_of) for half in samples.split(0.5, 0))
    for layer in fit.layers:
        affine = read_weight(graph, layer)
        yield (
            pose(layer, *affine, fit.moments[layer.output]),
            pose(layer, *affine, held.moments[layer.output]),
        )


def main() -> None:
    """Print a row for each layer and the geometric means."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--samples", type=int)
    given = parser.parse_args()
    titles = [f"{kind}{' + S 8' * bool(channels)}" for kind, channels in TRIED]
    titles += ["Tucker-2", "spatial / channel", "spatial / Tucker-2"]
    print(f"| layer | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}")
    ratios: list[tuple[float, float]] = []
    for posed, judge in halves(given.folder, given.samples):
        layer = posed.layer
        found = []
        for kind, channels in TRIED:
            form = largest(layer, kind, channels, given.share)
            missed = judge.error(expand(layer, decompose(posed, form))) if form else float("nan")
            found.append((form.rank if form else 0, missed))
        ranks, approximation = published_tucker(posed, given.share)
        tucker = judge.error(approximation)
        ratios.append((found[2][1] / found[0][1], found[2][1] / tucker))
        shape = "x".join(map(str, layer.shape))
        cells = " | ".join(f"{missed:.5f} (r {rank})" for rank, missed in found)
        print(
            f"| {shape}, {prod(layer.size)} px | {cells} | {tucker:.5f} (r {ranks[0]}, {ranks[1]}) "
            f"| {ratios[-1][0]:.2f} | {ratios[-1][1]:.2f} |",
            flush=True,
        )
    for against, column in zip(("channel", "Tucker-2"), zip(*ratios, strict=True), strict=True):
        mean = np.exp(np.mean(np.log(column)))
        print(f"\nspatial / {against}, geometric mean: {mean:.3f}, worst {max(column):.3f}")


if __name__ == "__main__":
    main()
