"""Layers that are planned together, since channels between them may be cut: their joint choices as one curve.

What a layer costs depends on how many channels are left on either side of it, and what its readers lose on
how many it gives. Layers that such pairs join are one unit. At a given price of cost, each layer takes its
best form for its widths, and the widths that are best in all are searched pair by pair until none changes.
The prices that are tried are those at which two neighbouring corners of the lower hull are worth the same, so
that every corner is found, but for what the search from pair to pair misses in chains.
Source: Eisner and Severance, Journal of the ACM 23 (1976), for the prices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_lrsd.plan.allocate import lower_hull
from onnx_lrsd.types import DENSE, WIDTH, CostOf, ErrorCurve, Form, Layer, Point

CHEAPEST = 1e12
"""A price of a unit of cost at which cost alone decides."""
SAME = 1e-9
"""Choices whose worth differs by less, relatively, are worth the same."""
ROUNDS = 4
"""How often the widths of a chain of pairs are gone through, at most."""

KeptOf = tuple[int, int]
"""Channels that a layer gives and reads; 0 for all of them."""


@dataclass(frozen=True, kw_only=True)
class Joint(Point):
    """One choice for a whole unit: a point for each of its layers, and for each pair that is cut.

    ``form`` is that of its first layer, ``error`` the sum of all errors times their sensitivities.
    """

    members: Mapping[str, Point]


def members_of(points: Mapping[str, Point]) -> dict[str, Point]:
    """The points of layers and cut pairs behind those of units."""
    found: dict[str, Point] = {}
    for output, point in points.items():
        found |= point.members if isinstance(point, Joint) else {output: point}
    return found


@dataclass(frozen=True, kw_only=True)
class PairCurve:
    """What each width of a pair loses, and saves between its layers; the first point keeps all channels.

    ``channels`` is how many there are; ``producers`` and ``consumers`` are the outputs of its layers. Points
    have the form dense or width.
    """

    key: str
    channels: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Curves:
    """The curves of all layers, of the pairs between them, and the points of layers with fewer channels."""

    layers: tuple[ErrorCurve, ...]
    pairs: tuple[PairCurve, ...] = ()
    narrow: Mapping[tuple[str, KeptOf], tuple[Point, ...]] = field(default_factory=dict)

    @cached_property
    def giving(self) -> dict[str, str]:
        """By layer, the pair whose channels it gives."""
        return {output: pair.key for pair in self.pairs for output in pair.producers}

    @cached_property
    def reading(self) -> dict[str, str]:
        """By layer, the pair whose channels it reads."""
        return {output: pair.key for pair in self.pairs for output in pair.consumers}

    @cached_property
    def _by_output(self) -> dict[str, ErrorCurve]:
        return {curve.layer.output: curve for curve in self.layers}

    def points(self, output: str, widths: Mapping[str, int]) -> tuple[Point, ...]:
        """The points of a layer where the pairs in ``widths`` are cut."""
        given = widths.get(self.giving.get(output, ""), 0)
        read = widths.get(self.reading.get(output, ""), 0)
        return self.points_at(output, (given, read))

    def points_at(self, output: str, kept: KeptOf) -> tuple[Point, ...]:
        """The points of a layer that gives and reads so many channels; 0 for all of them."""
        return self.narrow[output, kept] if any(kept) else self._by_output[output].points

    def widths(self, key: str | None) -> list[int]:
        """The widths of a pair in the order of its points, 0 for all channels; 0 alone without a pair."""
        for pair in self.pairs:
            if pair.key == key:
                return [point.form.rank for point in pair.points]
        return [0]

    def table(self, output: str, cost: CostOf) -> _Table:
        """The points of a layer that can be best at some price of ``cost``, for all its widths."""
        if (output, cost) not in self._tables:
            self._tables[output, cost] = _Table.of(self, output, cost)
        return self._tables[output, cost]

    @cached_property
    def _tables(self) -> dict[tuple[str, CostOf], _Table]:
        return {}

    def layer(self, output: str) -> Layer:
        """The first layer of a curve."""
        return self._by_output[output].layer

    def sharing(self, output: str) -> tuple[Layer, ...]:
        """The other layers that apply the weight of a curve's first layer; none for any other."""
        return self._by_output[output].others if output in self._by_output else ()

    def where(self, output: str, stays: Callable[[Point], bool], *, narrow: bool) -> Curves:
        """The curves with only those points of a layer that stay, of its ``narrow`` ones or of the others."""

        def left(points: tuple[Point, ...]) -> tuple[Point, ...]:
            return tuple(point for point in points if point.form.dense or stays(point))

        if narrow:
            own = {key: left(points) for key, points in self.narrow.items() if key[0] == output}
            return Curves(self.layers, self.pairs, {**self.narrow, **own})
        layers = tuple(
            replace(curve, points=left(curve.points)) if curve.layer.output == output else curve
            for curve in self.layers
        )
        return Curves(layers, self.pairs, self.narrow)

    def chosen(self, forms: Mapping[str, Form]) -> dict[str, Point]:
        """The point of every layer, and of every pair that is cut, for ``forms`` by layer and pair."""
        widths = {key: form.rank for key, form in forms.items() if form.kind == WIDTH}
        found = {}
        for curve in self.layers:
            output = curve.layer.output
            form = forms.get(output, Form(DENSE))
            found[output] = next(p for p in self.points(output, widths) if p.form == form)
        for pair in self.pairs:
            if pair.key in widths:
                found[pair.key] = next(p for p in pair.points if p.form == forms[pair.key])
        return found

    def joint(
        self, sensitivity: Mapping[str, float], costs: Sequence[CostOf]
    ) -> tuple[list[ErrorCurve], dict[str, float]]:
        """A curve for each unit, with its best choices for each of ``costs``; and how much its error counts.

        A layer that no pair joins keeps its own curve.
        """
        weights = {curve.layer.output: sensitivity[curve.layer.output] for curve in self.layers}
        units = self._units()
        joined = {output for outputs, _ in units for output in outputs}
        found = [curve for curve in self.layers if curve.layer.output not in joined]
        for outputs, pairs in units:
            points = _Unit(self, outputs, pairs, sensitivity).points(costs)
            found.append(ErrorCurve(self._by_output[outputs[0]].layer, points))
            weights[outputs[0]] = 1.0
        return found, weights

    def _units(self) -> list[tuple[list[str], list[PairCurve]]]:
        """Layers that pairs join, with these pairs."""
        units: list[tuple[list[str], list[PairCurve]]] = []
        for pair in self.pairs:
            outputs = [output for output in (*pair.producers, *pair.consumers) if output in self._by_output]
            others, pairs = [], [pair]
            for unit in units:
                if set(unit[0]) & set(outputs):
                    outputs, pairs = [*unit[0], *outputs], [*unit[1], *pairs]
                else:
                    others.append(unit)
            units = [*others, (list(dict.fromkeys(outputs)), pairs)]
        return units


@dataclass(frozen=True)
class _Table:
    """The points of one layer that can be best at some price, for all widths on either side of it.

    ``points[given][read]`` are those at these widths, counted as the points of the pairs are. ``errors`` and
    ``costs`` are (given, read, points); where there are fewer points than elsewhere they repeat the first.
    """

    points: Sequence[Sequence[Sequence[Point]]]
    errors: npt.NDArray[np.float64]
    costs: npt.NDArray[np.float64]

    @staticmethod
    def of(curves: Curves, output: str, cost: CostOf) -> _Table:
        given, read = (curves.widths(key.get(output)) for key in (curves.giving, curves.reading))
        points = [[lower_hull(curves.points_at(output, (g, r)), cost) for r in read] for g in given]
        most = max(len(found) for row in points for found in row)

        def filled(value: Callable[[Point], float]) -> npt.NDArray[np.float64]:
            table = np.empty((len(given), len(read), most))
            for place in np.ndindex(len(given), len(read)):
                values = [value(point) for point in points[place[0]][place[1]]]
                table[place] = values[0]
                table[place][: len(values)] = values
            return table

        return _Table(points, filled(lambda point: point.error), filled(cost))

    def worths(self, weight: float, price: float) -> npt.NDArray[np.float64]:
        """Error times ``weight`` and cost times ``price``, together, of every point."""
        found: npt.NDArray[np.float64] = weight * self.errors + price * self.costs
        return found


WidthPlaces: TypeAlias = dict[str, int]
"""By the key of a pair, the index of its width among its points."""


class _Choice(NamedTuple):
    """A point for each layer and each pair that is cut, by output or key; and all of them as one."""

    members: Mapping[str, Point]
    joint: Joint


@dataclass(frozen=True)
class _Unit:
    """Layers and the pairs that join them."""

    curves: Curves
    outputs: Sequence[str]
    pairs: Sequence[PairCurve]
    sensitivity: Mapping[str, float]

    def points(self, costs: Sequence[CostOf]) -> tuple[Joint, ...]:
        """Its joint choices; the first one leaves all as it is."""
        found: dict[tuple[tuple[str, Form], ...], Joint] = {}
        whole = self._choice({output: self.curves.points(output, {})[0] for output in self.outputs})
        for choice in (whole, *(c for cost in costs for c in self._along_the_hull(cost))):
            key = tuple((key, point.form) for key, point in sorted(choice.members.items()))
            found.setdefault(key, choice.joint)
        return tuple(found.values())

    def _choice(self, members: Mapping[str, Point]) -> _Choice:
        between = [members.get(pair.key, pair.points[0]) for pair in self.pairs]
        points = [*(members[output] for output in self.outputs), *between]
        joint = Joint(
            form=points[0].form,
            error=sum(point.error * self.sensitivity[key] for key, point in members.items()),
            price=sum((point.price for point in points[1:]), start=points[0].price),
            time=sum(point.time for point in points),
            members=members,
        )
        return _Choice(members, joint)

    def _along_the_hull(self, cost: CostOf) -> list[_Choice]:
        """The choices at the corners of the lower hull, from all as it is to the cheapest.

        Between two corners the price at which both are worth the same tells whether there is another.
        """
        found: list[_Choice] = []
        dear, cheap = self._at(0.0, cost), self._at(CHEAPEST, cost)
        waiting = [(dear.chosen({}), cheap.chosen(cheap.best_widths({})))]
        while waiting:
            left, right = waiting.pop()
            one, two = left.joint, right.joint
            found += [left, right]
            if cost(one) <= cost(two) or one.error >= two.error:
                continue
            price = (two.error - one.error) / (cost(one) - cost(two))
            priced = self._at(price, cost)
            starts = [self._widths(near.members) for near in (left, right)]
            tried = [priced.chosen(widths) for widths in map(priced.best_widths, starts)]
            worths = [choice.joint.error + price * cost(choice.joint) for choice in tried]
            # What is saved between the layers counts as a negative cost, so that worths may be about zero.
            same = SAME * (one.error + price * abs(cost(one)))
            if min(worths) < one.error + price * cost(one) - same:
                middle = tried[worths.index(min(worths))]
                waiting += [(left, middle), (middle, right)]
        return found

    def _at(self, price: float, cost: CostOf) -> _Priced:
        layers = {
            output: self.curves.table(output, cost).worths(self.sensitivity[output], price)
            for output in self.outputs
        }
        pairs = {
            pair.key: np.array([p.error * self.sensitivity[pair.key] + price * cost(p) for p in pair.points])
            for pair in self.pairs
        }
        return _Priced(self, cost, layers, {key: found.min(axis=2) for key, found in layers.items()}, pairs)

    def _widths(self, members: Mapping[str, Point]) -> WidthPlaces:
        return {pair.key: pair.points.index(members[pair.key]) for pair in self.pairs if pair.key in members}


@dataclass(frozen=True)
class _Priced:
    """A unit at a price of its cost: what each point of its ``layers`` is worth, and each of its ``pairs``.

    ``least`` (given, read) is the worth of the best point of a layer.
    """

    unit: _Unit
    cost: CostOf
    layers: Mapping[str, npt.NDArray[np.float64]]
    least: Mapping[str, npt.NDArray[np.float64]]
    pairs: Mapping[str, npt.NDArray[np.float64]]

    def best_widths(self, start: WidthPlaces) -> WidthPlaces:
        """The best widths found from ``start`` on: pairs are improved one by one, until none changes."""
        now = {pair.key: start.get(pair.key, 0) for pair in self.unit.pairs}
        for _ in range(ROUNDS if len(self.pairs) > 1 else 1):
            before = dict(now)
            for pair in self.unit.pairs:
                worth = self.pairs[pair.key].copy()
                for output in dict.fromkeys((*pair.producers, *pair.consumers)):
                    if output in self.least:
                        worth += self._by_width_of(pair.key, output, now)
                now[pair.key] = int(worth.argmin())
            if now == before:
                break
        return now

    def _by_width_of(self, key: str, output: str, now: WidthPlaces) -> npt.NDArray[np.float64]:
        """The worth of a layer by the width of the pair ``key``, with others as they are ``now``."""
        least, given = self.least[output], self.unit.curves.giving.get(output)
        read = self.unit.curves.reading.get(output)
        if given == read:
            return np.diagonal(least)
        if given == key:
            return least[:, now.get(read or "", 0)]
        return least[now.get(given or "", 0), :]

    def chosen(self, widths: WidthPlaces) -> _Choice:
        """The best points of the layers at these widths."""
        curves, members = self.unit.curves, dict[str, Point]()
        for output in self.unit.outputs:
            given, read = (widths.get(keys.get(output, ""), 0) for keys in (curves.giving, curves.reading))
            points = curves.table(output, self.cost).points[given][read]
            members[output] = points[int(self.layers[output][given, read].argmin())]
        for pair in self.unit.pairs:
            if widths.get(pair.key):
                members[pair.key] = pair.points[widths[pair.key]]
        return self.unit._choice(members)
