"""Layers that are planned together, since channels between them may be cut: their joint choices as one curve.

What a layer costs depends on how many channels are left on either side of it, and what its readers lose on
how many it gives. Layers that such pairs join are one unit. For a price of a unit of cost, the widths are
chosen that lose least with the best form of each layer at these widths, pair by pair until nothing changes.
The prices are those that lead to every corner of the lower hull of all joint choices, up to what the search
from pair to pair misses in chains.
Source: Eisner and Severance, Journal of the ACM 23 (1976), for the prices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

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
    """What each width of a pair loses, and what lies between its layers costs; the first point is all of it.

    It has so many ``channels``; ``producers`` and ``consumers`` are the outputs of its layers. Points have
    the form dense or width.
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
        if not given and not read:
            return self._by_output[output].points
        return self.narrow[output, (given, read)]

    def layer(self, output: str) -> Layer:
        """The first layer of a curve."""
        return self._by_output[output].layer

    def sharing(self, output: str) -> tuple[Layer, ...]:
        """The other layers that apply the weight of a curve's first layer; none for any other."""
        return self._by_output[output].others if output in self._by_output else ()

    def where(self, output: str, stays: Callable[[Point], bool], *, narrow: bool) -> Curves:
        """With the points of a layer that stay, of those with all its channels or of those with fewer."""

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
        """A curve for each unit, and what its error counts; best for each of ``costs``."""
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
class _Unit:
    """Layers and the pairs that join them."""

    curves: Curves
    outputs: Sequence[str]
    pairs: Sequence[PairCurve]
    sensitivity: Mapping[str, float]

    def points(self, costs: Sequence[CostOf]) -> tuple[Joint, ...]:
        """Its joint choices; the first one leaves all as it is."""
        found: dict[tuple[tuple[str, Form], ...], Joint] = {}
        whole = {output: self.curves.points(output, {})[0] for output in self.outputs}
        for members in (whole, *(m for cost in costs for m in self._along_the_hull(cost))):
            joint = self._joint(members)
            found.setdefault(tuple((key, point.form) for key, point in sorted(members.items())), joint)
        return tuple(found.values())

    def _joint(self, members: Mapping[str, Point]) -> Joint:
        between = [members.get(pair.key, pair.points[0]) for pair in self.pairs]
        points = [*(members[output] for output in self.outputs), *between]
        return Joint(
            form=points[0].form,
            error=sum(point.error * self.sensitivity[key] for key, point in members.items()),
            price=sum((point.price for point in points[1:]), start=points[0].price),
            time=sum(point.time for point in points),
            members=members,
        )

    def _along_the_hull(self, cost: CostOf) -> list[dict[str, Point]]:
        """The choices at the corners of the lower hull, from all as it is to the cheapest.

        Between two corners the price at which both are worth the same tells whether there is another.
        """
        found: list[dict[str, Point]] = []
        dear = self._members({}, 0.0, cost)
        waiting = [(dear, self._members(self._best_widths({}, CHEAPEST, cost), CHEAPEST, cost))]
        while waiting:
            left, right = waiting.pop()
            one, two = self._joint(left), self._joint(right)
            found += [left, right]
            if cost(one) <= cost(two) or one.error >= two.error:
                continue
            price = (two.error - one.error) / (cost(one) - cost(two))
            starts = [_widths(near) for near in (left, right)]
            tried = [self._members(self._best_widths(s, price, cost), price, cost) for s in starts]
            worths = [self._worth(members, price, cost) for members in tried]
            if min(worths) < (1 - SAME) * (one.error + price * cost(one)):
                middle = tried[worths.index(min(worths))]
                waiting += [(left, middle), (middle, right)]
        return found

    def _worth(self, members: Mapping[str, Point], price: float, cost: CostOf) -> float:
        joint = self._joint(members)
        return joint.error + price * cost(joint)

    def _best_widths(self, widths: Mapping[str, int], price: float, cost: CostOf) -> dict[str, int]:
        """From ``widths`` on, one pair after the other, until none changes."""
        now = dict(widths)
        for _ in range(ROUNDS if len(self.pairs) > 1 else 1):
            before = dict(now)
            for pair in self.pairs:
                near = [o for o in (*pair.producers, *pair.consumers) if o in self.outputs]

                def lost(point: Point, pair: PairCurve = pair, near: Sequence[str] = near) -> float:
                    others = {**now, pair.key: point.form.rank}
                    own = point.error * self.sensitivity[pair.key] + price * cost(point)
                    return own + sum(self._best(output, others, price, cost)[0] for output in near)

                now[pair.key] = min(pair.points, key=lost).form.rank
            if now == before:
                break
        return now

    def _best(
        self, output: str, widths: Mapping[str, int], price: float, cost: CostOf
    ) -> tuple[float, Point]:
        weight = self.sensitivity[output]
        points = self.curves.points(output, widths)
        values = [point.error * weight + price * cost(point) for point in points]
        least = min(range(len(values)), key=values.__getitem__)
        return values[least], points[least]

    def _members(self, widths: Mapping[str, int], price: float, cost: CostOf) -> dict[str, Point]:
        members = {output: self._best(output, widths, price, cost)[1] for output in self.outputs}
        for pair in self.pairs:
            if widths.get(pair.key):
                members[pair.key] = next(p for p in pair.points if p.form.rank == widths[pair.key])
        return members


def _widths(members: Mapping[str, Point]) -> dict[str, int]:
    return {key: point.form.rank for key, point in members.items() if point.form.kind == WIDTH}
