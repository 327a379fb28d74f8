"""One form for every layer: the least total error within the budget of the whole model.

Minimise sum_l s_l error_l(form) subject to sum_l cost_l(form) + rest <= budget, with s_l the layer's
sensitivity. On the lower convex hulls of the curves one Lagrange multiplier solves this exactly up
to the last step; what the hull leaves of the budget is then spent greedily on all points.
Source: Shoham and Gersho, IEEE Trans. ASSP 36 (1988).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from onnx_lrsd.errors import BudgetError
from onnx_lrsd.types import CostOf, ErrorCurve, Point


def by_time(point: Point) -> float:
    """Predicted time of a point, as the target's table alone has it."""
    return point.time


def lower_hull(points: Sequence[Point], cost: CostOf) -> list[Point]:
    """The points of the lower convex hull of error over cost, dearest (least error) first."""
    hull: list[Point] = []
    for point in sorted(points, key=lambda p: (cost(p), p.error)):
        if hull and point.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1], cost) <= _slope(hull[-1], point, cost):
            hull.pop()
        hull.append(point)
    return hull[::-1]


def _slope(cheap: Point, dear: Point, cost: CostOf) -> float:
    """Error that the dearer of two points saves for each unit of cost."""
    return (cheap.error - dear.error) / max(cost(dear) - cost(cheap), 1e-12)


def allocate(
    curves: Sequence[ErrorCurve],
    budget: float,
    rest: float,
    cost: CostOf,
    sensitivity: Mapping[str, float] | None = None,
) -> dict[str, Point]:
    """A point for each curve, layer name -> point, with total cost at most ``budget``.

    ``rest`` is the cost of everything in the model that the curves do not cover, in the unit of
    ``cost``. Sensitivities default to 1. Raises BudgetError, naming the nearest budget that can be
    met, when even the cheapest points cost more.

    >>> from onnx_lrsd.types import COSTS, Form, Layer, Price
    >>> weight = {"weight": "w", "shape": (64, 64), "dtype": "float32", "n": 64, "m": 64}
    >>> layer = Layer(output="y", name="dense", op="Gemm", input="x", **weight)
    >>> dense = Point(Form(), 0.0, Price(4096, 4096, 16384))
    >>> split = Point(Form("channel", 16), 0.01, Price(2048, 2048, 8192))
    >>> chosen = allocate([ErrorCurve(layer, (dense, split))], 3000, 0, COSTS["macs"])
    >>> str(chosen["y"].form)
    'channel 16'
    """
    weights = {c.layer.output: 1.0 if sensitivity is None else sensitivity[c.layer.output] for c in curves}
    hulls = {c.layer.output: lower_hull(c.points, cost) for c in curves}
    steps = []
    for name, hull in hulls.items():
        for index, (dear, cheap) in enumerate(pairwise(hull)):
            steps.append((weights[name] * _slope(cheap, dear, cost), name, index + 1))
    chosen = {name: hull[0] for name, hull in hulls.items()}
    total = rest + sum(cost(point) for point in chosen.values())
    # Hull slopes grow along each hull, so ascending order takes every layer's steps in order.
    for _, name, index in sorted(steps):
        if total <= budget:
            break
        total += cost(hulls[name][index]) - cost(chosen[name])
        chosen[name] = hulls[name][index]
    if total > budget * (1 + 1e-9):
        if not steps:
            raise BudgetError("No layer of the model can be made cheaper: use it as it is.")
        whole = rest + sum(cost(hull[0]) for hull in hulls.values())
        raise BudgetError(
            f"The model can be made at most {_floor(whole / max(total, 1e-12))} times cheaper within what "
            "its layers bear: ask for that or less (--include, --exclude and --forms narrow what may change)."
        )
    return spend(curves, chosen, budget - total, cost, weights)


def _floor(ratio: float) -> str:
    return f"{int(ratio * 100) / 100:.2f}"


def spend(
    curves: Sequence[ErrorCurve],
    chosen: dict[str, Point],
    slack: float,
    cost: CostOf,
    sensitivity: Mapping[str, float] | None = None,
    time: CostOf | None = None,
) -> dict[str, Point]:
    """Spend ``slack`` of the budget: time and again on the point that saves most error for its cost.

    With ``time``, a point that takes nothing from the budget must not take time either.
    """
    while True:
        best: tuple[float, str, Point] | None = None
        for curve in curves:
            name, present = curve.layer.output, chosen[curve.layer.output]
            for point in curve.points:
                extra = cost(point) - cost(present)
                saved = (present.error - point.error) * (1.0 if sensitivity is None else sensitivity[name])
                if saved <= 0 or extra > slack:
                    continue
                if time is not None and extra <= 0 and time(point) > time(present):
                    continue
                gain = saved / max(extra, 1e-9)
                if best is None or gain > best[0]:
                    best = (gain, name, point)
        if best is None:
            return chosen
        _, name, point = best
        slack -= cost(point) - cost(chosen[name])
        chosen = {**chosen, name: point}
