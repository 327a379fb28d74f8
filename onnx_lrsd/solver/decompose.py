"""Fit one layer in one form, W ~ L + S with the bias refitted, and measure its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import numpy as np

from onnx_lrsd.arrays import cast, indices, namespace, to_numpy
from onnx_lrsd.solver import separable
from onnx_lrsd.solver.admm import fit_sparse, low_rank_plus_sparse
from onnx_lrsd.solver.channels import Elimination, best_channels, channel_gains, eliminate
from onnx_lrsd.solver.codes.fit import code_dense, code_factors
from onnx_lrsd.solver.effort import STANDARD, Effort
from onnx_lrsd.solver.layout import factor_kernels, group_metric, group_weight, shared_groups, ungroup_weight
from onnx_lrsd.solver.lowrank import LowRank, low_rank
from onnx_lrsd.solver.parts import SharedFactors
from onnx_lrsd.solver.pattern import check_pattern
from onnx_lrsd.solver.problem import Metric, Problem, regress
from onnx_lrsd.solver.rectified import Rectified, refine, refine_entries, refine_weight
from onnx_lrsd.solver.resolvent import Resolvent
from onnx_lrsd.storage import FP16, STORAGES
from onnx_lrsd.types import (
    CHANNEL,
    CHANNELS,
    DENSE,
    NONE,
    SPATIAL,
    TUCKER,
    UNSTRUCTURED,
    Array,
    Factors,
    Form,
    Layer,
)

CODED_KINDS = (DENSE, CHANNEL, SPATIAL)
"""The kinds that can be stored in codes."""
RECTIFIED_FROM = 0.002
"""Relative error from which refining for the rectifier behind the layer is worth its time."""


class _Parts(NamedTuple):
    """Factors V (r, A) and H (B, n, r), and S (n, m); each may be None.

    ``converged`` says whether the search for S did. ``shift`` (n,), if not None, is added to the bias that is
    best for the moments: a fit refined for a rectifier has another one.
    """

    v: Array | None
    h: Array | None
    sparse: Array | None
    converged: bool = True
    shift: Array | None = None

    @property
    def product(self) -> Array:
        """The weight (n, m) that factors and S give together; at least one of them is there."""
        low = None
        if self.v is not None and self.h is not None:
            low = ungroup_weight(namespace(self.v).matmul(self.h, self.v))
        if self.sparse is None or low is None:
            return self.sparse if low is None else low
        return low + self.sparse


def decompose(
    problem: Problem,
    form: Form,
    *,
    effort: Effort = STANDARD,
    seed: int = 0,
    resolvent: Resolvent | None = None,
    rectified: Rectified | None = None,
) -> Factors:
    """Fit ``form`` to one layer; the error is recomputed in float64 from the factors themselves.

    With ``rectified``, factors without S and free entries of S are refined for what the rectifier behind
    the layer lets pass, if their error is at least RECTIFIED_FROM. The error returned is that in front of
    the rectifier, which is then not the least possible one.

    ``seed`` and ``resolvent`` (that of ``problem.metric``, to be shared between calls) concern forms whose S
    has free entries. Raises ValueError for a dense form, a form the kernel does not allow, and a rank or a
    count of entries out of range.

    >>> import numpy as np, onnx_lrsd
    >>> from onnx_lrsd.types import Form, Layer
    >>> named = {"output": "y", "name": "dense", "op": "Gemm", "input": "x", "weight": "w"}
    >>> layer = Layer(**named, shape=(8, 6), dtype="float32", n=8, m=6)
    >>> weight = np.outer(np.arange(8.0), np.ones(6))
    >>> factors = onnx_lrsd.decompose(onnx_lrsd.pose(layer, weight, np.zeros(8), None), Form("channel", 1))
    >>> v, u = factors.kernels
    >>> v.shape, u.shape, bool(np.allclose(u @ v, weight)), factors.error < 1e-9
    ((1, 6), (8, 1), True, True)
    """
    return _decomposed(problem, form, effort, seed, resolvent, rectified).factors


def decompose_shared(
    problem: Problem, own: Sequence[Problem], form: Form, *, effort: Effort = STANDARD, seed: int = 0
) -> list[Factors]:
    """Fit ``form`` once for the layers of the problems ``own``, which apply one weight.

    ``problem`` is that of all together. Each layer has the same factors, the bias that is best for its own
    inputs, and its own error.
    """
    found = _decomposed(problem, form, effort, seed, None, None)
    each = [bias_and_error(one, found.weight, None) for one in own]
    return [replace(found.factors, bias=to_numpy(bias), error=error) for bias, error in each]


class _Decomposed(NamedTuple):
    """Factors and the weight (n, m) that they give."""

    factors: Factors
    weight: Array


def _decomposed(
    problem: Problem,
    form: Form,
    effort: Effort,
    seed: int,
    resolvent: Resolvent | None,
    rectified: Rectified | None,
) -> _Decomposed:
    """Fit factors and S in floating point, or in codes, and the bias to both."""
    layer, weight = problem.layer, problem.weight
    check_form(layer, form)
    xp = namespace(weight)
    if problem.keeps_zero:
        rectified = None  # its refinement would shift the bias
    if form.coded:
        return _coded(problem, form, effort, seed, resolvent, rectified)
    channels: tuple[int, ...] = ()
    if form.pattern.kind == CHANNELS:
        chosen = choose_channels(problem, form)
        parts, channels = _beside_channels(problem, form, chosen, effort.sweeps), chosen.channels
    else:
        parts = _fitted(problem, form, effort, seed, resolvent, rectified)
        channels = tuple(range(layer.channels)) if parts.sparse is not None else ()
    approximation = parts.product
    kernels: tuple[Array, ...] = ()
    if parts.v is not None and parts.h is not None:
        kernels = factor_kernels(layer, form.kind, parts.v, parts.h, form.outer)
    sparse = None
    if parts.sparse is not None:
        wide = np.reshape(to_numpy(parts.sparse), (layer.n, layer.channels, *layer.kernel))
        sparse = wide[:, list(channels)]
    bias, error = bias_and_error(problem, approximation, parts.shift)
    fitted = Factors(
        form=form,
        kernels=tuple(to_numpy(kernel) for kernel in kernels),
        bias=to_numpy(bias),
        sparse=sparse,
        channels=channels,
        error=error,
        converged=parts.converged and bool(xp.all(xp.isfinite(approximation))),
    )
    return _Decomposed(fitted, approximation)


def refit(problem: Problem, rectified: Rectified | None = None) -> Factors:
    """The dense weight that ``problem`` aims at, with its best bias: a layer fitted to changed inputs.

    With ``rectified`` it is refined for what the rectifier behind the layer lets pass.
    """
    layer, dense, shift = problem.layer, problem.weight, None
    if rectified is not None and problem.error(dense) >= RECTIFIED_FROM:
        aim = problem.metric.apply(dense)
        dense, shift = refine_weight(
            problem, dense, lambda moved: regress(aim + cast(moved, aim.dtype), problem.metric), rectified
        )
    bias, error = bias_and_error(problem, dense, shift)
    weight = np.reshape(to_numpy(dense), (layer.n, layer.channels, *layer.kernel))
    return Factors(
        form=Form(DENSE),
        kernels=(),
        bias=to_numpy(bias),
        sparse=weight,
        channels=tuple(range(layer.channels)),
        error=error,
    )


def _coded(
    problem: Problem,
    form: Form,
    effort: Effort,
    seed: int,
    resolvent: Resolvent | None,
    rectified: Rectified | None,
) -> _Decomposed:
    """A fit in floating point, which is then rounded to codes.

    Codes aim at the original weight, or at the refined one where the fit was refined for a rectifier.
    """
    weight, shift = problem.weight, None
    if form.kind == DENSE:
        coded = code_dense(problem, form)
    else:
        parts = _fitted(problem, form, effort, seed, resolvent, rectified)
        shift = parts.shift
        aim = weight if shift is None else parts.product
        coded = code_factors(problem, form, parts.v, parts.h, parts.sparse, aim)
    bias, error = bias_and_error(problem, coded.weight, shift)
    fitted = Factors(form=form, kernels=(), bias=to_numpy(bias), error=error, packed=coded.packed)
    return _Decomposed(fitted, coded.weight)


def bias_and_error(problem: Problem, weight: Array, shift: Array | None) -> tuple[Array, float]:
    """Bias and error of the approximation ``weight`` (n, m); ``shift`` (n,) is added to its best bias."""
    bias, error = problem.bias(weight), problem.error(weight)
    if shift is None:
        return bias / problem.scale, error
    xp = namespace(shift)
    return (bias + shift) / problem.scale, error + float(xp.sum(xp.square(shift))) / problem.energy


def _alone(problem: Problem, form: Form, sweeps: int, rectified: Rectified | None) -> _Parts:
    """Factors without S, refined for the rectifier behind the layer if that is worth its time."""
    layer, weight, metric = problem.layer, problem.weigh(problem.weight), problem.metric
    shared = None if form.kind == CHANNEL else group(layer, weight, metric, form.kind)
    v, weighed = factors(layer, weight, metric, form, sweeps, shared)
    parts = _Parts(v, problem.unweigh(weighed), None)
    if rectified is None or not _worth_refining(problem, parts):
        return parts
    shared = shared or group(layer, weight, metric, form.kind)
    found = refine(problem, shared, v, weighed, rectified, form.outer)
    return _Parts(found.v, found.h, None, shift=found.shift)


def _worth_refining(problem: Problem, parts: _Parts) -> bool:
    """Whether refining for a rectifier may help; a metric of few rows does not support a second fit."""
    return problem.metric.rows is None and problem.error(parts.product) >= RECTIFIED_FROM


def factors(
    layer: Layer,
    weight: Array,
    metric: Metric,
    form: Form,
    sweeps: int,
    shared: separable.Separable | None = None,
) -> tuple[Array, Array]:
    """V (rank, A) and H (B, n, rank), float64, for ``weight`` (n, columns) in ``metric``.

    The columns may be those of all channels or of some. ``shared`` is the result of ``group`` for them.
    """
    if form.kind == CHANNEL:
        found = low_rank(weight, metric)
        return found.right[: form.rank], found.left[:, : form.rank][None]
    xp = namespace(weight)
    shared = shared or group(layer, weight, metric, form.kind)
    v, h, _ = separable.fit(shared, form.rank, sweeps, outer=form.outer)
    return cast(v, xp.float64), cast(h, xp.float64)


def group(
    layer: Layer, weight: Array, metric: Metric, kind: str, image: Array | None = None
) -> separable.Separable:
    """``weight`` (n, columns) and its metric grouped for a separable form, and factorised once, float32.

    ``image`` (n, columns), if it is known, is W H.
    """
    xp = namespace(weight)
    groups = shared_groups(layer.kernel, kind)
    weight = cast(weight, xp.float32)
    key = groups, weight.shape[1]  # a metric that knows nothing of the inputs goes with any number of columns
    grouped = metric.factorised.get(key)
    if image is not None:
        image = cast(image, xp.float32)
    if grouped is None:
        matrix = metric.matrix(weight)
        image = weight @ matrix if image is None else image
        grouped = metric.factorised[key] = separable.grouped_metric(group_metric(matrix, groups))
    product = None if image is None else group_weight(image, groups)
    return separable.separable_problem(group_weight(weight, groups), grouped, product)


def choose_channels(problem: Problem, form: Form, low: LowRank | None = None) -> Elimination:
    """The channels that S keeps: those that lower the error most beside factors of the form's rank.

    ``low``, if it is known, is ``low_rank`` of the problem, for factors that are not grouped.
    """
    weight, metric = problem.weight, problem.metric.matrix(problem.weight)
    difference = weight
    if form.rank and form.kind == CHANNEL and low is not None:
        difference = weight - low.left[:, : form.rank] @ low.right[: form.rank, :]
    elif form.rank:
        v, h = factors(problem.layer, weight, problem.metric, form, 0)
        difference = weight - ungroup_weight(namespace(weight).matmul(h, v))
    taps = prod(problem.layer.kernel)
    channels = best_channels(channel_gains(difference, metric, taps), form.channels)
    return eliminate(metric, channels, taps)


def _beside_channels(problem: Problem, form: Form, chosen: Elimination, sweeps: int) -> _Parts:
    """Factors for the channels that S does not keep, in the conditional metric, and S in closed form."""
    layer, weight = problem.layer, problem.weight
    xp = namespace(weight)
    part = xp.take(weight, chosen.rest, axis=1)
    v, h, low = None, None, xp.zeros_like(part)
    if form.rank:
        v, h = factors(layer, part, Metric(chosen.metric, None, 0.0), form, sweeps)
        low = ungroup_weight(xp.matmul(h, v))
        v = _scatter_channels(v, chosen.channels, layer.channels)
    columns = chosen.sparse(weight, low)
    return _Parts(v, h, chosen.join(columns, xp.zeros_like(part)))


def _fitted(
    problem: Problem,
    form: Form,
    effort: Effort,
    seed: int,
    resolvent: Resolvent | None,
    rectified: Rectified | None,
) -> _Parts:
    """Factors alone, or beside an S of free or N:M entries; refined for the rectifier behind the layer."""
    if form.pattern == NONE:
        return _alone(problem, form, effort.sweeps, rectified)
    h = resolvent or Resolvent(_formed(problem, form), problem.weight, prod(problem.layer.kernel))
    parts = _jointly(problem, form, effort, seed, h)
    if rectified is None or not _worth_refining(problem, parts):
        return parts
    sparse, shift = refine_entries(problem, h, parts.product - parts.sparse, parts.sparse, rectified)
    return parts._replace(sparse=sparse, shift=shift)


def _jointly(problem: Problem, form: Form, effort: Effort, seed: int, h: Resolvent) -> _Parts:
    """Factors and S, fitted together by least squares."""
    layer, weight = problem.layer, problem.weight
    xp = namespace(weight)
    taps = prod(layer.kernel)
    if form.kind == CHANNEL or not form.rank:
        found = low_rank_plus_sparse(
            weight, problem.metric, form.rank, form.pattern, taps=taps, effort=effort, seed=seed, resolvent=h
        )
        v, left = (found.right, found.left[None]) if form.rank else (None, None)
        return _Parts(v, left, found.sparse, found.converged)
    w = cast(weight * h.columns, xp.float32)
    groups = shared_groups(layer.kernel, form.kind)
    part = SharedFactors(w, h, groups, form.rank, form.outer)
    s, rested = fit_sparse(w, h, part, form.pattern, taps, effort)
    v = cast(part.v, xp.float64) / xp.reshape(h.columns, (-1, groups))[:, 0]
    return _Parts(v, cast(part.h, xp.float64), cast(s, xp.float64) / h.columns, rested)


def _formed(problem: Problem, form: Form) -> Metric:
    """The metric; as an (m, m) matrix where shared factors need one."""
    metric = problem.metric
    if form.kind == CHANNEL or not form.rank or metric.rows is None:
        return metric
    return replace(metric, second=metric.matrix(problem.weight), rows=None, damping=0.0)


def _scatter_channels(v: Array, channels: tuple[int, ...], total: int) -> Array:
    """V of the channels that S does not keep, with zeros for the others: (rank, all columns)."""
    xp = namespace(v)
    rank = v.shape[0]
    rest = np.setdiff1d(np.arange(total), channels)
    part = xp.reshape(v, (rank, len(rest), -1))
    empty = xp.zeros_like(part[:, :1, :])
    order = indices(np.argsort(np.concatenate([channels, rest])), v)
    wide = xp.concat([*(empty for _ in channels), part], axis=1)
    return xp.reshape(xp.take(wide, order, axis=1), (rank, -1))


def check_form(layer: Layer, form: Form) -> None:
    """Raise ValueError for a form that the layer cannot take; the message says why."""
    if form.dense:
        raise ValueError("a dense form needs no factors")
    _check_storages(layer, form)
    if form.kind == DENSE:
        return
    if layer.constant:
        raise ValueError(f"{layer.name} is a constant, which has codes but no factors")
    groups = shared_groups(layer.kernel, form.kind)
    limit = min(layer.n * groups, layer.m // groups)
    if not 0 <= form.rank <= limit:
        raise ValueError(f"rank {form.rank} of {layer.name} is not between 0 and {limit}")
    outer = min(layer.n, form.rank * groups) if form.kind == TUCKER else 0
    if not min(outer, 1) <= form.outer <= outer:
        raise ValueError(
            f"outer rank {form.outer} of {layer.name} is not between {min(outer, 1)} and {outer}"
        )
    if form.channels >= layer.channels:
        raise ValueError(f"{form.channels} channels for S of {layer.name}, which has {layer.channels} inputs")
    check_pattern(form.pattern, layer.n, layer.m, prod(layer.kernel))
    if not form.rank and form.pattern == NONE:
        raise ValueError(f"form {form} of {layer.name} has neither factors nor a sparse part")


def _check_storages(layer: Layer, form: Form) -> None:
    rows = layer.n if form.kind == DENSE else form.rank
    if form.coded and sum(count for _, count in form.weights) != rows:
        raise ValueError(f"the storages of {layer.name} do not add up to {rows}")
    names = [name for name, count in form.weights if count > 0] + ([form.entries] if form.entries else [])
    if len(names) < len(form.weights) or not set(names) <= set(STORAGES):
        raise ValueError(f"the storages of {layer.name} are none of {', '.join(STORAGES)}")
    if FP16.name in [name for name, _ in form.weights] and len(form.weights) > 1:
        raise ValueError(f"fp16 mixes with no other storage in {layer.name}")
    if form.coded and (form.pattern.kind not in ("none", UNSTRUCTURED) or form.kind not in CODED_KINDS):
        raise ValueError(f"form {form} of {layer.name} has no codes")
    if form.coded and bool(form.entries) != (form.pattern != NONE):
        raise ValueError(f"the entries of S of {layer.name} need a storage")
