"""What calibration costs, as a multiple of plain inference of the same samples.

    python benchmarks/calibration.py FOLDER... [--samples N] [--rounds K]

A FOLDER holds model.onnx and calib.npz. Inference and calibration alternate; the median of the paired
ratios is printed.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np

from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.fit.calibrate import calibrate
from onnx_lrsd.graph.model import load
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.runtime.session import inputs_of, open_session
from onnx_lrsd.targets.onnxruntime import ONNXRUNTIME
from onnx_lrsd.types import KINDS, Layer


def worth_trying(layer: Layer) -> bool:
    """Whether ``optimize`` would take moments of the layer."""
    return bool(ONNXRUNTIME.forms(layer, KINDS))


def main() -> None:
    """Time both and print a markdown row for each folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print("| model | samples | inference, s | calibration, s | ratio |\n|---|---|---|---|---|")
    for folder in given.folders:
        model = load(folder / "model.onnx")
        graph = model.graph()
        layers, _ = find_layers(graph)
        samples = read_samples(folder / "calib.npz", inputs_of(model.proto), limit=given.samples)
        plain, whole = [], []
        for _ in range(given.rounds):
            start = time.perf_counter()
            session = open_session(model.proto, folder=model.folder)
            for feed in samples.batches(1):
                session.run(feed)
            middle = time.perf_counter()
            calibrate(model, layers, samples, partial(read_weight, graph), asked=worth_trying)
            plain.append(middle - start)
            whole.append(time.perf_counter() - middle)
        ratio = float(np.median(np.array(whole) / np.array(plain)))
        print(
            f"| {folder.name} | {samples.count} | {np.median(plain):.1f} | {np.median(whole):.1f} "
            f"| {ratio:.2f} x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
