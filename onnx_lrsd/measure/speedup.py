"""Is a form really faster here? Each layer alone, before and after, timed side by side; then all together.

Latency depends on shapes, so the trial comes before the fit and a form that does not pay is never
fitted. Factors are random, each layer's its own: with zeros, or the same for layers alike, a transformer
looks faster by half than it then is (results/predicted_time.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from onnx_lrsd.data.samples import Samples
from onnx_lrsd.graph.model import Model
from onnx_lrsd.measure.compare import STARTS, Pace, time_pair
from onnx_lrsd.measure.layer_times import unrecorded
from onnx_lrsd.passes.isolate import isolate
from onnx_lrsd.passes.kernel_owners import kernel_owners
from onnx_lrsd.passes.order_sums import order_sums
from onnx_lrsd.passes.split import split
from onnx_lrsd.runtime.kernel_times import kernels
from onnx_lrsd.solver.layout import factor_kernels, shared_groups
from onnx_lrsd.types import N_OF_M, UNSTRUCTURED, Factors, Feed, Form, Layer, Progress
from onnx_lrsd.work_dir import KEEP_NOTHING, Keep

CLEARLY = 1.02
"""A rewrite that is not this many times faster alone does not pay."""


def speedups(
    model: Model,
    layers: Sequence[Layer],
    forms: Mapping[str, Form],
    shapes: Mapping[str, tuple[int, ...]],
    known: dict[object, float],
    progress: Progress | None = None,
    keep: Keep = KEEP_NOTHING,
) -> dict[str, float]:
    """How many times faster each layer in ``forms`` gets, measured; layers alike are timed once.

    ``shapes`` are those of the layers' inputs; ``known`` keeps results between calls, ``keep`` between runs.
    """
    chosen = [layer for layer in layers if layer.output in forms]
    keys = {layer.output: (layer.unnamed, shapes[layer.input], forms[layer.output]) for layer in chosen}
    timed_for = {keys[layer.output]: layer for layer in reversed(chosen)}  # the first of those alike
    rewritten = _rewritten(model, [layer for key, layer in timed_for.items() if key not in known], forms)
    found: dict[str, float] = {}
    rng = np.random.default_rng(0)
    for done, layer in enumerate(chosen):
        shape, key = shapes[layer.input], keys[layer.output]
        if key not in known:
            feed = {layer.input: rng.standard_normal(shape).astype(layer.dtype)}
            before, after = isolate(model.proto, layer, shape), isolate(rewritten.proto, layer, shape)
            timed = partial(
                time_pair, before, after, feed, folder=model.folder, line=CLEARLY, device=model.device
            )
            known[key] = keep("trial", (key, model.device), timed, (Pace,)).ratio
        found[layer.output] = known[key]
        if progress is not None:
            progress("trial", done + 1, len(chosen))
    return found


def speedups_within(
    model: Model, layers: Sequence[Layer], forms: Mapping[str, Form], samples: Samples
) -> dict[str, float]:
    """How many times faster each layer in ``forms`` gets within the whole model on one smallest batch.

    What is fast alone may want another layout than its neighbours, or separate nodes that were fused. The
    seconds of a layer are those of all its kernels: its own, and those of channel-wise nodes that read it,
    which may be fused with it in one of the models only. A layer without a kernel of its own has no ratio,
    nor has any of a model that is run part by part, or on a GPU, where the record of a node is its launch's.
    """
    if model.parted or model.device != "cpu":
        return {}
    chosen = [layer for layer in layers if layer.output in forms]
    feed = samples.example()
    before, after = (
        _seconds_of_layers(each, chosen, feed)
        for each in (model, _rewritten(model, chosen, forms, whole=True))
    )
    return {name: before[name] / after[name] for name in before if name in after}


def _seconds_of_layers(model: Model, layers: Sequence[Layer], feed: Feed) -> dict[str, float]:
    """Seconds that the kernels of each layer take in one run of ``model``, by the layer's output."""
    recorded = kernels(model.proto, feed, folder=model.folder)
    owners = kernel_owners(model.proto, layers, [kernel.name for kernel in recorded])
    seconds = dict[str, float]()
    for kernel, owner in zip(recorded, owners, strict=True):
        if owner is not None:
            seconds[owner] = seconds.get(owner, 0.0) + unrecorded([kernel])
    return seconds


def whole_speedup(
    model: Model,
    layers: Sequence[Layer],
    forms: Mapping[str, Form],
    samples: Samples,
    seconds: float,
    over: Mapping[str, Form] | None = None,
    rewritten_from: Model | None = None,
) -> float:
    """How many times faster the whole model gets with ``forms``, measured on one smallest batch.

    It is compared with itself in the forms ``over``, or as it came where these are not given. With
    ``rewritten_from``, a narrower network, ``forms`` are those of its layers.
    """
    before, after = (
        _rewritten(source, [layer for layer in layers if layer.output in each], each, whole=True)
        for source, each in ((model, over or {}), (rewritten_from or model, forms))
    )
    pair = before.proto, after.proto
    return time_pair(
        *pair,
        samples.example(),
        folder=model.folder,
        seconds=seconds,
        restarts=STARTS,
        device=model.device,
    ).ratio


def _rewritten(
    model: Model, layers: Sequence[Layer], forms: Mapping[str, Form], whole: bool = False
) -> Model:
    working = model.graph()
    for layer in layers:
        split(working, layer, placeholder(layer, forms[layer.output]))
    if whole:
        order_sums(working, [layer.output for layer in layers if forms[layer.output].channels])
    return model.splice(working)


def placeholder(layer: Layer, form: Form) -> Factors:
    """Random factors of the right shapes that keep the variance of their inputs, and a small bias."""
    rng = np.random.default_rng(list(layer.output.encode()))
    kernels: tuple[np.ndarray, ...] = ()
    if form.rank:
        groups = shared_groups(layer.kernel, form.kind)
        v, h = np.zeros((form.rank, layer.m // groups)), np.zeros((groups, layer.n, form.rank))
        kernels = tuple(_random(k.shape, rng) for k in factor_kernels(layer, form.kind, v, h, form.outer))
    channels = layer.channels if form.pattern.kind in (UNSTRUCTURED, N_OF_M) else form.channels
    sparse = _random((layer.n, channels, *layer.kernel), rng) if channels else None
    return Factors(
        form=form,
        kernels=kernels,
        bias=rng.standard_normal(layer.n) / 10,
        sparse=sparse,
        channels=tuple(range(channels)),
    )


def _random(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    values: np.ndarray = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return values
