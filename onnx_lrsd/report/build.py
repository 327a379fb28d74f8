"""The account of a run: what became of each layer, what was promised and whether it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from onnx_lrsd.data.samples import Samples
from onnx_lrsd.facts import (
    Details,
    Engine,
    Int8,
    LayerReport,
    LoadCosts,
    MemoryUse,
    Promise,
    Report,
    Verification,
)
from onnx_lrsd.graph.model import Model
from onnx_lrsd.measure.load_cost import peak_memory
from onnx_lrsd.run import NOT_NEEDED, REFITTED, Run
from onnx_lrsd.runtime.session import RUNTIME_MEMORY
from onnx_lrsd.solver.pattern import nonzeros
from onnx_lrsd.targets import price
from onnx_lrsd.types import DENSE, N_OF_M, Choice, Declined, Factors, Form, Layer, Plan


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """What is handed out: the model, the factors of its layers by output, and what was measured of it.

    ``planned``: the forms of the plan are in it. ``loading`` is what opening the original and the model
    takes, where weights are in codes.
    """

    model: Model
    factors: Mapping[str, Factors]
    verification: Verification
    promise: Promise | None
    planned: bool
    int8: Int8 | None = None
    loading: LoadCosts | None = None


def make_report(
    run: Run,
    *,
    source: Model,
    output: Path | None,
    layers: Sequence[Layer],
    narrow: Sequence[Layer],
    declined: Sequence[Declined],
    stay: Sequence[Declined],
    plan: Plan,
    fit_on: Samples | None,
    whole: float | None,
    delivered: Delivered | None,
    engine: Engine | None,
    details: Details | None,
) -> Report:
    """Everything there is to say; ``delivered`` is None where there is only a plan.

    ``narrow`` are the ``layers`` with the channels that were not cut, ``stay`` those of which none may be.
    ``whole`` is the measured time of the
    original in seconds, None where times were not predicted.
    """
    factors: Mapping[str, Factors] = {} if delivered is None else delivered.factors
    measured = () if delivered is None else delivered.verification.warnings
    reasons = run.journal.reasons
    changed = set(factors) | {layer.output for layer in narrow if layer.full is not None}
    if delivered is None:
        changed = set(plan.choices)
    rows = [
        _layer_report(layer, left, plan, factors.get(layer.output), reasons, delivered is not None)
        for layer, left in zip(layers, narrow, strict=True)
    ]
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
        verification=None if delivered is None else delivered.verification,
        promise=None if delivered is None else delivered.promise,
        layers=tuple(rows),
        int8=None if delivered is None else delivered.int8,
        loading=None if delivered is None else delivered.loading,
        warnings=tuple(dict.fromkeys((*run.journal.warnings, *measured))),
        seconds=dict(run.journal.seconds),
        time=run.time.seconds if run.time.limited else None,
        left_out=tuple(run.time.left_out),
        memory=_memory(run, source),
        whole=tuple(stay),
        versions=versions,
        engine=engine,
        details=details,
        predicted=_predicted(whole, plan, changed),
        table="" if whole is None else run.table,
    )


def _memory(run: Run, source: Model) -> MemoryUse | None:
    """What was held, where that is limited."""
    if not run.memory.limited:
        return None
    return MemoryUse(
        limit=int(run.memory.bytes),
        most=peak_memory(),
        runtime=RUNTIME_MEMORY.most,
        aside=run.memory.aside,
        parted=source.parted,
    )


def _predicted(whole: float | None, plan: Plan, changed: Iterable[str]) -> float | None:
    """The latency ratio expected of the layers in ``changed``; None where nothing was measured."""
    if whole is None:
        return None
    saved = 0.0
    for name in changed:
        choice = plan.choices.get(name)
        if choice is not None:  # of a layer that was refitted alone a plan may say nothing
            saved += (choice.before.seconds or 0.0) - (choice.after.seconds or 0.0)
    return whole / max(whole - saved, 1e-9)


def _layer_report(
    layer: Layer,
    left: Layer,
    plan: Plan,
    factors: Factors | None,
    reasons: Mapping[str, str],
    delivered: bool,
) -> LayerReport:
    """What became of ``layer``; ``left`` is the same layer with the channels that were not cut."""
    choice, cut = plan.choices.get(layer.output), left.full is not None
    form, error, reason = _became(choice, factors, reasons.get(layer.output), cut, delivered)
    before, after = price(layer, Form(DENSE)), price(left, form)
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
        output=layer.output,
        gives=_kept(left.output_channels, layer.output_channels),
        reads=_kept(left.channels, layer.channels),
    )


def _became(
    choice: Choice | None, factors: Factors | None, noted: str | None, cut: bool, delivered: bool
) -> tuple[Form, float, str]:
    """The form of a layer, its relative error, and why it stays as it is, in words; empty where it does not.

    ``noted`` is the reason that the run gave, if any; ``cut`` says that some of its channels are gone.
    """
    reason = noted or (choice.reason if choice is not None else "") or NOT_NEEDED
    if factors is not None and not factors.form.dense:
        return factors.form, factors.error, ""
    if factors is not None:
        return Form(DENSE), factors.error, "" if cut else f"{reason}; {REFITTED}"
    if choice is not None and not choice.form.dense and noted is None:
        return choice.form, choice.error, "planned"
    if cut:
        return Form(DENSE), 0.0, "" if delivered else "planned"
    return Form(DENSE), 0.0, reason


def _kept(left: int, of: int) -> tuple[int, int] | None:
    """How many channels are left of how many, if some were cut."""
    return None if left == of else (left, of)


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
