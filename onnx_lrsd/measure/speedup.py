"""Is a form really faster here? Each layer alone, before and after, timed side by side; then all together.

Latency depends on shapes, so that the trial comes before the fit and a form that does not pay is never
fitted. Factors are random, each layer's its own: with zeros, or the same for layers alike, a transformer
looks faster by half than it then is (results/predicted_time.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

import numpy as np

from onnx_lrsd.data.samples import Samples
from onnx_lrsd.graph.model import Model
from onnx_lrsd.measure.compare import STARTS, time_pair
from onnx_lrsd.measure.layer_times import unrecorded
from onnx_lrsd.passes.isolate import isolate
from onnx_lrsd.passes.order_sums import order_sums
from onnx_lrsd.passes.split import split
from onnx_lrsd.runtime.kernel_times import kernels
from onnx_lrsd.solver.layout import factor_kernels, shared_groups
from onnx_lrsd.types import N_OF_M, UNSTRUCTURED, Factors, Form, Layer, Progress

CLEARLY = 1.02
"""A rewrite that is not this many times faster alone does not pay."""


def speedups(
    model: Model,
    layers: Sequence[Layer],
    forms: Mapping[str, Form],
    shapes: Mapping[str, tuple[int, ...]],
    known: dict[object, float],
    progress: Progress | None = None,
) -> dict[str, float]:
    """How many times faster each layer in ``forms`` gets, measured; layers alike are timed once.

    ``shapes`` are those of the layers' inputs; ``known`` keeps results between calls.
    """
    chosen = [layer for layer in layers if layer.output in forms]
    rewritten = _rewritten(model, chosen, forms)
    found: dict[str, float] = {}
    rng = np.random.default_rng(0)
    for done, layer in enumerate(chosen):
        shape = shapes[layer.input]
        key = (layer.unnamed, shape, forms[layer.output])
        if key not in known:
            feed = {layer.input: rng.standard_normal(shape).astype(layer.dtype)}
            before, after = isolate(model.proto, layer, shape), isolate(rewritten.proto, layer, shape)
            known[key] = time_pair(before, after, feed, folder=model.folder)[0]
        found[layer.output] = known[key]
        if progress is not None:
            progress("trial", done + 1, len(chosen))
    return found


def speedups_within(
    model: Model, layers: Sequence[Layer], forms: Mapping[str, Form], samples: Samples
) -> dict[str, float]:
    """How many times faster each layer in ``forms`` gets within the whole model on one smallest batch.

    What is fast alone may want another layout than its neighbours, or part what was fused. Kernels of both
    models are lined up by their names; a stretch that differs, with the one behind it, is its layers' work.
    Layers in one stretch have one ratio; those that left no trace have none.
    """
    chosen = [layer for layer in layers if layer.output in forms]
    rewritten = _rewritten(model, chosen, forms, whole=True)
    feed = samples.example()
    old, new = (kernels(x.proto, feed, folder=model.folder) for x in (model, rewritten))
    before, after = ([kernel.name for kernel in each] for each in (old, new))
    owners = {k: layer.output for k in after for layer in chosen if k.startswith(f"{layer.name}/lrsd/")}
    found: dict[str, float] = {}
    for what, i, i_end, j, j_end in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        stretch = old[i : i_end + 1], new[j : j_end + 1]
        if what != "equal" and all(stretch):
            ratio = unrecorded(stretch[0]) / unrecorded(stretch[1])
            found |= {owners[name]: ratio for name in after[j:j_end] if name in owners}
    return found


def whole_speedup(
    model: Model, layers: Sequence[Layer], forms: Mapping[str, Form], samples: Samples, seconds: float
) -> float:
    """How many times faster the whole model gets with ``forms``, measured on one smallest batch."""
    chosen = [layer for layer in layers if layer.output in forms]
    rewritten = _rewritten(model, chosen, forms, whole=True)
    feed = samples.example()
    pair = model.proto, rewritten.proto
    return time_pair(*pair, feed, folder=model.folder, seconds=seconds, restarts=STARTS).ratio


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
