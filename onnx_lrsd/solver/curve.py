"""The errors of one layer in many forms: one factorisation for each grouping of inputs, no factors kept.

Errors are those of the damped objective, without the sweeps of a final fit. They predict the error on
held-out samples better than the error of the final fit on its own samples does: damping stands for what
was not seen. Forms whose S has free entries are fitted one by one, briefly; their error is that of the fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import prod

from onnx_lrsd.arrays import namespace, to_numpy
from onnx_lrsd.solver import separable
from onnx_lrsd.solver.decompose import choose_channels, decompose, group
from onnx_lrsd.solver.effort import FAST
from onnx_lrsd.solver.layout import shared_groups
from onnx_lrsd.solver.lowrank import LowRank, low_rank, low_rank_errors
from onnx_lrsd.solver.problem import Metric, Problem
from onnx_lrsd.solver.resolvent import Resolvent
from onnx_lrsd.types import CHANNEL, CHANNELS, N_OF_M, TUCKER, UNSTRUCTURED, Form, Pattern


def errors(problem: Problem, forms: Sequence[Form]) -> dict[Form, float]:
    """Relative output error of every form; dense is not among them.

    Forms that group the inputs alike share one factorisation. Those that keep whole channels share the
    channels chosen at the middle rank, those with free entries the eigenvectors of the metric.
    """
    families: defaultdict[Pattern, list[Form]] = defaultdict(list)
    found: dict[Form, float] = {}
    free = [form for form in forms if form.pattern.kind in (UNSTRUCTURED, N_OF_M)]
    for form in forms:
        if form not in free:
            families[form.pattern].append(form)
    if free:
        found |= _free_entries(problem, free)
    low = low_rank(problem.weight, problem.metric) if _need_factors(problem, forms) else None
    for pattern, family in families.items():
        if pattern.kind == CHANNELS:
            if problem.metric.rows is not None:
                continue  # the conditional metric would be the (m, m) matrix that rows avoid
            for kind in sorted({form.kind for form in family}):
                alike = sorted(form for form in family if form.kind == kind)
                chosen = choose_channels(problem, alike[len(alike) // 2], low)
                rest = replace(
                    problem, weight=problem.weight[:, chosen.rest], metric=Metric(chosen.metric, None, 0.0)
                )
                found |= _family(rest, alike)
        else:
            found |= _family(problem, family, low)
    return found


def _need_factors(problem: Problem, forms: Sequence[Form]) -> bool:
    """Whether channels are to be chosen beside factors that are not grouped: one set serves all counts."""
    beside = (form.pattern.kind == CHANNELS and form.kind == CHANNEL and form.rank > 0 for form in forms)
    return problem.metric.rows is None and any(beside)


def _free_entries(problem: Problem, forms: Sequence[Form]) -> dict[Form, float]:
    """Errors of forms whose S has free entries; a metric of few rows does not allow shared factors."""
    if problem.metric.rows is not None:
        forms = [form for form in forms if form.kind == CHANNEL or not form.rank]
    resolvent = Resolvent(problem.metric, problem.weight, prod(problem.layer.kernel))
    return {form: decompose(problem, form, effort=FAST, resolvent=resolvent).error for form in forms}


def _family(problem: Problem, forms: Sequence[Form], low: LowRank | None = None) -> dict[Form, float]:
    """tr(D H D^T) / energy of forms without S, from one product W H and a factorisation for each grouping.

    ``low``, if it is known, is ``low_rank`` of the problem.
    """
    weight, metric = problem.weight, problem.metric
    if problem.energy <= 0:
        return dict.fromkeys(forms, 0.0)
    image = metric.apply(weight)
    total = float(namespace(weight).sum(image * weight)) / problem.energy
    found = {form: total for form in forms if not form.rank}
    alike: defaultdict[int, list[Form]] = defaultdict(list)
    for form in forms:
        if form.rank and form.kind != CHANNEL:
            alike[shared_groups(problem.layer.kernel, form.kind)].append(form)
        elif form.rank and form not in found:
            tail = to_numpy(low_rank_errors(weight, metric, image) if low is None else low.errors)
            found |= {f: float(tail[f.rank]) * total for f in forms if f.rank and f.kind == CHANNEL}
    for shared in alike.values():
        ranks = [form.rank for form in shared if form.kind == TUCKER]
        grouped = group(problem.layer, weight, metric, shared[0].kind, image)
        curve = separable.curve(grouped, max(form.rank for form in shared), ranks)
        scale = grouped.energy / problem.energy
        for form in shared:
            outer = form.kind == TUCKER
            missed = curve.by_outer[form.rank][form.outer] if outer else curve.by_rank[form.rank]
            found[form] = float(missed) * scale
    return found
