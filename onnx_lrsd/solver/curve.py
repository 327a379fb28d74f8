"""The errors of one layer in many forms: one factorisation for each kind, and no factors kept.

Errors are those of the damped objective, without the sweeps of a final fit. They predict the error on
held-out samples better than the error of the final fit on its own samples does: damping stands for what
was not seen. Forms whose S has free entries are fitted one by one, briefly; their error is that of the fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

from onnx_lrsd.solver import separable
from onnx_lrsd.solver.decompose import choose_channels, decompose, group
from onnx_lrsd.solver.effort import FAST
from onnx_lrsd.solver.lowrank import low_rank
from onnx_lrsd.solver.problem import Metric, Problem
from onnx_lrsd.solver.resolvent import Resolvent
from onnx_lrsd.types import CHANNEL, CHANNELS, N_OF_M, TUCKER, UNSTRUCTURED, Form, Pattern


def errors(problem: Problem, forms: Sequence[Form]) -> dict[Form, float]:
    """Relative output error of every form; dense is not among them.

    Forms that differ only in rank share one factorisation. Those that keep whole channels share the channels
    chosen at the middle rank, those with free entries the eigenvectors of the metric.
    """
    families: defaultdict[tuple[str, Pattern], list[Form]] = defaultdict(list)
    found: dict[Form, float] = {}
    free = [form for form in forms if form.pattern.kind in (UNSTRUCTURED, N_OF_M)]
    for form in forms:
        if form not in free:
            families[form.kind, form.pattern].append(form)
    if free:
        found |= _free_entries(problem, free)
    for (kind, pattern), family in families.items():
        family = sorted(family)
        weight, metric = problem.weight, problem.metric
        if pattern.kind == CHANNELS:
            if problem.metric.rows is not None:
                continue  # the conditional metric would be the (m, m) matrix that rows avoid
            chosen = choose_channels(problem, family[len(family) // 2])
            weight, metric = weight[:, chosen.rest], Metric(chosen.metric, None, 0.0)
        for form, missed in _family(replace(problem, weight=weight, metric=metric), kind, family):
            found[form] = missed / problem.energy if problem.energy > 0 else 0.0
    return found


def _free_entries(problem: Problem, forms: Sequence[Form]) -> dict[Form, float]:
    """Errors of forms whose S has free entries; a metric of few rows does not allow shared factors."""
    if problem.metric.rows is not None:
        forms = [form for form in forms if form.kind == CHANNEL or not form.rank]
    resolvent = Resolvent(problem.metric, problem.weight, prod(problem.layer.kernel))
    return {form: decompose(problem, form, effort=FAST, resolvent=resolvent).error for form in forms}


def _family(problem: Problem, kind: str, family: list[Form]) -> Iterable[tuple[Form, float]]:
    """(form, tr(D H D^T)) for forms of one kind, in ascending rank."""
    weight, metric = problem.weight, problem.metric
    total = float((metric.apply(weight) * weight).sum())
    ranked = [form for form in family if form.rank]
    yield from ((form, total) for form in family if not form.rank)
    if not ranked:
        return
    if kind == CHANNEL:
        tail = low_rank(weight, metric).errors
        yield from ((form, float(tail[form.rank]) * total) for form in ranked)
        return
    shared = group(problem.layer, weight, metric, kind)
    if kind == TUCKER:
        by_outer = separable.outer_errors(shared, sorted({form.rank for form in ranked}))
        yield from ((form, float(by_outer[form.rank][form.outer]) * shared.energy) for form in ranked)
        return
    missed = separable.rank_errors(shared, ranked[-1].rank)
    yield from ((form, float(missed[form.rank]) * shared.energy) for form in ranked)
