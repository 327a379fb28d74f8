"""Where the time of a model goes: the whole run, and each layer that could take another form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnx_lrsd.dataset import Samples
from onnx_lrsd.model import Model
from onnx_lrsd.passes import isolate
from onnx_lrsd.runtime import kernels, open_session
from onnx_lrsd.timing import busy_clock
from onnx_lrsd.types import Layer

SESSIONS, RUNS, SECONDS = 3, 5, 0.5
"""Sessions that the whole is timed in, runs of each at least, and seconds after which there are no more."""
LAYOUT = ("ReorderInput", "ReorderOutput")
"""Nodes that a convolution needs when it is alone, and not among its like."""


@dataclass(frozen=True)
class Anatomy:
    """Seconds of one sample in one thread: of the whole model, and of layers by name."""

    whole: float
    layers: Mapping[str, float]


def anatomy(
    model: Model,
    layers: Sequence[Layer],
    shapes: Mapping[str, tuple[int, ...]],
    samples: Samples,
) -> Anatomy:
    """Time the whole model and each of ``layers`` alone on one smallest batch; layers alike are timed once.

    ``shapes`` are those of the layers' inputs in that batch.
    """
    feed = next(iter(samples.batches(1)))
    size = samples.size_of(feed)
    rng, known = np.random.default_rng(0), dict[object, float]()
    found = {}
    for layer in layers:
        shape = shapes[layer.input]
        key = (layer.op, layer.shape, layer.axis, layer.strides, layer.pads, layer.dilations, shape)
        if key not in known:
            alone = isolate(model.proto, layer, shape)
            values = {layer.input: rng.standard_normal(shape).astype(layer.dtype)}
            nodes = kernels(alone, values, folder=model.folder, runs=RUNS)
            known[key] = sum(node.seconds for node in nodes if node.op not in LAYOUT)
        found[layer.name] = known[key] / size
    return Anatomy(_whole(model, feed) / size, found)


def _whole(model: Model, feed: Mapping[str, np.ndarray]) -> float:
    """Seconds of one run, the median over a few sessions of their median runs."""
    medians = []
    for _ in range(SESSIONS):
        session = open_session(model.proto, folder=model.folder, threads=1)
        medians.append(_median(partial(session.run, feed)))
    return float(np.median(medians))


def _median(run: Callable[[], object]) -> float:
    clock, times = busy_clock(), list[float]()
    run()
    while len(times) < RUNS or sum(times) < SECONDS:
        start = clock()
        run()
        times.append(max(clock() - start, 1e-9))
    return float(np.median(times))
