"""Attention heads in another basis of their channels, whose last channels the reader needs least.

A head sums values over positions, with one weight for all channels of a position. So a change of basis may be
made before that sum as well as behind it. Let c be the channels of one head, E[c c^T] = H = L L^T, and
y = W_h c what the reader makes of them, W_h L = U S V^T. The r linear combinations of c that tell y best are
the first r rows of V^T L^-1. The spans of these rows for r = 1, 2, ... lie within each other. In an
orthogonal basis whose first r vectors span the r-th of them, for every r, the best r combinations are simply
the first r channels; and as it is orthogonal, neither the norms of weights nor the damping change.
Source: Lin et al., MoDeGPT, ICLR 2025 (value and output projections as one factorisation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from onnx_lrsd.arrays import cast, from_numpy, identity, indices, namespace, to_numpy
from onnx_lrsd.solver.problem import Problem
from onnx_lrsd.solver.width import Columns, restricted
from onnx_lrsd.types import Array

Bases = npt.NDArray[np.float64]
"""Orthogonal matrices (heads, channels, channels): row i is the i-th new channel in terms of the old ones."""


def head_bases(readers: Sequence[Problem], columns: Sequence[Columns]) -> Bases:
    """For each head the basis whose first channels tell the ``readers`` most, all of these together.

    The readers read the same channels: ``columns[r]`` (channels, heads) are their places among the inputs of
    reader r.
    """
    found = []
    for head in range(columns[0].shape[1]):
        grams: list[npt.NDArray[np.float64]] = []
        for problem, own in zip(readers, columns, strict=True):
            at = indices(own[:, head], problem.weight)
            weight = problem.weigh(problem.weight)
            weight = namespace(weight).take(weight, at, axis=1)
            scale = 1.0 / problem.energy if problem.energy > 0 else 0.0
            grams.append(to_numpy(weight.T @ weight) * scale)
        lower = np.linalg.cholesky(_second(readers[0], columns[0][:, head]))
        _, vectors = np.linalg.eigh(lower.T @ sum(grams[1:], start=grams[0]) @ lower)
        spans = np.linalg.solve(lower.T, vectors[:, ::-1])
        found.append(np.linalg.qr(spans)[0].T)
    return np.array(found)


def _second(problem: Problem, columns: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The damped second moment of the inputs ``columns`` (k,): (k, k)."""
    at = indices(columns, problem.weight)
    return to_numpy(restricted(problem.metric, at).matrix(identity(len(columns), problem.weight)))


def turned(values: Array, columns: Columns, bases: Bases, *, back: bool = False) -> Array:
    """``values`` (N, m) with the entries at ``columns`` (channels, heads) in the new bases.

    With ``back`` they come from the new bases and go to the old ones.
    """
    xp = namespace(values)
    channels, heads = columns.shape
    at = columns.T.ravel()
    matrices = bases if back else bases.transpose(0, 2, 1)
    own = xp.reshape(xp.take(values, indices(at, values), axis=1), (-1, heads, channels))
    own = xp.matmul(xp.permute_dims(own, (1, 0, 2)), cast(from_numpy(matrices, like=values), values.dtype))
    own = xp.reshape(xp.permute_dims(own, (1, 0, 2)), (values.shape[0], -1))
    beside = np.setdiff1d(np.arange(values.shape[1]), at)
    order = np.argsort(np.concatenate([at, beside]))
    both = xp.concat([own, xp.take(values, indices(beside, values), axis=1)], axis=1)
    return xp.take(both, indices(order, values), axis=1)


def turned_inputs(problem: Problem, columns: Columns, bases: Bases) -> Problem:
    """The problem of a layer for unchanged inputs, those at ``columns`` (channels, heads) turned."""
    metric = problem.metric
    second, rows = metric.second, metric.rows
    if second is not None:
        second = turned(turned(second, columns, bases).T, columns, bases)
    if rows is not None:
        rows = turned(rows, columns, bases)
    return replace(
        problem,
        weight=turned(problem.weight, columns, bases),
        mean=turned(problem.mean[None, :], columns, bases)[0, :],
        metric=replace(metric, second=second, rows=rows),
    )


def turned_outputs(problem: Problem, rows: Columns, bases: Bases) -> Problem:
    """The problem of a layer for unchanged inputs, its outputs at ``rows`` (channels, heads) turned."""
    offset = problem.offset
    return replace(
        problem,
        weight=turned(problem.weight.T, rows, bases).T,
        output_mean=turned(problem.output_mean[None, :], rows, bases)[0, :],
        offset=None if offset is None else turned(offset[None, :], rows, bases)[0, :],
        outputs=None,
    )
