"""Search the budget that keeps what was asked for, and a form for every layer within it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from math import inf, log
from statistics import median
from typing import NamedTuple

from onnx_lrsd.data.holdout import FEW, search_and_confirm
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.errors import BudgetError, OptionError
from onnx_lrsd.facts import Trial, Verification
from onnx_lrsd.fit.fitter import Fitter
from onnx_lrsd.fit.narrow import Narrower
from onnx_lrsd.graph.model import Model
from onnx_lrsd.measure.compare import Baseline, compare
from onnx_lrsd.measure.speedup import CLEARLY, speedups, speedups_within, whole_speedup
from onnx_lrsd.passes.post_dominators import count_post_dominators
from onnx_lrsd.plan.allocate import allocate, by_time, spend
from onnx_lrsd.plan.promise import ratio_of
from onnx_lrsd.plan.search import DropLimit, ErrorLimit, Forms, Proposals, RatioSearch, Search
from onnx_lrsd.plan.units import Curves, members_of
from onnx_lrsd.run import Run
from onnx_lrsd.targets import price
from onnx_lrsd.time_limit import PLANNED
from onnx_lrsd.types import (
    COSTS,
    DENSE,
    N_OF_M,
    UNSTRUCTURED,
    WIDTH,
    CostOf,
    ErrorCurve,
    Form,
    Layer,
    Point,
    Price,
)

MUCH_CHEAPER = 0.75
"""Share of a slow form's MACs below which another of its kind may still be fast."""
_ROUNDS = 6
"""Allocations, at most: each leaves out the forms that were measured to be slow after the one before."""
LOSES = 1.25
"""How many times as much a plan may lose that is predicted to be faster at the MACs asked for, or has fewer
nodes."""
NEGLIGIBLE_ERROR = 1e-3
"""Output error of a plan with cut channels up to which none without cuts is fitted to be compared."""
SURELY = 1.5
"""A plan without cuts that is predicted to lose so many times as much is not fitted to be compared
(results/time.md)."""
AFFORDABLE = 2e11
"""MACs of all samples to fit on up to which a second plan may be fitted: with more it takes minutes."""
MODERATE = 0.03
"""Relative error of a layer at which its sensitivity is measured first."""
CLOSE = 1.5
"""A sensitivity holds for errors up to this factor apart: it is known within a fourth or so."""
REPAIRED = 0.1
"""Share of the error in its inputs for which the fit of a rewritten layer compensates (results/parts.md)."""
SPARE, LAVISH = 1.01, 1.05
"""A plan for latency is to be measured faster than asked for by between these factors, to be safe."""

WHOLE_SECONDS = 3.0
"""How long the whole model is timed in a trial of a plan for latency."""

SHORT = 5e-5
"""Seconds of a layer below which its time alone does not tell its time in the model: what a run takes beside
it counts as well, and alone its weight stays in a cache that the whole model fills (results/decisions.md)."""
UNSURE = 0.85
"""A form of a short layer that is at least this many times as fast alone may gain within the model."""
UNSURE_SECONDS = 1.0
"""How long the whole model is timed with and without forms that are unsure."""


class Planner:
    """Chooses a form for every layer; what measurement finds to be no faster is left dense.

    ``total`` is the price of the whole model, ``shapes`` are those of the layers' inputs in the
    smallest batch of ``samples``.
    """

    def __init__(
        self,
        run: Run,
        source: Model,
        curves: Curves,
        total: Price,
        shapes: Mapping[str, tuple[int, ...]],
        samples: Samples,
        narrower: Narrower | None = None,
    ) -> None:
        self.run, self.source, self.shapes, self.samples = run, source, shapes, samples
        self.curves, self.narrower = curves, narrower
        self.cost = COSTS[run.cost]
        self.whole = self.cost(Point(Form(DENSE), 0.0, total))
        self.rest = max(self.whole - sum(self.cost(curve.points[0]) for curve in curves.layers), 0.0)
        self.times: dict[object, float] = {}
        self.gaining: dict[str, list[Form]] = {}
        """By layer, forms that seemed no faster alone but made the whole model faster."""
        keys = [*(curve.layer.output for curve in curves.layers), *(pair.key for pair in curves.pairs)]
        self.sensitivity = dict.fromkeys(keys, 1.0)
        self._joined: _Joined | None = None
        self._baselines: dict[int, Baseline] = {}
        self.weighed = False
        """Whether sensitivities were measured; until then all layers count alike."""

    def weigh(self, measure: Callable[[Forms], dict[str, float]]) -> None:
        """Measure sensitivities: at a moderate error of each layer, then at the forms that these lead to.

        The second time only layers are measured whose error is another than at first, and that have all their
        channels. ``measure`` works in the original network, where nothing is refitted; what the fits of the
        layers behind will compensate for is taken off.
        """
        moderate = self._moderate_points()
        behind = self._layers_behind(moderate)

        def after_fits(forms: Forms) -> dict[str, float]:
            measured = measure(forms)
            return {name: value * (1 - REPAIRED) ** behind[name] for name, value in measured.items()}

        found = after_fits({name: point.form for name, point in moderate.items()})
        if not found:
            return
        self.sensitivity = dict.fromkeys(self.sensitivity, median(found.values())) | found
        self.weighed = True
        try:
            points = self._allocate(self.run.options.ratio or self.run.target.first_ratio)
        except BudgetError:
            return
        other = self._at_other_errors(points, moderate)
        if other:
            again = after_fits(other)
            for pair in self.curves.pairs:
                if pair.key in again:
                    # What a cut moves grows faster than its error: a small cut must not make large ones look
                    # harmless.
                    again[pair.key] = max(again[pair.key], found.get(pair.key, 0.0))
            self.sensitivity |= again

    def _moderate_points(self) -> dict[str, Point]:
        """Of each layer and pair that has a smaller form, the point at which it is measured first."""
        of_layers = [(curve.layer.output, curve.points) for curve in self.curves.layers]
        of_pairs = [(pair.key, pair.points) for pair in self.curves.pairs]
        found = dict[str, Point]()
        for key, points in (*of_layers, *of_pairs):
            smaller = [point for point in points if not point.form.dense and point.error > 0]
            if smaller:
                found[key] = min(smaller, key=_far_from_moderate)
        return found

    def _layers_behind(self, measured: Collection[str]) -> dict[str, int]:
        """By layer and pair, how many layers that can be rewritten lie on every path to the outputs.

        Those are the layers in ``measured``, and those that read the channels of a pair. Queries and keys are
        read by a product, behind which lies what is behind the layer of the queries.
        """
        layers = [curve.layer for curve in self.curves.layers]
        first = {pair.key: (pair.consumers or pair.producers)[0] for pair in self.curves.pairs}
        asked = {*measured, *self.curves.reading, *first.values()}
        able = [layer for layer in layers if layer.output in measured]
        able += [layer for layer in layers if layer.output in asked and layer.output not in measured]
        behind = count_post_dominators(self.source.graph(), able)
        return behind | {key: behind[output] for key, output in first.items()}

    def _at_other_errors(self, points: Mapping[str, Point], moderate: Mapping[str, Point]) -> Forms:
        """Forms of layers with all channels whose errors are far from those that were measured."""
        cut = {name for name, point in points.items() if point.form.kind == WIDTH}
        narrower = {
            name
            for pair_of in (self.curves.giving, self.curves.reading)
            for name, key in pair_of.items()
            if key in cut
        }
        return {
            name: point.form
            for name, point in points.items()
            if not point.form.dense and name not in narrower and not _close(point, moderate.get(name))
        }

    def for_ratio(self, ratio: float) -> Forms:
        """Forms that make the whole model ``ratio`` times cheaper, each measured to be faster than dense.

        Where another engine runs the result they are only predicted to be. Raises BudgetError where the
        layers do not bear it.
        """
        return self._for_latency(ratio) if self.run.cost == "latency" else self._planned(ratio)

    def _for_latency(self, ratio: float) -> Forms:
        """Predictions allocate, measurement decides: the aim is corrected until the whole model meets it.

        Raises OptionError where the model is run part by part.
        """
        if self.source.parted:
            raise OptionError(
                "{cost} times the whole model, which {memory} has run in parts: give more, or another cost.",
                cost=self.run.cost,
                memory=self.run.options.memory,
            )
        aim, tried = ratio * SPARE, list[tuple[float, Forms]]()
        for _ in range(_ROUNDS):
            try:
                chosen = self._planned(aim)
            except BudgetError:
                if not tried:
                    raise
                break
            if not chosen:
                return chosen
            narrow, layers = self._narrow(chosen)
            got = whole_speedup(
                self.source, layers, chosen, self.samples, WHOLE_SECONDS, rewritten_from=narrow
            )
            tried.append((got, chosen))
            if self.run.progress is not None:
                self.run.progress("trial of the whole", len(tried), _ROUNDS)
            if SPARE <= got / ratio <= LAVISH or self.run.time.passed(PLANNED):
                break
            aim *= ratio * (SPARE + LAVISH) / 2 / got
        enough = [entry for entry in tried if entry[0] >= SPARE * ratio]
        found = min(enough, key=_first) if enough else max(tried, key=_first)
        return found[1]

    def _planned(self, ratio: float) -> Forms:
        """Forms for ``ratio``, allocated anew without those that are measured to be slow."""
        for _ in range(_ROUNDS):
            points = self._allocate(ratio)
            chosen = {name: point.form for name, point in points.items() if not point.form.dense}
            slow = self._drop_slow(chosen)
            if not slow:
                break
        return self._of_all({name: form for name, form in chosen.items() if name not in slow})

    def _layers(self) -> list[Layer]:
        return [layer for curve in self.curves.layers for layer in curve.layers]

    def _of_all(self, chosen: Forms) -> dict[str, Form]:
        """``chosen``, by the first layer of a curve, for all layers that share a weight; and the widths."""
        forms = {
            layer.output: chosen[curve.layer.output]
            for curve in self.curves.layers
            for layer in curve.layers
            if curve.layer.output in chosen
        }
        return forms | {key: form for key, form in chosen.items() if form.kind == WIDTH}

    def _together(self, measured: Mapping[str, float]) -> dict[str, float]:
        """How many times faster the layers of each curve get together, as ``measured`` for each layer."""
        found = dict[str, float]()
        for curve in self.curves.layers:
            known = [layer for layer in curve.layers if layer.output in measured]
            if len(known) == 1:
                found[curve.layer.output] = measured[known[0].output]
            elif known:
                before = [float(price(layer, Form()).macs) for layer in known]
                after = [macs / measured[layer.output] for macs, layer in zip(before, known, strict=True)]
                found[curve.layer.output] = sum(before) / sum(after)
        return found

    def search(self, fitter: Fitter, check_on: Samples) -> tuple[Proposals, Samples]:
        """Proposals for what was asked, and the samples that are left to check them on.

        An output error is searched on one half of the samples and checked on the other, where both are large
        enough; otherwise on all of them, by the upper end of its interval. A score has few labels: it is
        searched and checked on all of them, by what all models tried say together.
        """
        run, options = self.run, self.run.options
        if options.ratio is not None:
            reached = partial(ratio_of, cost=run.cost)
            make = partial(self._better_for, fitter=fitter, samples=search_and_confirm(check_on)[0])
            return RatioSearch(options.ratio, make, reached, run.announce, run.time), check_on
        searching = partial(
            Search,
            run.target.first_ratio,
            self.for_ratio,
            announce=run.announce,
            time=run.time,
            predicted=self.predicted if self.weighed else None,
        )
        hint = ", or try --int8" if run.int8_may_gain else ""
        if options.max_drop is not None:
            drop_limit = DropLimit(options.max_drop, hint)

            def error(forms: Forms) -> float:
                found = self._compared(fitter.fit(forms).model, check_on)
                drop_limit.searched(found)
                return found.error

            return searching(error, drop_limit), check_on

        one, other = search_and_confirm(check_on) if check_on.count >= 2 * FEW else (check_on, check_on)

        def bound(forms: Forms) -> float:
            return self._compared(fitter.fit(forms).model, one).error_bound

        error_limit = ErrorLimit(options.max_error or 0.0, hint)
        return searching(bound, error_limit), other

    def _better_for(self, ratio: float, *, fitter: Fitter, samples: Samples) -> Forms:
        """Forms for ``ratio``, without cut channels where these are found to lose clearly more.

        What a cut moves in the outputs is measured at one width and scatters with the samples, so plans for
        MACs are fitted both ways and judged on ``samples``, on which nothing was fitted (results/spread.md).
        """
        forms = self.for_ratio(ratio)
        cut = any(form.kind == WIDTH for form in forms.values())
        affordable = self.run.cost == "macs" and self.whole * self.samples.count <= AFFORDABLE
        if not cut or not affordable or self.run.time.passed(PLANNED):
            return forms
        plain = copy(self)
        plain.curves = Curves(self.curves.layers)
        if self.weighed and plain.predicted(ratio) > SURELY * self.predicted(ratio):
            return forms
        lost = self._compared(fitter.fit(forms).model, samples).error
        if lost <= NEGLIGIBLE_ERROR:
            return forms
        try:
            others = plain.for_ratio(ratio)
        except BudgetError:
            return forms
        less = self._compared(fitter.fit(others).model, samples).error
        return others if LOSES * less < lost else forms

    def _compared(self, model: Model, samples: Samples) -> Verification:
        """The outputs of ``model`` on ``samples`` beside those of the original."""
        run = self.run
        return compare(
            self.source,
            model,
            samples,
            latency=False,
            metric=run.metric,
            groups=run.groups,
            baseline=self._baselines.setdefault(id(samples), Baseline(self.source, samples)),
            as_needed=True,
            progress=run.progress,
        )

    def predicted(self, ratio: float) -> float:
        """What a plan for ``ratio`` is predicted to lose; inf where the layers do not bear it."""
        return next((trial.error for trial in self.frontier([ratio])), inf)

    def frontier(self, ratios: Iterable[float]) -> list[Trial]:
        """What a plan for each of ``ratios`` (ascending) is predicted to lose, as far as the layers bear it.

        Sensitivities weigh the errors of the layers; nothing is measured or fitted.
        """
        found = []
        for ratio in ratios:
            try:
                points = self._allocate(ratio)
            except BudgetError:
                break
            found.append(Trial(ratio, sum(self.sensitivity[name] * p.error for name, p in points.items())))
        return found

    def _allocate(self, ratio: float) -> dict[str, Point]:
        """A point for each layer, and for each pair that is cut. Raises BudgetError if that is too much."""
        by_macs = self.run.cost == "macs"
        units, weights = self._joint([self.cost, by_time] if by_macs else [self.cost])
        points = allocate(units, self.whole / ratio, self.rest, self.cost, weights)
        if by_macs:
            points = self._by_time(units, weights, points, self.whole / ratio)
        return self._spent(members_of(points), self.whole / ratio, by_time if by_macs else None)

    def _spent(self, points: dict[str, Point], budget: float, time: CostOf | None) -> dict[str, Point]:
        """``points`` with what they leave of the budget spent layer by layer, at the widths they have.

        The joint choices of a unit lie far apart, those of its layers do not.
        """
        widths = {name: point.form.rank for name, point in points.items() if point.form.kind == WIDTH}
        if not widths:
            return points
        own = [replace(c, points=self.curves.points(c.layer.output, widths)) for c in self.curves.layers]
        chosen = {curve.layer.output: points[curve.layer.output] for curve in own}
        slack = budget - self.rest - sum(self.cost(point) for point in points.values())
        return points | spend(own, chosen, slack, self.cost, self.sensitivity, time)

    def _joint(self, costs: Sequence[CostOf]) -> tuple[list[ErrorCurve], dict[str, float]]:
        """The joint choices of all layers, made again only where curves or sensitivities have changed."""
        known = self._joined
        if known is None or known.curves is not self.curves or known.sensitivity != self.sensitivity:
            found = self.curves.joint(self.sensitivity, costs)
            known = self._joined = _Joined(self.curves, dict(self.sensitivity), *found)
        return known.units, known.weights

    def _by_time(
        self,
        units: Sequence[ErrorCurve],
        weights: Mapping[str, float],
        points: dict[str, Point],
        most_macs: float,
    ) -> dict[str, Point]:
        """Points with the same MACs that are predicted to run faster, if there are any.

        MACs are what was asked for, time is what is wanted: allocate by predicted time and bisect its
        budget until the MACs are met. Where that loses clearly more, MACs alone decide.
        """
        low, high = 0.0, sum(point.time for point in points.values())
        best, slack = points, 0.0
        for _ in range(16):
            budget = (low + high) / 2
            try:
                found = allocate(units, budget, 0.0, by_time, weights)
            except BudgetError:
                low = budget
                continue
            left = most_macs - self.rest - sum(point.price.macs for point in found.values())
            if left >= 0:
                best, slack, low = found, left, budget
            else:
                high = budget
        faster = spend(units, best, slack, self.cost, weights, by_time)
        lost, most = (sum(weights[name] * p.error for name, p in each.items()) for each in (faster, points))
        return faster if lost <= LOSES * most else points

    def _narrow(self, forms: Forms) -> tuple[Model, Sequence[Layer]]:
        """The network with the widths in ``forms``, not fitted, and its layers."""
        if self.narrower is None:
            return self.source, self._layers()
        return self.narrower.cut(forms)

    def _drop_slow(self, chosen: Forms) -> set[str]:
        """Names of the layers whose form is not faster here; their curves lose it, and forms like it.

        Each layer is timed alone, and once all are faster alone, within the whole model. Where short layers
        are only a little slower alone, the whole model decides at once.
        """
        if not chosen or not self.run.target.timed_here:
            return set()
        if self.run.time.passed(PLANNED):
            self.run.time.leave_out("trials of some planned forms, which are only predicted to be faster")
            return set()
        model, layers = self._narrow(chosen)
        forms = self._of_all(chosen)
        shapes = {**self.shapes, **_input_shapes(layers, self.shapes)}
        measured = self._together(
            speedups(model, layers, forms, shapes, self.times, self.run.progress, self.run.keep)
        )
        slow, where = {name: ratio for name, ratio in measured.items() if ratio < CLEARLY}, ""
        slow = {name: ratio for name, ratio in slow.items() if not self._gains(name, chosen[name])}
        unsure = slow and all(self._unsure(name, ratio) for name, ratio in slow.items())
        if unsure and not self.source.parted:
            slow = self._unsure_in_vain(model, layers, chosen, slow)
        if not slow:
            slow, where = self._slow_within(model, layers, chosen), " within the model"
        for layer in layers:
            name = layer.output
            if name in slow:
                form = chosen[name]
                ran = f"as {form} it ran {slow[name]:.2f} times as fast as before{where}"
                others = [other.output for other in self.curves.sharing(name)]
                self.run.journal.leave([name, *others], ran)
                stays = _stays([layer, *self.curves.sharing(name)], form)
                self.curves = self.curves.where(name, stays, narrow=layer.full is not None)
        return set(slow)

    def _gains(self, name: str, form: Form) -> bool:
        """Whether the whole model gained by a form of the same kind of this layer that saves no more MACs."""
        layer = self.curves.layer(name)
        return any(
            (form.kind, form.pattern.kind) == (other.kind, other.pattern.kind)
            and price(layer, form).macs <= price(layer, other).macs
            for other in self.gaining.get(name, ())
        )

    def _unsure(self, name: str, ratio: float) -> bool:
        """Whether ``ratio``, of a layer alone, leaves open if it gains within the model."""
        seconds = self.curves.points(name, {})[0].price.seconds
        return seconds is not None and seconds < SHORT and ratio >= UNSURE

    def _unsure_in_vain(
        self, model: Model, layers: Sequence[Layer], chosen: Forms, unsure: Mapping[str, float]
    ) -> dict[str, float]:
        """Of the forms that are ``unsure``, those to drop: none where the whole model is faster with them.

        Otherwise the half that is slower alone: the next round asks for the others.
        """
        others = {name: form for name, form in chosen.items() if name not in unsure}
        pair = self._of_all(chosen), self._of_all(others)
        gained = whole_speedup(model, layers, pair[0], self.samples, UNSURE_SECONDS, over=pair[1])
        if gained > 1:
            for name in unsure:
                self.gaining.setdefault(name, []).append(chosen[name])
            return {}
        slowest = sorted(unsure, key=unsure.__getitem__)[: (len(unsure) + 1) // 2]
        return {name: unsure[name] for name in slowest}

    def _slow_within(self, model: Model, layers: Sequence[Layer], chosen: Forms) -> dict[str, float]:
        """The layers that are slower within the model, with their ratios of speed, which are below 1.

        They must be slower twice, as once may be another program's doing. Their own kernels do not tell what
        their neighbours gain: the whole model must be faster without these forms, too.
        """
        slow = dict.fromkeys(chosen, 0.0)
        for _ in range(2):
            if slow:
                measured = self._together(speedups_within(model, layers, self._of_all(chosen), self.samples))
                slow = {name: measured[name] for name in slow if measured.get(name, 1.0) < 1}
        if not slow:
            return {}
        others = {name: form for name, form in chosen.items() if name not in slow}
        pair = self._of_all(others), self._of_all(chosen)
        without = whole_speedup(model, layers, pair[0], self.samples, WHOLE_SECONDS, over=pair[1])
        return slow if without > 1 else {}


class _Joined(NamedTuple):
    """The joint choices that follow from curves and sensitivities, and what the error of each counts."""

    curves: Curves
    sensitivity: dict[str, float]
    units: list[ErrorCurve]
    weights: dict[str, float]


def _far_from_moderate(point: Point) -> tuple[bool, float]:
    """How ill a point suits a first sensitivity; an S of single entries would take too long to fit."""
    return point.form.pattern.kind in (N_OF_M, UNSTRUCTURED), abs(log(point.error / MODERATE))


def _close(one: Point, two: Point | None) -> bool:
    """Whether two points err so much alike that a sensitivity measured at one does for the other."""
    return two is not None and abs(log(max(one.error, 1e-12) / two.error)) <= log(CLOSE)


def _first(entry: tuple[float, *tuple[object, ...]]) -> float:
    return entry[0]


def _stays(layers: Sequence[Layer], slow: Form) -> Callable[[Point], bool]:
    """A test for points of ``layers``: whether one is of another kind than ``slow``, or saves much more."""
    least = sum(price(layer, slow).macs for layer in layers) * MUCH_CHEAPER

    def stays(point: Point) -> bool:
        alike = point.form.kind == slow.kind and point.form.pattern.kind == slow.pattern.kind
        return not alike or point.price.macs < least

    return stays


def _input_shapes(
    layers: Sequence[Layer], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs of narrow layers, by tensor."""
    found = {}
    for layer in layers:
        if layer.full is not None:
            shape = list(shapes[layer.input])
            shape[layer.axis] = layer.channels
            found[layer.input] = tuple(shape)
    return found
