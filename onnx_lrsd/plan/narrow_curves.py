"""Error curves of pairs with fewer channels between their layers, and of these layers in every form then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_lrsd.fit.narrow import Inner, Narrower, narrow_layer
from onnx_lrsd.passes.pairs import Pair
from onnx_lrsd.plan.allocate import by_time, lower_hull
from onnx_lrsd.plan.curves import ERRORS_OF, MOST_ERROR, Offer, point
from onnx_lrsd.plan.units import Curves, KeptOf, PairCurve
from onnx_lrsd.run import Run
from onnx_lrsd.solver.problem import Problem
from onnx_lrsd.solver.width import narrowed
from onnx_lrsd.targets.chains import RANK_MULTIPLE
from onnx_lrsd.time_limit import WIDENED
from onnx_lrsd.types import COSTS, DENSE, KINDS, WIDTH, ErrorCurve, Form, Layer, Moments, Point, Price
from onnx_lrsd.wording import counted

NO_PRICE = Price(0, 0, 0, 0.0)
SHARES = 16
"""Widths are tried in steps of one such part of the channels."""
HEAD_MULTIPLE = 4
"""Channels of a head are tried in multiples of this: so many fill a vector register."""
GIVES, READS = 0, 1
"""The sides of a layer."""

_Errors: TypeAlias = Mapping[tuple[str, int], Mapping[Form, float]]
"""By a layer's output and the side that is cut: errors of its forms at the middle one of a few widths."""


def pair_curves(
    run: Run,
    curves: Sequence[ErrorCurve],
    narrower: Narrower,
    moments: Mapping[str, Moments],
    macs: Mapping[str, float],
) -> Curves:
    """The curves of the layers, joined by those of the pairs that may be cut between them.

    ``macs`` are those of every node that is no layer, by its first output.
    """
    pairs = {
        key: _pair_curve(key, inner, _macs_between(inner.pair, macs)) for key, inner in narrower.inner.items()
    }
    between = [_Between.of(run, curve, pairs) for curve in curves]
    errors = _errors(run, between, replace(narrower, moments=moments))
    narrow: dict[tuple[str, KeptOf], tuple[Point, ...]] = {}
    for layer in between:
        narrow |= _narrow_points(run, layer, narrower, errors)
    return Curves(tuple(curves), tuple(pairs.values()), narrow)


def _macs_between(pair: Pair, macs: Mapping[str, float]) -> float:
    """MACs that are spent on the channels between the layers: of depthwise convolutions, and of attention."""
    between = sum(
        macs[name] * float(np.mean(carried.owner >= 0))
        for name, carried in pair.carried.items()
        if name in macs
    )
    return between + macs.get(pair.product, 0.0)


def _pair_curve(key: str, inner: Inner, between: float) -> PairCurve:
    """What each width loses: the sum of what the layers that read the channels lose.

    It saves its share of the MACs ``between`` them.
    """
    pair, total = inner.pair, inner.pair.channels
    errors = inner.widths.errors.sum(axis=0)
    found = [Point(Form(DENSE), 0.0, NO_PRICE)]
    for width in widths_to_try(inner):
        if errors[width] <= MOST_ERROR * max(len(pair.consumers), 1) and width < total:
            saved = replace(NO_PRICE, macs=-round(between * (1 - width / total)))
            found.append(Point(Form(WIDTH, width), float(errors[width]), saved))
    giving, reading = (tuple(end.output for end in ends) for ends in (pair.producers, pair.consumers))
    return PairCurve(key=key, channels=total, producers=giving, consumers=reading, points=tuple(found))


def widths_to_try(inner: Inner) -> list[int]:
    """Sixteenths of the channels, rounded to what runtimes like, the largest first."""
    total = inner.pair.channels
    each = max(end.positions.shape[1] for end in inner.pair.producers)
    block = max(RANK_MULTIPLE // each, HEAD_MULTIPLE if inner.pair.heads else 1)
    shares = {max(round(total * part / SHARES / block), 1) * block for part in range(2, SHARES)}
    return sorted((width for width in shares if width < total), reverse=True)


@dataclass(frozen=True)
class _Between:
    """A layer and the pairs whose channels it gives and reads, None where there is none.

    ``kinds`` are those of the factors that are tried beside fewer channels.
    """

    curve: ErrorCurve
    pairs: tuple[PairCurve | None, PairCurve | None]
    kinds: tuple[str, ...]

    @staticmethod
    def of(run: Run, curve: ErrorCurve, pairs: Mapping[str, PairCurve]) -> _Between:
        output = curve.layer.output
        giving = next((pair for pair in pairs.values() if output in pair.producers), None)
        reading = next((pair for pair in pairs.values() if output in pair.consumers), None)
        return _Between(curve, (giving, reading), _worth_trying(run, curve))

    def widths(self, side: int) -> list[int]:
        """The widths on one side, 0 for all channels."""
        pair = self.pairs[side]
        return [0] if pair is None else [0, *(point.form.rank for point in pair.points[1:])]

    def few(self, side: int) -> set[int]:
        """A few of the widths on one side, for which factors are tried as well."""
        rest = self.widths(side)[1:]
        return {0, *(rest[len(rest) * part // 4] for part in range(4) if rest)}

    def middle(self, side: int) -> int:
        """The middle one of the few widths; 0 where there is none."""
        widths = sorted(width for width in self.few(side) if width)
        return widths[len(widths) // 2] if widths else 0

    def kept(self, widths: KeptOf) -> dict[str, int]:
        """The channels that the pairs keep, by key, where ``widths`` (given, read) are cut."""
        ends = zip(self.pairs, widths, strict=True)
        return {pair.key: width for pair, width in ends if pair is not None and width}

    def left_out(self, side: int, width: int) -> float:
        """How many channels are left out at ``width``, relative to those left out at the middle width."""
        pair = self.pairs[side]
        assert pair is not None  # without a pair 0 is the only width
        return (pair.channels - width) / (pair.channels - self.middle(side))


def _worth_trying(run: Run, curve: ErrorCurve) -> tuple[str, ...]:
    """The kinds of factors that are best for the layer with all channels, at some price of cost or time.

    None where a target stores codes: curves of coded forms take most of a run, and plans that combine them
    with fewer channels lose as much (results/time.md).
    """
    if run.target.stores_codes:
        return ()
    best = {
        point.form.kind
        for cost in (COSTS[run.cost], by_time)
        for point in lower_hull(curve.points, cost)
        if not point.form.dense
    }
    return tuple(kind for kind in run.options.forms or KINDS if kind in best)


@dataclass(frozen=True, kw_only=True)
class NarrowTask:
    """The ``problem`` of a layer, and the narrower ``layer``, for a worker.

    ``outputs`` (k,) and ``inputs`` (k,) are the rows and columns of W that it keeps (None: all).
    """

    offer: Offer
    problem: Problem
    layer: Layer
    outputs: npt.NDArray[np.int64] | None
    inputs: npt.NDArray[np.int64] | None


def narrow_errors(task: NarrowTask) -> dict[Form, float]:
    """The errors of every form of some kinds for the narrower layer of a task."""
    return task.offer.errors(narrowed(task.problem, task.layer, task.outputs, task.inputs))


def _errors(run: Run, between: Sequence[_Between], narrower: Narrower) -> _Errors:
    """The errors of all layers that have pairs and kinds to try, as far as there is time."""
    sides = [(layer, side) for layer in between for side in (GIVES, READS)]
    wanted = [(layer, side) for layer, side in sides if layer.kinds and layer.middle(side)]

    def task_of(index: int) -> NarrowTask:
        return _task(run, *wanted[index], narrower)

    facts = [(layer.curve.layer.output, side, layer.middle(side), layer.kinds) for layer, side in wanted]
    made = run.shared("errors", facts, narrow_errors, task_of, ERRORS_OF, share=WIDENED, step="widths")
    if len(made) < len(wanted):
        late = counted(len(wanted) - len(made), "layer")
        run.time.leave_out(f"factors beside fewer channels in {late} of {len(wanted)}")
    return {(fact[0], fact[1]): errors for fact, errors in zip(facts, made, strict=False)}


def _task(run: Run, between: _Between, side: int, narrower: Narrower) -> NarrowTask:
    layer, middle = between.curve.layer, between.middle(side)
    kept = between.kept((middle, 0) if side == GIVES else (0, middle))
    outputs, inputs = narrower.left(layer, kept)
    return NarrowTask(
        offer=Offer.of(run, between.kinds),
        problem=narrower.problem(layer, tuple(kept)),
        layer=_narrowed(narrower, layer, kept),
        outputs=outputs if side == GIVES else None,
        inputs=inputs if side == READS else None,
    )


def _narrowed(narrower: Narrower, layer: Layer, kept: Mapping[str, int]) -> Layer:
    return narrow_layer(layer, kept, {key: narrower.inner[key].pair for key in kept})


def _narrow_points(
    run: Run, between: _Between, narrower: Narrower, errors: _Errors
) -> dict[tuple[str, KeptOf], tuple[Point, ...]]:
    """The points of one layer for all widths on either side.

    It is dense in each, and also has factors where one side alone has one of a few widths.
    """
    curve, layer, output = between.curve, between.curve.layer, between.curve.layer.output
    whole = curve.points[0]
    rate = None if whole.price.seconds is None or not whole.time else whole.price.seconds / whole.time
    own = {point.form: point.error for point in curve.points}
    found: dict[tuple[str, KeptOf], tuple[Point, ...]] = {}
    for widths in product(between.widths(GIVES), between.widths(READS)):
        if not any(widths):
            continue
        small = _narrowed(narrower, layer, between.kept(widths))
        points = [_timed_by(point(run.target, [small], Form(DENSE), 0.0), rate)]
        side = GIVES if widths[GIVES] else READS
        few = all(width in between.few(each) for each, width in enumerate(widths))
        middle = errors.get((output, side)) if 0 in widths and few else None
        if middle is not None:
            left_out = between.left_out(side, widths[side])
            for form in run.target.forms(small, between.kinds):
                error = _interpolated(own.get(form), middle.get(form), left_out)
                if error is not None and error <= MOST_ERROR:
                    points.append(_timed_by(point(run.target, [small], form, error), rate))
        if run.target.stores_codes:
            points += _in_codes(run, curve, small)
        found[output, widths] = tuple(points)
    return found


def _in_codes(run: Run, curve: ErrorCurve, small: Layer) -> list[Point]:
    """The dense weight of a narrower layer in every storage.

    Rounding costs a share of the energy that hardly depends on how many channels there are.
    """
    found = []
    for coded in curve.points:
        if coded.form.kind == DENSE and coded.form.coded:
            ((storage, _),) = coded.form.weights
            form = Form(DENSE, weights=((storage, small.n),))
            found.append(point(run.target, [small], form, coded.error))
    return found


def _interpolated(own: float | None, middle: float | None, left_out: float) -> float | None:
    """The error of a form at a width, from ``own``, that at all channels, and that at the ``middle`` width.

    ``left_out`` is as in ``_Between``. Below the middle width the error is taken to be the same. None where
    an error is not known. Curves of every width took most of the time of a run (results/time.md).
    """
    if middle is None or left_out >= 1:
        return middle
    return None if own is None else own + left_out * (middle - own)


def _timed_by(found: Point, rate: float | None) -> Point:
    """``found`` with measured seconds for each unit of predicted time."""
    if rate is None:
        return found
    return replace(found, price=replace(found.price, seconds=rate * found.time))
