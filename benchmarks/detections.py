"""What a user sees of a changed model: how many detections of a detector stay, or lines of text as read.

    python -m benchmarks detections BEFORE.onnx AFTER.onnx DATA.npz [--first 4] [--threshold .25]
    python -m benchmarks detections BEFORE.onnx AFTER.onnx DATA.npz --lines

Detections are anchors whose best score is above a threshold in both models, of the same class. For models
whose one output is (samples, channels, anchors), boxes first, scores from channel FIRST on, as YOLO exports
are (prepare.py nudenet_photos). Lines are those of models that read text, with one output of scores
(samples, steps, characters): the best character of each step, repeats and the blank 0 dropped, is what is
read (prepare.py ppocrv4_rec_lines).
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


def read_lines(scores: npt.NDArray[Any]) -> list[tuple[int, ...]]:
    """The characters that scores (samples, steps, characters) are read as, greedily.

    Source: Graves et al., Connectionist temporal classification, ICML 2006, section 3.2.
    """
    best = scores.argmax(axis=-1)
    changed = np.diff(best, axis=1, prepend=-1) != 0
    return [tuple(map(int, line[new & (line > 0)])) for line, new in zip(best, changed, strict=True)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("files", type=Path, nargs=3, metavar="FILE")
    parser.add_argument("--first", type=int, default=4, help="first channel of scores")
    parser.add_argument("--threshold", type=float, default=0.25)
    parser.add_argument("--lines", action="store_true", help="compare lines of text")


def run(given: argparse.Namespace) -> None:
    """Print the counts."""
    before, after = (onnx_lrsd.load(path) for path in given.files[:2])
    samples = read_samples(given.files[2], inputs_of(before.proto))
    one, two = (open_session(model.proto, folder=model.folder) for model in (before, after))
    feeds = samples.batches(batch_to_run(samples))
    pairs = ((next(iter(one.run(feed).values())), next(iter(two.run(feed).values()))) for feed in feeds)
    if given.lines:
        same = [
            line == other
            for old, new in pairs
            for line, other in zip(*map(read_lines, (old, new)), strict=True)
        ]
        print(f"{len(same)} lines: {sum(same)} are read as before ({np.mean(same):.1%}).")
        return
    total = np.zeros(3, int)
    for old, new in pairs:
        total += detections(old[:, given.first :], new[:, given.first :], given.threshold)
    found = Detections(*map(int, total))
    print(f"{found.before} detections above {given.threshold:g}: {found.stay} stay, {found.after} after.")
