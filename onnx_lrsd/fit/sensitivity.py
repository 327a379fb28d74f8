"""How far a layer's own output error moves the outputs of the network, measured without labels.

Layer by layer, the error it makes in a reduced form is added to its weights in the original network, and
final outputs are compared on a few dozen samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_lrsd.data.samples import Samples, batch_to_run, position_axes
from onnx_lrsd.fit.calibrate import WeightOf
from onnx_lrsd.graph.model import Model
from onnx_lrsd.passes.split import split
from onnx_lrsd.runtime.divergence import Divergence, as_array, is_scores, positions_first
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.effort import BRIEF
from onnx_lrsd.solver.problem import pose
from onnx_lrsd.storage import INT3
from onnx_lrsd.types import DENSE, N_OF_M, UNSTRUCTURED, Form, Layer, Moments, Progress, Values

FEWEST, MOST_SAMPLES = 8, 32
"""Samples that are run once for every layer: enough to know a sensitivity within a fourth or so."""
RUNS = 2
"""Inferences for each calibration sample, unless that leaves fewer than FEWEST for a layer."""
LEAST, MOST = 1e-4, 1e5
"""Bounds of a sensitivity in units of the median: beyond them lie noise and outputs that are not finite.

In transformers a few tokens carry nearly all energy of some layers, whose relative errors then count
thousands of times as much as those of others."""


def sensitivities(
    model: Model,
    layers: Sequence[Layer],
    forms: Mapping[str, Form],
    weight_of: WeightOf,
    moments: Mapping[str, Moments],
    samples: Samples,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, float]:
    """Error of the model's outputs for each unit of relative error of a layer in ``forms``, by layer name.

    An output counts relative to its variance, scores of classes as logits without their mean: a shift of
    all classes changes no probability, and saturated probabilities would leave a few samples to decide
    everything. Several outputs add up. Empty where no output is a floating number, or nothing was lost.
    Layers whose form has single entries are left out, which take too long to fit, but for those of few rows.
    """
    probes = [(layer, _probe(layer, forms.get(layer.output), moments.get(layer.output))) for layer in layers]
    chosen = [(layer, form) for layer, form in probes if form is not None]
    wanted = max(FEWEST, min(MOST_SAMPLES, RUNS * samples.count // max(len(chosen), 1)))
    if samples.count >= wanted + 2 * samples.smallest_batch:
        samples = samples.split(wanted, 0)[1]
    before = final_outputs(model, samples)
    found = {}
    for done, (layer, form) in enumerate(chosen):
        problem = pose(layer, *weight_of(layer), moments.get(layer.output), device)
        factors = decompose(problem, form, effort=BRIEF)
        working = model.graph()
        split(working, layer, factors)
        moved = movement(before, final_outputs(model.splice(working), samples))
        if factors.error > 0 and moved > 0:
            found[layer.output] = moved / factors.error
        if progress is not None:
            progress("sensitivity", done + 1, len(chosen))
    middle = float(np.median(list(found.values()))) if found else 0.0
    return {name: min(max(value, LEAST * middle), MOST * middle) for name, value in found.items()}


def _probe(layer: Layer, form: Form | None, moments: Moments | None) -> Form | None:
    """The form whose error is injected for ``form``, if one is.

    On its own few rows an S loses nothing; elsewhere it errs in all directions, as rounding does.
    """
    if form is None or form.pattern.kind not in (N_OF_M, UNSTRUCTURED):
        return form
    few = moments is not None and moments.rows is not None and form.pattern.kind == UNSTRUCTURED
    return Form(DENSE, weights=((INT3.name, layer.n),)) if few else None


def movement(before: Sequence[Sequence[Values]], after: Sequence[Sequence[Values]]) -> float:
    """Squared change of what ``final_outputs`` gives, relative to its variance; outputs add up."""
    total = 0.0
    for old_batches, new_batches in zip(before, after, strict=True):
        error = Divergence()
        for old, new in zip(old_batches, new_batches, strict=True):
            error.add(old, new)
        total += error.relative()
    return total


def final_outputs(model: Model, samples: Samples) -> list[list[Values]]:
    """Floating outputs of the model but at padding, in batches; scores of classes as centred logits."""
    session = open_session(model.proto, folder=model.folder)
    axes = position_axes(samples, session.run)
    found: dict[str, list[Values]] = {name: [] for name in session.outputs}
    for feed in samples.batches(batch_to_run(samples)):
        size, real = samples.size_of(feed), samples.real(feed)
        for name, value in session.run(feed).items():
            array = positions_first(as_array(value), real, axes.get(name, ()))
            if array.dtype.kind == "f":
                found[name].append(logits(array.reshape(size, -1)) if is_scores(array, size) else array)
    return [batches for batches in found.values() if batches]


def logits(scores: Values) -> Values:
    """Logits (samples, classes) without their mean, from logits or from probabilities."""
    values = scores.astype(np.float64)
    if values.min() >= 0 and np.abs(values.sum(axis=1) - 1).max() < 1e-3:
        values = np.log(np.maximum(values, 1e-9))
    centred: Values = values - values.mean(axis=1, keepdims=True)
    return centred
