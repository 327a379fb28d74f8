"""What every layer would lose in every form that its target offers."""

from __future__ import annotations

from dataclasses import replace

from onnx_lrsd.fit.calibrate import Calibration, WeightOf
from onnx_lrsd.measure.layer_times import LayerTimes
from onnx_lrsd.run import NO_FORM, NO_STORAGE, Run
from onnx_lrsd.solver.problem import pose
from onnx_lrsd.targets import Target, price
from onnx_lrsd.types import DENSE, KINDS, ErrorCurve, Form, Layer, Point

MOST_ERROR = 0.5
"""A form that loses half of a layer's output energy is no approximation and never planned."""


def error_curves(run: Run, known: Calibration, weight_of: WeightOf) -> list[ErrorCurve]:
    """An error curve for each layer; what is left out of a curve is noted as the layer's reason."""
    kinds = run.options.forms or KINDS
    curves = []
    for done, layer in enumerate(known.layers):
        dense = _point(run.target, layer, Form(DENSE), 0.0)
        forms = run.target.forms(layer, kinds)
        moments = known.moments.get(layer.output)
        if not forms:
            run.journal.leave([layer.output], NO_STORAGE if run.target.stores_codes else NO_FORM)
        elif layer.output in known.left_out and moments is not None and not moments.count:
            run.journal.leave([layer.output], "its input is not finite on the calibration data")
            forms = ()
        points = [dense]
        if forms:
            problem = pose(layer, *weight_of(layer), moments, run.options.device)
            found = run.target.errors(problem, kinds, run.weights)
            points += [_point(run.target, layer, f, e) for f, e in found.items() if e <= MOST_ERROR]
            if len(points) == 1:
                run.journal.leave([layer.output], "every smaller form loses too much of its output")
        curves.append(ErrorCurve(layer, tuple(points)))
        if run.progress is not None:
            run.progress("curves", done + 1, len(known.layers))
    return curves


def _point(target: Target, layer: Layer, form: Form, error: float) -> Point:
    return Point(form, error, price(layer, form), target.predicted_time(layer, form))


def with_seconds(curves: list[ErrorCurve], measured: LayerTimes) -> list[ErrorCurve]:
    """The curves with ``price.seconds``: the measured time of the dense layer times the predicted ratio."""
    return [
        ErrorCurve(curve.layer, tuple(_timed(p, curve.points[0].time, seconds) for p in curve.points))
        if (seconds := measured.layers.get(curve.layer.output)) is not None
        else curve
        for curve in curves
    ]


def _timed(point: Point, dense: float, seconds: float) -> Point:
    return replace(point, price=replace(point.price, seconds=seconds * point.time / dense))
