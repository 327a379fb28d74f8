"""How far an error of one layer's outputs moves the outputs of the network, measured without labels.

One layer at a time is written in a reduced form in the original network, and the outputs of both networks are
compared on a few samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from onnx_lrsd.data.samples import Samples, batch_to_run, position_axes
from onnx_lrsd.fit.calibrate import WeightOf
from onnx_lrsd.fit.narrow import Narrower
from onnx_lrsd.fit.resume import resumed
from onnx_lrsd.fit.shared import fit_shared
from onnx_lrsd.graph.model import Model
from onnx_lrsd.measure.judge import OutputGroup, output_groups
from onnx_lrsd.passes.shared_weights import groups
from onnx_lrsd.passes.split import split
from onnx_lrsd.runtime.divergence import (
    Divergence,
    as_array,
    change,
    is_scores,
    positions_first,
    row_axes,
)
from onnx_lrsd.runtime.session import Session, open_model
from onnx_lrsd.solver.effort import BRIEF
from onnx_lrsd.storage import INT3
from onnx_lrsd.time_limit import WEIGHED, TimeLimit
from onnx_lrsd.types import (
    DENSE,
    N_OF_M,
    UNSTRUCTURED,
    WIDTH,
    Factors,
    Form,
    Layer,
    Moments,
    Progress,
    Values,
)
from onnx_lrsd.wording import counted
from onnx_lrsd.work_dir import KEEP_NOTHING, Keep
from onnx_lrsd.workers import one_ahead

_FEWEST, _MOST_SAMPLES = 8, 16
"""Samples that are run once for every layer: enough to know a sensitivity within a fourth or so."""
_RUNS = 2
"""Runs of the network for each calibration sample, unless that leaves fewer than _FEWEST for a layer."""
_LEAST, MOST = 1e-4, 1e5
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
    narrower: Narrower | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    keep: Keep = KEEP_NOTHING,
    time: TimeLimit | None = None,
) -> dict[str, float]:
    """Error of the model's outputs per unit of relative error of a layer in ``forms``, by ``Layer.output``.

    For a pair, by its key, it is per unit of the errors of all layers that read fewer channels.

    The error of a group of channels of an output is relative to its variance; of all groups of all outputs
    the one that moves most counts. Scores of classes are compared as logits without their mean: a shift of
    all classes changes no probability, and saturated probabilities would leave a few samples to decide
    everything.

    Layers whose S has single entries take too long to fit and are left out, unless they have few rows. Those
    that are not measured when ``time`` runs short are left out as well. The result is empty where no output
    is a floating number, or nothing was lost.
    """
    probes = _probes(layers, forms, moments, narrower)
    wanted = max(_FEWEST, min(_MOST_SAMPLES, _RUNS * samples.count // max(len(probes), 1)))
    if samples.count >= wanted + 2 * samples.smallest_batch:
        samples = next(samples.parts(wanted))
    known = {probe.key: keep.look("sensitivity", (probe.key, probe.form, wanted)) for probe in probes}
    measured = {key: float(value[0]) for key, value in known.items() if value is not None}
    probes = [probe for probe in probes if probe.key not in measured]
    reference = cache(partial(Reference, model, samples))
    changing = [{name for la in probe.layers for name in (la.output, la.weight)} for probe in probes]

    def fitted_to(probe: _Probe) -> dict[str, Factors]:
        if probe.form.kind == WIDTH:
            assert narrower is not None
            return narrower.masked(probe.key, probe.form.rank)
        return fit_shared(probe.layers, probe.form, weight_of, moments, device, BRIEF)

    with closing(one_ahead(map(fitted_to, probes))) as fits:
        for done, (probe, rest) in enumerate(zip(probes, resumed(model, samples, changing), strict=True)):
            if time is not None and time.passed(WEIGHED):
                time.leave_out(
                    f"{counted(len(probes) - done, 'sensitivity', 'sensitivities')} of {len(probes)}"
                )
                break
            fitted = next(fits)
            # The error on the rows that the fit saw: outputs are compared on the same samples.
            error = sum(factors.error for factors in fitted.values())
            if probe.form.kind != WIDTH:
                error /= len(fitted)
            working = rest.model.graph()
            for layer in probe.layers:
                split(working, layer, fitted[layer.output])
            moved = reference().moved(rest.outputs(rest.model.splice(working)))
            value = moved / error if error > 0 and moved > 0 else 0.0
            measured[probe.key] = keep("sensitivity", (probe.key, probe.form, wanted), partial(float, value))
            if progress is not None:
                progress("sensitivity", done + 1, len(probes))
    found = {key: value for key, value in measured.items() if value > 0}
    middle = float(np.median(list(found.values()))) if found else 0.0
    return {name: min(max(value, _LEAST * middle), MOST * middle) for name, value in found.items()}


class _Probe(NamedTuple):
    """What is changed to measure one sensitivity: ``layers`` in ``form``, or a pair's readers at a width."""

    key: str
    layers: tuple[Layer, ...]
    form: Form


def _probes(
    layers: Sequence[Layer],
    forms: Mapping[str, Form],
    moments: Mapping[str, Moments],
    narrower: Narrower | None,
) -> list[_Probe]:
    """What is measured for ``forms``, in the order of the graph."""
    found = list[_Probe]()
    for unit in groups(layers):
        first = unit[0].output
        form = _injected(unit[0], forms.get(first), moments.get(first))
        if form is not None:
            found.append(_Probe(first, unit, form))
    for key, form in forms.items():
        if form.kind == WIDTH and narrower is not None:
            found.append(_Probe(key, narrower.masking(key), form))
    place = {layer.output: index for index, layer in enumerate(layers)}
    return sorted(found, key=lambda probe: min(place[layer.output] for layer in probe.layers))


def _injected(layer: Layer, form: Form | None, moments: Moments | None) -> Form | None:
    """The form whose error is injected to measure the sensitivity for ``form``; None where none is.

    An S of free entries has no error on the few rows it was fitted to. On others its error has all
    directions, like one of rounding, so a rounded weight takes its place.
    """
    if form is None or form.pattern.kind not in (N_OF_M, UNSTRUCTURED):
        return form
    few = moments is not None and moments.rows is not None and form.pattern.kind == UNSTRUCTURED
    return Form(DENSE, weights=((INT3.name, layer.n),)) if few else None


class _View(NamedTuple):
    """What ``of`` makes of an output, which is compared.

    ``before`` is that of the model, batch by batch; a change is relative to its ``variance``.
    """

    of: Callable[[Values], Values]
    before: list[Values]
    variance: float

    @staticmethod
    def made(of: Callable[[Values], Values], batches: Sequence[Values]) -> _View:
        before, found = [of(rows) for rows in batches], Divergence()
        for rows in before:
            found.add(rows, rows)
        return _View(of, before, float(found.by_sample()[1].sum()))

    def moved(self, after: Sequence[Values]) -> float:
        """Squared change of the batches ``after``, relative to the variance."""
        missed = sum(change(old, self.of(new)) for old, new in zip(self.before, after, strict=True))
        if missed <= 0:
            return 0.0
        return missed / self.variance if self.variance > 0 else float("inf")


class Reference:
    """The outputs of a model on some samples: how far those of another are from them."""

    def __init__(self, model: Model, samples: Samples) -> None:
        self.model, self.samples = model, samples
        outputs, self.positions = _run(open_model(model), samples)
        rows = {name: found.batches for name, found in outputs.items()}
        axes = {name: found.axes for name, found in outputs.items()}
        feed = next(samples.batches(batch_to_run(samples)))
        groups = output_groups(model, feed, rows, axes)
        self.views = {
            name: [view for group in groups[name] for view in _views(group, before)]
            for name, before in outputs.items()
        }

    def movement(self, other: Model) -> float:
        """How far the outputs of ``other`` are from those of the model, as ``moved`` has it."""
        session = open_model(other)
        return self.moved(session.run(feed) for feed in self.samples.batches(batch_to_run(self.samples)))

    def moved(self, outputs: Iterable[Mapping[str, Any]]) -> float:
        """Squared change of the group of channels that moves most, relative to its variance.

        ``outputs`` are those of another model for the same samples, batch by batch.
        """
        after = _collected(outputs, self.samples, self.positions)
        moved = [view.moved(after[name].batches) for name, views in self.views.items() for view in views]
        return max(moved, default=0.0)


def _views(group: OutputGroup, before: FinalOutput) -> list[_View]:
    """What is compared of a group: scores as logits, probabilities also as what stood in front of them."""
    whole = not group.ranges and not before.axes
    if whole and all(is_scores(rows, len(rows)) for rows in before.batches):
        return [_View.made(logits, before.batches)]
    made = [group.of]
    if group.activation:
        made.append(lambda rows: group.logits(group.of(rows)))
    return [_View.made(of, before.batches) for of in made]


class FinalOutput(NamedTuple):
    """A floating output without padding, in batches of rows.

    ``axes`` are those that became rows beside the axis of samples.
    """

    axes: tuple[int, ...]
    batches: list[Values]


def final_outputs(model: Model, samples: Samples) -> dict[str, FinalOutput]:
    """Every floating output of the model, by name."""
    return _run(open_model(model), samples)[0]


def _run(session: Session, samples: Samples) -> tuple[dict[str, FinalOutput], dict[str, tuple[int, ...]]]:
    """Every floating output, and the axes of all outputs along which positions lie."""
    positions = position_axes(samples, session.run)
    outputs = (session.run(feed) for feed in samples.batches(batch_to_run(samples)))
    return _collected(outputs, samples, positions), positions


def _collected(
    outputs: Iterable[Mapping[str, Any]], samples: Samples, positions: Mapping[str, tuple[int, ...]]
) -> dict[str, FinalOutput]:
    found: dict[str, FinalOutput] = {}
    for feed, values in zip(samples.batches(batch_to_run(samples)), outputs, strict=True):
        real = samples.real(feed)
        for name, value in values.items():
            array, along = as_array(value), positions.get(name, ())
            if array.dtype.kind == "f":
                output = found.setdefault(name, FinalOutput(row_axes(array, real, along), []))
                output.batches.append(positions_first(array, real, along))
    return found


def logits(scores: Values) -> Values:
    """Logits (samples, classes) without their mean, from logits or from probabilities."""
    values = scores.reshape(len(scores), -1).astype(np.float64)
    if values.min() >= 0 and np.abs(values.sum(axis=1) - 1).max() < 1e-3:
        values = np.log(np.maximum(values, 1e-9))
    centred: Values = values - values.mean(axis=1, keepdims=True)
    return centred
