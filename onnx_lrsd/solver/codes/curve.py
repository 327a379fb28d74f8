"""The error of one layer over forms in codes: dense, factors of mixed precision, and S.

How many levels a rank deserves follows from what it explains. A rank of energy e coded with noise d
costs e d (2 with V's part), and b bits; for a price of bits each rank takes the storage of least sum, or
none at all: reverse water-filling with the storages there are (Cover and Thomas, Elements of Information
Theory, section 10.3.3). One price gives rank and storages together, a range of prices the curve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf, prod

import numpy as np

from onnx_lrsd.arrays import from_numpy, indices, namespace, to_numpy
from onnx_lrsd.solver import separable
from onnx_lrsd.solver.codes.fit import code_dense, feedback_of
from onnx_lrsd.solver.decompose import decompose, group
from onnx_lrsd.solver.effort import BRIEF
from onnx_lrsd.solver.layout import expand, rank_size, shared_groups
from onnx_lrsd.solver.lowrank import low_rank_errors
from onnx_lrsd.solver.problem import Problem
from onnx_lrsd.solver.resolvent import Resolvent
from onnx_lrsd.storage import FP16, INT2, INT3, INT4, INT6, STORAGES, TERNARY, UINT8, Storage
from onnx_lrsd.types import CHANNEL, DENSE, SPATIAL, UNSTRUCTURED, Form, Pattern

MEASURED = (INT4, INT3, INT2, TERNARY)
"""Storages whose error is measured for a dense weight; that of finer ones follows from INT4's by noise."""
OF_RANKS = (UINT8, INT6, INT4, INT3, INT2)
"""Storages that the ranks of factors may have."""
V_SHARE = 0.3
"""Noise of V relative to that of H: V's errors are fed back within a row, and H is refitted to the rest."""
PRICES = 16
"""Prices of a bit that are tried, each of which gives one form of factors."""
MOST_OF_DENSE = 0.6
"""Ranks whose factors hold more numbers than this share of the weight are not tried."""
DENSITIES = (0.12, 0.05, 0.25)
"""Densities of an S alone; others than the first are tried if that one is not hopeless."""
HOPELESS = 1.5
"""An S alone is hopeless if it loses so many times as much as another form of at most as many bits."""
BESIDE = (0.7,)
"""Bits for each entry of the weight that factors take beside an S of about as many bytes."""
_KEPT = (0.02, 0.045, 0.1, 0.22, 0.5)
"""Shares of a weight's numbers at which fp16 is fitted; between them the logarithm of the error is
interpolated over that of the share."""
OF_FACTORS = 0.3
"""Share of the kept numbers that is factors beside an S: found on convolutions of VGG-16
(results/parameters.md)."""
OFFERED = 17
"""How many shares, from the first to the last of _KEPT, are offered."""
GAP_BITS = 4.3
"""Bits that the distance to the next entry takes, entries that bridge long ones included."""
SAMPLED = 4096
"""Rows of a constant that the errors of its storages are measured on."""
MOST_WORK = 3e9
"""n m^2 up to which an S in fp16 is tried: its search takes forty products of that size."""
FEWEST_OUTPUTS, WORK, WORK_BESIDE = 64, 1e9, 4e8
"""Where n m^2 is above WORK, a sample of at least FEWEST_OUTPUTS outputs stands for the weight. Up to
WORK_BESIDE an S in fp16 is also tried beside factors: with larger weights that is slow and gains little."""
CODED_WORK, CODED_BESIDE = 4e8, 1e8
"""n m^2 up to which an S in codes is tried, and beside factors: of 53 layers of a residual network none above
256 x 64 had one in its best form at 4 to 24 times fewer bytes (results/time.md)."""


def coded_errors(problem: Problem, kinds: Sequence[str], weights: str | None) -> dict[Form, float]:
    """Relative output error of forms in codes, of the given kinds.

    ``weights`` names the storage that all of them have; None for whichever are best.
    """
    if problem.layer.constant:
        return _of_rows(problem, weights) if DENSE in kinds else {}
    found: dict[Form, float] = {}
    noises: dict[Form, float] = {}
    if DENSE in kinds:
        found |= _dense(problem, weights)
    for kind in (SPATIAL, CHANNEL):
        if kind in kinds and _fits(problem, kind):
            for form, missed, noise in _factors(problem, kind, weights):
                found[form], noises[form] = missed + noise, noise
    sparse = problem.for_entries()
    if weights == FP16.name:
        return found | _in_numbers(sparse, kinds)
    n, m = problem.weight.shape
    if problem.metric.rows is not None or n * m**2 > CODED_WORK:
        return found
    return found | _with_entries(sparse, found, noises, weights)


def _fits(problem: Problem, kind: str) -> bool:
    """Whether a kind is tried: spatial for kernels over two axes, if rows are many; channel for others."""
    kernel = problem.layer.kernel
    two_axes = len(kernel) == 2 and min(kernel) > 1
    if kind == SPATIAL:
        return two_axes and problem.metric.rows is None
    return not two_axes


def _dense(problem: Problem, weights: str | None) -> dict[Form, float]:
    """A dense weight in each storage. Outputs are rounded one by one, so a sample of them tells the error."""
    n, m = problem.weight.shape
    asked = list(STORAGES.values()) if weights is None else [STORAGES[weights]]
    measured: dict[str, float] = {}
    rows = min(max(int(WORK / m**2), FEWEST_OUTPUTS), n)
    sampled = problem if rows == n else _some_rows(problem, rows)
    feedback = feedback_of(sampled)

    def error(storage: Storage) -> float:
        if storage.name not in measured:
            weight = code_dense(sampled, _dense_form(rows, storage), feedback).weight
            measured[storage.name] = sampled.error(weight)
        return measured[storage.name]

    found = {}
    for storage in asked:
        if storage in MEASURED:
            found[_dense_form(n, storage)] = max(error(storage), 0.0)
        else:
            found[_dense_form(n, storage)] = max(error(INT4), 0.0) * storage.noise / INT4.noise
    return found


def _of_rows(problem: Problem, weights: str | None) -> dict[Form, float]:
    """The relative error of a constant in each storage, measured on SAMPLED rows at most."""
    n = problem.layer.n
    sampled = _some_rows(problem, min(n, SAMPLED))
    offered = list(STORAGES) if weights is None else [weights]
    return {
        _dense_form(n, STORAGES[name]): sampled.error(
            code_dense(sampled, _dense_form(sampled.layer.n, STORAGES[name])).weight
        )
        for name in offered
    }


def _dense_form(n: int, storage: Storage) -> Form:
    return Form(DENSE, weights=((storage.name, n),))


def _factors(problem: Problem, kind: str, weights: str | None) -> Iterator[tuple[Form, float, float]]:
    """Forms of factors that are best at some price of a bit: each with the errors of rank and of coding."""
    energies, missed = _energies(problem, kind)
    offered = OF_RANKS if weights is None else (STORAGES[weights],)
    for rank in np.unique(np.geomspace(1, len(energies), PRICES).round().astype(int)):
        mix = _mix(energies, int(rank), offered)
        kept = sum(mix)
        noise = (1 + V_SHARE) * float(np.repeat([s.noise for s in offered], mix) @ energies[:kept])
        stored = tuple((s.name, k) for s, k in zip(offered, mix, strict=True) if k)
        yield Form(kind, kept, weights=stored), float(missed[kept]), noise


def _energies(problem: Problem, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The energy that each rank adds (top,) and the error of each (top + 1,), relative and damped."""
    weight, metric = problem.weight, problem.metric
    n, m = weight.shape
    groups = shared_groups(problem.layer.kernel, kind)
    top = min(int(MOST_OF_DENSE * n * m / rank_size(problem.layer, kind)), m // groups, n * groups)
    scale = float((metric.apply(weight) * weight).sum()) / max(problem.energy, 1e-30)
    if kind == CHANNEL:
        missed = to_numpy(low_rank_errors(weight, metric))[: top + 1] * scale
    else:
        missed = to_numpy(separable.curve(group(problem.layer, weight, metric, kind), top).by_rank) * scale
    return np.maximum(missed[:-1] - missed[1:], 0.0), missed


def _mix(energies: np.ndarray, last: int, offered: Sequence[Storage]) -> list[int]:
    """How many ranks take each of the ``offered`` storages, at the price at which rank ``last`` is just kept.

    ``energies`` fall but for rounding errors. They are made to fall, so the first ranks get most levels.
    """
    falling = np.minimum.accumulate(energies)
    cheapest = offered[-1]
    price = falling[last - 1] * (1 - (1 + V_SHARE) * cheapest.noise) / cheapest.bits
    costs = np.stack([falling * (1 + V_SHARE) * s.noise + price * s.bits * (1 - 1e-9) for s in offered])
    chosen = costs.argmin(axis=0)
    kept = (falling > costs.min(axis=0)) | (np.arange(len(falling)) < last)
    return [int(np.sum(chosen[kept] == index)) for index in range(len(offered))]


def _in_numbers(problem: Problem, kinds: Sequence[str]) -> dict[Form, float]:
    """The errors of S in fp16, alone and beside factors, by how many numbers of the weight are kept."""
    n, m = problem.weight.shape
    work_of_row = m * (m if problem.metric.rows is None else len(problem.metric.rows))
    rows = min(max(int(WORK / work_of_row), FEWEST_OUTPUTS), n)
    if rows * work_of_row > MOST_WORK:
        return {}
    sampled = problem if rows == n else _some_rows(problem, rows)
    held = None
    if problem.metric.rows is not None:
        sampled, held = sampled.halves()
    resolvent = Resolvent(sampled.metric, sampled.weight, prod(problem.layer.kernel))

    def error(form: Form) -> float:
        of_rows = replace(
            form, weights=(), entries="", pattern=Pattern(UNSTRUCTURED, form.pattern.count * rows // n)
        )
        return _expected(sampled, of_rows, resolvent, held)

    kind = next((kind for kind in (SPATIAL, CHANNEL) if kind in kinds and _fits(problem, kind)), None)
    parts = [0.0]
    if kind is not None and n * work_of_row <= WORK_BESIDE:
        parts.append(OF_FACTORS)
    found = {}
    for part in parts:
        errors = [max(error(_kept_numbers(problem, kind or CHANNEL, x, part)), 1e-12) for x in _KEPT]
        for share in np.geomspace(_KEPT[0], _KEPT[-1], OFFERED):
            form = _kept_numbers(problem, kind or CHANNEL, float(share), part)
            found[form] = float(np.exp(np.interp(np.log(share), np.log(_KEPT), np.log(errors))))
    return found


def _kept_numbers(problem: Problem, kind: str, share: float, part: float) -> Form:
    """Factors and S in fp16 that hold ``share`` of the weight's numbers, of which factors hold ``part``."""
    n, m = problem.weight.shape
    each = rank_size(problem.layer, kind)
    rank = round(part * share * n * m / each)
    left = Pattern(UNSTRUCTURED, round(share * n * m) - rank * each)
    weights = ((FP16.name, rank),) if rank else ()
    return Form(kind if rank else CHANNEL, rank, left, weights=weights, entries=FP16.name)


def _some_rows(problem: Problem, rows: int) -> Problem:
    """The problem of so many ``rows`` of the weight, taken evenly from all in the order of their energies."""
    xp = namespace(problem.weight)
    energies = xp.sum(problem.metric.undamped(problem.weight) * problem.weight, axis=1)
    order = np.argsort(to_numpy(energies))
    chosen = order[(np.arange(rows) + 0.5).astype(int) * len(order) // rows]
    kept = indices(np.sort(chosen), problem.weight)
    weight, own = (xp.take(x, kept, axis=0) for x in (problem.weight, problem.output_mean))
    shape = (rows, *problem.layer.shape[1:])
    layer = replace(problem.layer, n=rows, shape=shape, rows_per_bias=1)
    energy = float(xp.sum(xp.take(energies, kept, axis=0)))
    return Problem(
        layer=layer, weight=weight, mean=problem.mean, output_mean=own, metric=problem.metric, energy=energy
    )


def _with_entries(
    problem: Problem, errors: Mapping[Form, float], noises: Mapping[Form, float], weights: str | None
) -> dict[Form, float]:
    """The errors of S in codes, alone and beside factors: those of brief fits, plus what coding loses.

    ``noises`` is what coding loses in each form of factors, ``errors`` the whole error of forms without S.
    """
    n, m = problem.weight.shape
    storage = INT4 if weights is None else STORAGES[weights]
    resolvent = Resolvent(problem.metric, problem.weight, prod(problem.layer.kernel))

    def fitted(form: Form) -> float:
        return _expected(problem, replace(form, weights=()), resolvent)

    found = {}
    for share in DENSITIES:
        form = Form(CHANNEL, 0, Pattern(UNSTRUCTURED, round(share * n * m)))
        missed = fitted(form)
        error = missed + storage.noise * (1 - missed)
        found[replace(form, entries=storage.name)] = error
        bits = share * (storage.bits + GAP_BITS)
        rivals = [errors[other] for other in errors if _bits(problem, other) <= bits]
        if error > HOPELESS * min(rivals, default=inf):
            break
    if not noises or n * m**2 > CODED_BESIDE:
        return found
    for bits in BESIDE:
        factors = min(noises, key=lambda form: abs(np.log(_bits(problem, form) / bits)))
        entries = min(round(_bits(problem, factors) * n * m / (storage.bits + GAP_BITS)), n * m // 2)
        if entries:
            form = replace(factors, pattern=Pattern(UNSTRUCTURED, entries))
            missed = fitted(form)
            noise = noises[factors] + storage.noise * max(errors[factors] - missed, 0.0)
            found[replace(form, entries=storage.name)] = missed + noise
    return found


def _expected(problem: Problem, form: Form, resolvent: Resolvent, held: Problem | None = None) -> float:
    """The relative error that a brief fit is expected to have on other samples.

    It is measured on ``held``, a problem of other rows, or without one in the damped metric. On the samples
    it was fitted to, an S of free entries looks several times better.
    """
    factors = decompose(problem, form, effort=BRIEF, resolvent=resolvent)
    weight = from_numpy(expand(problem.layer, factors), problem.weight)
    return problem.expected(weight) if held is None else held.error(weight)


def _bits(problem: Problem, form: Form) -> float:
    """Bits for each entry of the weight that a form without S takes."""
    kept = sum(STORAGES[name].bits * count for name, count in form.weights)
    width = problem.layer.m if form.kind == DENSE else rank_size(problem.layer, form.kind)
    return float(kept * width / (problem.layer.n * problem.layer.m))
