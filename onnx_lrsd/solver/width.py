"""Fewer channels between layers: which ones their readers need least, and the readers refitted to the others.

A reader y = W x + b that is fitted to the channels J alone has B_J = (W H)_J (H_JJ)^-1. Dropping one more
channel, with the columns I, costs tr(B_I ((H^-1)_II)^-1 B_I^T) exactly, and then

    B <- B - B_I ((H^-1)_II)^-1 (H^-1)_I,    H^-1 <- H^-1 - (H^-1)_:I ((H^-1)_II)^-1 (H^-1)_I:

so dropping the cheapest channel until none is left gives the error of every width in one pass. Updates are
gathered and carried out for many channels at once; meanwhile only the columns of the channels that may be
next are kept up to date. All widths together cost about as much as the inverse.
Sources: Hassibi and Stork, NeurIPS 5 (1993); He, Zhang, Sun, ICCV 2017 (channels and the refit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnx_lrsd.arrays import (
    cast,
    diagonal,
    from_numpy,
    identity,
    indices,
    namespace,
    spd_inverse,
    to_numpy,
    zeros,
)
from onnx_lrsd.solver.decompose import bias_and_error
from onnx_lrsd.solver.problem import Metric, Problem, regress
from onnx_lrsd.solver.rectified import Rectified, refine_weight
from onnx_lrsd.types import DENSE, Array, Factors, Form, Layer, whole_channels

PENDING, PENDING_PART = 64, 16
"""Updates are carried out once 64 columns are dropped, or one in 16 of all if these are more: each time the
whole matrix is read and written."""
SINGLE = 1024
"""With so many inputs or more the pass is computed in float32. Damping keeps the condition number of H near
1e5, and of the result only the order of the channels counts: rows kept apart judge the errors
(results/time.md)."""
UPCOMING = 3
"""So many times as many columns are kept up to date as will be dropped, those of the cheapest channels."""

Columns = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Widths:
    """What every width costs. ``dropped`` are channels, the first to go first; ``least`` are always left.

    ``errors`` (readers, channels + 1) is the relative error of each reader by the number of channels kept;
    inf below ``least``.
    """

    dropped: tuple[int, ...]
    errors: npt.NDArray[np.float64]

    def kept(self, width: int) -> tuple[int, ...]:
        """The channels that a ``width`` keeps, ascending. Raises ValueError for a width below ``least``."""
        total = self.errors.shape[1] - 1
        gone = self.dropped[: total - width]
        if len(gone) < total - width:
            raise ValueError(f"no width below {total - len(self.dropped)} was asked for")
        return tuple(sorted(set(range(total)).difference(gone)))


def widths(
    readers: Sequence[Problem],
    columns: Sequence[Columns],
    *,
    least: int = 0,
    weights: Sequence[float] | None = None,
) -> Widths:
    """Drop the channels that all ``readers`` read, the cheapest one first, until ``least`` are left.

    ``columns[r]`` (channels, k) are the inputs of reader r that come from each channel; inputs that it
    does not name stay. What a channel costs is the sum over the readers of their relative errors, times
    ``weights`` (1 each). Errors are those of the damped metric, in that of the outputs where there is one.
    Raises ValueError where the columns do not fit.
    """
    total = len(columns[0])
    for problem, own in zip(readers, columns, strict=True):
        if own.shape[0] != total or len(np.unique(own)) != own.size or own.max() >= problem.weight.shape[1]:
            raise ValueError(
                f"columns {own.shape} of {problem.layer.name} are not {total} times distinct inputs"
            )
    counting = [1.0] * len(readers) if weights is None else [float(weight) for weight in weights]
    pending = max(PENDING, *(problem.weight.shape[1] // PENDING_PART for problem in readers))
    states = [_Reader(problem, own, pending) for problem, own in zip(readers, columns, strict=True)]
    left = np.arange(total)
    dropped: list[int] = []
    added: list[list[Array]] = [[] for _ in readers]
    steps = max(1, pending // max(state.taps for state in states))
    while len(left) > least:
        none = from_numpy(np.zeros(len(left)), like=readers[0].weight)
        upcoming = min(UPCOMING * steps, len(left))
        taken = _drop_cheapest(states, counting, added, none, upcoming, min(steps, len(left) - least))
        dropped += left[taken].tolist()
        stay = np.setdiff1d(np.arange(len(left)), taken)
        left = left[stay]
        if len(left) > least:
            for state in states:
                state.settle(stay)
    errors = np.full((len(readers), total + 1), np.inf)
    for row, of_reader in zip(errors, added, strict=True):
        rises = np.array([0.0] + [max(float(cost), 0.0) for cost in of_reader])
        row[total - len(of_reader) :] = np.cumsum(rises)[::-1]
    return Widths(tuple(dropped), errors)


def _drop_cheapest(
    states: Sequence[_Reader],
    weights: Sequence[float],
    added: Sequence[list[Array]],
    barred: Array,
    upcoming: int,
    most: int,
) -> list[int]:
    """Drop up to ``most`` channels, one by one the cheapest, and return them as the readers number them now.

    Only the ``upcoming`` channels that are cheapest at first are kept up to date: it ends where another one
    has become cheaper. What each drop adds to the error of a reader is appended to its list in ``added``.
    ``barred`` (channels,) is zero, and becomes inf for what is dropped.
    """
    xp = namespace(barred)
    total = sum((state.costs() * weight for state, weight in zip(states, weights, strict=True)), start=barred)
    order = xp.argsort(total, stable=True)
    place = xp.argsort(order)  # of each channel in that order
    for state in states:
        state.prepare(order[:upcoming])
    taken: list[int] = []
    while len(taken) < most:
        costs = [state.costs() for state in states]
        total = sum((cost * weight for cost, weight in zip(costs, weights, strict=True)), start=barred)
        cheapest = int(xp.argmin(total))
        if int(place[cheapest]) >= upcoming:
            break  # never at first: the cheapest of all is among them
        for state, cost, of_reader in zip(states, costs, added, strict=True):
            of_reader.append(cost[cheapest, ...])
            state.drop(cheapest, int(place[cheapest]))
        barred[cheapest] = float("inf")
        taken.append(cheapest)
    return taken


class _Reader:
    """B (n, m) and H^-1 (m, m) of one reader on the channels that are left; columns are ordered by channel.

    Between two calls of ``settle`` they are B - C L^T and H^-1 - L L^T, with the columns of C and L that the
    dropped channels gave; ``inverses`` and ``grams`` (channels, k, k), the blocks of H^-1 and of B^T B on
    their diagonals, are always up to date.
    """

    def __init__(self, problem: Problem, columns: Columns, pending: int) -> None:
        self.taps, self.most = columns.shape[1], pending
        beside = np.setdiff1d(np.arange(problem.weight.shape[1]), columns)
        order = indices(np.concatenate([columns.ravel(), beside]), problem.weight)
        xp = namespace(problem.weight)
        weight = xp.take(problem.weigh(problem.weight), order, axis=1)
        if weight.shape[1] >= SINGLE:
            weight = cast(weight, xp.float32)
        if weight.shape[0] > weight.shape[1]:
            weight = xp.linalg.qr(weight)[1]  # only B^T B counts
        self.scale = 1.0 / problem.energy if problem.energy > 0 else 0.0
        self.weight = weight
        self.inverse = _inverse(restricted(problem.metric, order), weight)
        self._start(len(columns))

    def _start(self, channels: int) -> None:
        """Compute the blocks on the diagonals anew for ``channels``; no update is pending then."""
        xp, taps = namespace(self.weight), self.taps
        b = xp.reshape(self.weight[:, : channels * taps], (-1, channels, taps))
        b = xp.permute_dims(b, (1, 0, 2))
        self.grams = xp.matmul(xp.permute_dims(b, (0, 2, 1)), b)
        self.inverses = self.inverse.blocks(channels, taps)
        room, (outputs, inputs) = self.most + taps, self.weight.shape
        self.pending = 0
        self.lower, self.product = (zeros((room, inputs), self.weight) for _ in range(2))
        self.left = zeros((room, outputs), self.weight)

    def costs(self) -> Array:
        """What dropping each channel adds to the relative error: tr((B^T B)_II ((H^-1)_II)^-1)."""
        xp = namespace(self.grams)
        if self.taps == 1:
            return self.grams[:, 0, 0] / self.inverses[:, 0, 0] * self.scale
        return xp.sum(diagonal(xp.linalg.solve(self.inverses, self.grams)), axis=-1) * self.scale

    def prepare(self, ready: Array) -> None:
        """Hold H^-1 and B^T B at the columns of the channels ``ready``, as rows (channels, k, m)."""
        xp, taps = namespace(self.weight), self.taps
        at = xp.reshape(ready[:, None] * taps + indices(np.arange(taps), self.weight)[None, :], (-1,))
        shape = (ready.shape[0], taps, -1)
        self.ready_inverse = xp.reshape(self.inverse.rows(at), shape)
        self.ready_gram = xp.reshape(xp.take(self.weight, at, axis=1).T @ self.weight, shape)

    def drop(self, channel: int, place: int) -> None:
        """Drop ``channel``, which is number ``place`` of those that ``prepare`` was given."""
        xp, taps, t = namespace(self.weight), self.taps, self.pending
        own = slice(channel * taps, (channel + 1) * taps)
        lower, product, left = self.lower[:t, :], self.product[:t, :], self.left[:t, :]
        back = lower[:, own].T  # (k, t): what the dropped channels changed at these columns
        row = self.ready_inverse[place, :, :] - back @ lower
        b = self.weight[:, own].T - back @ left
        aim = self.ready_gram[place, :, :] - back @ product
        block = row[:, own]
        root = xp.linalg.inv(xp.linalg.cholesky((block + block.T) / 2)) if taps > 1 else block**-0.5
        row, b, aim = root @ row, root @ b, root @ aim
        gram = aim - (b @ left.T) @ lower  # B^T times the new column of C
        self.inverses, self.grams = self._moved(row, gram, b @ b.T)
        self.inverses[channel, :, :], self.grams[channel, :, :] = identity(taps, row), 0.0
        until = t + taps
        self.lower[t:until, :], self.product[t:until, :], self.left[t:until, :] = row, aim, b
        self.pending = until

    def _moved(self, row: Array, gram: Array, own: Array) -> tuple[Array, Array]:
        """Diagonal blocks (channels, k, k) of H^-1 - l l^T and of (B - c l^T)^T (B - c l^T).

        ``row`` (k, m) is l^T, ``gram`` (k, m) is (B^T c)^T and ``own`` (k, k) is c^T c.
        """
        xp, taps, channels = namespace(row), self.taps, self.grams.shape[0]
        if taps == 1:
            lo, g = row[0, :channels, None, None], gram[0, :channels, None, None]
            return self.inverses - lo * lo, self.grams + lo * (own * lo - 2 * g)
        wide = (taps, channels, taps)
        lo = xp.permute_dims(xp.reshape(row[:, : channels * taps], wide), (1, 2, 0))
        g = xp.permute_dims(xp.reshape(gram[:, : channels * taps], wide), (1, 2, 0))
        back = xp.permute_dims(lo, (0, 2, 1))
        both = xp.matmul(g, back)
        grams = self.grams - both - xp.permute_dims(both, (0, 2, 1)) + xp.matmul(xp.matmul(lo, own), back)
        return self.inverses - xp.matmul(lo, back), grams

    def settle(self, stay: Columns) -> None:
        """Carry out the pending updates and keep the channels ``stay`` alone."""
        xp, taps, t = namespace(self.weight), self.taps, self.pending
        columns = (stay[:, None] * taps + np.arange(taps)).ravel()
        beside = np.arange(self.grams.shape[0] * taps, self.weight.shape[1])
        at = indices(np.concatenate([columns, beside]), self.weight)
        gone = np.setdiff1d(np.arange(self.grams.shape[0]), stay)
        gone = indices((gone[:, None] * taps + np.arange(taps)).ravel(), self.weight)
        lower = xp.take(self.lower[:t, :], at, axis=1)
        self.weight = xp.take(self.weight, at, axis=1) - self.left[:t, :].T @ lower
        self.inverse = self.inverse.without(gone, at, lower)
        self._start(len(stay))


@dataclass(frozen=True)
class _Full:
    """H^-1 as a matrix (m, m)."""

    matrix: Array

    def rows(self, at: Array) -> Array:
        """The rows ``at`` (k,): (k, m)."""
        return namespace(self.matrix).take(self.matrix, at, axis=0)

    def blocks(self, channels: int, taps: int) -> Array:
        """Blocks (channels, k, k) on the diagonal."""
        xp, matrix = namespace(self.matrix), self.matrix
        if taps == 1:
            return diagonal(matrix)[:channels, None, None]
        size = channels * taps
        wide = xp.reshape(matrix[:size, :size], (channels, taps, channels, taps))
        return xp.permute_dims(diagonal(xp.permute_dims(wide, (1, 3, 0, 2))), (2, 0, 1))

    def without(self, gone: Array, at: Array, lower: Array) -> _Full:
        """H^-1 on the inputs ``at``, those ``gone`` dropped: ``lower`` (t, m) is L^T of these drops."""
        xp = namespace(self.matrix)
        kept = xp.take(xp.take(self.matrix, at, axis=0), at, axis=1)
        return _Full(kept - lower.T @ lower)


@dataclass(frozen=True)
class _Thin:
    """H^-1 = (I - Z^T Z) / damping with Z (N, m), for few rows: no (m, m) matrix is formed."""

    root: Array
    damping: float

    def rows(self, at: Array) -> Array:
        """The rows ``at`` (k,): (k, m)."""
        xp, z = namespace(self.root), self.root
        some = xp.take(z, at, axis=1)
        unit = cast(at[:, None] == indices(np.arange(z.shape[1]), z)[None, :], z.dtype)
        return (unit - some.T @ z) / self.damping

    def blocks(self, channels: int, taps: int) -> Array:
        """Blocks (channels, k, k) on the diagonal."""
        xp = namespace(self.root)
        z = xp.permute_dims(xp.reshape(self.root[:, : channels * taps], (-1, channels, taps)), (1, 0, 2))
        return (identity(taps, z) - xp.matmul(xp.permute_dims(z, (0, 2, 1)), z)) / self.damping

    def without(self, gone: Array, at: Array, lower: Array) -> _Thin:
        """H^-1 on the inputs ``at``, those ``gone`` dropped."""
        xp, z = namespace(self.root), self.root
        lost = xp.take(z, gone, axis=1)
        kept = xp.take(z, at, axis=1)
        inner = identity(z.shape[0], z) - lost @ lost.T
        return _Thin(xp.linalg.solve(xp.linalg.cholesky(inner), kept), self.damping)


def _inverse(metric: Metric, like: Array) -> _Full | _Thin:
    """H^-1 on the columns of ``like`` (n, m)."""
    xp = namespace(like)
    if metric.second is not None:
        return _Full(spd_inverse(metric.matrix(like)))
    if metric.rows is None:
        return _Thin(like[:0, :], 1.0 + metric.damping)
    rows, count = cast(metric.rows, like.dtype), metric.rows.shape[0]
    inner = rows @ rows.T / count + metric.damping * identity(count, rows)
    return _Thin(xp.linalg.solve(xp.linalg.cholesky(inner), rows) / count**0.5, metric.damping)


def restricted(metric: Metric, columns: Array) -> Metric:
    """The metric of the inputs ``columns`` (k,) alone."""
    if metric.second is not None:
        xp = namespace(metric.second)
        return replace(metric, second=xp.take(xp.take(metric.second, columns, axis=0), columns, axis=1))
    if metric.rows is not None:
        return replace(metric, rows=namespace(metric.rows).take(metric.rows, columns, axis=1))
    return metric


def narrowed(problem: Problem, layer: Layer, outputs: Columns | None, inputs: Columns | None) -> Problem:
    """The problem of a narrower ``layer``: it keeps these outputs, and is fitted to these inputs (None: all).

    Errors stay relative to the energy of all outputs, so they add up with what the width itself loses. The
    inputs must be those of the original network.
    """
    xp = namespace(problem.weight)
    weight, mean, metric, middle = problem.weight, problem.mean, problem.metric, problem.output_mean
    offset = problem.offset
    if inputs is not None:
        at = indices(inputs, weight)
        metric = restricted(metric, at)
        weight = regress(xp.take(problem.metric.apply(weight), at, axis=1), metric)
        mean = xp.take(mean, at, axis=0)
    if outputs is not None:
        at = indices(outputs, weight)
        weight, middle = xp.take(weight, at, axis=0), xp.take(middle, at, axis=0)
        offset = None if offset is None else xp.take(offset, at, axis=0)
    return replace(
        problem,
        layer=layer,
        weight=weight,
        mean=mean,
        output_mean=middle,
        metric=metric,
        offset=offset,
        outputs=None,
    )


def _spread(weight: Array, columns: Columns, inputs: int) -> Array:
    """A weight of all ``inputs`` (n, inputs): ``weight`` (n, k) at ``columns`` (k,), zeros elsewhere."""
    xp = namespace(weight)
    beside = np.setdiff1d(np.arange(inputs), columns)
    empty = zeros((weight.shape[0], len(beside)), weight)
    order = indices(np.argsort(np.concatenate([columns, beside])), weight)
    return xp.take(xp.concat([weight, empty], axis=1), order, axis=1)


def fit_width(
    problem: Problem, columns: Columns, kept: Sequence[int], rectified: Rectified | None = None
) -> Factors:
    """Fit a reader to the channels ``kept`` alone: a dense weight of the inputs that are left, and its bias.

    ``columns`` (channels, k) are the inputs that come from each channel. In the result ``channels`` are the
    inputs that are left, in their order in W, and ``sparse`` (n, len(channels)) is their weight, float64.
    With ``rectified`` it is refined for what the rectifier behind the reader lets pass.
    """
    gone = np.setdiff1d(np.arange(len(columns)), np.asarray(kept))
    at = np.setdiff1d(np.arange(problem.weight.shape[1]), columns[gone])
    inside = indices(at, problem.weight)
    metric = restricted(problem.metric, inside)
    xp = namespace(problem.weight)
    aim = problem.metric.apply(problem.weight)

    def fitted(moved: Array | None) -> Array:
        """The weight (n, m), zero at the inputs that are gone."""
        right = aim if moved is None else aim + cast(moved, aim.dtype)
        return _spread(regress(xp.take(right, inside, axis=1), metric), at, aim.shape[1])

    weight, shift = fitted(None), None
    if rectified is not None:
        weight, shift = refine_weight(problem, weight, fitted, rectified)
    bias, error = bias_and_error(problem, weight, shift)
    return Factors(
        form=Form(DENSE, pattern=whole_channels(len(at))),
        kernels=(),
        bias=to_numpy(bias),
        sparse=to_numpy(xp.take(weight, inside, axis=1)),
        channels=tuple(at.tolist()),
        error=error,
    )
