"""A weight in codes: its parts are rounded one after the other, and each is refitted before it is rounded.

V is coded first, in the metric of what its errors do to the output. H is then the regression of the outputs
on the features of the coded V, and is coded in the metric of their Gram matrix. S comes last and aims at what
both leave. So each step compensates, as far as it can, for the error of the one before. The bias makes up for
the mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from onnx_lrsd.arrays import cast, diagonal, from_numpy, identity, namespace, to_numpy, trace
from onnx_lrsd.solver.codes.rounding import (
    Feedback,
    best_scale,
    nearest,
    round_columns,
    round_rows,
    settle,
    steps_of,
)
from onnx_lrsd.solver.layout import group_metric, shared_groups, ungroup_weight
from onnx_lrsd.solver.problem import Metric, Problem
from onnx_lrsd.storage import FAR_REACH, FP16, NEAR_REACH, STORAGES, Storage, with_bridges
from onnx_lrsd.types import DENSE, Array, Codes, Entries, Form, Layer, Mix, Packed

_V_RIDGE = 1e-3
"""Ridge of the metric of V's rows, relative to its mean diagonal."""
_S_SWEEPS = 2
"""Sweeps of coordinate descent on the codes of S, which starts from plain rounding."""
TIES = 1e-6
"""Ridge of a Gram matrix of features, relative to its mean diagonal."""

PIECE = 1 << 26
"""Numbers in a block of codes, at most. Decoding computes 1.5 times as many values on the way, and ONNX
Runtime folds constants up to a GiB."""


class Coded(NamedTuple):
    """``packed`` as it is stored, and the ``weight`` (n, m), float64, that it decodes to."""

    packed: Packed
    weight: Array


def feedback_of(problem: Problem) -> Feedback | None:
    """What ``code_dense`` may share between storages; None where nothing or few rows are known."""
    metric = problem.metric
    return None if metric.second is None else Feedback.of(metric.matrix(problem.weight))


def code_dense(problem: Problem, form: Form, feedback: Feedback | None = None) -> Coded:
    """The whole weight in the storage of ``form``; ``feedback`` may be shared between calls."""
    codes, weight = _code_rows(problem.weight, problem.metric, form.weights, feedback)
    return Coded(Packed(codes), weight)


def code_factors(
    problem: Problem, form: Form, v: Array | None, h: Array | None, sparse: Array | None, aim: Array
) -> Coded:
    """Factors V (r, A), H (B, n, r) and S (n, m), each or None, in the storages of ``form``.

    ``aim`` (n, m) is the weight that H and S are refitted to.
    """
    xp = namespace(problem.weight)
    weight, rows, entries = xp.zeros_like(aim), None, None
    if v is not None and h is not None:
        rows, weight = _code_pair(problem, form, v, h, aim if sparse is None else aim - sparse)
    if sparse is not None:
        entries, added = _code_entries(problem.metric, aim - weight, sparse, STORAGES[form.entries])
        weight = weight + added
    return Coded(Packed(rows, entries), weight)


def decode(layer: Layer, form: Form, packed: Packed) -> np.ndarray:
    """The weight (n, m) that a runtime computes from ``packed``, float64."""
    weight = np.zeros((layer.n, layer.m))
    if packed.rows is not None:
        steps = packed.rows.steps[:, None]
        rows = np.concatenate([_centred(STORAGES[name], codes) for name, codes in packed.rows.blocks])
        if form.kind == DENSE:
            weight += rows * steps
        else:
            groups = shared_groups(layer.kernel, form.kind)
            v, h = np.split(rows, [layer.m // groups], axis=1)
            weight += ungroup_weight(((h * steps).T @ v).reshape(groups, layer.n, -1))
    if packed.sparse is not None:
        sparse = np.zeros(layer.n * layer.m)
        sparse[packed.sparse.positions] = _centred(STORAGES[packed.sparse.storage], packed.sparse.codes)
        weight += sparse.reshape(layer.n, layer.m) * packed.sparse.steps[:, None]
    return weight


def _centred(storage: Storage, codes: np.ndarray) -> np.ndarray:
    if storage is FP16:
        return np.asarray(codes, dtype=np.float64)
    return codes.astype(np.float64) - (storage.levels - 1) / 2


def _code_rows(
    weight: Array, metric: Metric | Array, weights: Mix, feedback: Feedback | None = None
) -> tuple[Codes, Array]:
    """Rows of ``weight`` (rows, m) in their storages, and what they decode to, float64.

    ``metric`` (m, m) may be an array; ``feedback`` is that of a ``Metric``, if it is known.
    """
    xp = namespace(weight)
    if not isinstance(metric, Metric):
        feedback = Feedback.of(metric)
    blocks, steps, decoded, start = [], [], [], 0
    for name, count in _in_pieces(weights, weight.shape[1]):
        part, storage = weight[start : start + count, :], STORAGES[name]
        start += count
        if storage is FP16:
            return _halved(weight)
        codes, step = _rounded(part, metric, storage, feedback)
        blocks.append((name, _stored(codes, storage)))
        steps.append(to_numpy(step)[:, 0].astype(np.float32))
        decoded.append(cast(codes, xp.float64) * cast(step, xp.float64))
    return Codes(tuple(blocks), np.concatenate(steps)), xp.concat(decoded, axis=0)


def _in_pieces(weights: Mix, width: int) -> Iterator[tuple[str, int]]:
    """The blocks of ``weights``, none of more than PIECE numbers unless it is one row."""
    most = max(PIECE // width, 1)
    for name, count in weights:
        for start in range(0, count, most):
            yield name, min(most, count - start)


def _halved(rows: Array) -> tuple[Codes, Array]:
    """``rows`` as fp16, without a step."""
    values = np.asarray(to_numpy(rows), dtype=np.float16)
    return Codes(((FP16.name, values),), np.ones(len(values), np.float32)), from_numpy(
        values.astype(np.float64), rows
    )


def _rounded(
    weight: Array, metric: Metric | Array, storage: Storage, feedback: Feedback | None
) -> tuple[Array, Array]:
    """Centred codes (n, m) of ``weight`` in a metric, and their steps (n, 1).

    Of a metric of few rows only the diagonal counts: the (m, m) matrix is never formed.
    """
    xp = namespace(weight)
    levels = xp.full_like(weight[:, :1], float(storage.levels))
    if isinstance(metric, Metric):
        if metric.second is None and metric.rows is None:
            return round_rows(weight, storage.levels)
        if metric.rows is not None:
            own = xp.mean(xp.square(metric.rows), axis=0) + metric.damping
            steps = steps_of(weight, own, levels)
            return nearest(weight, steps, levels), steps
        metric = metric.matrix(weight)
    feedback = feedback or Feedback.of(metric)
    steps = steps_of(weight, feedback.left, levels)
    codes = round_columns(weight, feedback, steps, levels)
    steps = best_scale(weight, metric, codes, steps)
    codes = settle(weight, metric, codes, steps, levels)
    return codes, best_scale(weight, metric, codes, steps)


def _stored(centred: Array, storage: Storage) -> np.ndarray:
    """Centred codes as whole numbers from 0 on, uint8."""
    whole: np.ndarray = np.rint(to_numpy(centred) + (storage.levels - 1) / 2).astype(np.uint8)
    return whole


def _code_pair(problem: Problem, form: Form, v: Array, h: Array, aim: Array) -> tuple[Codes, Array]:
    """V and H in codes, a row a rank, and the product (n, m) they decode to; ``aim`` is what it should be."""
    xp = namespace(aim)
    metric, groups = problem.metric, shared_groups(problem.layer.kernel, form.kind)
    blocks = None if groups == 1 else group_metric(metric.matrix(aim), groups)
    v, h = _principal(cast(v, xp.float64), cast(h, xp.float64), metric, blocks)
    coded_v, v = _code_rows(v, metric if blocks is None else _metric_of_v(h, blocks), form.weights)
    features = _features(v, groups)
    image = metric.apply(features)
    gram = image @ features.T
    gram = (gram + gram.T) / 2 + TIES * trace(gram) / gram.shape[0] * identity(gram.shape[0], gram)
    best = xp.linalg.solve(gram, image @ aim.T).T
    n, rank = aim.shape[0], v.shape[0]

    def by_feature(columns: Array) -> Array:  # (n, B r) -> (r, B n)
        return xp.reshape(xp.permute_dims(xp.reshape(columns, (n, groups, rank)), (2, 1, 0)), (rank, -1))

    if form.weights[0][0] == FP16.name:
        rows, half = _halved(xp.concat([v, by_feature(best)], axis=1))
        h_rows = xp.reshape(half[:, v.shape[1] :], (rank, groups, n))
        return rows, xp.reshape(xp.permute_dims(h_rows, (2, 1, 0)), (n, -1)) @ features
    counts = [count for _, count in form.weights]
    levels = np.repeat([float(STORAGES[name].levels) for name, _ in form.weights], counts)
    levels = from_numpy(levels, aim)[:, None]
    rows_of_h = by_feature(best)
    steps = steps_of(rows_of_h, xp.ones_like(rows_of_h[0, :]), levels)
    wide_steps, wide_levels = (xp.reshape(xp.concat([x] * groups, axis=0), (1, -1)) for x in (steps, levels))
    codes = round_columns(best, Feedback.of(gram), wide_steps, wide_levels)
    codes = cast(settle(best, gram, codes, wide_steps, wide_levels), xp.float64)
    of_h, packed, start = by_feature(codes), [], 0
    for name, of_v in coded_v.blocks:
        stop = start + of_v.shape[0]
        packed.append((name, np.concatenate([of_v, _stored(of_h[start:stop, :], STORAGES[name])], axis=1)))
        start = stop
    both = (coded_v.steps * to_numpy(steps)[:, 0]).astype(np.float32)
    return Codes(tuple(packed), both), (codes * wide_steps) @ features


def _principal(v: Array, h: Array, metric: Metric, blocks: Array | None) -> tuple[Array, Array]:
    """The same product with uncorrelated features of unit variance, those of largest effect first."""
    xp = namespace(v)
    if blocks is None:
        gram = metric.apply(v) @ v.T
    else:
        groups = blocks.shape[0]
        gram = v @ (sum(blocks[b, b] for b in range(groups)) / groups) @ v.T
    values, vectors = xp.linalg.eigh((gram + gram.T) / 2)
    root = xp.sqrt(xp.maximum(values, values[-1] * 1e-12))
    v, h = (vectors / root).T @ v, xp.matmul(h, vectors * root)
    effect = xp.sum(xp.matmul(xp.permute_dims(h, (0, 2, 1)), h), axis=0)
    _, turn = xp.linalg.eigh((effect + effect.T) / 2)
    turn = xp.flip(turn, axis=1)
    return turn.T @ v, xp.matmul(h, turn)


def _metric_of_v(h: Array, blocks: Array) -> Array:
    """The metric (A, A) of an error in a row of V: sum_bd tr(H_b^T H_d) C_bd, the same for all rows."""
    xp = namespace(h)
    groups = blocks.shape[0]
    flat = xp.reshape(h, (groups, -1))
    share = flat @ flat.T
    metric = sum(share[b, d] * blocks[b, d] for b in range(groups) for d in range(groups))
    metric = (metric + metric.T) / (2 * xp.sum(diagonal(share)))
    return metric + _V_RIDGE * trace(metric) / metric.shape[0] * identity(metric.shape[0], metric)


def _features(v: Array, groups: int) -> Array:
    """(B r, m): row (b, q) is V's row q on the inputs of group b, so a weight is (n, B r) times it."""
    xp = namespace(v)
    each = identity(groups, v)[:, None, None, :] * v[None, :, :, None]
    return xp.reshape(each, (groups * v.shape[0], -1))


def _code_entries(metric: Metric, aim: Array, sparse: Array, storage: Storage) -> tuple[Entries, Array]:
    """S in codes for ``aim`` (n, m), and decoded; entries that bridge gaps are added to its support."""
    xp = namespace(aim)
    n, m = aim.shape
    chosen = np.flatnonzero(to_numpy(sparse))
    reach = min((NEAR_REACH, FAR_REACH), key=lambda reach: with_bridges(chosen.size, n * m, storage, reach))
    positions = bridged(chosen, reach)
    flat = np.zeros(n * m)
    flat[positions] = 1.0
    mask = xp.reshape(from_numpy(flat, aim), (n, m)) > 0
    if storage is FP16:
        values = xp.where(mask, sparse, xp.zeros_like(sparse))
        half = np.reshape(to_numpy(values), -1)[positions].astype(np.float16)
        flat[positions] = half
        return Entries(positions, storage.name, half, np.ones(n, np.float32), reach), xp.reshape(
            from_numpy(flat, aim), (n, m)
        )
    levels = xp.full_like(aim[:, :1], float(storage.levels))
    steps = steps_of(sparse, cast(mask, aim.dtype), levels)
    codes = nearest(cast(sparse, xp.float32), cast(steps, xp.float32), cast(levels, xp.float32))
    if metric.rows is None:
        matrix = metric.matrix(aim)
        for _ in range(_S_SWEEPS):
            codes = settle(aim, matrix, codes, steps, levels, mask)
        steps = best_scale(aim, matrix, xp.where(mask, codes, xp.zeros_like(codes)), steps)
    stored = np.reshape(_stored(codes, storage), -1)[positions]
    decoded = xp.where(mask, cast(codes, xp.float64) * steps, xp.zeros_like(aim))
    return Entries(positions, storage.name, stored, to_numpy(steps)[:, 0].astype(np.float32), reach), decoded


def bridged(chosen: np.ndarray, reach: int) -> np.ndarray:
    """The positions ``chosen`` (k,), ascending, and the fewest others that leave no gap above ``reach``.

    The first gap begins at -1.
    """
    before = np.concatenate([[-1], chosen[:-1]])
    missing = (chosen - before - 1) // reach
    starts = np.repeat(before, missing)
    nth = np.arange(missing.sum()) - np.repeat(np.cumsum(missing) - missing, missing) + 1
    return np.sort(np.concatenate([chosen, starts + nth * reach])).astype(np.int64)
