"""How many detections of a detector stay: anchors whose best score is above a threshold in both models.

    python -m benchmarks detections BEFORE.onnx AFTER.onnx DATA.npz [--first 4] [--threshold .25]

For models whose one output is (samples, channels, anchors), boxes first, scores from channel FIRST on, as
YOLO exports are (prepare.py nudenet_photos).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import onnx_lrsd
from onnx_lrsd.data.samples import batch_to_run, read_samples
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.runtime.session import open_session

OPTIONS = ()


class Detections(NamedTuple):
    """Anchors above the threshold in the first model, in both, and in the second."""

    before: int
    stay: int
    after: int


def detections(old: npt.NDArray[Any], new: npt.NDArray[Any], threshold: float) -> Detections:
    """Count them in scores (samples, classes, anchors) of both models; the class must be the same too."""
    found, still = (scores.max(axis=1) > threshold for scores in (old, new))
    same = found & still & (old.argmax(axis=1) == new.argmax(axis=1))
    return Detections(*(int(np.sum(which)) for which in (found, same, still)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("files", type=Path, nargs=3, metavar="FILE")
    parser.add_argument("--first", type=int, default=4, help="first channel of scores")
    parser.add_argument("--threshold", type=float, default=0.25)


def run(given: argparse.Namespace) -> None:
    """Print the counts."""
    before, after = (onnx_lrsd.load(path) for path in given.files[:2])
    samples = read_samples(given.files[2], inputs_of(before.proto))
    one, two = (open_session(model.proto, folder=model.folder) for model in (before, after))
    total = np.zeros(3, int)
    for feed in samples.batches(batch_to_run(samples)):
        old, new = (next(iter(session.run(feed).values()))[:, given.first :] for session in (one, two))
        total += detections(old, new, given.threshold)
    found = Detections(*map(int, total))
    print(f"{found.before} detections above {given.threshold:g}: {found.stay} stay, {found.after} after.")
