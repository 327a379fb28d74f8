"""What the report page draws beyond the figures of the report: curves, spectra, pictures, histograms.

They are collected only where they are asked for. All of it is small: a curve has at most POINTS points, a
spectrum RANKS, a picture ROWS x COLUMNS digits, a histogram BINS bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lrsd.arrays import to_numpy
from onnx_lrsd.solver.lowrank import low_rank
from onnx_lrsd.solver.problem import Problem
from onnx_lrsd.types import CHANNELS, N_OF_M, NONE, ErrorCurve, Factors, Form, Layer, Point

POINTS, RANKS, BINS = 80, 64, 40
ROWS, COLUMNS = 32, 64
LEVELS = 9
"""A cell of a picture is a digit from 0 to this."""

Values = npt.NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Forms that one layer could take, cheapest first, in columns: what each costs and loses.

    ``errors`` are relative errors of the layer's output; ``seconds`` are None where nobody measured.
    ``groups`` name the kind of each form and of its S.
    """

    forms: tuple[str, ...]
    groups: tuple[str, ...]
    errors: tuple[float, ...]
    macs: tuple[int, ...]
    parameters: tuple[int, ...]
    bytes: tuple[int, ...]
    seconds: tuple[float | None, ...]


@dataclass(frozen=True)
class Spectrum:
    """Of the whitened weight: at ``ranks``, singular values relative to the first, and the energy left."""

    ranks: tuple[int, ...]
    values: tuple[float, ...]
    left: tuple[float, ...]


@dataclass(frozen=True)
class Picture:
    """Where S has entries, or which input channels it keeps: rows of digits 0 to LEVELS, ' ' for no cell.

    ``kind`` is 'entries' (cells are shares of entries that are kept, relative to the fullest cell) or
    'channels' (one cell a channel, row by row). ``shape`` is that of what is shown: (n, m), or (channels,).
    """

    kind: str
    shape: tuple[int, ...]
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Histogram:
    """Shares of a layer's outputs in BINS equal bins from ``low`` to ``high``, in both models."""

    low: float
    high: float
    before: tuple[float, ...]
    after: tuple[float, ...]


def curve_of(found: ErrorCurve, chosen: Form | None = None) -> Curve:
    """The forms of a layer's curve that no other one beats in price and error, and the one ``chosen``."""
    smaller = sorted((p for p in found.points if not p.form.dense), key=lambda p: (p.price.macs, p.error))
    points = _thinned(smaller, chosen)
    return Curve(
        forms=tuple(str(p.form) for p in points),
        groups=tuple(_group(p.form) for p in points),
        errors=tuple(_rounded(p.error) for p in points),
        macs=tuple(p.price.macs for p in points),
        parameters=tuple(p.price.parameters for p in points),
        bytes=tuple(p.price.bytes for p in points),
        seconds=tuple(None if p.price.seconds is None else _rounded(p.price.seconds) for p in points),
    )


def _thinned(points: Sequence[Point], chosen: Form | None) -> list[Point]:
    """At most POINTS of ``points``, evenly, with the chosen one."""
    kept = {round(i) for i in np.linspace(0, len(points) - 1, min(POINTS, len(points)))}
    return [point for index, point in enumerate(points) if index in kept or point.form == chosen]


def _group(form: Form) -> str:
    """The kind of a form and of its S, without numbers that differ from point to point."""
    low = form.kind if form.rank or form.pattern == NONE else ""
    if form.pattern == NONE:
        return low
    sparse = f"{form.pattern.count}:{form.pattern.block}" if form.pattern.kind == N_OF_M else "S"
    return f"{low} + {sparse}" if low else f"{sparse} alone"


def spectrum(problem: Problem) -> Spectrum:
    """Singular values of W H^(1/2) at RANKS ranks or fewer, spread evenly over their logarithms."""
    left = to_numpy(low_rank(problem.weight, problem.metric).errors)
    values = np.sqrt(np.maximum(left[:-1] - left[1:], 0.0))
    count = len(values)
    ranks = np.unique(np.round(np.geomspace(1, count, min(RANKS, count))).astype(int))
    first = float(values[0]) or 1.0
    return Spectrum(
        tuple(ranks.tolist()),
        tuple(_rounded(float(values[r - 1]) / first) for r in ranks),
        tuple(_rounded(float(left[r])) for r in ranks),
    )


def picture(layer: Layer, factors: Factors) -> Picture | None:
    """What S keeps of a weight; None for a form without S."""
    form = factors.form
    if form.dense or form.pattern == NONE:
        return None
    if form.pattern.kind == CHANNELS:
        kept = np.zeros(layer.channels)
        kept[list(factors.channels)] = 1.0
        return Picture("channels", (layer.channels,), _strip(kept))
    mask = np.zeros((layer.n, layer.m))
    if factors.packed is not None and factors.packed.sparse is not None:
        mask.flat[factors.packed.sparse.positions] = 1.0
    elif factors.sparse is not None:
        mask = (factors.sparse.reshape(layer.n, layer.m) != 0).astype(float)
    return Picture("entries", mask.shape, _digits(_shrunk(mask)))


def _strip(kept: Values) -> tuple[str, ...]:
    """Channels row by row, several to a cell where there are too many."""
    each = -(-len(kept) // (ROWS * COLUMNS))
    padded = np.full(-(-len(kept) // each) * each, np.nan)
    padded[: len(kept)] = kept
    cells = np.nanmean(padded.reshape(-1, each), axis=1)
    width = min(COLUMNS, len(cells))
    return tuple(_digits(cells[i : i + width][None])[0] for i in range(0, len(cells), width))


def _shrunk(mask: Values) -> Values:
    """Means of ``mask`` over blocks, ROWS x COLUMNS of them at most."""
    for axis, most in ((0, ROWS), (1, COLUMNS)):
        length = mask.shape[axis]
        starts = np.unique(np.arange(min(most, length)) * length // min(most, length))
        sizes = np.diff([*starts, length])
        mask = np.add.reduceat(mask, starts, axis=axis) / (sizes[:, None] if axis == 0 else sizes)
    return mask


def _digits(cells: Values) -> tuple[str, ...]:
    """``cells`` relative to the largest one; what is not zero is never shown as such."""
    levels = np.ceil(LEVELS * cells / max(float(cells.max()), 1e-300) - 1e-9).astype(int)
    return tuple("".join(map(str, row)) for row in levels)


def histogram(before: Values, after: Values) -> Histogram | None:
    """Of the same outputs in both models; the outermost thousandth of values counts to the last bins."""
    finite = np.isfinite(before) & np.isfinite(after)
    before, after = before[finite], after[finite]
    if not before.size:
        return None
    low, high = (float(bound) for bound in np.quantile(before, [0.001, 0.999]))
    if not low < high:
        low, high = float(before.min()) - 0.5, float(before.max()) + 0.5
    shares = (
        np.histogram(np.clip(values, low, high), BINS, (low, high))[0] / before.size
        for values in (before, after)
    )
    one, two = (tuple(_rounded(float(share)) for share in counts) for counts in shares)
    return Histogram(_rounded(low), _rounded(high), one, two)


def _rounded(value: float) -> float:
    """Four digits that count: more are not to be seen."""
    return float(f"{value:.4g}")


def by_output(curves: Iterable[ErrorCurve], chosen: Mapping[str, Form]) -> dict[str, Curve]:
    """The curves of layers that have any, by the layer's output."""
    found = {curve.layer.output: curve_of(curve, chosen.get(curve.layer.output)) for curve in curves}
    return {name: curve for name, curve in found.items() if curve.forms}
