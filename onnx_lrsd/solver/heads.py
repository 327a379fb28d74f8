"""Channels of attention heads in another basis: one of which the last channels are worth least to the reader.

A head hands on values weighted over positions, each channel alike. Values in another basis are therefore
weighted values in that basis, and for the reader y = W_h c of one head with E[c c^T] = H = L L^T the best
readers of r combinations of its channels read the span of the first r rows of V^T L^-1, where
W_h L = U S V^T. An orthogonal basis of these spans, one within the other, makes of fewer combinations fewer
channels, and leaves the norm of weights and the damping as they are.
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
    """The basis of each head of which the ``readers`` together need the first channels most.

    ``columns[r]`` (channels, heads) are the inputs of reader r, which all read the same channels.
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
    """The damped second moment of some inputs."""
    at = indices(columns, problem.weight)
    return to_numpy(restricted(problem.metric, at).matrix(identity(len(columns), problem.weight)))


def turned(values: Array, columns: Columns, bases: Bases, *, back: bool = False) -> Array:
    """Rows ``values`` (N, m) whose entries at ``columns`` (channels, heads) are turned by the bases.

    ``back``: from the new channels to the old ones.
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
