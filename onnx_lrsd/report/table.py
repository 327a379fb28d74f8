"""Tables of one run, and of two models side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from onnx_lrsd.facts import (
    Drift,
    Engine,
    EngineTimes,
    Int8,
    LayerReport,
    LoadCosts,
    MemoryUse,
    OutputError,
    Promise,
    Report,
    ScoreChange,
    TensorDrift,
    Verification,
)
from onnx_lrsd.report.forms import forms_in_words
from onnx_lrsd.report.grid import (
    NAME_WIDTH,
    NAMES_SHOWN,
    ROWS_SHOWN,
    Ink,
    Row,
    bytes_text,
    count_text,
    error_text,
    grid_of,
    grouped_alike,
    kept_channels,
    more_rows,
    names_by_reason,
    paragraph,
    range_text,
    ratio_text,
    rounded_down,
    shape_text,
    share_text,
    sums_note,
    time_text,
)
from onnx_lrsd.report.names import shortened
from onnx_lrsd.types import OUTPUT_OF_MODEL
from onnx_lrsd.wording import counted

GROUP_WIDTH = 26
"""The same of a group of channels, whose error has an interval."""
_UNIT_NAMES = {"macs": "MACs", "parameters": "parameters", "bytes": "bytes"}


def report_table(report: Report, *, colour: bool = False, every: bool = False) -> str:
    """The report of one run; ``every`` lists each layer that was left alone, with its reason."""
    ink = Ink(colour)
    samples = counted(report.calibration_samples, "sample") if report.calibration_samples else "no samples"
    where = f" of {Path(report.calibration_source).name}" if report.calibration_source else ""
    title = (
        f"{Path(report.input).name} -> {Path(report.output).name}"
        if report.output
        else Path(report.input).name
    )
    parts = [ink.strong(title) + ink.faint(f"   target {report.target}, calibrated on {samples}{where}")]
    if report.verification is not None:
        predicted = report.predicted if report.cost == "latency" else None
        parts.append(_facts(report.verification, ink, report.promise, report.cost, predicted))
    else:
        parts.append("A plan only: nothing was rewritten or measured.")
    if report.int8 is not None:
        parts.append(_int8(report.int8, ink))
    if report.loading is not None:
        parts.append(_loading(report.loading))
    if report.engine is not None:
        parts.append(_engine(report.engine, ink))
    split = [layer for layer in report.layers if not layer.left]
    left = [layer for layer in report.layers if layer.left]
    if split:
        parts.append(_split_layers(split, ink, every))
    if left:
        parts.append(_left_alone(left, _share_left(report, split), ink, every))
    # That those of the last layer stay goes without saying.
    whole = [entry for entry in report.whole if every or entry.reason != OUTPUT_OF_MODEL]
    if whole:
        parts.append(kept_channels(whole, every))
    parts += [paragraph(f"Warning: {warning}") for warning in report.warnings]
    if report.time is not None:
        parts.append(paragraph(_left_out(report.time, report.left_out)))
    if report.memory is not None:
        parts.append(paragraph(_memory(report.memory)))
    if report.seconds:
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items())
        parts.append(ink.faint(paragraph(f"{sum(report.seconds.values()):.1f} s: {stages}")))
    return "\n\n".join(parts)


def comparison_table(found: Verification, before: str, after: str, *, colour: bool = False) -> str:
    """Two models side by side, and each of their outputs."""
    ink = Ink(colour)
    title = ink.strong(f"{Path(before).name} and {Path(after).name}")
    warnings = [paragraph(f"Warning: {warning}") for warning in found.warnings]
    parts = [title, _facts(found, ink, None, "macs"), _outputs(found.outputs, ink), *warnings]
    return "\n\n".join(part for part in parts if part)


def _outputs(outputs: Sequence[OutputError], ink: Ink) -> str:
    """How alike the outputs are that differ, beside their errors; empty where nothing differs."""
    rows: list[Row] = [
        (
            output.name,
            "" if output.cosine is None else f"{output.cosine:.6f}",
            "" if output.largest is None else f"{output.largest:.2e}",
            "" if output.agreement is None else f"{100 * output.agreement:.2f} %",
        )
        for output in outputs
        if output.worst
    ]
    shown = rows[:ROWS_SHOWN] + more_rows(len(rows) - ROWS_SHOWN, 4)
    header = ("output", "cosine", "largest difference", "same class")
    return grid_of(header, shown, "lrrr", ink) if rows else ""


def drift_table(found: Drift, *, colour: bool = False, every: bool = False) -> str:
    """Errors tensor by tensor, in the order of the graph: all if ``every``, else those that rise most."""
    ink = Ink(colour)
    first, most = found.first, found.most
    if first is None or most is None:
        return f"None of {counted(len(found.tensors), 'tensor')} differs by more than rounding."
    names = shortened([first.name, most.name], NAME_WIDTH)
    rising = f"{error_text(most.inherited)} -> {error_text(most.error)}"
    said = [
        f"first apart   {names[first.name]} ({first.op}): {error_text(first.error)}",
        f"rises most    {names[most.name]} ({most.op}): {rising}",
    ]

    def rise(tensor: TensorDrift) -> float:
        return tensor.error - tensor.inherited

    shown = found.tensors
    if not every and len(shown) > ROWS_SHOWN:
        least = sorted(map(rise, shown))[-ROWS_SHOWN]
        shown = tuple(tensor for tensor in shown if rise(tensor) >= least)[:ROWS_SHOWN]
    rows: list[Row] = [
        (
            tensor.name,
            tensor.op,
            error_text(tensor.inherited),
            error_text(tensor.error),
            "" if tensor.cosine is None else f"{tensor.cosine:.6f}",
            f"{tensor.largest:.2e}",
        )
        for tensor in shown
    ]
    rows += more_rows(len(found.tensors) - len(shown), 6)
    grid = grid_of(("tensor", "op", "before it", "error", "cosine", "largest"), rows, "llrrrr", ink)
    return "\n".join([*said, "", grid])


def _left_out(seconds: float, left_out: Sequence[str]) -> str:
    """What was left out to keep to a time."""
    said = ", ".join(left_out) or "nothing"
    return f"Left out to take at most {seconds:g} s: {said}."


def _memory(found: MemoryUse) -> str:
    """What was held beside what was allowed, and what that took."""
    said = f"Memory: {bytes_text(found.limit)} allowed beside what ONNX Runtime takes"
    if found.most:
        said += f"; {bytes_text(found.most)} held at a time at most, up to {bytes_text(found.runtime)} by it"
    if found.aside:
        said += "; rows, moments and new weights lay in files"
    if found.parted:
        said += "; the models were run part by part, so not timed as a whole"
    return said + "."


def _facts(
    found: Verification, ink: Ink, promise: Promise | None, cost: str, predicted: float | None = None
) -> str:
    """Before and after, then what it cost in accuracy, then the promise."""
    before, after = found.before, found.after
    missed = f"not counted: {', '.join(found.not_counted)}" if found.not_counted else ""
    rows: list[Row] = [
        (
            "size",
            bytes_text(before.bytes),
            bytes_text(after.bytes),
            ratio_text(before.bytes, after.bytes),
            "",
        ),
        (
            "parameters",
            f"{before.parameters:,}",
            f"{after.parameters:,}",
            ratio_text(before.parameters, after.parameters),
            "",
        ),
        (
            "MACs",
            count_text(before.macs),
            count_text(after.macs),
            ratio_text(before.macs, after.macs),
            missed,
        ),
    ]
    if before.latency_ms is not None and after.latency_ms is not None and found.latency_ratio is not None:
        low, high = found.latency_interval or (found.latency_ratio, found.latency_ratio)
        ratio = f"{rounded_down(found.latency_ratio):.2f} x"
        interval = f"{rounded_down(low):.2f} to {rounded_down(high):.2f} at 95 %"
        if predicted is not None:
            interval += f", {predicted:.2f} predicted"
        where = "latency" if found.device == "cpu" else "latency (GPU)"
        rows.append((where, time_text(before.latency_ms), time_text(after.latency_ms), ratio, interval))
    if found.metric is not None:
        rows.append(_metric(found.metric))
    grid = grid_of(("", "before", "after", "ratio", ""), rows, "lrrrl", ink)
    measured = f"over {counted(found.samples, 'sample')}"
    if found.samples < found.given:
        measured = f"over {found.samples:,} of {counted(found.given, 'sample')}, drawn at random"
    errors = [f"output error  {line}, {measured}" for line in _errors(found.outputs)]
    if len(errors) > ROWS_SHOWN:
        errors = [*errors[:ROWS_SHOWN], f"and {counted(len(errors) - ROWS_SHOWN, 'error')} more"]
    parts = [grid, "", *errors]
    if promise is not None:
        said = _promise(promise, cost)
        if promise.kind == "ratio" and cost == "macs" and missed:
            said += ", of the MACs that are counted"
        parts.append(ink.verdict(said, promise.kept))
    return "\n".join(parts)


def _errors(outputs: Sequence[OutputError]) -> list[str]:
    """The error of each output, or of each group of its channels, and its interval."""
    whole = shortened([output.name for output in outputs if not output.groups], NAME_WIDTH)
    parts = shortened([group.name for output in outputs for group in output.groups], GROUP_WIDTH)
    lines = []
    for output in outputs:
        if not output.groups:
            lines.append(f"{whole[output.name]}  {error_text(output.relative_error)} of its {output.of}")
        for group in output.groups:
            low, high = (error_text(end) for end in group.interval)
            said = f"{parts[group.name]}  {error_text(group.relative_error)} of its {output.of}"
            lines.append(f"{said} ({low.removesuffix(' %')} to {high})" if group.relative_error > 0 else said)
    return lines


def _int8(int8: Int8, ink: Ink) -> str:
    """The result of each step alone, and which layers stay in float."""
    rows: list[Row] = []
    for name, step in int8.steps.items():
        worst = step.error
        latency = "" if step.latency_ratio is None else f"{rounded_down(step.latency_ratio):.2f} x"
        score = "" if step.metric is None else f"{100 * step.metric.after:.2f} %"
        rows.append(
            (name, latency, ratio_text(step.before.bytes, step.after.bytes), error_text(worst), score)
        )
    metric = next((step.metric.name for step in int8.steps.values() if step.metric is not None), "")
    lines = [grid_of(("step", "latency", "size", "output error", metric), rows, "lrrrr", ink)]
    said = f"{counted(int8.nodes, 'node')} in int8"
    if int8.left:
        worst_first = sorted(int8.left, key=lambda name: -int8.left[name])
        names = shortened(int8.left, NAME_WIDTH)
        listed = ", ".join(f"{names[n]} ({error_text(int8.left[n])})" for n in worst_first[:NAMES_SHOWN])
        more = f" and {len(int8.left) - NAMES_SHOWN} more" if len(int8.left) > NAMES_SHOWN else ""
        said += f", {len(int8.left)} in float for the output error of each in int8: {listed}{more}"
    return "\n".join([*lines, paragraph(said)])


def _engine(engine: Engine, ink: Ink) -> str:
    """The command on one line, for copying, and the nodes with 2:4 weights."""
    names = shortened(engine.sparse, NAME_WIDTH)
    listed = ", ".join(names[name] for name in engine.sparse)
    said = f"2:4, for sparse tensor cores: {listed}" if listed else "No weight is 2:4."
    lines = [ink.strong(engine.command), paragraph(said)]
    if engine.times is not None:
        lines.append(paragraph(_engine_times(engine.times)))
    return "\n".join([*lines, *map(paragraph, engine.notes)])


def _engine_times(times: EngineTimes) -> str:
    """What the engines were timed at; the rows above are ONNX Runtime's."""
    low, high = (f"{rounded_down(end):.2f}" for end in times.interval)
    at = "".join(f", {name} {shape_text(shape)}" for name, shape in times.shapes.items())
    return (
        f"Engines of TensorRT {times.version} on {times.gpu}{at}: {time_text(times.before_ms)} before, "
        f"{time_text(times.after_ms)} after, {rounded_down(times.ratio):.2f} x ({low} to {high} at 95 %). "
        "The latency above is that of ONNX Runtime."
    )


def _metric(metric: ScoreChange) -> Row:
    low, high = (100 * bound for bound in metric.interval)
    points = 100 * (metric.after - metric.before)
    note = f"{low:+.2f} to {high:+.2f} at 95 %, {counted(metric.samples, 'sample')}"
    before, after = (f"{100 * share:.2f} %" for share in (metric.before, metric.after))
    return metric.name, before, after, f"{points:+.2f} points", note


def _promise(promise: Promise, cost: str) -> str:
    if not promise.gained:
        verdict = "NO GAIN, the original is handed back"
    else:
        verdict = "kept" if promise.kept else "NOT KEPT"
    if promise.confidence is not None:
        verdict += f" ({int(100 * promise.confidence)} % sure)"
    if promise.kind == "ratio":
        less = "less time" if cost == "latency" else f"fewer {_UNIT_NAMES.get(cost, cost)}"
        said = f"{promise.asked:g} x {less} asked, {rounded_down(promise.got):.2f} x got"
    elif promise.kind == "max_error":
        said = f"output error of at most {100 * promise.asked:g} % asked, {error_text(promise.got)} got"
    elif promise.kind == "max_drop":
        said = f"drop of at most {promise.asked:g} points asked, {promise.got:.2f} got"
    else:
        said = f"{promise.kind} {promise.asked:g} asked, {promise.got:g} got"
    return f"promise       {said}: {verdict}"


def _loading(costs: LoadCosts) -> str:
    """What decoding the weights costs: when the model is opened, or in every run if it is not folded."""
    before, after = costs.before, costs.after
    peaks = f"{bytes_text(before.peak_bytes)} -> {bytes_text(after.peak_bytes)}"
    return paragraph(
        f"opening       {1000 * before.seconds:,.0f} -> {1000 * after.seconds:,.0f} ms, peak memory of the "
        f"process {peaks}: ONNX Runtime decodes the weights as it opens the model; with graph optimisation "
        "disabled it would do so in every run"
    )


def _split_layers(layers: Sequence[LayerReport], ink: Ink, every: bool) -> str:
    coded = any(layer.weights or layer.entries for layer in layers)

    def sizes(layer: LayerReport) -> tuple[int, int]:
        return (layer.bytes_before, layer.bytes_after) if coded else (layer.macs_before, layer.macs_after)

    groups = grouped_alike(layers, lambda layer: (layer.op, layer.shape, sizes(layer)[0]), every)
    shown = groups if every else groups[:ROWS_SHOWN]
    rows: list[Row] = []
    for group in shown:
        before, after = (sum(side) for side in zip(*map(sizes, group), strict=True))
        several = f"{len(group)} x {shape_text(group[0].shape)}"
        ratios = [ratio_text(*sizes(layer)) for layer in sorted(group, key=lambda layer: -sizes(layer)[1])]
        errors = [error_text(error) for error in sorted(layer.error for layer in group)]
        rows.append(
            (
                several if len(group) > 1 else group[0].name,
                group[0].op,
                forms_in_words(group),
                *map(bytes_text if coded else count_text, (before, after)),
                range_text(ratios),
                range_text(errors),
            )
        )
    rows += more_rows(sum(map(len, groups[len(shown) :])), 7)
    header = ("layer", "op", "form", "bytes" if coded else "MACs before", "after", "ratio", "layer error")
    return "\n\n".join([grid_of(header, rows, "lllrrrr", ink), *sums_note(groups)])


def _share_left(report: Report, split: Sequence[LayerReport]) -> str:
    """The share of the model's MACs outside its rewritten layers; empty where they were not counted."""
    if report.verification is None:
        return ""
    whole = report.verification.before.macs
    return f" ({share_text(whole - sum(layer.macs_before for layer in split), whole)} of the MACs)"


def _left_alone(layers: Sequence[LayerReport], share: str, ink: Ink, every: bool) -> str:
    groups = defaultdict(list)
    for layer in layers:
        groups[layer.reason or "no reason given"].append(layer.name)
    title = f"{counted(len(layers), 'layer')} left dense{share}:"
    return "\n".join([title, *names_by_reason(groups, every)])
