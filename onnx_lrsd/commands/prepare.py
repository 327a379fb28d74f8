"""A model made ready for a plan: loaded, its layers found and calibrated, and what fits and plans it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnx_lrsd.commands.memory import ensure_fits, rows_of, scratch_for
from onnx_lrsd.data.holdout import FEW, fit_and_check
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.errors import UnsupportedModelError
from onnx_lrsd.fit.calibrate import (
    Calibration,
    WeightOf,
    calibrate,
    kept_calibration,
    what_was_left_out,
)
from onnx_lrsd.fit.fitter import Fitter, KeepingFitter, LowRankFitter
from onnx_lrsd.fit.half import HalfFitter
from onnx_lrsd.fit.narrow import (
    Inner,
    Narrower,
    OrderTask,
    drop_order,
    left_whole,
    order_task,
    planned_pairs,
)
from onnx_lrsd.fit.sampling import GatheredRows, Sampling, input_shapes, locate
from onnx_lrsd.fit.sensitivity import sensitivities
from onnx_lrsd.fit.shards import facts_of, gathered_rows, part_files
from onnx_lrsd.graph.model import Model, ensure_writable, load, raised
from onnx_lrsd.graph.shapes import inferred_shapes
from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.int8.fit import Int8Fitter
from onnx_lrsd.int8.quantise import already_quantised
from onnx_lrsd.measure.compare import labels_for, price_and_macs_beside
from onnx_lrsd.measure.layer_times import LayerTimes, seconds_of_a_sample, time_layers
from onnx_lrsd.passes.bytes_outside import bytes_outside
from onnx_lrsd.passes.find_constants import find_constants
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.functions import without_layers_in_functions
from onnx_lrsd.passes.pairs import Pair, cut_tensors, find_pairs
from onnx_lrsd.passes.shared_weights import groups, share_weights
from onnx_lrsd.passes.unfuse import optimised_by_runtime, unfuse
from onnx_lrsd.plan.curves import error_curves, with_seconds
from onnx_lrsd.plan.narrow_curves import pair_curves
from onnx_lrsd.plan.planner import Planner
from onnx_lrsd.plan.promise import STORED
from onnx_lrsd.plan.search import Forms
from onnx_lrsd.plan.units import Curves
from onnx_lrsd.run import Run, with_work_dir
from onnx_lrsd.runtime.session import sound
from onnx_lrsd.scratch import OnDemand
from onnx_lrsd.solver.width import Widths
from onnx_lrsd.time_limit import CHECKS, ORDERED, PASSES
from onnx_lrsd.types import (
    DENSE,
    KINDS,
    WIDTH,
    Declined,
    Layer,
    Moments,
    Plan,
    Price,
)
from onnx_lrsd.wording import counted

PartFiles: TypeAlias = str | Path | Sequence[str | Path]
"""A path, a pattern of paths, or a list of these."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model with its layers, and the samples: what there is before anything is run.

    ``run`` knows from here on where the work dir keeps what belongs to this model and these samples.
    ``source`` is the ``original`` as it is worked on; ``declined`` are nodes that are left alone.
    ``constants`` are weights of no layer that may be stored as codes. ``pairs`` are layers whose channels in
    between may be cut; ``stay`` are layers all of whose channels must stay. Results are measured on
    ``check_on``.
    """

    run: Run
    original: Model
    source: Model
    weight_of: WeightOf
    declined: Sequence[Declined]
    layers: tuple[Layer, ...]
    constants: tuple[Layer, ...]
    pairs: Mapping[str, Pair]
    stay: Sequence[Declined]
    fit_on: Samples | None
    check_on: Samples


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What was ``found``, calibrated: all that a plan and its fits start from.

    ``known`` is what the samples ``found.fit_on`` teach, ``narrower`` cuts the channels of ``found.pairs``,
    and ``fitter`` fits forms.
    """

    found: Found
    known: Calibration
    narrower: Narrower
    fitter: Fitter


def find(
    run: Run,
    model: str | Path | onnx.ModelProto,
    calibration: Any,
    evaluation: Any,
    *,
    output: Path | None = None,
    plan: Plan | None = None,
    whole: bool = False,
) -> Found:
    """Load ``model`` and the samples, and find the layers that ``run`` or ``plan`` asks for.

    ``whole``: all samples are taken, however little time there is. Raises LrsdError for anything that is
    wrong with the input, or if ``output`` cannot be written.
    """
    options = run.options
    with run.journal.clock("load"):
        original = replace(load(model), device=run.device, most_bytes=run.memory.session_bytes)
        ensure_fits(run, original)
        if output is not None:
            ensure_writable(output, original.path)
        with sound(original.proto, original.folder):
            source, graph = _workable(run, original)
            layers, declined = find_layers(graph)
            if run.target.stores_codes and DENSE in (options.forms or KINDS):
                named = None if plan is None else plan.choices
                layers, declined = find_constants(graph, layers, declined, named)
            layers, declined = _select(graph, layers, declined, run)
            constants = tuple(layer for layer in layers if layer.constant)
            others = share_weights(graph, [layer for layer in layers if not layer.constant])
            plain = any(layer.dtype == "float32" for layer in others)
            run = replace(run, bears_int8=plain and not already_quantised(original.proto))
            if run.cost in STORED:
                run.journal.warn(bytes_outside(graph, [*constants, *others]))
    weight_of = partial(read_weight, graph)
    fit_on, check_on, notes = fit_and_check(
        source, calibration, evaluation, limit=options.samples, seed=options.seed
    )
    labels_for(run.metric, check_on)  # where they are missed it is said before the work
    run.journal.warn(*notes)
    if not whole:
        with run.journal.clock("load"):
            fit_on, check_on = _in_time(run, source, fit_on, check_on)
    pairs, stay = _pairs(run, source, graph, others, constants, plan)
    return Found(
        run=with_work_dir(run, original, fit_on or check_on, calibrated=fit_on is not None),
        original=original,
        source=source,
        weight_of=weight_of,
        declined=declined,
        layers=tuple(others),
        constants=constants,
        pairs=pairs,
        stay=stay,
        fit_on=fit_on,
        check_on=check_on,
    )


def prepare(
    run: Run,
    model: str | Path | onnx.ModelProto,
    calibration: Any,
    evaluation: Any,
    *,
    output: Path | None = None,
    plan: Plan | None = None,
    moments: PartFiles | None = None,
) -> Prepared:
    """Load ``model``, find its layers and calibrate those that ``run`` or ``plan`` asks for.

    ``moments`` are files of shards that stand in for the calibration. Raises LrsdError for anything that is
    wrong with the input, or if ``output`` cannot be written.
    """
    found = find(run, model, calibration, evaluation, output=output, plan=plan, whole=moments is not None)
    run = found.run
    with run.journal.clock("calibrate"):
        known = _calibrate(found, plan, moments)
        known = replace(known, layers=(*found.constants, *known.layers))
        run.journal.warn(what_was_left_out(known))
    with run.journal.clock("decompose"):
        narrower = _narrower(found, known, judged=plan is None)
    fitter = _fitter(found, replace(known, moments={}), narrower)
    return Prepared(found=found, known=known, narrower=narrower, fitter=fitter)


def _in_time(
    run: Run, source: Model, fit_on: Samples | None, check_on: Samples
) -> tuple[Samples | None, Samples]:
    """As many of the samples to fit on and to measure on as there is time for."""
    time = run.time
    if not time.limited:
        return fit_on, check_on
    each = seconds_of_a_sample(source, check_on, time.clock)
    fewer = check_on.some(time.most(CHECKS * each, 1.0, FEW) or check_on.count)
    if fewer.count < check_on.count:
        time.leave_out(f"{check_on.count - fewer.count} of {check_on.count} samples to measure on")
    if fit_on is None:
        return None, fewer
    fitted = fit_on.some(time.most(PASSES * each, 1.0, FEW) or fit_on.count)
    if fitted.count < fit_on.count:
        time.leave_out(f"{fit_on.count - fitted.count} of {fit_on.count} samples to calibrate on")
    return fitted, fewer


def _workable(run: Run, original: Model) -> tuple[Model, WorkingGraph]:
    """``original`` in the target's opset, without fused operators or layers in functions, and its graph."""
    source = raised(without_layers_in_functions(original), run.target.opset, f"The target {run.target.name}")
    graph = source.graph()
    run.journal.warn(optimised_by_runtime(graph))
    if not unfuse(graph):
        return source, graph
    source = source.splice(graph)
    return source, source.graph()


def _select(
    graph: WorkingGraph, found: Sequence[Layer], declined: Sequence[Declined], run: Run
) -> tuple[tuple[Layer, ...], tuple[Declined, ...]]:
    """The layers that --include and --exclude leave, and all others with the reason.

    Raises UnsupportedModelError where none is left.
    """
    options = run.options
    kept, out = [], list(declined)
    for layer in found:
        if options.include is not None and not re.search(options.include, layer.name):
            out.append(Declined(layer.name, layer.op, "not named by --include"))
        elif options.exclude is not None and re.search(options.exclude, layer.name):
            out.append(Declined(layer.name, layer.op, "named by --exclude"))
        else:
            kept.append(layer)
    if kept:
        return tuple(kept), tuple(out)
    said = "The model has no Conv, ConvTranspose, Gemm or MatMul with a constant weight"
    if out:
        reasons = Counter(entry.reason for entry in out)
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        said = f"No layer of the model can be worked on ({listed})"
    remedy = "use it as it is"
    if found:
        remedy = "name layers as `onnx-lrsd inspect` lists them"
    elif not run.target.stores_codes and find_constants(graph, found, declined)[0]:
        remedy += ", or make its file smaller with --target size"
    raise UnsupportedModelError(f"{said}: {remedy}.")


def _pairs(
    run: Run,
    source: Model,
    graph: WorkingGraph,
    layers: Sequence[Layer],
    constants: Sequence[Layer],
    plan: Plan | None,
) -> tuple[dict[str, Pair], tuple[Declined, ...]]:
    """The pairs whose channels may be cut, those that ``plan`` cuts if there is one, and who has none.

    Pairs with one of ``constants`` in between are left whole: codes make it smaller.
    """
    wanted = WIDTH in (run.options.forms or KINDS)
    if plan is not None:
        wanted = bool(plan.widths)
    if not wanted:
        return {}, ()
    every = find_layers(graph)[0]
    found, stay = find_pairs(graph, every, inferred_shapes(source.proto))
    # What else reads a weight would still read all of it.
    own = {group[0].output for group in groups(layers) if len(group) == 1 and not group[0].also_read}
    stored = {layer.weight for layer in constants}
    coded = [pair for pair in found if not stored.isdisjoint(cut_tensors(graph, pair))]
    others = [pair for pair in found if pair not in coded]
    pairs, unplanned = planned_pairs(others, own, {layer.output for layer in every} - own)
    giving = {end.output for pair in pairs.values() for end in pair.producers}
    in_codes = {end.output for pair in coded for end in pair.producers} - giving
    unplanned |= dict.fromkeys(sorted(in_codes), "a constant between them gets codes")
    chosen = {key: pair for key, pair in pairs.items() if plan is None or key in plan.widths}
    return chosen, left_whole(stay, unplanned, every)


def _narrower(found: Found, known: Calibration, *, judged: bool) -> Narrower:
    """What cuts the pairs, of which it keeps the moments of the layers that read their channels.

    ``judged``: errors of their widths are wanted, by cross-validation.
    """
    run, pairs = found.run, found.pairs
    deciding = {end.output for pair in pairs.values() for end in pair.deciding}
    plain = Narrower(
        model=found.source,
        layers=known.layers,
        weight_of=found.weight_of,
        moments=_only(known.moments, deciding),
        inner={},
        device=run.options.device,
    )

    def finite(pair: Pair) -> bool:
        found = [known.moments[end.output] for end in pair.deciding if end.output in known.moments]
        return all(np.isfinite(moments.mean).all() for moments in found)

    keys = [key for key, pair in pairs.items() if finite(pair)]

    def task_of(index: int) -> OrderTask:
        return order_task(pairs[keys[index]], plain, known if judged else None)

    made = run.shared(
        "widths" if judged else "orders", keys, drop_order, task_of, (Widths,), share=ORDERED, step="channels"
    )
    if len(made) < len(keys):
        pairs_left = f"{len(keys) - len(made)} of {counted(len(keys), 'pair')}"
        run.time.leave_out(f"the channels between {pairs_left} of layers")
    inner = {key: Inner(pairs[key], *order) for key, order in zip(keys, made, strict=False)}
    return replace(plain, inner=inner)


def _only(moments: Mapping[str, Moments], outputs: Collection[str]) -> Mapping[str, Moments]:
    """Those of the layers with these ``outputs``."""
    names = [name for name in moments if name in outputs]
    if isinstance(moments, OnDemand):
        return OnDemand(names, moments.__getitem__)
    return {name: moments[name] for name in names}


def asked_for(
    run: Run, layers: Sequence[Layer], pairs: Mapping[str, Pair], plan: Plan | None
) -> Callable[[Layer], bool]:
    """Whether there shall be moments of a layer: a form is worth trying for it, or ``plan`` splits it."""
    kinds = run.options.forms or KINDS
    planned = {name for name, choice in plan.choices.items() if not choice.form.dense} if plan else set()
    planned |= {end.output for pair in pairs.values() for end in pair.deciding}
    # Of layers that apply one weight all are asked for: only the one that stores it would gain bytes.
    together = {layer.output for group in groups(layers) if len(group) > 1 for layer in group}
    wanted = planned | together

    def asked(layer: Layer) -> bool:
        return layer.output in wanted or bool(run.target.forms(layer, kinds))

    return asked


def _calibrate(found: Found, plan: Plan | None, moments: PartFiles | None) -> Calibration:
    """What the samples teach about the layers that are asked for, or what shards of them have taught."""
    run, source, layers = found.run, found.source, found.layers
    fit_on, check_on = found.fit_on, found.check_on
    if fit_on is None:
        shapes = input_shapes(source, layers, check_on)
        located = locate(layers, shapes, check_on)
        return Calibration(
            scratch=scratch_for(run, found.original, [(layer, 0) for layer in (*found.constants, *located)]),
            layers=located,
            moments={},
            kept={},
            by_inputs=frozenset(),
            inputs={},
            every=1,
            shapes=shapes,
            samples=check_on,
            batch=1,
            seed=run.options.seed,
        )
    parts = None if moments is None else part_files(moments)

    def gathered(sampling: Sampling) -> Iterator[GatheredRows]:
        assert parts is not None
        return gathered_rows(parts, facts_of(found.original, sampling), sampling)

    taught = partial(
        calibrate,
        source,
        layers,
        fit_on,
        found.weight_of,
        asked=asked_for(run, layers, found.pairs, plan),
        seed=run.options.seed,
        progress=run.progress,
        gathered=None if parts is None else gathered,
        scratch_for=lambda sampling: scratch_for(run, found.original, rows_of(sampling, found.constants)),
    )
    if run.memory.limited:
        return taught()
    split = [] if plan is None else sorted(name for name, one in plan.choices.items() if not one.form.dense)
    return kept_calibration(run.keep, [layers, sorted(found.pairs), split], fit_on, taught)


def make_planner(run: Run, ready: Prepared) -> tuple[Planner, Curves, float | None]:
    """A planner, the curves it plans with, and the measured seconds of the model where times count.

    With samples to fit on, layers are weighed by their sensitivities.
    """
    found, known = ready.found, ready.known
    curves, total = _curves(run, ready)
    with run.journal.clock("plan"):
        planner = Planner(run, found.source, curves, total, known.shapes, known.samples, ready.narrower)
        if found.fit_on is not None:
            planner.weigh(partial(_sensitivities, run, ready))
    return planner, curves, total.seconds


def _sensitivities(run: Run, ready: Prepared, forms: Forms) -> dict[str, float]:
    found, known = ready.found, ready.known
    return sensitivities(
        found.source,
        known.layers,
        forms,
        found.weight_of,
        known.moments,
        known.samples,
        narrower=ready.narrower,
        device=run.options.device,
        progress=run.progress,
        keep=run.keep,
        time=run.time,
    )


def _curves(run: Run, ready: Prepared) -> tuple[Curves, Price]:
    """The error curves of all layers and pairs, and the price of the model, in seconds where times count."""
    source, known, narrower = ready.found.source, ready.known, ready.narrower
    with run.journal.clock("decompose"):
        curves = error_curves(run, known, ready.found.weight_of)
    with run.journal.clock("plan"):
        priced = partial(price_and_macs_beside, source, known.samples, known.layers)
        total, macs = run.keep("price", None, priced, (Price,))
        if run.target.times:
            inner = narrower.outputs
            able = [
                layer
                for curve in curves
                if len(curve.points) > 1 or curve.layer.output in inner
                for layer in curve.layers
            ]
            timed = partial(time_layers, source, able, known.shapes, known.samples, progress=run.progress)
            measured = run.keep("times", able, timed, (LayerTimes,))
            curves, total = with_seconds(curves, measured), replace(total, seconds=measured.whole)
    with run.journal.clock("decompose"):
        return pair_curves(run, curves, narrower, known.moments, macs), total


def _fitter(found: Found, known: Calibration, narrower: Narrower) -> Fitter:
    """What fits forms, with half precision or int8 behind it if asked.

    Without samples to fit on the weights alone decide.
    """
    run = found.run
    plain = LowRankFitter(
        original=found.original,
        narrower=narrower,
        calibration=None if found.fit_on is None else known,
        device=run.options.device,
        clock=run.journal.clock,
        progress=run.progress,
        keep=run.keep,
        workers=run.workers,
        scratch=known.scratch,
    )
    if run.options.precision is not None:
        return KeepingFitter(HalfFitter(plain, run.journal.warn))
    return KeepingFitter(Int8Fitter(run, plain, known.samples) if run.options.int8 else plain)
