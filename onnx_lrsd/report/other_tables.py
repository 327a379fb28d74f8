"""Tables of sweeps, inspections and machines."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from onnx_lrsd.facts import (
    Inspection,
    Promise,
    Sweep,
    SweepPoint,
)
from onnx_lrsd.report.grid import (
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
    rounded_down,
    shape_text,
    share_text,
    sums_note,
    time_text,
)
from onnx_lrsd.report.names import common_pattern
from onnx_lrsd.targets.machine import MATRIX, Machine
from onnx_lrsd.wording import counted


def sweep_table(found: Sweep, *, colour: bool = False) -> str:
    """The original and every model of a sweep, and the one that gains most within the promise."""
    ink = Ink(colour)
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
                bytes_text(first.before.bytes),
                "",
                score,
                "",
            )
        ]
        for point in found.points:
            rows.append(_sweep_row(point))
        header = ("model", "latency", "faster", "at 95 %", "size", "output error, at most", metric, "promise")
        parts.append(grid_of(header, rows, "lrrlrrrl", ink))
    parts.append(ink.verdict(_sweep_verdict(found), found.best is not None))
    parts += [paragraph(f"Warning: {warning}") for warning in found.warnings]
    return "\n\n".join(parts)


def _sweep_row(point: SweepPoint) -> Row:
    seen = point.verification
    low, high = seen.latency_interval or (0.0, 0.0)
    return (
        point_name(point.ratio, point.int8),
        _milliseconds(seen.after.latency_ms),
        "" if seen.latency_ratio is None else f"{rounded_down(seen.latency_ratio):.2f} x",
        "" if seen.latency_interval is None else f"{rounded_down(low):.2f} to {rounded_down(high):.2f}",
        bytes_text(seen.after.bytes),
        error_text(seen.error_bound),
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
    return "" if value is None else time_text(value)


def inspection_table(found: Inspection, model: str, *, colour: bool = False, every: bool = False) -> str:
    """The layers that can be worked on with their share of the model, and what was declined and why."""
    ink = Ink(colour)
    total = found.total
    covered = sum(price.macs for _, price in found.layers)
    size = f"{bytes_text(total.bytes)}, {total.parameters:,} parameters"
    able, share = counted(len(found.layers), "layer"), share_text(covered, total.macs)
    parts = [
        ink.strong(Path(model).name) + ink.faint(f"   {size}, {count_text(total.macs)} MACs a sample"),
        *_counted_with(found),
        f"{able} can be worked on: {share} of the MACs.",
    ]
    alike = grouped_alike(found.layers, lambda entry: (entry[0].op, entry[0].shape, entry[1]), every)
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
                shape_text(layer.shape),
                count_text(count),
                share_text(count, total.macs),
                f"{sum(price.parameters for _, price in group):,}",
            )
        )
    if rows:
        rows += more_rows(sum(map(len, alike[len(shown) :])), 6)
        parts.append(grid_of(("layer", "op", "weight", "MACs", "share", "parameters"), rows, "lllrrr", ink))
        parts += sums_note(alike)
    if found.not_counted:
        parts.append(paragraph(f"Not counted in the MACs: {', '.join(found.not_counted)}."))
    parts += [paragraph(note) for note in found.notes]
    if found.declined:
        groups = defaultdict(list)
        for entry in found.declined:
            groups[entry.reason].append(entry.name)
        title = f"{counted(len(found.declined), 'node left as it is', 'nodes left as they are')}:"
        parts.append("\n".join([title, *names_by_reason(groups, every)]))
    return "\n\n".join([*parts, *_channels(found, every)])


def _channels(found: Inspection, every: bool) -> list[str]:
    """Between which layers channels may be cut, and why all of others must stay."""
    parts = []
    if found.widths:
        cut = defaultdict(list)
        for names, channels in found.widths.items():
            cut[f"{channels} channels"].append(names)
        title = f"Channels may be cut between layers in {counted(len(found.widths), 'place')}:"
        parts.append("\n".join([title, *names_by_reason(cut, every)]))
    if found.whole:
        parts.append(kept_channels(found.whole, every))
    return parts


def _counted_with(found: Inspection) -> list[str]:
    """The shapes of the inputs that MACs were counted with, and where they are from."""
    if not found.shapes:
        return []
    shapes = [f"{name} {shape_text(shape)}" for name, shape in found.shapes.items() if shape]
    if not shapes:
        return []
    said = f"MACs are counted with {', '.join(shapes)}"
    if found.assumed:
        first = found.assumed[0]
        option = f"--shape {first}:{shape_text(found.shapes[first])}"
        said += f". Sizes of open axes are assumed: give your own, as {option}, or samples with --calib"
    elif found.source:
        said += f", the shape of the first sample of {Path(found.source).name}"
    return [paragraph(f"{said}.")]


def machine_table(machine: Machine, *, colour: bool = False) -> str:
    """What was measured of a machine: rates for few and many outputs, on small maps and large ones."""
    ink = Ink(colour)
    where = "one thread" if machine.device == "cpu" else "on the GPU"
    head = f"{machine.processor}, ONNX Runtime {machine.runtime}, {where}, float32"
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
        parts.append(grid_of(header, rows, "lr" + "r" * len(grid.outputs), ink))
    return "\n\n".join([*parts, "Rates are in GMAC/s."])
