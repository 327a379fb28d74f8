"""What it saves to run the rewritten network from where it has settled while layers are fitted in order.

    python benchmarks/relay.py FOLDER... [--samples N] [--target size]

A FOLDER holds model.onnx and calib.npz. Every layer of 16 channels and more becomes two factors of a third of
its rank (or, for the size, a dense weight of 4 bits), once with the network run from its inputs before each
stage, once from the activations held. Printed are the seconds in ONNX Runtime, opening included, those of
the whole fit, and by how much the layers' errors differ.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.fit.calibrate import calibrate
from onnx_lrsd.fit.reconstruct import reconstruct
from onnx_lrsd.graph.model import load
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.runtime.activation_cache import MOST_HELD, Relay
from onnx_lrsd.runtime.session import Session, inputs_of, open_session
from onnx_lrsd.types import CHANNEL, DENSE, Form, Layer

FEWEST_CHANNELS = 16
RUNS, FIT = (sys.modules[f"onnx_lrsd.{name}"] for name in ("calibrate", "reconstruct"))
"""The modules: the package has functions of these names."""


class Clock:
    """Seconds spent in the calls that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its seconds added up."""

        def call(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            found = function(*given, **named)
            self.seconds += time.perf_counter() - start
            if isinstance(found, Session):
                found.run = self.timed(found.run)  # type: ignore[method-assign]
            return found

        return call


def form_of(layer: Layer, target: str) -> Form:
    """A third of the rank, or 4 bits."""
    if target == "size":
        return Form(DENSE, weights=(("int4", layer.n),))
    return Form(CHANNEL, min(layer.n, layer.channels) // 3)


def main() -> None:
    """Print a markdown row for each folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--target", choices=("onnxruntime", "size"), default="onnxruntime")
    given = parser.parse_args()
    print("| model | samples | network from its inputs, s | fit, s | from what is held, s | fit, s | apart |")
    print("|---|---|---|---|---|---|---|")
    for folder in given.folders:
        model = load(folder / "model.onnx")
        graph = model.graph()
        weight_of = partial(read_weight, graph)
        samples = read_samples(folder / "calib.npz", inputs_of(model.proto), limit=given.samples)
        wide = [x for x in find_layers(graph)[0] if min(x.n, x.channels) >= FEWEST_CHANNELS]
        known = calibrate(model, wide, samples, weight_of)
        forms = {layer.output: form_of(layer, given.target) for layer in wide}
        cells, errors = [], []
        for most in (0, MOST_HELD):
            clock = Clock()
            vars(RUNS)["open_session"] = clock.timed(open_session)
            vars(FIT)["Relay"] = partial(Relay, most)
            start = time.perf_counter()
            fitted = reconstruct(model, known.layers, forms, weight_of, known)[1]
            cells += [f"{clock.seconds:.1f}", f"{time.perf_counter() - start:.1f}"]
            errors.append({name: factors.error for name, factors in fitted.items()})
        apart = max(abs(errors[0][name] - errors[1][name]) for name in forms)
        print(f"| {folder.name} | {samples.count} | {' | '.join(cells)} | {apart:.0e} |", flush=True)


if __name__ == "__main__":
    main()
