"""Whether S as a depthwise convolution, or of the centre tap alone, pays in equal predicted time.

    python benchmarks/branches.py FOLDER [--share .25] [--samples N]

A FOLDER holds model.onnx and calib.npz. Every k x k convolution is fitted on one half of the samples as the
spatial form of most rank within ``share`` of its predicted time, alone or with a branch that is paid for out
of the same time; the error is that of its outputs on the other half, relative to their variance. *Centre
tap*: a dense 1 x 1 convolution of the input, found in closed form by regressing the centre columns out.
*Depthwise*: a k x k convolution of one channel each, fitted in turns with the factors. Its time is that of a
1 x 1 convolution of one block, less than what it really takes.
"""

from __future__ import annotations

import argparse
from math import prod
from pathlib import Path

import numpy as np
from forms import halves

from onnx_lrsd.solver.decompose import SWEEPS, factors
from onnx_lrsd.solver.layout import ungroup_weight
from onnx_lrsd.solver.problem import Metric, Problem
from onnx_lrsd.targets import TARGETS, built_in
from onnx_lrsd.targets.target import Node
from onnx_lrsd.types import SPATIAL, Array, Form, Layer

TARGET, MACHINE = TARGETS["onnxruntime"], built_in()
TURNS = 5
"""Alternations of depthwise S and factors."""


def rank_within(layer: Layer, seconds: float) -> int:
    """The largest rank, a multiple of the block, that is predicted to run in ``seconds``; 0 for none."""
    ranks = range(MACHINE.block, min(layer.n, layer.channels) * 3, MACHINE.block)
    return max((r for r in ranks if TARGET.cost(layer, Form(SPATIAL, r)) <= seconds), default=0)


def spatial(problem: Problem, weight: Array, metric: Metric, rank: int) -> Array:
    """The spatial form (n, m) nearest to ``weight`` in ``metric``."""
    v, h = factors(problem.layer, weight, metric, Form(SPATIAL, rank), SWEEPS["standard"])
    return ungroup_weight(np.matmul(h, v))


def with_centre_tap(problem: Problem, rank: int) -> Array:
    """Spatial + S on the centre columns, jointly: the factors see the metric conditional on them."""
    taps = prod(problem.layer.kernel)
    centre = np.arange(taps // 2, problem.layer.m, taps)
    second = problem.metric.matrix(problem.weight)
    inverse = np.linalg.inv(second[np.ix_(centre, centre)])
    rest = second - second[:, centre] @ inverse @ second[centre]
    low = spatial(
        problem,
        problem.weight,
        Metric((rest + rest.T) / 2, None, 1e-6 * float(np.trace(rest)) / len(rest)),
        rank,
    )
    low[:, centre] += ((problem.weight - low) @ second)[:, centre] @ inverse
    return low


def with_depthwise(problem: Problem, rank: int) -> Array:
    """Spatial + one k x k filter for each channel, in turns."""
    layer, taps = problem.layer, prod(problem.layer.kernel)
    second = problem.metric.matrix(problem.weight)
    own = np.arange(layer.m).reshape(layer.channels, taps)
    sparse = np.zeros_like(problem.weight)
    for _ in range(TURNS):
        low = spatial(problem, problem.weight - sparse, problem.metric, rank)
        right = (problem.weight - low) @ second
        sparse = np.zeros_like(sparse)
        for i, columns in enumerate(own):
            sparse[i, columns] = np.linalg.solve(second[np.ix_(columns, columns)], right[i, columns])
    return low + sparse


def main() -> None:
    """Print a row for each layer and the geometric means."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--samples", type=int)
    given = parser.parse_args()
    print(
        "| layer | spatial | + centre tap | + depthwise | centre tap / alone | depthwise / alone |\n"
        + "|---" * 6
        + "|"
    )
    ratios: dict[str, list[float]] = {"centre tap": [], "depthwise": []}
    for posed, judge in halves(given.folder, given.samples):
        layer = posed.layer
        budget = given.share * TARGET.cost(layer, Form())
        tap = MACHINE.seconds(Node(layer.n, layer.channels, (1, 1), layer.positions))
        channelwise = MACHINE.seconds(Node(layer.n, MACHINE.block, (1, 1), layer.positions))
        rank = rank_within(layer, budget)
        if not rank:
            continue
        alone = judge.error(spatial(posed, posed.weight, posed.metric, rank))
        cells, shares = [f"{alone:.5f} (r {rank})"], []
        for name, extra, fitted in (
            ("centre tap", tap, with_centre_tap),
            ("depthwise", channelwise, with_depthwise),
        ):
            rank = rank_within(layer, budget - extra)
            if not rank or (name == "depthwise" and layer.n != layer.channels):
                cells.append("")
                shares.append("")
                continue
            missed = judge.error(fitted(posed, rank))
            ratios[name].append(missed / alone)
            cells.append(f"{missed:.5f} (r {rank})")
            shares.append(f"{missed / alone:.2f}")
        shape = "x".join(map(str, layer.shape))
        print(f"| {shape}, {prod(layer.size)} px | {' | '.join([*cells, *shares])} |", flush=True)
    for name, found in ((name, found) for name, found in ratios.items() if found):
        print(f"\n{name}, geometric mean: {np.exp(np.mean(np.log(found))):.3f}, best {min(found):.3f}")


if __name__ == "__main__":
    main()
