"""How much of a budget goes to the factors and how much to S: decided on samples the fit has not seen.

A non-zero of S costs what the target charges for it, a rank what its factors hold. Along the split the
held-out error falls to one valley and rises again, so that a walk downhill from the middle finds it in
few fits. The damping is chosen likewise. Folds are over samples (images, sentences): rows of one sample
are alike, and a fold over rows would choose too little damping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

from onnx_lrsd.arrays import from_numpy
from onnx_lrsd.solver.decompose import check_form, decompose
from onnx_lrsd.solver.effort import BRIEF, Effort
from onnx_lrsd.solver.layout import expand, rank_size, shared_groups
from onnx_lrsd.solver.problem import Problem
from onnx_lrsd.solver.resolvent import Resolvent
from onnx_lrsd.types import NONE, TUCKER, UNSTRUCTURED, Form, Layer, Pattern

SHARES = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
DAMPINGS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Multiples of the damping of the problem, of which the best is looked for in the same way."""


@dataclass(frozen=True)
class Split:
    """The form chosen, the multiple of the damping, and the held-out error of the brief fit behind it."""

    form: Form
    damping: float
    error: float


def split_forms(
    layer: Layer, kind: str, budget: float, *, entry_cost: float = 1.0, shares: Sequence[float] = SHARES
) -> list[Form]:
    """Forms of a two-factor ``kind`` that spend ``budget`` parameters, from S alone to factors alone.

    ``entry_cost`` is what one non-zero of S costs, in parameters. Raises ValueError for Tucker-2, whose
    two ranks no single share describes.
    """
    if kind == TUCKER:
        raise ValueError("a share of the budget does not describe the two ranks of tucker")
    groups = shared_groups(layer.kernel, kind)
    each = rank_size(layer, kind)
    most = min(layer.n * groups, layer.m // groups)
    forms: list[Form] = []
    for share in shares:
        rank = min(round(share * budget / each), most, int(budget // each))
        entries = min(int((budget - rank * each) / entry_cost), layer.n * layer.m) if share < 1 else 0
        form = Form(kind, rank, Pattern(UNSTRUCTURED, entries) if entries else NONE)
        if form not in forms and (rank or entries):
            forms.append(form)
    return forms


def choose_split(fit: Problem, held: Problem, forms: Sequence[Form], *, effort: Effort = BRIEF) -> Split:
    """The best of ``forms``, ordered along the split, and its damping, by the error on ``held``.

    ``fit`` and ``held`` are one layer's problem with the moments of different samples. Raises ValueError
    where a form does not fit the layer or there is none.
    """
    if not forms:
        raise ValueError("forms is empty")
    for form in forms:
        check_form(fit.layer, form)
    resolvents: dict[float, Resolvent] = {}

    def error(form: Form, damping: float) -> float:
        metric = replace(fit.metric, damping=damping * fit.metric.damping)
        problem = replace(fit, metric=metric)
        if damping not in resolvents:
            resolvents[damping] = Resolvent(metric, fit.weight, prod(fit.layer.kernel))
        shared = None if metric.rows is not None else resolvents[damping]
        found = decompose(problem, form, effort=effort, resolvent=shared)
        return held.error(from_numpy(expand(fit.layer, found), held.weight))

    place, _ = _valley(lambda place: error(forms[place], 1.0), len(forms), len(forms) // 3)
    form = forms[place]
    place, least = _valley(lambda place: error(form, DAMPINGS[place]), len(DAMPINGS), DAMPINGS.index(1.0))
    return Split(form, DAMPINGS[place], least)


def _valley(height: Callable[[int], float], count: int, start: int) -> tuple[int, float]:
    """The place where a walk downhill over 0..count-1 from ``start`` ends, and its height."""
    known: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in known:
            known[place] = height(place)
        return known[place]

    place = start
    while True:
        beside = [other for other in (place - 1, place + 1) if 0 <= other < count]
        lowest = min((place, *beside), key=at)
        if lowest == place:
            return place, known[place]
        place = lowest
