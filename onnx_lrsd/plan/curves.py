"""What every layer would lose in every form that its target offers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TypeVar

from onnx_lrsd.fit.calibrate import Calibration, WeightOf
from onnx_lrsd.fit.narrow import Inner, Narrower, narrow_layer
from onnx_lrsd.fit.shared import pose_shared
from onnx_lrsd.measure.layer_times import LayerTimes
from onnx_lrsd.passes.shared_weights import groups
from onnx_lrsd.plan.allocate import by_time, lower_hull
from onnx_lrsd.plan.promise import STORED
from onnx_lrsd.plan.units import Curves, KeptOf, PairCurve
from onnx_lrsd.run import NO_FORM, NO_STORAGE, NO_TIME, Run
from onnx_lrsd.solver.problem import Problem
from onnx_lrsd.solver.width import narrowed
from onnx_lrsd.targets import TARGETS, Machine, Target, price
from onnx_lrsd.targets.chains import RANK_MULTIPLE
from onnx_lrsd.time_limit import TRIED, WIDENED
from onnx_lrsd.types import (
    COSTS,
    DENSE,
    KINDS,
    WIDTH,
    ErrorCurve,
    Form,
    Layer,
    Moments,
    Pattern,
    Point,
    Price,
    Values,
)
from onnx_lrsd.wording import counted

_Result = TypeVar("_Result")

NO_PRICE = Price(0, 0, 0, 0.0)
SHARES = 16
"""Widths are tried in steps of so many parts of the channels."""
HEAD_MULTIPLE = 4
"""Channels of a head are tried in steps of so many, which vectors hold."""
MOST_ERROR = 0.5
"""A form that loses half of a layer's output energy is no approximation and never planned."""


def error_curves(run: Run, known: Calibration, weight_of: WeightOf) -> list[ErrorCurve]:
    """An error curve for each weight; what is left out of a curve is noted as the reason of its layers.

    Layers that apply one weight have one curve.
    """
    units = groups(known.layers)
    # Where time may run out, most is to be gained of the layers with most work.
    order = sorted(units, key=_work, reverse=True) if run.time.limited else units
    found = [(layers, _often(run, known, layers)) for layers in order]
    wanted = [(layers, often) for layers, often in found if often is not None]

    def task_of(index: int) -> CurveTask:
        layers, often = wanted[index]
        return _task(
            run,
            layers=(often, *(layer for layer in layers if layer.output != often.output)),
            affine={layer.output: weight_of(layer) for layer in layers},
            moments={la.output: known.moments[la.output] for la in layers if la.output in known.moments},
        )

    def told(done: int) -> None:
        if run.progress is not None:
            run.progress("curves", done, len(wanted))

    errors: dict[str, Mapping[Form, float]] = {}
    size = run.workers.count if run.time.limited else max(len(wanted), 1)
    for start in range(0, len(wanted), size):
        if run.time.passed(TRIED):
            break
        here = [layers for layers, _ in wanted[start : start + size]]
        facts = [([layer.output for layer in layers],) for layers in here]
        made = _shared_errors(run, facts, partial(_after, task_of, start), partial(_after, told, start))
        errors |= {layers[0].output: one for layers, one in zip(here, made, strict=True)}
    late = [layers for layers, _ in wanted[len(errors) :]]
    for layers in late:
        run.journal.leave([layer.output for layer in layers], NO_TIME)
    if late:
        run.time.leave_out(f"smaller forms of {len(late)} of {counted(len(units), 'weight')}")
    curves = []
    for layers in units:
        points = [_point(run.target, layers, Form(DENSE), 0.0)]
        if layers[0].output in errors:
            forms = errors[layers[0].output].items()
            points += [
                _point(run.target, layers, form, error) for form, error in forms if error <= MOST_ERROR
            ]
            if len(points) == 1:
                names = [layer.output for layer in layers]
                run.journal.leave(names, "every smaller form loses too much of its output")
        curves.append(ErrorCurve(layers[0], tuple(points), layers[1:]))
    return curves


def _after(function: Callable[[int], _Result], start: int, index: int) -> _Result:
    """``function`` of what is ``index`` behind ``start``."""
    return function(start + index)


def _often(run: Run, known: Calibration, layers: tuple[Layer, ...]) -> Layer | None:
    """Of layers that apply one weight the one that decides which forms are worth trying for all.

    Speed decides: it is the one that runs most often. None where no form is, which is noted.
    """
    names = [layer.output for layer in layers]
    often = replace(max(layers, key=_positions), shares="", also_read=layers[0].also_read)
    moments = [known.moments[name] for name in names if name in known.moments]
    if layers[0].also_read and run.cost in STORED:
        reason = f"{layers[0].also_read} reads its weight as well, which would stay beside a smaller one"
        run.journal.leave(names, reason)
        return None
    if not run.target.forms(often, run.options.forms or KINDS):
        run.journal.leave(names, NO_STORAGE if run.target.stores_codes else NO_FORM)
        return None
    if moments and not known.left_out.keys().isdisjoint(names) and not any(m.count for m in moments):
        run.journal.leave(names, "its input is not finite on the calibration data")
        return None
    return often


@dataclass(frozen=True, kw_only=True)
class CurveTask:
    """The problem of layers that apply one weight, and what its errors depend on, for a worker.

    ``affine`` has W and b, and ``moments`` those of the inputs, of each layer by its output.
    """

    target: str
    machine: Machine | None
    kinds: tuple[str, ...]
    weights: str | None
    device: str
    layers: tuple[Layer, ...]
    affine: Mapping[str, tuple[Values, Values]]
    moments: Mapping[str, Moments]


def errors_of(task: CurveTask) -> dict[Form, float]:
    """The errors of every form worth trying for the layers of a task."""
    target = TARGETS[task.target]
    target = target if task.machine is None else target.on(task.machine)
    problem = pose_shared(task.layers, lambda la: task.affine[la.output], task.moments, task.device)
    return dict(target.errors(problem, task.kinds, task.weights))


def _task(
    run: Run,
    layers: tuple[Layer, ...],
    affine: Mapping[str, tuple[Values, Values]],
    moments: Mapping[str, Moments],
) -> CurveTask:
    return CurveTask(
        target=run.target.name,
        machine=run.machine,
        kinds=run.options.forms or KINDS,
        weights=run.weights,
        device=run.options.device,
        layers=layers,
        affine=affine,
        moments=moments,
    )


def _work(layers: Sequence[Layer]) -> int:
    """MACs of the layers, or numbers in their weight where they have none."""
    return max(layer.n * layer.m * max(layer.positions, 1) for layer in layers)


def _shared_errors(
    run: Run,
    facts: Sequence[tuple[object, ...]],
    task_of: Callable[[int], CurveTask],
    told: Callable[[int], None] = lambda done: None,
) -> list[Mapping[Form, float]]:
    """The errors of the forms in the problems that ``facts`` stand for; workers do what is not kept."""
    classes = Form, Pattern
    kept = [run.keep.look("errors", fact, classes) for fact in facts]
    missing = [index for index, found in enumerate(kept) if found is None]
    made = run.workers.map(
        errors_of,
        lambda index: task_of(missing[index]),
        len(missing),
        lambda done: told(len(facts) - len(missing) + done),
    )
    new = dict(zip(missing, made, strict=True))

    def stored(index: int) -> Mapping[Form, float]:
        return run.keep("errors", facts[index], partial(dict, new[index]), classes)

    return [stored(index) if found is None else found[0] for index, found in enumerate(kept)]


def _errors(
    run: Run, what: tuple[object, ...], kinds: tuple[str, ...], posed: Callable[[], Problem]
) -> Mapping[Form, float]:
    """The errors of forms of these kinds for ``what``, whose problem is posed where they are not kept."""
    return run.keep(
        "errors", what, lambda: dict(run.target.errors(posed(), kinds, run.weights)), (Form, Pattern)
    )


def _positions(layer: Layer) -> int:
    return layer.positions


def pair_curves(run: Run, curves: Sequence[ErrorCurve], narrower: Narrower | None) -> Curves:
    """The curves of the layers, joined by those of the pairs that may be cut between them."""
    if narrower is None:
        return Curves(tuple(curves))
    pairs = {key: _pair_curve(key, inner) for key, inner in narrower.inner.items()}
    narrow: dict[tuple[str, KeptOf], tuple[Point, ...]] = {}
    late = 0
    for done, curve in enumerate(curves):
        factors = not run.time.passed(WIDENED)
        late += not factors
        narrow |= _narrow_points(run, curve, pairs, narrower, factors=factors)
        if run.progress is not None:
            run.progress("widths", done + 1, len(curves))
    if late:
        run.time.leave_out(f"factors beside fewer channels in {late} of {counted(len(curves), 'layer')}")
    return Curves(tuple(curves), tuple(pairs.values()), narrow)


def _pair_curve(key: str, inner: Inner) -> PairCurve:
    """What each width loses: the sum of what the layers that read the channels lose."""
    pair, total = inner.pair, inner.pair.channels
    errors = inner.widths.errors.sum(axis=0)
    found = [Point(Form(DENSE), 0.0, NO_PRICE)]
    for width in widths_to_try(inner):
        if errors[width] <= MOST_ERROR * len(pair.consumers) and width < total:
            found.append(Point(Form(WIDTH, width), float(errors[width]), NO_PRICE))
    giving, reading = (tuple(end.output for end in ends) for ends in (pair.producers, pair.consumers))
    return PairCurve(key=key, channels=total, producers=giving, consumers=reading, points=tuple(found))


def widths_to_try(inner: Inner) -> list[int]:
    """Sixteenths of the channels, rounded to what runtimes like, the largest first."""
    total = inner.pair.channels
    each = max(end.positions.shape[1] for end in inner.pair.producers)
    block = HEAD_MULTIPLE if inner.pair.heads else max(RANK_MULTIPLE // each, 1)
    shares = {max(round(total * part / SHARES / block), 1) * block for part in range(2, SHARES)}
    return sorted((width for width in shares if width < total), reverse=True)


def _narrow_points(
    run: Run, curve: ErrorCurve, pairs: Mapping[str, PairCurve], narrower: Narrower, *, factors: bool
) -> dict[tuple[str, KeptOf], tuple[Point, ...]]:
    """The points of one layer for all widths on either side: dense, and with ``factors`` at a few.

    In codes a narrower layer has no factors beside: curves of coded forms take most of a run, and the plans
    with them lose as much (results/time.md).
    """
    layer, output = curve.layer, curve.layer.output
    giving = next((pair for pair in pairs.values() if output in pair.producers), None)
    reading = next((pair for pair in pairs.values() if output in pair.consumers), None)
    given, read = (
        [0, *(p.form.rank for p in pair.points[1:])] if pair is not None else [0]
        for pair in (giving, reading)
    )
    few = [_few(widths) for widths in (given, read)]
    whole, kinds = curve.points[0], _worth_trying(run, curve)
    rate = None if whole.price.seconds is None or not whole.time else whole.price.seconds / whole.time
    own = {point.form: point.error for point in curve.points}
    measured: dict[int, Mapping[Form, float]] = {}
    found: dict[tuple[str, KeptOf], tuple[Point, ...]] = {}
    beside = factors and bool(kinds) and not run.target.stores_codes

    def narrowed_to(widths: tuple[int, int]) -> tuple[Layer, dict[str, int]]:
        ends = zip((giving, reading), widths, strict=True)
        kept = {pair.key: width for pair, width in ends if pair is not None and width}
        return narrow_layer(layer, kept, {key: narrower.inner[key].pair for key in kept}), kept

    def errors_at(side: int) -> Mapping[Form, float]:
        """Those of the forms at the middle one of the few widths of one side."""
        if side not in measured:
            middle = _middle(few[side])
            widths = (middle, 0) if side == 0 else (0, middle)
            small, kept = narrowed_to(widths)
            outputs, inputs = narrower.left(layer, kept)

            def posed() -> Problem:
                whole = narrower.problem(layer, tuple(kept))
                return narrowed(whole, small, outputs if widths[0] else None, inputs if widths[1] else None)

            measured[side] = _errors(run, (output, widths, kinds), kinds, posed)
        return measured[side]

    for widths in product(given, read):
        if not any(widths):
            continue
        small, _ = narrowed_to(widths)
        points = [_timed_by(_point(run.target, [small], Form(DENSE), 0.0), rate)]
        if beside and 0 in widths and widths[0] in few[0] and widths[1] in few[1]:
            side = 0 if widths[0] else 1
            pair = (giving, reading)[side]
            assert pair is not None  # who has no pair there has no width but 0
            left_out = (pair.channels - widths[side]) / (pair.channels - _middle(few[side]))
            for form in run.target.forms(small, kinds):
                error = _between(own.get(form), errors_at(side).get(form), left_out)
                if error is not None and error <= MOST_ERROR:
                    points.append(_timed_by(_point(run.target, [small], form, error), rate))
        elif run.target.stores_codes:
            # Rounding costs a share of the energy that hardly depends on how many channels there are.
            coded = [point for point in curve.points if point.form.kind == DENSE and point.form.coded]
            for point in coded:
                ((storage, _),) = point.form.weights
                form = Form(DENSE, weights=((storage, small.n),))
                points.append(_point(run.target, [small], form, point.error))
        found[output, widths] = tuple(points)
    return found


def _worth_trying(run: Run, curve: ErrorCurve) -> tuple[str, ...]:
    """The kinds of factors that are best for the layer as it is, at some price of what counts or of time.

    Others are not tried for fewer channels.
    """
    best = {
        point.form.kind
        for cost in (COSTS[run.cost], by_time)
        for point in lower_hull(curve.points, cost)
        if not point.form.dense
    }
    return tuple(kind for kind in run.options.forms or KINDS if kind in best)


def _middle(few: Collection[int]) -> int:
    widths = sorted(width for width in few if width)
    return widths[len(widths) // 2]


def _between(own: float | None, middle: float | None, left_out: float) -> float | None:
    """The error of a form at a width, from that at all channels and that at the middle width.

    ``left_out`` is the share of the channels left out, in those left out at the middle. Below the middle the
    error is that of the middle. Curves of every width took most of the time of a run (results/time.md).
    """
    if middle is None or left_out >= 1:
        return middle
    return None if own is None else own + left_out * (middle - own)


def _few(widths: Sequence[int]) -> set[int]:
    """A few of the ``widths``, for which factors are tried as well; the first one is that of all channels."""
    rest = widths[1:]
    return {widths[0], *(rest[len(rest) * part // 4] for part in range(4) if rest)}


def _timed_by(point: Point, rate: float | None) -> Point:
    """``point`` with measured seconds for each unit of predicted time."""
    if rate is None:
        return point
    return replace(point, price=replace(point.price, seconds=rate * point.time))


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
