"""Where the time of a model goes: the whole run, and each layer that could take another form."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_lrsd.data.samples import Samples, as_fed, batch_to_run
from onnx_lrsd.graph.model import Model
from onnx_lrsd.passes.isolate import isolate
from onnx_lrsd.runtime.kernel_times import Kernel, kernels
from onnx_lrsd.runtime.session import open_model, open_session
from onnx_lrsd.runtime.timing import busy_clock
from onnx_lrsd.types import Feed, Layer, Progress

SESSIONS, _RUNS, SECONDS = 3, 5, 0.5
"""Sessions that the whole is timed in, runs of each at least, and seconds after which there are no more."""
_MOST_RUNS = 200
"""Runs of each session, at most."""
LINKS, LINK_CHANNELS = 64, 16
"""Nodes of the longer chain that tells what a node takes beside its work, and their channels."""
_FEED = {"x": np.ones((1, LINK_CHANNELS, 1, 1), np.float32)}
LAYOUT = ("ReorderInput", "ReorderOutput")
"""Nodes that a convolution needs when it is alone, but not between others of its kind."""


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one sample, on a CPU in one thread: of the whole model, and of layers by name."""

    whole: float
    layers: Mapping[str, float]


def time_layers(
    model: Model,
    layers: Sequence[Layer],
    shapes: Mapping[str, tuple[int, ...]],
    samples: Samples,
    *,
    progress: Progress | None = None,
) -> LayerTimes:
    """Time the whole model and each of ``layers`` alone on one smallest batch; layers alike are timed once.

    ``shapes`` are those of the layers' inputs in that batch. All is timed where the model runs. A model
    that is run part by part is not timed: its layers stand for the whole.
    """
    feed = samples.example()
    size = samples.size_of(feed)
    rng, known = np.random.default_rng(0), dict[object, float]()
    found = {}
    for done, layer in enumerate(layers):
        shape = shapes[layer.input]
        key = (layer.unnamed, shape)
        if key not in known:
            alone = isolate(model.proto, layer, shape)
            values = {layer.input: rng.standard_normal(shape).astype(layer.dtype)}
            known[key] = _alone(model, alone, values)
        found[layer.output] = known[key] / size
        if progress is not None:
            progress("time layers", done + 1, len(layers))
    whole = sum(found.values()) if model.parted else _whole(model, feed) / size
    fitting = min(1.0, whole / max(sum(found.values()), 1e-12))  # alone they can seem to take more than all
    return LayerTimes(whole, {name: seconds * fitting for name, seconds in found.items()})


def _alone(model: Model, alone: onnx.ModelProto, feed: Feed) -> float:
    """Seconds that a layer of ``model`` takes as a model of its own."""
    if model.device != "cpu":
        seconds = seconds_on(model.device, alone, feed, folder=model.folder)
        return max(seconds, bare_run(model.device).node)
    nodes = kernels(alone, feed, folder=model.folder, runs=_RUNS)
    return unrecorded(node for node in nodes if node.op not in LAYOUT)


def seconds_of_a_sample(
    model: Model, samples: Samples, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds by ``clock`` that each sample takes in a batch of usual size, with as many threads as usual."""
    session = open_model(model)
    feed = next(as_fed(samples, session.run).batches(batch_to_run(samples)))
    session.run(feed)
    start = clock()
    session.run(feed)
    return (clock() - start) / samples.size_of(feed)


@dataclass(frozen=True)
class BareNode:
    """Seconds that any node takes beside its work, and those by which recording lengthens it."""

    seconds: float
    recording: float


@cache
def bare_node() -> BareNode:
    """Measured once, by chains of tiny convolutions."""
    own = bare_run("cpu").node
    recorded = float(np.median([node.fastest for node in kernels(_chain(LINKS), _FEED, runs=50)]))
    return BareNode(own, max(recorded - own, 0.0))


@dataclass(frozen=True)
class BareRun:
    """Seconds that any node takes beside its work, and those that a run takes beside its nodes."""

    node: float
    run: float


@cache
def bare_run(device: str) -> BareRun:
    """Measured once, from what the links of a longer chain of tiny convolutions take more."""
    short, long = (
        _fastest(open_session(_chain(links), threads=1, device=device).timed(_FEED))
        for links in (LINKS // 2, LINKS)
    )
    node = max((long - short) / (LINKS - LINKS // 2), 1e-8)
    return BareRun(node, max(long - LINKS * node, 0.0))


def seconds_on(
    device: str,
    proto: onnx.ModelProto,
    feed: Feed,
    *,
    folder: Path | None = None,
    seconds: float | None = None,
) -> float:
    """What the nodes of ``proto`` take together on a GPU: its fastest run, less what any run takes.

    By the clock on the wall, with inputs and outputs on the device: ONNX Runtime records there when a kernel
    is launched, not how long it runs. Runs are repeated for ``seconds``, SECONDS if None.
    """
    session = open_session(proto, folder=folder, device=device)
    run = session.timed(feed)
    run()  # the first one chooses kernels
    return max(_fastest(run, seconds) - bare_run(device).run, 0.0)


def unrecorded(nodes: Iterable[Kernel]) -> float:
    """Seconds that ``nodes`` take without what recording them does."""
    bare = bare_node()
    return sum(max(node.seconds - bare.recording, bare.seconds) for node in nodes)


def _chain(links: int) -> onnx.ModelProto:
    """That many 1 x 1 convolutions of one position, one after the other."""
    shape, names = [1, LINK_CHANNELS, 1, 1], ["x", *(f"link {i}" for i in range(links))]
    nodes = [helper.make_node("Conv", [before, "w"], [name], name) for before, name in pairwise(names)]
    weight = np.eye(LINK_CHANNELS, dtype=np.float32)[..., None, None]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (names[0], names[-1])]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _fastest(run: Callable[[], object], seconds: float | None = None) -> float:
    """Seconds of the fastest of some runs, however busy the machine is."""
    times, deadline = list[float](), time.perf_counter() + (SECONDS if seconds is None else seconds)
    while len(times) < _RUNS or time.perf_counter() < deadline:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _whole(model: Model, feed: Mapping[str, np.ndarray]) -> float:
    """Seconds of one run, the median over a few sessions of their median runs."""
    medians = []
    for _ in range(SESSIONS):
        session = open_session(model.proto, folder=model.folder, threads=1, device=model.device)
        clock = busy_clock() if model.device == "cpu" else time.perf_counter
        medians.append(_median(session.timed(feed), clock))
    return float(np.median(medians))


def _median(run: Callable[[], object], clock: Callable[[], float]) -> float:
    times, total = list[float](), 0.0
    run()
    while len(times) < _RUNS or (total < SECONDS and len(times) < _MOST_RUNS):
        start = clock()
        run()
        times.append(max(clock() - start, 1e-9))
        total += times[-1]
    return float(np.median(times))
