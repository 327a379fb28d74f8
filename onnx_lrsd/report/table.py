"""The report as text, for a terminal of 100 columns.

Ratios are rounded down and errors up, so rounding never makes a result look better.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, TypeVar

from onnx_lrsd.facts import (
    Drift,
    Engine,
    Inspection,
    Int8,
    LayerReport,
    LoadCosts,
    OutputError,
    Promise,
    Report,
    ScoreChange,
    Sweep,
    SweepPoint,
    TensorDrift,
    Verification,
)
from onnx_lrsd.report.names import LEAST_WIDTH, common_pattern, shortened
from onnx_lrsd.storage import STORAGES
from onnx_lrsd.targets.machine import MATRIX, Machine
from onnx_lrsd.types import OUTPUT_OF_MODEL, Declined
from onnx_lrsd.wording import counted

_WIDTH = 100
NAMES_SHOWN = 3
"""Names shown of the layers that share a reason."""
NAME_WIDTH = 40
"""Columns of a name in running text."""
GROUP_WIDTH = 26
"""The same of a group of channels, whose error has an interval."""
MANY = 4
"""Layers of one shape that share a row unless all are asked for."""
FORMS_SHOWN = 2
"""Kinds of forms shown of the layers in one row."""
REASONS_SHOWN = 4
"""Kinds of reasons why channels stay that are listed unless all are asked for."""
ROWS_SHOWN = 60
"""Rows of layers shown unless all are asked for."""
_UNIT_NAMES = {"macs": "MACs", "parameters": "parameters", "bytes": "bytes"}

Row: TypeAlias = Sequence[str]
_Item = TypeVar("_Item")


def report_table(report: Report, *, colour: bool = False, every: bool = False) -> str:
    """The report of one run; ``every`` lists each layer that was left alone, with its reason."""
    ink = _Ink(colour)
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
        parts.append(_stay(whole, every))
    parts += [_paragraph(f"Warning: {warning}") for warning in report.warnings]
    if report.time is not None:
        parts.append(_paragraph(_left_out(report.time, report.left_out)))
    if report.seconds:
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items())
        parts.append(ink.faint(_paragraph(f"{sum(report.seconds.values()):.1f} s: {stages}")))
    return "\n\n".join(parts)


def comparison_table(found: Verification, before: str, after: str, *, colour: bool = False) -> str:
    """Two models side by side, and each of their outputs."""
    ink = _Ink(colour)
    title = ink.strong(f"{Path(before).name} and {Path(after).name}")
    warnings = [_paragraph(f"Warning: {warning}") for warning in found.warnings]
    parts = [title, _facts(found, ink, None, "macs"), _outputs(found.outputs, ink), *warnings]
    return "\n\n".join(part for part in parts if part)


def _outputs(outputs: Sequence[OutputError], ink: _Ink) -> str:
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
    shown = rows[:ROWS_SHOWN] + _more(len(rows) - ROWS_SHOWN, 4)
    header = ("output", "cosine", "largest difference", "same class")
    return _grid(header, shown, "lrrr", ink) if rows else ""


def drift_table(found: Drift, *, colour: bool = False, every: bool = False) -> str:
    """Errors tensor by tensor, in the order of the graph: all if ``every``, else those that rise most."""
    ink = _Ink(colour)
    first, most = found.first, found.most
    if first is None or most is None:
        return f"None of {counted(len(found.tensors), 'tensor')} differs by more than rounding."
    names = shortened([first.name, most.name], NAME_WIDTH)
    said = [
        f"first apart   {names[first.name]} ({first.op}): {_percent(first.error)}",
        f"rises most    {names[most.name]} ({most.op}): {_percent(most.inherited)} -> {_percent(most.error)}",
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
            _percent(tensor.inherited),
            _percent(tensor.error),
            "" if tensor.cosine is None else f"{tensor.cosine:.6f}",
            f"{tensor.largest:.2e}",
        )
        for tensor in shown
    ]
    rows += _more(len(found.tensors) - len(shown), 6)
    grid = _grid(("tensor", "op", "before it", "error", "cosine", "largest"), rows, "llrrrr", ink)
    return "\n".join([*said, "", grid])


def sweep_table(found: Sweep, *, colour: bool = False) -> str:
    """The original and every model of a sweep, and the one that gains most within the promise."""
    ink = _Ink(colour)
    samples = counted(found.calibration_samples, "sample") if found.calibration_samples else "no samples"
    parts = [
        ink.strong(Path(found.input).name) + ink.faint(f"   target {found.target}, calibrated on {samples}")
    ]
    if found.points:
        first = found.points[0].verification
        metric = "" if first.metric is None else first.metric.name
        score = "" if first.metric is None else f"{100 * first.metric.before:.2f} %"
        rows: list[Row] = [
            (
                "as it was",
                _milliseconds(first.before.latency_ms),
                "",
                "",
                _size(first.before.bytes),
                "",
                score,
                "",
            )
        ]
        for point in found.points:
            rows.append(_sweep_row(point))
        header = ("model", "latency", "faster", "at 95 %", "size", "output error, at most", metric, "promise")
        parts.append(_grid(header, rows, "lrrlrrrl", ink))
    parts.append(ink.verdict(_sweep_verdict(found), found.best is not None))
    parts += [_paragraph(f"Warning: {warning}") for warning in found.warnings]
    return "\n\n".join(parts)


def _sweep_row(point: SweepPoint) -> Row:
    seen = point.verification
    low, high = seen.latency_interval or (0.0, 0.0)
    return (
        point_name(point.ratio, point.int8),
        _milliseconds(seen.after.latency_ms),
        "" if seen.latency_ratio is None else f"{_down(seen.latency_ratio):.2f} x",
        "" if seen.latency_interval is None else f"{_down(low):.2f} to {_down(high):.2f}",
        _size(seen.after.bytes),
        _percent(seen.error_bound),
        "" if seen.metric is None else f"{100 * seen.metric.after:.2f} %",
        "kept" if point.promise.kept else "not kept",
    )


def _sweep_verdict(found: Sweep) -> str:
    asked = next((_limit(point.promise) for point in found.points), "")
    if found.best is None:
        return f"No model gains anything{f' with {asked}' if asked else ''}."
    best = found.points[found.best]
    return f"{point_name(best.ratio, best.int8)} gains most with {asked}: {Path(best.output).name}"


def _limit(promise: Promise) -> str:
    if promise.kind == "max_drop":
        return f"a score that falls by at most {promise.asked:g} points"
    return f"an output error of at most {100 * promise.asked:g} %"


def point_name(ratio: float | None, int8: bool) -> str:
    """What a model of a sweep is called.

    >>> point_name(1.5, True), point_name(2, False), point_name(None, True)
    ('1.5 x + int8', '2 x', 'int8 alone')
    """
    if ratio is None:
        return "int8 alone"
    return f"{ratio:g} x + int8" if int8 else f"{ratio:g} x"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else _time(value)


def inspection_table(found: Inspection, model: str, *, colour: bool = False, every: bool = False) -> str:
    """The layers that can be worked on with their share of the model, and what was declined and why."""
    ink = _Ink(colour)
    total = found.total
    covered = sum(price.macs for _, price in found.layers)
    parts = [
        ink.strong(Path(model).name)
        + ink.faint(
            f"   {_size(total.bytes)}, {total.parameters:,} parameters, {_count(total.macs)} MACs a sample"
        ),
        *_counted_with(found),
        f"{counted(len(found.layers), 'layer')} can be worked on: {_share(covered, total.macs)} of the MACs.",
    ]
    alike = _alike(found.layers, lambda entry: (entry[0].op, entry[0].shape, entry[1]), every)
    shown = alike if every else alike[:ROWS_SHOWN]
    rows: list[Row] = []
    for group in shown:
        layer, _ = group[0]
        names = [entry.name for entry, _ in group]
        count = sum(price.macs for _, price in group)
        rows.append(
            (
                layer.name if len(group) == 1 else f"{len(group)} x {common_pattern(names)}",
                layer.op,
                _dims(layer.shape),
                _count(count),
                _share(count, total.macs),
                f"{sum(price.parameters for _, price in group):,}",
            )
        )
    if rows:
        rows += _more(sum(map(len, alike[len(shown) :])), 6)
        parts.append(_grid(("layer", "op", "weight", "MACs", "share", "parameters"), rows, "lllrrr", ink))
        parts += _sums(alike)
    if found.not_counted:
        parts.append(_paragraph(f"Not counted in the MACs: {', '.join(found.not_counted)}."))
    parts += [_paragraph(note) for note in found.notes]
    if found.declined:
        groups = defaultdict(list)
        for entry in found.declined:
            groups[entry.reason].append(entry.name)
        title = f"{counted(len(found.declined), 'node left as it is', 'nodes left as they are')}:"
        parts.append("\n".join([title, *_grouped(groups, every)]))
    return "\n\n".join([*parts, *_channels(found, every)])


def _channels(found: Inspection, every: bool) -> list[str]:
    """Between which layers channels may be cut, and why all of others must stay."""
    parts = []
    if found.widths:
        cut = defaultdict(list)
        for names, channels in found.widths.items():
            cut[f"{channels} channels"].append(names)
        title = f"Channels may be cut between layers in {counted(len(found.widths), 'place')}:"
        parts.append("\n".join([title, *_grouped(cut, every)]))
    if found.whole:
        parts.append(_stay(found.whole, every))
    return parts


def _stay(whole: Sequence[Declined], every: bool) -> str:
    """Why all channels stay that layers give: how often for which kind of reason, or each if ``every``."""
    title = f"All channels stay that {counted(len(whole), 'layer gives', 'layers give')}:"
    if every:
        groups = defaultdict(list)
        for entry in whole:
            groups[entry.reason].append(entry.name)
        return "\n".join([title, *_grouped(groups, every)])
    kinds = Counter(entry.kind for entry in whole).most_common()
    said = [f"{count} x {kind}" for kind, count in kinds[:REASONS_SHOWN]]
    rest = sum(count for _, count in kinds[REASONS_SHOWN:])
    said += [f"{rest} for other reasons"] if rest else []
    return _paragraph(f"{title} {'; '.join(said)} (-v names them)")


def _counted_with(found: Inspection) -> list[str]:
    """The shapes of the inputs that MACs were counted with, and where they are from."""
    if not found.shapes:
        return []
    shapes = [f"{name} {_dims(shape)}" for name, shape in found.shapes.items() if shape]
    if not shapes:
        return []
    said = f"MACs are counted with {', '.join(shapes)}"
    if found.assumed:
        first = found.assumed[0]
        option = f"--shape {first}:{_dims(found.shapes[first])}"
        said += f". Sizes of open axes are assumed: give your own, as {option}, or samples with --calib"
    elif found.source:
        said += f", the shape of the first sample of {Path(found.source).name}"
    return [_paragraph(f"{said}.")]


def machine_table(machine: Machine, *, colour: bool = False) -> str:
    """What was measured of a machine: rates for few and many outputs, on small maps and large ones."""
    ink = _Ink(colour)
    head = f"{machine.processor}, ONNX Runtime {machine.runtime}, one thread, float32"
    facts = (
        f"Outputs of convolutions are padded to multiples of {machine.block}. A node takes "
        f"{machine.node * 1e6:.2f} us beside its work, to copy a value {machine.value * 1e9:.2f} ns."
    )
    parts = [ink.strong(head), facts]
    convolutions = [kind for kind in machine.rates if kind != MATRIX]
    for title, kinds, channels in (
        ("convolution, 64 channels", convolutions, 64),
        ("product, 256 inputs", [MATRIX], 256),
    ):
        grid = machine.rates[kinds[0]]
        few, many = grid.positions[0], grid.positions[len(grid.positions) // 2]
        header = (title, "positions", *(f"{outputs} outputs" for outputs in grid.outputs))
        rows = [
            (
                kind,
                f"{places:,}",
                *(f"{machine.rates[kind].at(out, channels, places) / 1e9:.1f}" for out in grid.outputs),
            )
            for kind in kinds
            for places in (few, many)
        ]
        parts.append(_grid(header, rows, "lr" + "r" * len(grid.outputs), ink))
    return "\n\n".join([*parts, "Rates are in GMAC/s."])


class _Ink:
    """ANSI emphasis, or none."""

    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def _wrap(self, code: int, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colour and text else text

    def strong(self, text: str) -> str:
        return self._wrap(1, text)

    def faint(self, text: str) -> str:
        return self._wrap(2, text)

    def verdict(self, text: str, good: bool) -> str:
        return self._wrap(32 if good else 31, text)


def _left_out(seconds: float, left_out: Sequence[str]) -> str:
    """What was left out to keep to a time."""
    said = ", ".join(left_out) or "nothing"
    return f"Left out to take at most {seconds:g} s: {said}."


def _facts(
    found: Verification, ink: _Ink, promise: Promise | None, cost: str, predicted: float | None = None
) -> str:
    """Before and after, then what it cost in accuracy, then the promise."""
    before, after = found.before, found.after
    missed = f"not counted: {', '.join(found.not_counted)}" if found.not_counted else ""
    rows: list[Row] = [
        ("size", _size(before.bytes), _size(after.bytes), _times(before.bytes, after.bytes), ""),
        (
            "parameters",
            f"{before.parameters:,}",
            f"{after.parameters:,}",
            _times(before.parameters, after.parameters),
            "",
        ),
        ("MACs", _count(before.macs), _count(after.macs), _times(before.macs, after.macs), missed),
    ]
    if before.latency_ms is not None and after.latency_ms is not None and found.latency_ratio is not None:
        low, high = found.latency_interval or (found.latency_ratio, found.latency_ratio)
        ratio = f"{_down(found.latency_ratio):.2f} x"
        interval = f"{_down(low):.2f} to {_down(high):.2f} at 95 %"
        if predicted is not None:
            interval += f", {predicted:.2f} predicted"
        where = "latency" if found.device == "cpu" else "latency (GPU)"
        rows.append((where, _time(before.latency_ms), _time(after.latency_ms), ratio, interval))
    if found.metric is not None:
        rows.append(_metric(found.metric))
    grid = _grid(("", "before", "after", "ratio", ""), rows, "lrrrl", ink)
    measured = f"over {counted(found.samples, 'sample')}"
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
            lines.append(f"{whole[output.name]}  {_percent(output.relative_error)} of its variance")
        for group in output.groups:
            low, high = (_percent(end) for end in group.interval)
            said = f"{parts[group.name]}  {_percent(group.relative_error)} of its variance"
            lines.append(f"{said} ({low.removesuffix(' %')} to {high})" if group.relative_error > 0 else said)
    return lines


def _int8(int8: Int8, ink: _Ink) -> str:
    """The result of each step alone, and which layers stay in float."""
    rows: list[Row] = []
    for name, step in int8.steps.items():
        worst = step.error
        latency = "" if step.latency_ratio is None else f"{_down(step.latency_ratio):.2f} x"
        score = "" if step.metric is None else f"{100 * step.metric.after:.2f} %"
        rows.append((name, latency, _times(step.before.bytes, step.after.bytes), _percent(worst), score))
    metric = next((step.metric.name for step in int8.steps.values() if step.metric is not None), "")
    lines = [_grid(("step", "latency", "size", "output error", metric), rows, "lrrrr", ink)]
    said = f"{counted(int8.nodes, 'node')} in int8"
    if int8.left:
        worst_first = sorted(int8.left, key=lambda name: -int8.left[name])
        names = shortened(int8.left, NAME_WIDTH)
        listed = ", ".join(f"{names[n]} ({_percent(int8.left[n])})" for n in worst_first[:NAMES_SHOWN])
        more = f" and {len(int8.left) - NAMES_SHOWN} more" if len(int8.left) > NAMES_SHOWN else ""
        said += f", {len(int8.left)} in float for the output error of each in int8: {listed}{more}"
    return "\n".join([*lines, _paragraph(said)])


def _engine(engine: Engine, ink: _Ink) -> str:
    """The command on one line, for copying, and the nodes with 2:4 weights."""
    names = shortened(engine.sparse, NAME_WIDTH)
    listed = ", ".join(names[name] for name in engine.sparse)
    said = f"2:4, for sparse tensor cores: {listed}" if listed else "No weight is 2:4."
    lines = [ink.strong(engine.command), _paragraph(said)]
    return "\n".join([*lines, *map(_paragraph, engine.notes)])


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
        said = f"{promise.asked:g} x {less} asked, {_down(promise.got):.2f} x got"
    elif promise.kind == "max_error":
        said = f"output error of at most {100 * promise.asked:g} % asked, {_percent(promise.got)} got"
    elif promise.kind == "max_drop":
        said = f"drop of at most {promise.asked:g} points asked, {promise.got:.2f} got"
    else:
        said = f"{promise.kind} {promise.asked:g} asked, {promise.got:g} got"
    return f"promise       {said}: {verdict}"


def _loading(costs: LoadCosts) -> str:
    """What decoding the weights costs: when the model is opened, or in every run if it is not folded."""
    before, after = costs.before, costs.after
    peaks = f"{_size(before.peak_bytes)} -> {_size(after.peak_bytes)}"
    return _paragraph(
        f"opening       {1000 * before.seconds:,.0f} -> {1000 * after.seconds:,.0f} ms, peak memory of the "
        f"process {peaks}: ONNX Runtime decodes the weights as it opens the model; with graph optimisation "
        "disabled it would do so in every run"
    )


def _split_layers(layers: Sequence[LayerReport], ink: _Ink, every: bool) -> str:
    coded = any(layer.weights or layer.entries for layer in layers)

    def sizes(layer: LayerReport) -> tuple[int, int]:
        return (layer.bytes_before, layer.bytes_after) if coded else (layer.macs_before, layer.macs_after)

    groups = _alike(layers, lambda layer: (layer.op, layer.shape, sizes(layer)[0]), every)
    shown = groups if every else groups[:ROWS_SHOWN]
    rows: list[Row] = []
    for group in shown:
        before, after = (sum(side) for side in zip(*map(sizes, group), strict=True))
        several = f"{len(group)} x {_dims(group[0].shape)}"
        ratios = [_times(*sizes(layer)) for layer in sorted(group, key=lambda layer: -sizes(layer)[1])]
        errors = [_percent(error) for error in sorted(layer.error for layer in group)]
        rows.append(
            (
                several if len(group) > 1 else group[0].name,
                group[0].op,
                _forms(group),
                *map(_size if coded else _count, (before, after)),
                _range(ratios),
                _range(errors),
            )
        )
    rows += _more(sum(map(len, groups[len(shown) :])), 7)
    header = ("layer", "op", "form", "bytes" if coded else "MACs before", "after", "ratio", "layer error")
    return "\n\n".join([_grid(header, rows, "lllrrrr", ink), *_sums(groups)])


def _alike(entries: Sequence[_Item], key: Callable[[_Item], object], every: bool) -> list[list[_Item]]:
    """``entries`` in groups of equal ``key`` where that are MANY, in the order of their first; else alone."""
    alike = defaultdict[object, list[_Item]](list)
    for entry in entries:
        alike[key(entry)].append(entry)
    groups = []
    for entry in entries:
        members = alike[key(entry)]
        if every or len(members) < MANY:
            groups.append([entry])
        elif entry is members[0]:
            groups.append(members)
    return groups


def _sums(groups: Sequence[Sequence[object]]) -> list[str]:
    several = any(len(group) > 1 for group in groups)
    return ["Layers of one shape stand in one row, with their sums; -v lists each."] if several else []


def _range(sorted_texts: Sequence[str]) -> str:
    """The first and the last, or one where they read the same; a unit is written once."""
    first, last = sorted_texts[0], sorted_texts[-1]
    if first == last:
        return first
    unit = last.rpartition(" ")[2]
    return f"{first.removesuffix(f' {unit}')} to {last}"


def _forms(group: Sequence[LayerReport]) -> str:
    """The form of all, or the kinds with the ranges of their ranks or widths; of dense codes the storages."""
    forms = {*map(form_of, group)}
    if len(forms) == 1:
        return forms.pop()
    counts = defaultdict[str, list[int]](list)
    for layer in group:
        kind, count = _kind(layer)
        counts[kind].append(count)
    said = []
    for kind, found in counts.items():
        if any(found):
            said.append(f"{kind} {_range([str(count) for count in sorted(found)])}")
        else:
            own = [layer for layer in group if _kind(layer) == (kind, 0)]
            said += [name for name in STORAGES if any(name in layer.weights for layer in own)] or [kind]
    sparse = " + S" if any(layer.nonzeros for layer in group) else ""
    return ", ".join(said[:FORMS_SHOWN]) + (", ..." if len(said) > FORMS_SHOWN else "") + sparse


def _kind(layer: LayerReport) -> tuple[str, int]:
    """The kind of a form, and the rank or width that says how small it is; 0 where neither does."""
    kept = layer.gives or layer.reads
    return (layer.form, layer.rank) if layer.rank or kept is None else ("width", kept[0])


def form_of(layer: LayerReport) -> str:
    """The form of the weight, and how many channels are left where some were cut."""
    kept = layer.gives or layer.reads
    width = f"width {kept[0]} of {kept[1]}" if kept is not None else ""
    if layer.gives is not None and layer.reads is not None:
        width += f", reads {layer.reads[0]} of {layer.reads[1]}"
    if not width:
        return _written(layer)
    narrow = replace(layer, gives=None, reads=None).left
    return width if narrow else f"{_written(layer)}, {width}"


def _written(layer: LayerReport) -> str:
    """The form of the weight."""
    if layer.weights or layer.entries:
        return _in_codes(layer)
    rank = f" {layer.rank}" if layer.rank else ""
    pattern = f"{layer.kept}:{layer.of}" if layer.of else f"S {layer.nonzeros:,}"
    if layer.of and not layer.rank:
        return pattern
    return f"{layer.form}{rank}" + (f" + {pattern}" if layer.nonzeros else "")


def _in_codes(layer: LayerReport) -> str:
    """The storage of a dense weight, or the mean bits of the ranks; and the storage of S."""
    low = next(iter(layer.weights), "")
    if layer.rank:
        bits = sum(STORAGES[name].bits * count for name, count in layer.weights.items()) / layer.rank
        low = f"{layer.form} {layer.rank} in {bits:.1f} bits"
    sparse = f"S {layer.nonzeros:,} {layer.entries}" if layer.nonzeros else ""
    return " + ".join(part for part in (low, sparse) if part)


def _share_left(report: Report, split: Sequence[LayerReport]) -> str:
    """The share of the model's MACs outside its rewritten layers; empty where they were not counted."""
    if report.verification is None:
        return ""
    whole = report.verification.before.macs
    return f" ({_share(whole - sum(layer.macs_before for layer in split), whole)} of the MACs)"


def _left_alone(layers: Sequence[LayerReport], share: str, ink: _Ink, every: bool) -> str:
    groups = defaultdict(list)
    for layer in layers:
        groups[layer.reason or "no reason given"].append(layer.name)
    title = f"{counted(len(layers), 'layer')} left dense{share}:"
    return "\n".join([title, *_grouped(groups, every)])


def _grouped(groups: dict[str, list[str]], every: bool) -> Iterable[str]:
    short = shortened((name for names in groups.values() for name in names), NAME_WIDTH)
    for reason, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        listed = names if every else names[:NAMES_SHOWN]
        more = f" and {len(names) - len(listed)} more" if len(names) > len(listed) else ""
        text = f"{reason}: {', '.join(short[name] for name in listed)}{more}"
        yield textwrap.fill(
            text,
            _WIDTH,
            initial_indent=f"{len(names):5} x ",
            subsequent_indent=" " * 8,
            break_on_hyphens=False,
        )


def _grid(header: Row, rows: Sequence[Row], align: str, ink: _Ink) -> str:
    """Columns as wide as their cells, the first cut to the space left; ``align`` has l or r for each."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    widths[0] = min(widths[0], max(_WIDTH - sum(widths[1:]) - 2 * len(widths[1:]), LEAST_WIDTH))
    first = shortened((row[0] for row in (header, *rows)), widths[0])

    def line(row: Row) -> str:
        cells = (
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip((first[row[0]], *row[1:]), widths, align, strict=True)
        )
        return "  ".join(cells).rstrip()

    return "\n".join([ink.faint(line(header)), *map(line, rows)])


def _more(count: int, columns: int) -> list[Row]:
    return [(f"and {count} more (-v lists them)", *[""] * (columns - 1))] if count > 0 else []


def _paragraph(text: str) -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def _dims(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _count(count: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.3f} ms" if milliseconds < 10 else f"{milliseconds:,.1f} ms"


def _times(before: int, after: int) -> str:
    return f"{_down(before / after):.2f} x" if after else ""


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _down(ratio: float) -> float:
    # A ratio such as 2.3 is a hair less than 2.3 in binary and would lose a hundredth.
    return math.floor(ratio * 100 + 1e-9) / 100 if math.isfinite(ratio) else ratio


def _percent(error: float) -> str:
    """An error in per cent, rounded up to two significant digits."""
    if not math.isfinite(error):
        return "not finite"
    if error <= 0:
        return "0 %"
    percent = 100 * error
    digits = max(1 - math.floor(math.log10(percent)), 0)
    if digits > 6:
        return "< 0.00001 %"
    up = math.ceil(percent * 10**digits - 1e-9) / 10**digits
    return f"{up:.{digits}f} %"
