"""The whole way from a trained model to a smaller, faster one, in the order of the paper.

load -> find -> calibrate -> curves -> plan -> fit (decompose and rewrite) -> verify -> judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from onnx_lrsd.arrays import on_gpu
from onnx_lrsd.commands.prepare import PartFiles, make_planner, prepare
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.errors import OptionError
from onnx_lrsd.facts import Details, Int8, LoadCosts, Report, Spectrum, Verification
from onnx_lrsd.fit.calibrate import (
    Calibration,
    WeightOf,
)
from onnx_lrsd.fit.fitter import BOTH, LOW_RANK, ORIGINAL, Fitted, Fitter
from onnx_lrsd.fit.reconstruct import biases_added
from onnx_lrsd.graph.model import Model, check, save
from onnx_lrsd.measure.compare import (
    COMPARE_SECONDS,
    TRIAL_SECONDS,
    compare,
    groups_on,
)
from onnx_lrsd.measure.load_cost import opening_cost
from onnx_lrsd.plan.planner import Planner
from onnx_lrsd.plan.promise import judge, promised
from onnx_lrsd.plan.replay import forms_of, make_plan
from onnx_lrsd.plan.search import Forms, Once, Proposals
from onnx_lrsd.plan.units import Curves
from onnx_lrsd.report.build import Delivered, make_report
from onnx_lrsd.report.details import PREDICTED_RATIOS, collect, spectra, trade_off
from onnx_lrsd.run import OUT_OF_REACH, Options, Run, start
from onnx_lrsd.targets import price
from onnx_lrsd.time_limit import CHECKED, OutOfTime
from onnx_lrsd.types import (
    Form,
    Layer,
    Plan,
    Progress,
    Score,
)
from onnx_lrsd.workers import workers_for


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
    details: bool = False,
    moments: PartFiles | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    target: str | None = None,
    cost: str | None = None,
    ratio: float | None = None,
    max_error: float | None = None,
    max_drop: float | None = None,
    metric: str | Score | None = None,
    weights: str | None = None,
    precision: str | None = None,
    int8: bool = False,
    forms: tuple[str, ...] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    samples: int | None = None,
    device: str = "auto",
    time: str | float | None = None,
    memory: str | int | None = None,
    seed: int = 0,
    jobs: int = 1,
    dask: str | None = None,
    work_dir: str | Path | None = None,
) -> Result:
    """Make ``model`` smaller and faster with outputs close to the original's.

    ``calibration`` and ``evaluation`` are anything ``read_samples`` takes; without calibration the
    weights alone decide, and the report warns of it. With ``output`` the result is written there,
    atomically. ``plan`` replays an earlier plan; ``dry_run`` stops once there is a plan. With ``details``
    the report has what its page draws. ``moments`` are files that ``calibrate_shard`` wrote, or a pattern of
    their names, in place of a run over the calibration samples. ``executor``, any of
    concurrent.futures, does what ``jobs`` would be started for. The rest are the fields of ``Options``.
    Raises OptionError for options that are wrong or do not go together, another LrsdError for anything that
    is wrong with the input.

    >>> import numpy as np, onnx, onnx_lrsd
    >>> graph = onnx.parser.parse_graph("g (float[n, 64] x) => (float[n, 64] y) { y = MatMul (x, w) }")
    >>> weight = np.outer(np.arange(64), np.ones(64)).astype(np.float32)
    >>> graph.initializer.extend([onnx.numpy_helper.from_array(weight, "w")])
    >>> opset = onnx.helper.make_opsetid("", 17)
    >>> model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    >>> x = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    >>> optimised, report, plan = onnx_lrsd.optimize(model, {"x": x}, ratio=2, dry_run=True)
    >>> report.calibration_samples, list(plan.choices)
    (27, ['y'])
    """
    options = Options(
        target=target,
        cost=cost,
        ratio=ratio,
        max_error=max_error,
        max_drop=max_drop,
        metric=metric,
        weights=weights,
        precision=precision,
        int8=int8,
        forms=forms,
        include=include,
        exclude=exclude,
        samples=samples,
        device=device,
        time=time,
        memory=memory,
        seed=seed,
        jobs=jobs,
        dask=dask,
        work_dir=work_dir,
    )
    options.check_with(
        calibration=calibration,
        evaluation=evaluation,
        plan=plan,
        output=output,
        dry_run=dry_run,
        moments=moments,
    )
    if executor is not None and (jobs > 1 or dask is not None):
        raise OptionError("{executor} stands in for {jobs} and {dask}: give one of them.")
    run = start(options if plan is not None else options.with_goal(), plan, progress)
    with workers_for(jobs, executor, dask, run.journal.warn, on_gpu=on_gpu(device)) as workers:
        run = replace(run, workers=workers)
        return _optimized(run, model, calibration, evaluation, output, plan, dry_run, details, moments)


def _optimized(
    run: Run,
    model: str | Path | onnx.ModelProto,
    calibration: Any,
    evaluation: Any,
    output: Path | None,
    plan: Plan | None,
    dry_run: bool,
    details: bool,
    moments: PartFiles | None,
) -> Result:
    """The algorithm, in its order; all is as ``optimize`` has it."""
    ready = prepare(run, model, calibration, evaluation, output=output, plan=plan, moments=moments)
    found, known, narrower, fitter = ready.found, ready.known, ready.narrower, ready.fitter
    original, source, weight_of = found.original, found.source, found.weight_of
    fit_on, check_on = found.fit_on, found.check_on
    run = replace(found.run, groups=groups_on(source, check_on))
    planner, curves, whole = None, Curves(()), None
    if plan is None:
        planner, curves, whole = make_planner(run, ready)
        with run.journal.clock("plan"):
            search, check_on = planner.search(fitter, check_on)
    else:
        search = Once(forms_of(plan, known.layers, found.pairs))
    spectrum = _spectra(run, known, weight_of) if details else {}
    known = replace(known, moments={})  # they may be large, and a fit takes its own
    del ready
    chosen, rewritten, delivered, build = _next(run, search) or {}, original, None, None
    if not dry_run:
        chosen, delivered = _deliver(
            run, original, known.layers, search, chosen, fitter, check_on, planned=plan is not None
        )
        rewritten = delivered.model
        run.journal.warn(biases_added(source, check_on.example(), known.layers, delivered.factors, weight_of))
        if run.target.engine is not None:
            given = check_on if fit_on is None else fit_on
            before = None if run.time.limited or rewritten is original else original
            with run.journal.clock("verify"):
                build = run.target.engine(rewritten, given, output, before)
    if not chosen:
        _explain(run, search, known.layers)
    plan = plan or make_plan(run, curves, chosen)
    if output is not None:
        save(rewritten, output)
    drawn = None
    if details:
        drawn = _details(run, source, known, curves, spectrum, planner, search, plan, delivered)
    report = make_report(
        run,
        source=source,
        output=output,
        layers=known.layers,
        narrow=narrower.cut(chosen if delivered is None or delivered.planned else {})[1],
        declined=found.declined,
        stay=found.stay,
        plan=plan,
        fit_on=fit_on,
        whole=whole,
        delivered=delivered,
        engine=build,
        details=drawn,
    )
    return Result(rewritten, report, plan)


def _spectra(run: Run, known: Calibration, weight_of: WeightOf) -> dict[str, Spectrum]:
    with run.journal.clock("details"):
        return spectra(known, weight_of, run.options.device)


def _details(
    run: Run,
    source: Model,
    known: Calibration,
    curves: Curves,
    spectrum: Mapping[str, Spectrum],
    planner: Planner | None,
    search: Proposals,
    plan: Plan,
    delivered: Delivered | None,
) -> Details:
    """What the report page draws; ``planner`` is None where a plan was given."""
    weighed = planner if planner is not None and planner.weighed else None
    with run.journal.clock("details"):
        unchanged = delivered is None or (not delivered.planned and delivered.int8 is None)
        return collect(
            curves=curves.layers,
            spectra=spectrum,
            sensitivity={} if weighed is None else weighed.sensitivity,
            trade_off=trade_off(
                run.cost,
                predicted=[] if weighed is None else weighed.frontier(PREDICTED_RATIOS),
                tried=search.tried(),
                found=None if delivered is None else delivered.verification,
            ),
            layers=known.layers,
            plan=plan,
            factors={} if delivered is None else delivered.factors,
            before=source,
            after=source if delivered is None or unchanged else delivered.model,
            samples=known.samples,
        )


def _next(run: Run, search: Proposals) -> Forms | None:
    """The next forms to fit; None where the search is at its end."""
    with run.journal.clock("plan"):
        return search.propose()


def _explain(run: Run, search: Proposals, layers: Sequence[Layer]) -> None:
    """Note why the search ended without forms."""
    if why := search.why_nothing():
        run.journal.warn(why)
        run.journal.leave((layer.output for layer in layers), OUT_OF_REACH, unless_known=True)


def _deliver(
    run: Run,
    original: Model,
    layers: Sequence[Layer],
    search: Proposals,
    chosen: Forms,
    fitter: Fitter,
    check_on: Samples,
    *,
    planned: bool,
) -> tuple[Forms, Delivered]:
    """Fit, measure and judge what is proposed, from ``chosen`` on, until it is not refused.

    At the end of a search the last resort is handed out: for a ratio the nearest model, for other promises
    the original, with int8 alone if that was asked for and keeps the promise. What the user ``planned`` is
    handed out whatever it gains.
    """
    while True:
        chosen, fitted = _fitted(run, fitter, chosen)
        run.announce("check of what was found")
        with run.journal.clock("verify"):
            steps = {step.step: step for step in (fitted, *fitted.alternatives())}
            measured = {name: verify(run, original, layers, step, check_on) for name, step in steps.items()}
        outcome = judge(
            measured,
            run.options,
            run.target,
            run.cost,
            planned=planned,
            int8_may_gain=run.int8_may_gain,
        )
        best = outcome.kept
        if not outcome.refused:
            break
        run.journal.warn(outcome.refusal)
        search.refuse(measured[outcome.kept])
        following = _next(run, search) if chosen else None
        if following is None and (not chosen or outcome.last_resort != ORIGINAL):
            best = outcome.last_resort
            break
        chosen = following or {}
    run.journal.warn(*outcome.warnings)
    if outcome.reason:
        run.journal.leave(fitted.factors, outcome.reason)
    kept = steps.get(best)
    if kept is None:
        found = _unchanged(measured[fitted.step])
        promise = promised(None, run.options, run.cost)
        return chosen, Delivered(
            model=original, factors={}, verification=found, promise=promise, planned=False
        )
    run.journal.warn(*kept.notes, *measured[kept.step].warnings)
    int8 = Int8(kept.step, kept.nodes, kept.left, measured) if run.options.int8 else None
    return chosen, Delivered(
        model=kept.model,
        factors=kept.factors,
        verification=measured[kept.step],
        promise=outcome.promise,
        planned=kept.step in (LOW_RANK, BOTH),
        int8=int8,
        loading=LoadCosts(opening_cost(original), opening_cost(kept.model)) if kept.packed else None,
    )


def _fitted(run: Run, fitter: Fitter, chosen: Forms) -> tuple[Forms, Fitted]:
    """The model with the forms ``chosen``, or the original where no time is left to fit them."""
    try:
        return chosen, fitter.fit(chosen)
    except OutOfTime as late:
        run.journal.warn(f"{late} The original is handed back.")
        run.time.leave_out("the fit that was under way when time ran out")
        return {}, fitter.fit({})


def verify(
    run: Run,
    original: Model,
    layers: Sequence[Layer],
    fitted: Fitted,
    check_on: Samples,
    *,
    latency: bool = True,
) -> Verification:
    """``fitted`` against the original, where weights are in codes with the parameters they stand for."""
    check(fitted.model, original)
    found = compare(
        original,
        fitted.model,
        check_on,
        metric=run.metric,
        groups=run.groups,
        latency=latency and not original.parted,
        seconds=max(min(COMPARE_SECONDS, CHECKED * run.time.seconds), TRIAL_SECONDS),
        as_needed=True,
        progress=run.progress,
    )
    if not fitted.packed:
        return found
    return replace(found, after=replace(found.after, parameters=_held(found, layers, fitted)))


def _held(found: Verification, layers: Sequence[Layer], fitted: Fitted) -> int:
    """Parameters that a model in codes stands for: numbers of factors and entries, not bytes."""
    held = found.before.parameters
    for layer, narrow in zip(layers, fitted.narrow or layers, strict=True):
        factors = fitted.factors.get(layer.output)
        after = price(narrow, Form() if factors is None else factors.form)
        held += after.parameters - price(layer, Form()).parameters
    return held


def _unchanged(found: Verification) -> Verification:
    """The original against itself, on the samples and with the latency that were ``found`` for a model."""
    timed, score = found.latency_ratio is not None, found.metric
    return replace(
        found,
        after=found.before,
        latency_ratio=1.0 if timed else None,
        latency_interval=(1.0, 1.0) if timed else None,
        outputs=tuple(output.unchanged() for output in found.outputs),
        metric=None if score is None else replace(score, after=score.before, interval=(0.0, 0.0)),
        warnings=(),
    )
