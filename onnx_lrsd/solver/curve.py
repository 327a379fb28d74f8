"""The error of one layer over many forms at once: one factorisation for each kind, no factors kept.

Errors here are those of the damped objective, before the last sweeps of a final fit. Against
held-out samples that is the better estimate of the two: damping stands for what was not seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from onnx_lrsd.solver import separable
from onnx_lrsd.solver.decompose import choose_channels, prepare
from onnx_lrsd.solver.lowrank import low_rank
from onnx_lrsd.solver.whiten import Metric, Problem
from onnx_lrsd.types import CHANNEL, Form


def errors(problem: Problem, forms: Iterable[Form]) -> dict[Form, float]:
    """Relative output error of every form (dense is not among them).

    Forms that differ in rank alone share one factorisation; those with S share the channels chosen
    at the middle rank.
    """
    families: defaultdict[tuple[str, int], list[Form]] = defaultdict(list)
    for form in forms:
        families[form.kind, form.channels].append(form)
    found: dict[Form, float] = {}
    for (kind, channels), family in families.items():
        family = sorted(family)
        weight, metric = problem.weight, problem.metric
        if channels:
            if problem.metric.rows is not None:
                continue  # the conditional metric would be the (m, m) matrix that rows avoid
            chosen = choose_channels(problem, family[len(family) // 2])
            weight, metric = weight[:, chosen.rest], Metric(chosen.metric, None, 0.0)
        for form, missed in _family(replace(problem, weight=weight, metric=metric), kind, family):
            found[form] = missed / problem.energy if problem.energy > 0 else 0.0
    return found


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
    shared = prepare(problem.layer, weight, metric, kind)
    missed = separable.rank_errors(shared, ranked[-1].rank)
    yield from ((form, float(missed[form.rank]) * shared.energy) for form in ranked)
