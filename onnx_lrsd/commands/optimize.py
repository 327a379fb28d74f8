"""The whole way from a trained model to a smaller, faster one, in the order of the paper.

load -> find -> calibrate -> curves -> plan -> reconstruct (decompose and rewrite) -> verify.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from onnx_lrsd.data.holdout import fit_and_check, search_and_confirm
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.errors import BudgetError, DataError, UnsupportedModelError
from onnx_lrsd.facts import LoadCosts, Report, Verification
from onnx_lrsd.fit.calibrate import (
    Calibration,
    WeightOf,
    calibrate,
    input_shapes,
    locate,
    what_was_left_out,
)
from onnx_lrsd.fit.reconstruct import reconstruct
from onnx_lrsd.fit.sensitivity import sensitivities
from onnx_lrsd.graph.model import Model, check, ensure_writable, load, raised, save
from onnx_lrsd.int8.fit import INT8, LOW_RANK, Int8Fit
from onnx_lrsd.measure.compare import compare, total_price
from onnx_lrsd.measure.layer_times import anatomy
from onnx_lrsd.measure.load_cost import opening_cost
from onnx_lrsd.measure.speedup import CLEARLY
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.plan.curves import error_curves, with_seconds
from onnx_lrsd.plan.planner import Fit, Forms, Planner
from onnx_lrsd.plan.replay import forms_of, make_plan
from onnx_lrsd.report.build import make_report
from onnx_lrsd.run import OUT_OF_REACH, Options, Run
from onnx_lrsd.targets import TARGETS, price
from onnx_lrsd.targets.tensorrt import TENSORRT
from onnx_lrsd.targets.trtexec import engine
from onnx_lrsd.types import KINDS, Declined, Factors, Form, Layer, Plan, Progress

MUCH = 0.1
"""Output error from which a result that only met its ratio carries a warning."""
PAYS = 0.25
"""Of the time that fewer MACs should save, what such a result must save at least to be handed out."""


class Result(NamedTuple):
    """The optimised model, what is to be said about it, and the plan that leads to it again."""

    model: Model
    report: Report
    plan: Plan


def optimize(
    model: str | Path | onnx.ModelProto,
    calibration: Any = None,
    *,
    evaluation: Any = None,
    output: Path | None = None,
    plan: Plan | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Make ``model`` smaller and faster with outputs close to the original's.

    ``calibration`` and ``evaluation`` are anything ``read_samples`` takes; without calibration the
    weights alone decide, and the report warns of it. With ``output`` the result is written there,
    atomically. ``plan`` replays an earlier plan; ``dry_run`` stops once there is a plan. ``options``
    are the fields of ``Options``. Raises LrsdError for anything that is wrong with the input.

    >>> import numpy as np, onnx, onnx_lrsd
    >>> graph = onnx.parser.parse_graph("g (float[n, 64] x) => (float[n, 64] y) { y = MatMul (x, w) }")
    >>> weight = np.outer(np.arange(64), np.ones(64)).astype(np.float32)
    >>> graph.initializer.extend([onnx.numpy_helper.from_array(weight, "w")])
    >>> opset = onnx.helper.make_opsetid("", 17)
    >>> model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    >>> x = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    >>> optimised, report, plan = onnx_lrsd.optimize(model, {"x": x}, ratio=2, dry_run=True)
    >>> report.calibration_samples, list(plan.choices)
    (32, ['y'])
    """
    settings = Options(**options)
    if plan is not None and plan.target in TARGETS:
        settings = replace(settings, target=plan.target)
    if plan is None and settings.ratio is settings.max_error is settings.max_drop is None:
        settings = replace(settings, max_error=0.01)
    if settings.max_drop is not None and evaluation is None:
        raise DataError("A drop of the score is measured on labelled samples: give them with --eval.")
    if settings.int8 and calibration is None:
        raise DataError("Int8 takes the ranges of activations from samples: give them with --calib.")
    if settings.int8 and not TARGETS[settings.target].timed_here:
        raise DataError(
            f"--int8 quantises for ONNX Runtime and measures there, not for {settings.target}: leave it out."
        )
    run = Run(settings, progress)
    with run.clock("load"):
        original = load(model)
        if output is not None and not dry_run:
            ensure_writable(output, original.path)
        source = raised(original, run.target.opset, f"The target {run.target.name}")
        graph = source.graph()
        layers, declined = _select(*find_layers(graph), settings)
    weight_of = partial(read_weight, graph)
    fit_on, check_on, warnings = fit_and_check(
        source, calibration, evaluation, limit=settings.samples, seed=settings.seed
    )
    run.warnings.extend(warnings)
    with run.clock("calibrate"):
        known = _calibrate(run, source, layers, weight_of, fit_on, check_on, plan)
        if left_out := what_was_left_out(known):
            run.warnings.append(left_out)
    if plan is None:
        with run.clock("decompose"):
            curves = error_curves(run, known, weight_of)
        with run.clock("plan"):
            total = total_price(source, known.samples)
            if run.machine is not None:
                able = [curve.layer for curve in curves if len(curve.points) > 1]
                measured = anatomy(source, able, known.shapes, known.samples)
                curves, run.whole = with_seconds(curves, measured), measured.whole
                total = replace(total, seconds=measured.whole)
            planner = Planner(run, source, curves, total, known.shapes, known.samples)
            if fit_on is not None:
                planner.weigh(partial(_sensitivities, run, source, known, weight_of))
    known = replace(known, moments={})  # the fit takes moments of its own; these may be large
    fit: Fit = partial(
        reconstruct,
        source,
        known.layers,
        weight_of=weight_of,
        calibration=known if fit_on is not None else None,
        device=settings.device,
        progress=progress,
    )
    if settings.int8:
        fit = Int8Fit(run, source, fit, known.samples)
    refused: list[Verification] = []
    if plan is None:
        with run.clock("plan"):
            candidates, check_on = _choose(run, planner, fit, check_on, refused)
    else:
        candidates = iter([forms_of(plan, known.layers)])
    rewritten, factors, verification = original, dict[str, Factors](), None
    forms: Forms = {}
    for forms in _clocked(run, candidates):
        if dry_run:
            break
        with run.clock("decompose"):
            rewritten, factors = fit(forms=forms) if forms or settings.int8 else (original, {})
        with run.clock("verify"):
            rewritten, factors, verification = _verify(
                run, original, known.layers, fit, rewritten, factors, check_on
            )
        if _confirmed(run, verification):
            break
        refused.append(verification)
    if plan is None:
        plan = make_plan(run, curves, forms)
    if plan.target == TENSORRT.name and not dry_run:
        run.engine = engine(rewritten, check_on if fit_on is None else fit_on, output)
    if output is not None and not dry_run:
        save(rewritten, output)
    report = make_report(run, source, output, known.layers, declined, plan, factors, fit_on, verification)
    return Result(rewritten, report, plan)


def _select(
    found: Sequence[Layer], declined: Sequence[Declined], options: Options
) -> tuple[tuple[Layer, ...], tuple[Declined, ...]]:
    """The layers that --include and --exclude leave, and all others with the reason.

    Raises UnsupportedModelError where none is left.
    """
    kept, out = [], list(declined)
    for layer in found:
        if options.include is not None and not re.search(options.include, layer.name):
            out.append(Declined(layer.name, layer.op, "not named by --include"))
        elif options.exclude is not None and re.search(options.exclude, layer.name):
            out.append(Declined(layer.name, layer.op, "named by --exclude"))
        else:
            kept.append(layer)
    if not kept and not out:
        raise UnsupportedModelError(
            "The model has no Conv, ConvTranspose, Gemm or MatMul with a constant weight: use it as it is."
        )
    if not kept:
        reasons = Counter(entry.reason for entry in out)
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        raise UnsupportedModelError(f"No layer of the model can be worked on ({listed}): use it as it is.")
    return tuple(kept), tuple(out)


def _calibrate(
    run: Run,
    source: Model,
    layers: Sequence[Layer],
    weight_of: WeightOf,
    fit_on: Samples | None,
    check_on: Samples,
    plan: Plan | None,
) -> Calibration:
    """What the samples teach about the layers that a form is worth trying for, or that ``plan`` splits."""
    if fit_on is None:
        shapes = input_shapes(source, layers, check_on)
        located = locate(layers, shapes, check_on)
        return Calibration(
            layers=located,
            moments={},
            kept={},
            inputs={},
            every=1,
            shapes=shapes,
            samples=check_on,
            batch=1,
            seed=run.options.seed,
        )
    kinds = run.options.forms or KINDS
    planned = {name for name, choice in plan.choices.items() if not choice.form.dense} if plan else set()
    return calibrate(
        source,
        layers,
        fit_on,
        weight_of,
        asked=lambda layer: layer.output in planned or bool(run.target.forms(layer, kinds)),
        seed=run.options.seed,
        progress=run.progress,
    )


def _sensitivities(
    run: Run, source: Model, known: Calibration, weight_of: WeightOf, forms: Forms
) -> dict[str, float]:
    return sensitivities(
        source,
        known.layers,
        forms,
        weight_of,
        known.moments,
        known.samples,
        device=run.options.device,
        progress=run.progress,
    )


def _choose(
    run: Run, planner: Planner, fit: Fit, check_on: Samples, refused: Sequence[Verification]
) -> tuple[Iterator[Forms], Samples]:
    """Forms for what was asked, best first, and the samples that are left to check them on.

    The next ones are chosen by what is found of those before, which are then in ``refused``.
    """
    options = run.options
    if options.ratio is None:
        search_on, check_on = search_and_confirm(check_on)
        if options.max_drop is not None:
            return planner.for_drop(options.max_drop / 100, fit, search_on, refused), check_on
        return iter([planner.for_error(options.max_error or 0.0, fit, search_on)]), check_on
    try:
        return iter([planner.for_ratio(options.ratio)]), check_on
    except BudgetError as error:
        run.warnings.append(f"{error} The original is handed back.")
        for name in planner.sensitivity:
            run.reasons.setdefault(name, OUT_OF_REACH)
        return iter([Forms()]), check_on


def _clocked(run: Run, candidates: Iterator[Forms]) -> Iterator[Forms]:
    """``candidates``, with the time that each takes to find."""
    while True:
        with run.clock("plan"):
            forms = next(candidates, None)
        if forms is None:
            return
        yield forms


def _confirmed(run: Run, found: Verification) -> bool:
    """Whether the drop that was allowed holds on samples that the search has not seen."""
    most, metric = run.options.max_drop, found.metric
    if most is None or metric is None or metric.before - metric.after <= most / 100:
        return True
    run.warnings.append(
        f"A model that kept the score where it was searched lost {100 * (metric.before - metric.after):.2f} "
        "points on the samples that confirm: a larger one was taken."
    )
    return False


def _verify(
    run: Run,
    source: Model,
    layers: Sequence[Layer],
    fit: Fit,
    rewritten: Model,
    factors: dict[str, Factors],
    check_on: Samples,
) -> tuple[Model, dict[str, Factors], Verification]:
    """The result, its factors and what was measured; the original where the result is not better."""
    check(rewritten, source)
    metric = None if run.options.max_drop is None else run.options.metric
    found = compare(source, rewritten, check_on, metric=metric, progress=run.progress)
    if any(fitted.packed is not None for fitted in factors.values()):
        found = replace(found, after=replace(found.after, parameters=_held(found, layers, factors)))
        run.loading = LoadCosts(opening_cost(source), opening_cost(rewritten))
    if isinstance(fit, Int8Fit):
        kept, rewritten, found, run.int8 = fit.fastest(found, check_on)
        if kept == INT8:
            run.warnings.append("Int8 alone is faster than with low rank: it is handed back alone.")
            run.reasons.update(dict.fromkeys(factors, "int8 alone is faster"))
            factors = {}
        elif kept == LOW_RANK:
            run.warnings.append("Int8 is not faster on this machine: it was left out.")
    if rewritten is not source and (said := _no_gain(run, found)):
        run.warnings.append(f"The rewritten model {said}: the original is handed back.")
        run.reasons.update(dict.fromkeys(factors, "the whole model gained nothing by it"))
        rewritten, factors, run.int8 = source, {}, None
        found = compare(source, source, check_on, metric=metric)
    worst = found.error
    ratio = run.options.ratio
    if ratio is not None and worst > MUCH:
        run.warnings.append(
            f"The outputs changed by {worst:.0%} of their variance: this model does not bear "
            f"{ratio:g} x; ask for less, or name what may be lost with --max-error."
        )
    return rewritten, factors, found


def _held(found: Verification, layers: Sequence[Layer], factors: Mapping[str, Factors]) -> int:
    """Parameters that a model in codes stands for: numbers of factors and entries, not bytes."""
    rewritten = [layer for layer in layers if layer.output in factors]
    held = {layer.output: price(layer, factors[layer.output].form).parameters for layer in rewritten}
    return found.before.parameters - sum(price(x, Form()).parameters - held[x.output] for x in rewritten)


def _no_gain(run: Run, found: Verification) -> str:
    """In what the result is no better than the original; empty where it is.

    Where time is what counts it must be clearly gained, and more of it where the outputs suffered; elsewhere
    none may be lost beyond what the measurement leaves open.
    """
    if found.after.bytes > found.before.bytes:
        return "is larger as a whole"
    if not run.target.timed_here or found.latency_ratio is None or found.latency_interval is None:
        return ""
    ratio, (low, high) = found.latency_ratio, found.latency_interval
    said = f"runs {ratio:.2f} times as fast as a whole ({low:.2f} to {high:.2f})"
    if run.cost not in ("macs", "latency"):
        return said if high < 1 else ""
    if low < 1 or ratio < CLEARLY:
        return said
    least = 1 + PAYS * (found.before.macs / found.after.macs - 1)
    if run.options.ratio is not None and found.error > MUCH and ratio < least:
        return f"{said} and changes the outputs by {found.error:.0%} of their variance"
    return ""
