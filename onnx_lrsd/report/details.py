"""What the report page draws beyond the figures of the report: curves, spectra, pictures, histograms.

They are collected only where they are asked for. All of it is small: a curve has about POINTS points, a
spectrum at most RANKS, a picture ROWS x COLUMNS digits, a histogram BINS bins.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from math import ceil, nan

import numpy as np
import numpy.typing as npt

from onnx_lrsd.arrays import to_numpy
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.facts import (
    Curve,
    Details,
    Histogram,
    LayerDetails,
    Picture,
    Spectrum,
    TradeOff,
    Trial,
    Verification,
)
from onnx_lrsd.fit.calibrate import Calibration, WeightOf
from onnx_lrsd.graph.model import Model
from onnx_lrsd.measure.drift import paired_runs
from onnx_lrsd.runtime.divergence import Divergence, positions_first
from onnx_lrsd.solver.lowrank import low_rank
from onnx_lrsd.solver.problem import Problem, pose
from onnx_lrsd.targets import processor
from onnx_lrsd.types import CHANNELS, N_OF_M, NONE, ErrorCurve, Factors, Form, Layer, Plan, Point

PREDICTED_RATIOS = (1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0)
"""Ratios that the error of a plan is predicted at."""
POINTS, RANKS, BINS = 80, 64, 40
ROWS, COLUMNS = 32, 64
LEVELS = 9
"""A cell of a picture is a digit from 0 to this."""
COMPARED_SAMPLES, VALUES = 24, 20_000
"""Samples that outputs of layers are compared on, and values of one layer in its histogram."""

_Floats = npt.NDArray[np.floating]


def collect(
    *,
    curves: Sequence[ErrorCurve],
    spectra: Mapping[str, Spectrum],
    sensitivity: Mapping[str, float],
    trade_off: TradeOff | None,
    layers: Sequence[Layer],
    plan: Plan,
    factors: Mapping[str, Factors],
    before: Model,
    after: Model,
    samples: Samples,
) -> Details:
    """All that is drawn of one run; where something was not measured, as in a replay, it is left out.

    ``curves``, ``spectra``, ``sensitivity`` and ``factors`` are by the output of a layer. Outputs of layers
    are compared on a few of ``samples``, unless ``after`` is ``before`` itself.
    """
    by_output = {curve.layer.output: curve for curve in curves}
    outputs = dict[str, tuple[float, Histogram | None]]()
    if after is not before:
        outputs = _outputs(before, after, [layer.output for layer in layers], samples)
    rows = []
    for layer in layers:
        name = layer.output
        choice, curve, fitted = plan.choices.get(name), by_output.get(name), factors.get(name)
        form = Form() if choice is None else choice.form
        error, histogram = outputs.get(name, (None, None))
        rows.append(
            LayerDetails(
                output=name,
                planned=str(form),
                seconds_before=None if choice is None else choice.before.seconds,
                seconds_after=None if choice is None else choice.after.seconds,
                sensitivity=sensitivity.get(name),
                network_error=error,
                curve=None if curve is None or len(curve.points) < 2 else curve_of(curve, form),
                spectrum=spectra.get(name),
                picture=None if fitted is None else picture(layer, fitted),
                histogram=histogram,
            )
        )
    return Details(layers=tuple(rows), trade_off=trade_off, machine=machine(before.device))


def machine(device: str) -> dict[str, str]:
    """What the run was made on, with the GPU if ``device``, where the models ran, is one."""
    gpu = processor(device) if device != "cpu" else ""
    return {
        "processor": processor(),
        **({"GPU": gpu} if gpu else {}),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()}, {platform.machine()}",
        "python": platform.python_version(),
    }


def trade_off(
    cost: str, *, predicted: Sequence[Trial], tried: Sequence[Trial], found: Verification | None
) -> TradeOff:
    """The whole model's trade-off in the unit ``cost``, with the model that was ``found`` in the end."""
    chosen = None
    if found is not None:
        ratio = found.latency_ratio if cost == "latency" else _ratio(found, cost)
        chosen = Trial(_rounded(ratio or nan), _rounded(found.error_bound))
    return TradeOff(cost=cost, predicted=tuple(predicted), tried=tuple(tried), chosen=chosen)


def _ratio(found: Verification, cost: str) -> float:
    before, after = (float(getattr(model, cost)) for model in (found.before, found.after))
    return before / max(after, 1.0)


def spectra(known: Calibration, weight_of: WeightOf, device: str) -> dict[str, Spectrum]:
    """The spectrum of every layer with moments, by the layer's output."""
    return {
        layer.output: spectrum(pose(layer, *weight_of(layer), known.moments[layer.output], device))
        for layer in known.layers
        if layer.output in known.moments and np.isfinite(known.moments[layer.output].mean).all()
    }


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


def _strip(kept: _Floats) -> tuple[str, ...]:
    """Channels row by row, several to a cell where there are too many."""
    each = ceil(len(kept) / (ROWS * COLUMNS))
    padded = np.full(ceil(len(kept) / each) * each, np.nan)
    padded[: len(kept)] = kept
    cells = np.nanmean(padded.reshape(-1, each), axis=1)
    width = min(COLUMNS, len(cells))
    return tuple(_digits(cells[i : i + width][None])[0] for i in range(0, len(cells), width))


def _shrunk(mask: _Floats) -> _Floats:
    """Means of ``mask`` over blocks, ROWS x COLUMNS of them at most."""
    for axis, most in ((0, ROWS), (1, COLUMNS)):
        length = mask.shape[axis]
        starts = np.unique(np.arange(min(most, length)) * length // min(most, length))
        sizes = np.diff([*starts, length])
        mask = np.add.reduceat(mask, starts, axis=axis) / (sizes[:, None] if axis == 0 else sizes)
    return mask


def _digits(cells: _Floats) -> tuple[str, ...]:
    """``cells`` relative to the largest one; what is not zero is never shown as such."""
    levels = np.ceil(LEVELS * cells / max(float(cells.max()), 1e-300) - 1e-9).astype(int)
    return tuple("".join(map(str, row)) for row in levels)


def histogram(before: _Floats, after: _Floats) -> Histogram | None:
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


def _outputs(
    before: Model, after: Model, names: Sequence[str], samples: Samples
) -> dict[str, tuple[float, Histogram | None]]:
    """Relative error and histogram of the tensors ``names`` that both models have."""
    there = {name for node in after.proto.graph.node for name in node.output}
    shared = [name for name in names if name in there]
    if not shared:
        return {}
    errors = {name: Divergence() for name in shared}
    values: dict[str, list[tuple[_Floats, _Floats]]] = {name: [] for name in shared}
    samples = samples.some(COMPARED_SAMPLES)
    for old, new, real, size in paired_runs(before, after, samples, shared):
        most = ceil(VALUES * size / samples.count)
        for name, one, two in zip(shared, old, new, strict=True):
            errors[name].add(one, two, real, size)
            one, two = positions_first(one, real, ()), positions_first(two, real, ())
            if one.shape == two.shape and one.dtype.kind == "f":
                step = max(ceil(one.size / most), 1)
                values[name].append((one.ravel()[::step], two.ravel()[::step]))
    return {name: (errors[name].relative(), _histogram(values[name])) for name in shared}


def _histogram(parts: Sequence[tuple[_Floats, _Floats]]) -> Histogram | None:
    if not parts:
        return None
    before, after = (np.concatenate(side).astype(np.float64) for side in zip(*parts, strict=True))
    return histogram(before, after)
