"""Attention heads in another basis of their channels, whose last channels the reader needs least.

A head sums values over positions, with one weight for all channels of a position. So a change of basis may be
made before that sum as well as behind it. Let c be the channels of one head, E[c c^T] = H = L L^T, and
y = W_h c what the reader makes of them, W_h L = U S V^T. The r linear combinations of c that tell y best are
the first r rows of V^T L^-1. The spans of these rows for r = 1, 2, ... lie within each other. In an
orthogonal basis whose first r vectors span the r-th of them, for every r, the best r combinations are simply
the first r channels; and as it is orthogonal, neither the norms of weights nor the damping change.

Queries q and keys k count by their product q^T k alone. With E[q q^T] = L L^T, E[k k^T] = M M^T and
L^T M = U S V^T the best r channels of each are the first r of S^(1/2) U^T L^-1 q and S^(1/2) V^T M^-1 k. The
second basis is the inverse of the first one, transposed, so all channels together give the same products.
Both then have the second moment S, and leaving out the last channels adds the squares of theirs to the
error. The mean of the keys adds the same to the products of all positions: a softmax over these does not
see it, so that there the covariance of the keys takes the place of their second moment.
Source: Lin et al., MoDeGPT, ICLR 2025 (projections of attention factorised in pairs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from onnx_lrsd.arrays import cast, from_numpy, identity, indices, namespace, to_numpy
from onnx_lrsd.solver.problem import Problem
from onnx_lrsd.solver.width import Columns, Widths, restricted
from onnx_lrsd.types import Array

Bases = npt.NDArray[np.float64]
"""Matrices (heads, channels, channels): row i is the i-th new channel in terms of the old ones.

They are orthogonal, but for those of queries; keys have the transposed inverse of these."""
FLAT = 1e-6
"""Of the mean variance of a head's channels, what each of them has at least: no basis is ill-conditioned."""


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


def product_bases(
    queries: Problem, keys: Problem, rows: tuple[Columns, Columns], *, shifted: bool
) -> tuple[Bases, Widths]:
    """For each head the basis of the queries whose first channels tell most of their products with the keys.

    And what every width loses: the relative error of the products of positions that are drawn independently.
    ``rows`` (channels, heads) are the outputs of each head, of the layers of ``queries`` and of ``keys``. The
    products may be ``shifted`` by what is the same for all positions of the keys.
    """
    bases, squares = [], np.zeros(len(rows[0]))
    both = _output_seconds(queries, rows[0]), _output_seconds(keys, rows[1], centred=shifted)
    for of_queries, of_keys in zip(*both, strict=True):
        one, two = np.linalg.cholesky(of_queries), np.linalg.cholesky(of_keys)
        left, values, _ = np.linalg.svd(one.T @ two)
        bases.append(np.sqrt(values)[:, None] * np.linalg.solve(one.T, left).T)
        squares += np.square(values)
    missed = np.append(np.cumsum(squares[::-1])[::-1], 0.0) / squares.sum()
    return np.array(bases), Widths(tuple(range(len(squares)))[::-1], missed[None, :])


def _output_seconds(
    problem: Problem, rows: Columns, *, centred: bool = False
) -> list[npt.NDArray[np.float64]]:
    """The damped second moment of the outputs of each head, about zero if not ``centred``."""
    weight, mean = problem.weight, to_numpy(problem.output_mean)
    xp, applied = namespace(weight), problem.metric.apply(weight)
    found = []
    for own in rows.T:
        at = indices(own, weight)
        second = to_numpy(xp.take(applied, at, axis=0) @ xp.take(weight, at, axis=0).T)
        if not centred:
            second = second + np.outer(mean[own], mean[own])
        flat = FLAT * np.trace(second) / len(own)
        found.append(second + (flat if flat > 0 else 1.0) * np.eye(len(own)))
    return found


def _second(problem: Problem, columns: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The damped second moment of the inputs ``columns`` (k,): (k, k)."""
    at = indices(columns, problem.weight)
    return to_numpy(restricted(problem.metric, at).matrix(identity(len(columns), problem.weight)))


def turned(values: Array, columns: Columns, bases: Bases, *, back: bool = False) -> Array:
    """``values`` (N, m) with the entries at ``columns`` (channels, heads) in the new bases.

    With ``back`` they come from the new bases, which are orthogonal, and go to the old ones.
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
    offset, weight = problem.offset, turned(problem.weight.T, rows, bases).T
    return replace(
        problem,
        weight=weight,
        energy=float(namespace(weight).sum(problem.metric.undamped(weight) * weight)),
        output_mean=turned(problem.output_mean[None, :], rows, bases)[0, :],
        offset=None if offset is None else turned(offset[None, :], rows, bases)[0, :],
        outputs=None,
    )
