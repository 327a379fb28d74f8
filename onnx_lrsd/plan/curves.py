"""What every layer would lose in every form that its target offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnx_lrsd.fit.calibrate import Calibration, WeightOf
from onnx_lrsd.fit.shared import pose_shared
from onnx_lrsd.measure.layer_times import LayerTimes
from onnx_lrsd.passes.shared_weights import groups
from onnx_lrsd.run import NO_FORM, NO_STORAGE, Run
from onnx_lrsd.targets import Target, price
from onnx_lrsd.types import DENSE, KINDS, ErrorCurve, Form, Layer, Point

STORED = ("bytes", "parameters")
"""Costs of what is stored, not of what is computed."""
MOST_ERROR = 0.5
"""A form that loses half of a layer's output energy is no approximation and never planned."""


def error_curves(run: Run, known: Calibration, weight_of: WeightOf) -> list[ErrorCurve]:
    """An error curve for each weight; what is left out of a curve is noted as the reason of its layers.

    Layers that apply one weight have one curve.
    """
    kinds = run.options.forms or KINDS
    curves, done = [], 0
    for layers in groups(known.layers):
        names = [layer.output for layer in layers]
        # Speed decides which forms are worth trying: the layer that runs most often asks for most.
        often = replace(max(layers, key=_positions), shares="", also_read=layers[0].also_read)
        forms = run.target.forms(often, kinds)
        moments = [known.moments[name] for name in names if name in known.moments]
        if layers[0].also_read and run.cost in STORED:
            reason = f"{layers[0].also_read} reads its weight as well, which would stay beside a smaller one"
            run.journal.leave(names, reason)
            forms = ()
        elif not forms:
            run.journal.leave(names, NO_STORAGE if run.target.stores_codes else NO_FORM)
        elif moments and not known.left_out.keys().isdisjoint(names) and not any(m.count for m in moments):
            run.journal.leave(names, "its input is not finite on the calibration data")
            forms = ()
        points = [_point(run.target, layers, Form(DENSE), 0.0)]
        if forms:
            others = [layer for layer in layers if layer.output != often.output]
            problem = pose_shared([often, *others], weight_of, known.moments, run.options.device)
            found = run.target.errors(problem, kinds, run.weights)
            points += [_point(run.target, layers, f, e) for f, e in found.items() if e <= MOST_ERROR]
            if len(points) == 1:
                run.journal.leave(names, "every smaller form loses too much of its output")
        curves.append(ErrorCurve(layers[0], tuple(points), layers[1:]))
        done += len(layers)
        if run.progress is not None:
            run.progress("curves", done, len(known.layers))
    return curves


def _positions(layer: Layer) -> int:
    return layer.positions


def _point(target: Target, layers: Sequence[Layer], form: Form, error: float) -> Point:
    prices = [price(layer, form) for layer in layers]
    time = sum(target.predicted_time(layer, form) for layer in layers)
    return Point(form, error, sum(prices[1:], prices[0]), time)


def with_seconds(curves: list[ErrorCurve], measured: LayerTimes) -> list[ErrorCurve]:
    """The curves with ``price.seconds``: the measured time of the dense layers times the predicted ratio."""
    return [_with_seconds(curve, measured) for curve in curves]


def _with_seconds(curve: ErrorCurve, measured: LayerTimes) -> ErrorCurve:
    if not all(layer.output in measured.layers for layer in curve.layers):
        return curve
    seconds = sum(measured.layers[layer.output] for layer in curve.layers)
    return replace(curve, points=tuple(_timed(p, curve.points[0].time, seconds) for p in curve.points))


def _timed(point: Point, dense: float, seconds: float) -> Point:
    return replace(point, price=replace(point.price, seconds=seconds * point.time / dense))
