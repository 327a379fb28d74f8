"""What a 2:4 weight loses beside factors that take the same predicted time, layer by layer.

    python benchmarks/two_of_four.py FOLDER [--samples N] [--include RE]

A FOLDER holds model.onnx and calib.npz. For every layer that `--target tensorrt` offers 2:4 for: its relative
output error on the calibration moments, its predicted time as a share of the dense layer's, the factor form
of least error within that time and with the same error, and the CPU seconds of both error curves.
"""

from __future__ import annotations

import argparse
import re
import time
from functools import partial
from pathlib import Path

from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.fit.calibrate import calibrate
from onnx_lrsd.graph.model import load
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.runtime.session import inputs_of
from onnx_lrsd.solver.curve import errors
from onnx_lrsd.solver.problem import Problem, pose
from onnx_lrsd.targets.tensorrt import TENSORRT, TWO_OF_FOUR
from onnx_lrsd.types import CHANNEL, KINDS, Form

SPARSE = Form(CHANNEL, 0, TWO_OF_FOUR)


def timed(problem: Problem, forms: list[Form]) -> tuple[dict[Form, float], float]:
    """The error of every form, and the CPU seconds that took."""
    start = time.process_time()
    found = errors(problem, forms)
    return found, time.process_time() - start


def main() -> None:
    """Print a row for each layer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--include", default="")
    given = parser.parse_args()
    model = load(given.folder / "model.onnx")
    graph = model.graph()
    layers = [layer for layer in find_layers(graph)[0] if re.search(given.include, layer.name)]
    samples = read_samples(given.folder / "calib.npz", inputs_of(model.proto), limit=given.samples)
    weight_of = partial(read_weight, graph)
    known = calibrate(
        model, layers, samples, weight_of, asked=lambda layer: SPARSE in TENSORRT.forms(layer, KINDS)
    )
    print("| layer | 2:4, error | time | least error in that time | as little error | s, factors | s, 2:4 |")
    print("|---|---|---|---|---|---|---|")
    for layer in known.layers:
        if layer.output not in known.moments:
            continue
        problem = pose(layer, *weight_of(layer), known.moments[layer.output])
        forms = [form for form in TENSORRT.forms(layer, KINDS) if form.pattern != TWO_OF_FOUR]
        plain, seconds = timed(problem, forms)
        sparse, more = timed(problem, [SPARSE])
        dense = TENSORRT.cost(layer, Form())
        share = {form: TENSORRT.cost(layer, form) / dense for form in (*forms, SPARSE)}
        within = min((f for f in plain if share[f] <= share[SPARSE]), key=lambda f: plain[f])
        alike = [form for form in plain if plain[form] <= sparse[SPARSE]]
        best = min(alike, key=lambda form: share[form], default=None)
        said = "none" if best is None else f"{best}: {share[best]:.2f}"
        print(
            f"| {layer.name}, {'x'.join(map(str, layer.shape))} | {sparse[SPARSE]:.5f} | {share[SPARSE]:.2f} "
            f"| {within}: {plain[within]:.5f} | {said} | {seconds:.1f} | {more:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
