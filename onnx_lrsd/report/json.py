"""Reports and plans as JSON, schema 1: keys may be added, but none is renamed or removed.

Numbers are JSON numbers in full precision; NaN and infinities are written as null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

from onnx_lrsd.errors import DataError
from onnx_lrsd.facts import (
    Details,
    Drift,
    Engine,
    Inspection,
    Int8,
    LayerReport,
    LoadCosts,
    ModelCost,
    Report,
    Sweep,
    Verification,
)
from onnx_lrsd.storage import FP16, STORAGES
from onnx_lrsd.types import (
    CHANNELS,
    COSTS,
    DENSE,
    KINDS,
    N_OF_M,
    NONE,
    UNSTRUCTURED,
    Choice,
    Declined,
    Form,
    Layer,
    Pattern,
    Plan,
    Price,
    Width,
)

SCHEMA = 1
_STORED = ("weights", "entries")
"""Fields of a form in codes: storages with the number of ranks (or outputs) in each, and the storage of S."""
FORM_NUMBERS = ("rank", "channels", "outer", "nonzeros", "kept", "of")
"""``outer`` is Tucker-2's second rank; ``channels``, ``nonzeros``, or ``kept`` ``of`` a block describe S."""
_UNITS = ("macs", "parameters", "bytes")
_STAGES = ("load", "calibrate", "decompose", "plan", "rewrite", "verify")

Json: TypeAlias = dict[str, Any]


def report_to_json(report: Report) -> str:
    """The report of one run; ``before``, ``after`` and ``ratio`` are null after a dry run.

    ``details`` stands last and in one line for each layer, since it is for the page and not for reading.
    """
    found = report.verification
    facts: Json = {
        **_head(report.versions.get("onnx-lrsd")),
        "model": {"input": report.input, "output": report.output or None},
        "target": report.target,
        "cost": report.cost,
        "calibration": {"samples": report.calibration_samples, "source": report.calibration_source or None},
        **(_sides(found) if found else {"before": None, "after": None, "ratio": None, "outputs": []}),
        "checked_on": None if found is None else {"samples": found.samples, "given": _given(found)},
        "metric": _metric(found),
        "promise": None if report.promise is None else asdict(report.promise),
        "int8": None if report.int8 is None else _int8(report.int8),
        "loading": _loading(report.loading),
        "tensorrt": None if report.engine is None else _engine(report.engine),
        "predicted": {"latency": report.predicted, "table": report.table or None},
        "layers": [_layer(layer) for layer in report.layers],
        "whole": [_whole(entry) for entry in report.whole],
        "warnings": list(report.warnings),
        "seconds": {stage: report.seconds.get(stage, 0.0) for stage in _STAGES} | dict(report.seconds),
        "time": None if report.time is None else {"limit": report.time, "left_out": list(report.left_out)},
        **({} if report.memory is None else {"memory": asdict(report.memory)}),
        "versions": dict(report.versions),
    }
    return _dump(facts) if report.details is None else _with_details(_dump(facts), report.details)


def _with_details(text: str, details: Details) -> str:
    facts = asdict(details)
    layers = ",\n".join(f"      {_dump(layer, indent=None)}" for layer in facts.pop("layers"))
    head = "\n".join(f'    "{key}": {_dump(value, indent=None)},' for key, value in facts.items())
    body = f'"details": {{\n{head}\n    "layers": [\n{layers}\n    ]\n  }}'
    return text.removesuffix("\n}") + f",\n  {body}\n}}"


def comparison_to_json(
    found: Verification, before: str, after: str, source: str, drift: Drift | None = None
) -> str:
    """Two models side by side, on the samples of ``source``; with ``drift``, tensor by tensor as well."""
    facts: Json = {
        **_head(),
        "model": {"before": before, "after": after},
        "data": {"samples": found.samples, "source": source},
        **_sides(found),
        "metric": _metric(found),
        "warnings": list(found.warnings),
    }
    if drift is not None:
        named = {"first": drift.first, "most": drift.most}
        facts["drift"] = {which: tensor and tensor.name for which, tensor in named.items()}
        facts["tensors"] = [asdict(tensor) for tensor in drift.tensors]
    return _dump(facts)


def _given(found: Verification) -> int:
    return found.given or found.samples


def sweep_to_json(found: Sweep) -> str:
    """The models of a sweep, each beside the original; ``best`` is a place in ``points``, or null."""
    facts: Json = {
        **_head(),
        "model": {"input": found.input},
        "target": found.target,
        "cost": found.cost,
        "gains": found.gains,
        "calibration": {"samples": found.calibration_samples, "source": found.calibration_source or None},
        "points": [
            {
                "ratio_asked": point.ratio,
                "int8": point.int8,
                "output": point.output,
                **_sides(point.verification),
                "error": point.verification.error,
                "error_interval": list(point.verification.error_interval),
                "samples": point.verification.samples,
                "metric": _metric(point.verification),
                "promise": asdict(point.promise),
            }
            for point in found.points
        ],
        "best": found.best,
        "warnings": list(found.warnings),
        "seconds": dict(found.seconds),
    }
    return _dump(facts)


def inspection_to_json(found: Inspection, model: str) -> str:
    """What a model holds: its layers with their price, the nodes declined, and the whole."""
    facts: Json = {
        **_head(),
        "model": {"input": model},
        "inputs": {
            "source": found.source or None,
            "shapes": {name: list(shape) for name, shape in found.shapes.items()},
            "assumed": list(found.assumed),
        },
        "total": _price(found.total),
        "layers": [_inspected(layer, price) for layer, price in found.layers],
        "declined": [_declined(entry) for entry in found.declined],
        "widths": dict(found.widths),
        "whole": [_whole(entry) for entry in found.whole],
        "not_counted": list(found.not_counted),
        "notes": list(found.notes),
    }
    return _dump(facts)


def _declined(entry: Declined) -> Json:
    return {"name": entry.name, "op": entry.op, "reason": entry.reason}


def _whole(entry: Declined) -> Json:
    """A layer all of whose channels stay; ``kind`` is the reason without the node that it names."""
    return {**_declined(entry), "kind": entry.kind, "node": entry.node or None}


def plan_to_json(plan: Plan) -> str:
    """A plan to be read, edited and replayed: one line for each layer, and for each width between layers.

    A replay obeys ``kept`` of a width, and of a layer ``kind`` and the fields of FORM_NUMBERS and _STORED;
    the rest says why they were chosen.
    """
    head = _dump({**_head(), "target": plan.target, "cost": plan.cost})
    sections = {"layers": {name: _choice(choice) for name, choice in plan.choices.items()}}
    if plan.widths:
        sections["widths"] = {key: asdict(width) for key, width in plan.widths.items()}
    text = head.removesuffix("\n}")
    for title, entries in sections.items():
        lines = (f"    {json.dumps(name)}: {_dump(entry, indent=None)}" for name, entry in entries.items())
        text += f',\n  "{title}": {{\n' + ",\n".join(lines) + "\n  }"
    return text + "\n}"


def plan_from_json(text: str) -> Plan:
    """Read a plan that ``plan_to_json`` wrote and a person may have edited.

    Of a layer only ``kind`` is required, and ``rank`` unless it is dense. Raises DataError, which names the
    layer, for an invalid entry.
    """
    try:
        facts = json.loads(text, object_pairs_hook=_without_repeats)
    except ValueError as error:
        raise DataError(
            f"The plan is not valid JSON ({error}): mend it, or make one with --save-plan."
        ) from None
    layers = facts.get("layers") if isinstance(facts, dict) else None
    if not isinstance(layers, dict):
        raise DataError('The plan has no "layers": make one with --save-plan.')
    if facts.get("schema") != SCHEMA:
        raise DataError(
            f"The plan has schema {facts.get('schema')!r}, not {SCHEMA}: make one with --save-plan."
        )
    target, cost = facts.get("target"), facts.get("cost")
    if not isinstance(target, str):
        raise DataError('The plan names no "target": make one with --save-plan.')
    if cost not in COSTS:
        raise DataError(f'The "cost" of the plan is {cost!r}: write one of {", ".join(COSTS)}.')
    widths = facts.get("widths", {})
    if not isinstance(widths, dict):
        raise DataError('The "widths" of the plan are no object: make one with --save-plan.')
    return Plan(
        target,
        cost,
        {name: _read_choice(name, entry) for name, entry in layers.items()},
        {key: _read_width(key, entry) for key, entry in widths.items()},
    )


def _without_repeats(pairs: list[tuple[str, Any]]) -> Json:
    found: Json = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} stands there twice")
        found[key] = value
    return found


def _read_width(key: str, entry: Any) -> Width:
    kept = entry.get("kept") if isinstance(entry, dict) else None
    if type(kept) is not int or kept < 1:
        raise DataError(f'Width {key} of the plan keeps no whole number of channels: write {{"kept": 64}}.')
    of, error = entry.get("of", 0), entry.get("error", 0.0)
    if type(of) is not int or isinstance(error, bool) or not isinstance(error, int | float):
        raise DataError(f'Width {key} of the plan has an "of" or "error" that is no number: remove them.')
    return Width(kept, of, float(error))


def _read_choice(name: str, entry: Any) -> Choice:
    def wrong(said: str) -> DataError:
        return DataError(f"Layer {name} of the plan {said}.")

    if not isinstance(entry, dict):
        raise wrong('is no object: write {"kind": "dense"} or a kind with its rank')
    unknown = sorted(set(entry) - {"kind", *FORM_NUMBERS, *_STORED, "error", "before", "after", "reason"})
    if unknown:
        raise wrong(
            f'has the unknown field "{unknown[0]}": fields that count are kind, {", ".join(FORM_NUMBERS)}'
        )
    form = _read_form(entry, wrong)
    error, reason = entry.get("error") or 0.0, entry.get("reason") or ""
    if isinstance(error, bool) or not isinstance(error, int | float) or not isinstance(reason, str):
        raise wrong("has an error that is no number or a reason that is no text: remove them")
    try:
        before, after = (_read_price(entry.get(side)) for side in ("before", "after"))
        return Choice(form, float(error), before, after, reason)
    except (TypeError, ValueError, OverflowError):
        raise wrong('has a "before" or "after" that is no price: remove it') from None


def _read_form(entry: Json, wrong: Callable[[str], DataError]) -> Form:
    kind = entry.get("kind")
    if kind not in KINDS:
        raise wrong(f"has kind {json.dumps(kind)}: write one of {', '.join(KINDS)}")
    numbers = {field: entry.get(field, 0) for field in FORM_NUMBERS}
    for field, value in numbers.items():
        if type(value) is not int or value < 0:
            raise wrong(f"has {field} {json.dumps(value)}: write a whole number, 0 or more")
    patterns = [
        Pattern(CHANNELS, numbers["channels"]),
        Pattern(UNSTRUCTURED, numbers["nonzeros"]),
        Pattern(N_OF_M, numbers["kept"], numbers["of"]),
    ]
    given = [pattern for pattern in patterns if pattern.count or pattern.block]
    rank, outer = numbers["rank"], numbers["outer"]
    weights, entries = entry.get("weights", {}), entry.get("entries", "")
    counts = weights.values() if isinstance(weights, dict) else [None]
    if not all(type(count) is int and count > 0 for count in counts):
        raise wrong('has weights that are no storages with a number each: write {"int4": 64} or the like')
    if not {*weights, entries or FP16.name} <= set(STORAGES):
        raise wrong(f"has a storage that is none of {', '.join(STORAGES)}")
    if kind == DENSE and (rank or outer or given):
        raise wrong("is dense with a rank or channels: remove them, or name another kind")
    if len(given) > 1:
        raise wrong("has two patterns for its sparse part: give channels, nonzeros, or kept and of")
    if kind != DENSE and not (rank or given):
        raise wrong(f"is {kind} without a rank: give a rank of 1 or more, or write the kind dense")
    return Form(kind, rank, given[0] if given else NONE, outer, tuple(weights.items()), entries)


def _read_price(entry: Any) -> Price:
    """A price; all zero where there is none, since a replay computes prices anew."""
    if entry is None:
        return Price(0, 0, 0)
    if not isinstance(entry, dict):
        raise TypeError
    seconds = entry.get("seconds")
    macs, parameters, stored = (int(entry.get(unit, 0)) for unit in _UNITS)
    return Price(macs, parameters, stored, None if seconds is None else float(seconds))


def _head(tool_version: str | None = None) -> Json:
    if tool_version is None:
        try:
            tool_version = version("onnx-lrsd")
        except PackageNotFoundError:
            tool_version = "unknown"
    return {"schema": SCHEMA, "tool": {"name": "onnx-lrsd", "version": tool_version}}


def _sides(found: Verification) -> Json:
    before, after = found.before, found.after
    interval = None if found.latency_interval is None else list(found.latency_interval)
    units = "bytes", "parameters", "macs"
    ratio: Json = {unit: _quotient(getattr(before, unit), getattr(after, unit)) for unit in units}
    ratio["latency"] = {"median": found.latency_ratio, "interval": interval, "device": found.device}
    outputs = [asdict(output) for output in found.outputs]
    return {"before": _cost(before), "after": _cost(after), "ratio": ratio, "outputs": outputs}


def _int8(int8: Int8) -> Json:
    return {
        "kept": int8.kept,
        "nodes": int8.nodes,
        "left": [{"name": name, "error": error} for name, error in int8.left.items()],
        "steps": {name: _sides(step) | {"metric": _metric(step)} for name, step in int8.steps.items()},
    }


def _loading(loading: LoadCosts | None) -> Json | None:
    return None if loading is None else asdict(loading)


def _engine(engine: Engine) -> Json:
    found: Json = {"trtexec": engine.command, "sparse": list(engine.sparse), "notes": list(engine.notes)}
    if (times := engine.times) is not None:
        found["latency"] = {
            "before_ms": times.before_ms,
            "after_ms": times.after_ms,
            "median": times.ratio,
            "interval": list(times.interval),
            "device": times.gpu,
            "version": times.version,
            "shapes": {name: list(shape) for name, shape in times.shapes.items()},
        }
    return found


def _metric(found: Verification | None) -> Json | None:
    return None if found is None or found.metric is None else asdict(found.metric)


def _cost(cost: ModelCost) -> Json:
    """The figures; ``not_counted`` only where something is missing in them."""
    facts = asdict(cost)
    return facts if cost.not_counted else {key: facts[key] for key in facts if key != "not_counted"}


def _price(price: Price) -> Json:
    facts: Json = {unit: getattr(price, unit) for unit in _UNITS}
    return facts if price.seconds is None else facts | {"seconds": float(f"{price.seconds:.3e}")}


def _quotient(before: int, after: int) -> float | None:
    return before / after if after else None


def _layer(layer: LayerReport) -> Json:
    return asdict(layer)


def _inspected(layer: Layer, price: Price) -> Json:
    return {"name": layer.name, "op": layer.op, "shape": layer.shape, **_price(price)}


def _choice(choice: Choice) -> Json:
    form: Json = {"kind": choice.form.kind}
    if not choice.form.dense:
        pattern = choice.form.pattern
        form |= {"rank": choice.form.rank, "channels": choice.form.channels}
        if choice.form.outer:
            form["outer"] = choice.form.outer
        if pattern.kind == UNSTRUCTURED:
            form["nonzeros"] = pattern.count
        if pattern.kind == N_OF_M:
            form |= {"kept": pattern.count, "of": pattern.block}
    if choice.form.weights:
        form["weights"] = dict(choice.form.weights)
    if choice.form.entries:
        form["entries"] = choice.form.entries
    prices = {"before": _price(choice.before), "after": _price(choice.after)}
    return form | {"error": choice.error} | prices | ({"reason": choice.reason} if choice.reason else {})


def _dump(facts: Any, indent: int | None = 2) -> str:
    return json.dumps(_finite(facts), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """``value`` with None for NaN and infinities, and NumPy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
