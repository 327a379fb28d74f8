"""What every layer would lose in every form that its target offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnx_lrsd.fit.calibrate import Calibration, WeightOf
from onnx_lrsd.fit.shared import pose_shared
from onnx_lrsd.measure.layer_times import LayerTimes
from onnx_lrsd.passes.shared_weights import groups
from onnx_lrsd.plan.promise import STORED
from onnx_lrsd.run import NO_FORM, NO_STORAGE, NO_TIME, Run
from onnx_lrsd.solver.problem import Problem
from onnx_lrsd.targets import TARGETS, Machine, Target, price
from onnx_lrsd.time_limit import TRIED
from onnx_lrsd.types import (
    DENSE,
    KINDS,
    ErrorCurve,
    Form,
    Layer,
    Moments,
    Pattern,
    Point,
    Values,
)
from onnx_lrsd.wording import counted

ERRORS_OF = Form, Pattern
"""The classes that errors by form are kept with."""
MOST_ERROR = 0.5
"""A form that loses half of a layer's output energy is no approximation and never planned."""


def error_curves(run: Run, known: Calibration, weight_of: WeightOf) -> list[ErrorCurve]:
    """An error curve for each weight. Where a curve has the dense form alone, the journal says why.

    Layers that apply one weight have one curve.
    """
    units = groups(known.layers)
    # Where time may run out, most is to be gained of the layers with most work.
    order = sorted(units, key=_work, reverse=True) if run.time.limited else units
    found = [(layers, _deciding_layer(run, known, layers)) for layers in order]
    wanted = [(layers, deciding) for layers, deciding in found if deciding is not None]

    def task_of(index: int) -> CurveTask:
        layers, deciding = wanted[index]
        return CurveTask(
            offer=Offer.of(run, run.options.forms or KINDS),
            device=run.options.device,
            layers=(deciding, *(layer for layer in layers if layer.output != deciding.output)),
            affine={layer.output: weight_of(layer) for layer in layers},
            moments={la.output: known.moments[la.output] for la in layers if la.output in known.moments},
        )

    facts = [([layer.output for layer in layers],) for layers, _ in wanted]
    made = run.shared("errors", facts, errors_of, task_of, ERRORS_OF, share=TRIED, step="curves")
    errors = {layers[0].output: found for (layers, _), found in zip(wanted, made, strict=False)}
    late = [layers for layers, _ in wanted[len(errors) :]]
    for layers in late:
        run.journal.leave([layer.output for layer in layers], NO_TIME)
    if late:
        run.time.leave_out(f"smaller forms of {len(late)} of {counted(len(units), 'weight')}")
    curves = []
    for layers in units:
        points = [point(run.target, layers, Form(DENSE), 0.0)]
        if layers[0].output in errors:
            forms = errors[layers[0].output].items()
            points += [point(run.target, layers, form, error) for form, error in forms if error <= MOST_ERROR]
            if len(points) == 1:
                names = [layer.output for layer in layers]
                run.journal.leave(names, "every smaller form loses too much of its output")
        curves.append(ErrorCurve(layers[0], tuple(points), layers[1:]))
    return curves


def _deciding_layer(run: Run, known: Calibration, layers: tuple[Layer, ...]) -> Layer | None:
    """Of layers that apply one weight, the one that decides which forms are worth trying for all of them.

    It is the one that runs most often, as speed counts. None where no form is worth trying; the journal then
    says why.
    """
    names = [layer.output for layer in layers]
    deciding = replace(max(layers, key=_positions), shares="", also_read=layers[0].also_read)
    moments = [known.moments[name] for name in names if name in known.moments]
    if layers[0].also_read and run.cost in STORED:
        reason = f"{layers[0].also_read} reads its weight as well, which would stay beside a smaller one"
        run.journal.leave(names, reason)
        return None
    if not run.target.forms(deciding, run.options.forms or KINDS):
        run.journal.leave(names, NO_STORAGE if run.target.stores_codes else NO_FORM)
        return None
    if moments and not known.left_out.keys().isdisjoint(names) and not any(m.count for m in moments):
        run.journal.leave(names, "its input is not finite on the calibration data")
        return None
    return deciding


@dataclass(frozen=True)
class Offer:
    """The forms to try, for a worker: of these ``kinds``, in the storage ``weights`` if it is not None."""

    target: str
    machine: Machine | None
    kinds: tuple[str, ...]
    weights: str | None

    @staticmethod
    def of(run: Run, kinds: tuple[str, ...]) -> Offer:
        """What the target of ``run`` offers of these kinds."""
        return Offer(run.target.name, run.machine, kinds, run.weights)

    def errors(self, problem: Problem) -> dict[Form, float]:
        """The relative error of every form worth trying."""
        target = TARGETS[self.target]
        target = target if self.machine is None else target.on(self.machine)
        return dict(target.errors(problem, self.kinds, self.weights))


@dataclass(frozen=True, kw_only=True)
class CurveTask:
    """The problem of layers that apply one weight, and what is offered for it, for a worker.

    By the output of each layer: ``affine``, W (n, m) and b (n,), and the ``moments`` of its inputs.
    """

    offer: Offer
    device: str
    layers: tuple[Layer, ...]
    affine: Mapping[str, tuple[Values, Values]]
    moments: Mapping[str, Moments]


def errors_of(task: CurveTask) -> dict[Form, float]:
    """The errors of every form worth trying for the layers of a task."""
    problem = pose_shared(task.layers, lambda la: task.affine[la.output], task.moments, task.device)
    return task.offer.errors(problem)


def _work(layers: Sequence[Layer]) -> int:
    """MACs of the layers, or numbers in their weight where they have none."""
    return max(layer.n * layer.m * max(layer.positions, 1) for layer in layers)


def _positions(layer: Layer) -> int:
    return layer.positions


def point(target: Target, layers: Sequence[Layer], form: Form, error: float) -> Point:
    """The point of a ``form`` that layers with one weight take, with its ``error`` and what it costs."""
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
    """``point`` with seconds: the dense layer, predicted to take ``dense``, was measured at ``seconds``."""
    return replace(point, price=replace(point.price, seconds=seconds * point.time / dense))
