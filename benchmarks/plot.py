"""Held-out error over the budget as an SVG file, one small panel a layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.methods import FREE, Row

WIDTH, HEIGHT, GAP, COLUMNS = 240, 170, 48, 3
COLOURS = (
    "#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
    "#ff7f0e", "#aec7e8", "#98df8a", "#c5b0d5", "#c49c94",
)  # fmt: skip


def write(path: Path, rows: Sequence[Row]) -> None:
    """Lines of the unstructured results in ``rows``: log error over keep, a colour for each method."""
    rows = [row for row in rows if row.pattern == FREE]
    layers = list(dict.fromkeys(row.layer for row in rows))
    methods = sorted({row.method for row in rows}, key=lambda name: (not name.startswith("ours"), name))
    colours = dict(zip(methods, COLOURS, strict=False))
    columns = min(COLUMNS, len(layers))
    width = GAP + columns * (WIDTH + GAP)
    bottom = GAP + ceil(len(layers) / columns) * (HEIGHT + GAP)
    height = bottom + 20 * ceil(len(methods) / columns) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    for place, layer in enumerate(layers):
        left = GAP + place % columns * (WIDTH + GAP)
        top = GAP + place // columns * (HEIGHT + GAP)
        panel = _panel([row for row in rows if row.layer == layer], layer, colours)
        parts.append(f'<g transform="translate({left},{top})">{panel}</g>')
    for place, method in enumerate(methods):
        x, y = GAP + place % columns * (WIDTH + GAP), bottom + 20 * (place // columns)
        line = f'<line x1="{x}" x2="{x + 24}" y1="{y}" y2="{y}" {_stroke(method, colours)}/>'
        parts.append(f'{line}<text x="{x + 30}" y="{y + 4}">{escape(method)}</text>')
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def _panel(rows: Sequence[Row], title: str, colours: dict[str, str]) -> str:
    keeps = sorted({row.keep for row in rows})
    logs = [log10(max(row.error, 1e-16)) for row in rows]
    low, high = floor(min(logs)), max(ceil(max(logs)), floor(min(logs)) + 1)

    def at(row: Row) -> tuple[float, float]:
        span = keeps[-1] - keeps[0] or 1.0
        x = 8 + (WIDTH - 16) * (row.keep - keeps[0]) / span
        return x, HEIGHT * (high - log10(max(row.error, 1e-16))) / (high - low)

    parts = [
        f'<text y="-8" font-weight="bold">{escape(title)}</text>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>'
    ]
    for power in range(low, high + 1):
        y = HEIGHT * (high - power) / (high - low)
        parts.append(f'<line x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="-4" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>')
    for keep in keeps:
        x = at(next(row for row in rows if row.keep == keep))[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT + 14}" text-anchor="middle">{keep:.0%}</text>')
    for method in colours:
        points = [at(row) for row in sorted(rows, key=lambda row: row.keep) if row.method == method]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" {_stroke(method, colours)}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colours[method]}"/>' for x, y in points]
    return "".join(parts)


def _stroke(method: str, colours: dict[str, str]) -> str:
    return f'stroke="{colours[method]}" stroke-width="{2 if method.startswith("ours") else 1}"'
