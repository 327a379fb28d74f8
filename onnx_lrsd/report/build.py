"""The account of a run: what became of each layer, what was promised and whether it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from onnx_lrsd.data.samples import Samples
from onnx_lrsd.facts import LayerReport, Promise, Report, Verification
from onnx_lrsd.graph.model import Model
from onnx_lrsd.run import NOT_NEEDED, REFITTED, Run
from onnx_lrsd.solver.pattern import nonzeros
from onnx_lrsd.targets import price
from onnx_lrsd.types import COSTS, DENSE, N_OF_M, Declined, Factors, Form, Layer, Plan, Point, Price


def make_report(
    run: Run,
    source: Model,
    output: Path | None,
    layers: Sequence[Layer],
    declined: Sequence[Declined],
    plan: Plan,
    factors: Mapping[str, Factors],
    fit_on: Samples | None,
    verification: Verification | None,
) -> Report:
    """Everything there is to say; ``factors`` holds the layers that were rewritten in the end."""
    rows = [_layer_report(layer, plan, factors.get(layer.output), run.reasons) for layer in layers]
    rows += [_declined_report(entry) for entry in declined]
    versions = {}
    for package in ("onnx-lrsd", "onnx", "onnxruntime", "onnx-graphsurgeon", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return Report(
        input=str(source.path or "model"),
        output=str(output or ""),
        target=plan.target,
        cost=plan.cost,
        calibration_samples=0 if fit_on is None else fit_on.count,
        calibration_source="" if fit_on is None else fit_on.source,
        verification=verification,
        promise=None
        if verification is None
        else _promise(run, plan, verification, bool(factors) or run.int8 is not None),
        layers=tuple(rows),
        int8=run.int8,
        loading=run.loading,
        warnings=tuple(run.warnings),
        seconds=dict(run.seconds),
        versions=versions,
        engine=run.engine,
        predicted=_predicted(run, plan, factors if verification is not None else plan.choices),
        table=run.table if run.whole is not None else "",
    )


def _predicted(run: Run, plan: Plan, changed: Iterable[str]) -> float | None:
    """The latency ratio expected of the layers in ``changed``; None where nothing was measured."""
    if run.whole is None:
        return None
    saved = 0.0
    for name in changed:
        choice = plan.choices.get(name)  # of a layer that was refitted alone a plan may say nothing
        saved += (choice.before.seconds or 0.0) - (choice.after.seconds or 0.0) if choice else 0.0
    return run.whole / max(run.whole - saved, 1e-9)


def _promise(run: Run, plan: Plan, found: Verification, smaller: bool) -> Promise | None:
    """A drop that only the original itself keeps is a promise that could not be kept."""
    options = run.options
    if options.ratio is not None and plan.cost == "latency":
        got = found.latency_ratio or 0.0
        return Promise("ratio", options.ratio, got, got >= options.ratio * 0.995)
    if options.ratio is not None:
        before, after = (
            COSTS[plan.cost](Point(Form(DENSE), 0.0, Price(cost.macs, cost.parameters, cost.bytes)))
            for cost in (found.before, found.after)
        )
        got = before / max(after, 1)
        return Promise("ratio", options.ratio, got, got >= options.ratio * 0.995)
    if options.max_drop is not None and found.metric is not None:
        got = 100 * (found.metric.before - found.metric.after)
        return Promise("max_drop", options.max_drop, got, smaller and got <= options.max_drop)
    if options.max_error is not None:
        got = found.error
        return Promise("max_error", options.max_error, got, got <= options.max_error)
    return None


def _layer_report(
    layer: Layer, plan: Plan, factors: Factors | None, reasons: Mapping[str, str]
) -> LayerReport:
    choice = plan.choices.get(layer.output)
    before = price(layer, Form(DENSE))
    form = Form(DENSE)
    error, reason = 0.0, reasons.get(layer.output) or (choice.reason if choice else "") or NOT_NEEDED
    if factors is not None and factors.form.dense:
        error, reason = factors.error, f"{reason}; {REFITTED}"
    elif factors is not None:
        form, error, reason = factors.form, factors.error, ""
    elif choice is not None and not choice.form.dense and layer.output not in reasons:
        form, error, reason = choice.form, choice.error, "planned"
    after = price(layer, form)
    taps = layer.m // layer.channels
    return LayerReport(
        name=layer.name,
        op=layer.op,
        shape=layer.shape,
        form=form.kind,
        rank=form.rank,
        nonzeros=nonzeros(form.pattern, layer.n, layer.m, taps),
        pattern=form.pattern.kind,
        macs_before=before.macs,
        macs_after=after.macs,
        bytes_before=before.bytes,
        bytes_after=after.bytes,
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        error=error,
        reason=reason,
        kept=form.pattern.count if form.pattern.kind == N_OF_M else 0,
        of=form.pattern.block,
        weights=dict(form.weights),
        entries=form.entries,
    )


def _declined_report(entry: Declined) -> LayerReport:
    return LayerReport(
        name=entry.name,
        op=entry.op,
        shape=(),
        form=DENSE,
        rank=0,
        nonzeros=0,
        pattern="none",
        macs_before=0,
        macs_after=0,
        bytes_before=0,
        bytes_after=0,
        parameters_before=0,
        parameters_after=0,
        error=0.0,
        reason=entry.reason,
    )
