"""One layer in one form: W ~ U V + S with the bias refitted, and the error it really has."""

from __future__ import annotations

from math import prod

import numpy as np

from onnx_lrsd.arrays import namespace, to_numpy
from onnx_lrsd.solver import separable
from onnx_lrsd.solver.layout import factor_kernels, group_metric, group_weight, shared_groups, ungroup_weight
from onnx_lrsd.solver.lowrank import low_rank
from onnx_lrsd.solver.sparse import Elimination, best_channels, channel_gains, eliminate
from onnx_lrsd.solver.whiten import Metric, Problem
from onnx_lrsd.types import CHANNEL, DENSE, Array, Factors, Form, Layer

SWEEPS = 4
"""Alternating sweeps of a final fit: the first gives most of the gain, the fourth half a percent."""


def decompose(problem: Problem, form: Form) -> Factors:
    """Fit ``form`` to one layer; the error is recomputed in float64 from the factors themselves.

    Raises ValueError for a dense form, a form the kernel does not allow, and a rank or a number of
    channels out of range.

    >>> import numpy as np, onnx_lrsd
    >>> from onnx_lrsd.types import Form, Layer
    >>> layer = Layer("y", "dense", "Gemm", "x", "w", (8, 6), "float32", n=8, m=6)
    >>> weight = np.outer(np.arange(8.0), np.ones(6))
    >>> factors = onnx_lrsd.decompose(onnx_lrsd.pose(layer, weight, np.zeros(8), None), Form("channel", 1))
    >>> v, u = factors.kernels
    >>> v.shape, u.shape, bool(np.allclose(u @ v, weight)), factors.error < 1e-9
    ((1, 6), (8, 1), True, True)
    """
    layer, weight = problem.layer, problem.weight
    check_form(layer, form)
    xp = namespace(weight)
    chosen = choose_channels(problem, form) if form.channels else None
    approximation = xp.zeros_like(weight)
    kernels: tuple[Array, ...] = ()
    if form.rank:
        part = weight if chosen is None else weight[:, chosen.rest]
        metric = problem.metric if chosen is None else Metric(chosen.metric, None, 0.0)
        v, h = factors(layer, part, metric, form.kind, form.rank, SWEEPS)
        if chosen is not None:
            v = _scatter_channels(v, chosen.channels, layer.channels)
        kernels = tuple(to_numpy(k) for k in factor_kernels(layer, form.kind, v, h))
        approximation = ungroup_weight(xp.matmul(h, v))
    sparse = None
    if chosen is not None:
        columns = chosen.sparse(weight, approximation[:, chosen.rest])
        sparse = to_numpy(columns).reshape(layer.n, form.channels, *layer.kernel)
        approximation[:, chosen.kept] = columns
    return Factors(
        form,
        kernels,
        to_numpy(problem.bias(approximation)),
        sparse,
        () if chosen is None else chosen.channels,
        problem.error(approximation),
        bool(xp.all(xp.isfinite(approximation))),
    )


def factors(
    layer: Layer, weight: Array, metric: Metric, kind: str, rank: int, sweeps: int
) -> tuple[Array, Array]:
    """V (rank, A) and H (B, n, rank), float64, for ``weight`` (n, columns) in ``metric``.

    The columns may be those of all channels or of some.
    """
    if kind == CHANNEL:
        found = low_rank(weight, metric)
        return found.right[:rank], found.left[:, :rank][None]
    xp = namespace(weight)
    v, h, _ = separable.fit(prepare(layer, weight, metric, kind), rank, sweeps)
    return v.astype(xp.float64), h.astype(xp.float64)


def prepare(layer: Layer, weight: Array, metric: Metric, kind: str) -> separable.Separable:
    """``weight`` (n, columns) and its metric grouped for a separable form, float32."""
    xp = namespace(weight)
    groups = shared_groups(layer.kernel, kind)
    blocks = group_metric(metric.matrix(weight).astype(xp.float32), groups)
    return separable.prepare(
        xp.asarray(group_weight(weight, groups).astype(xp.float32), copy=True), xp.asarray(blocks, copy=True)
    )


def choose_channels(problem: Problem, form: Form) -> Elimination:
    """The channels S keeps: those that lower the error most beside factors of the form's rank."""
    weight, metric = problem.weight, problem.metric.matrix(problem.weight)
    difference = weight
    if form.rank:
        v, h = factors(problem.layer, weight, problem.metric, form.kind, form.rank, 0)
        difference = weight - ungroup_weight(namespace(weight).matmul(h, v))
    taps = prod(problem.layer.kernel)
    channels = best_channels(channel_gains(difference, metric, taps), form.channels)
    return eliminate(metric, channels, taps)


def _scatter_channels(v: Array, channels: tuple[int, ...], total: int) -> Array:
    """V on the channels S does not keep, widened by zeros to all ``total`` channels."""
    xp = namespace(v)
    rank = v.shape[0]
    rest = xp.asarray(np.setdiff1d(np.arange(total), channels))
    part = xp.reshape(v, (rank, total - len(channels), -1))
    wide = xp.zeros((rank, total, part.shape[2]), dtype=v.dtype)
    wide[:, rest] = part
    return xp.reshape(wide, (rank, -1))


def check_form(layer: Layer, form: Form) -> None:
    """Raise ValueError, in words, for a form that the layer cannot take."""
    if form.kind == DENSE:
        raise ValueError("a dense form needs no factors")
    groups = shared_groups(layer.kernel, form.kind)
    limit = min(layer.n * groups, layer.m // groups)
    if not 0 <= form.rank <= limit:
        raise ValueError(f"rank {form.rank} of {layer.node} is not between 0 and {limit}")
    if not 0 <= form.channels < layer.channels:
        raise ValueError(f"{form.channels} channels for S of {layer.node}, which has {layer.channels} inputs")
    if not form.rank and not form.channels:
        raise ValueError(f"form {form} of {layer.node} has neither factors nor a sparse part")
