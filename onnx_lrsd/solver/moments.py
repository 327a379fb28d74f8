"""Moments of rows of a layer's input, streamed batch by batch.

A row is what W is applied to once: a vector for Gemm and MatMul, a patch for Conv. Positions are
sampled, because all patches of a k x k convolution would cost k^2 times the activations (and their
second moment many times the network itself).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from onnx_lrsd.arrays import cast, namespace, to_device, to_numpy, zeros
from onnx_lrsd.types import Array, Layer, Moments, Rows, few_rows


def sample_positions(total: int, wanted: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """``wanted`` of ``total`` positions, ascending, one drawn from each of equal strata; all if few."""
    if wanted >= total:
        return np.arange(total)
    edges = np.arange(wanted) * total // wanted
    widths = np.diff(edges, append=total)
    return np.asarray(edges + (rng.random(wanted) * widths).astype(np.int64))


class MomentAccumulator:
    """Streams rows into the moments of one layer.

    Rows are centred on the mean of the first chunk: the moment then is no difference of two large numbers,
    and float32 products are exact enough. Where fewer rows are ``expected`` than half the inputs (``thin``)
    the rows themselves are kept and no (m, m) matrix is formed; no more than expected may come then.

    With ``targets`` (rows of the original outputs) the cross moment is streamed as well. Rows are gathered in
    host memory, all sums are taken and held on the ``device``, and the result is in host memory again.
    Source: shifted data algorithm; Chan, Golub, LeVeque, The American Statistician 37 (1983).
    """

    CHUNK = 6144
    """Rows that are multiplied at once: adding each product to the (m, m) sum takes time as well."""

    def __init__(self, layer: Layer, expected: int, device: str = "cpu") -> None:
        self.layer, self.device = layer, device
        self.thin = few_rows(layer.m, expected)
        self._count = 0
        self._sums: _Sums | None = None
        self._rows = np.empty((max(1, min(expected, self.CHUNK)), layer.m), np.float32)
        self._targets: Rows | None = None

    def add(self, rows: Rows, targets: Rows | None = None) -> None:
        """Take rows (k, m) and, for asymmetric reconstruction, the outputs (k, n) they should give."""
        if targets is not None and self._targets is None:
            self._targets = np.empty((len(self._rows), targets.shape[1]), np.float32)
        taken = 0
        while taken < len(rows):
            if self._count == len(self._rows):
                self._merge()
            here = slice(taken, taken + len(self._rows) - self._count)
            there = slice(self._count, self._count + len(rows[here]))
            self._rows[there] = rows[here]
            if targets is not None and self._targets is not None:
                self._targets[there] = targets[here]
            taken, self._count = taken + len(rows[here]), there.stop

    def _waiting(self) -> tuple[Array, Array | None]:
        """What was added since the last merge, on the device."""
        rows = to_device(self._rows[: self._count], self.device)
        if self._targets is None:
            return rows, None
        return rows, to_device(self._targets[: self._count], self.device)

    def _merge(self) -> None:
        rows, targets = self._waiting()
        if self._sums is None:
            self._sums = _Sums(rows, targets)
        self._sums.add(rows, targets)
        self._count = 0

    def result(self) -> Moments:
        """The moments of everything added; nothing may be added after."""
        if self.thin:
            return self._thin_result()
        if self._count:
            self._merge()
        self._rows = self._rows[:0].copy()  # of all layers together these are as large as what is kept
        self._targets = None
        if self._sums is None:
            m = self.layer.m
            return Moments(name=self.layer.output, count=0, mean=np.zeros(m), second=np.zeros((m, m)))
        return self._sums.moments(self.layer.output)

    def _thin_result(self) -> Moments:
        count, name = self._count, self.layer.output
        if not count:
            return Moments(name=name, count=0, mean=np.zeros(self.layer.m), rows=self._rows[:0])
        rows, targets = self._waiting()
        xp = namespace(rows)
        mean = xp.sum(rows, axis=0, dtype=xp.float64) / count
        centred = rows - cast(mean, xp.float32)
        found = Moments(name=name, count=count, mean=to_numpy(mean), rows=to_numpy(centred))
        if targets is None:
            return found
        output_mean = xp.sum(targets, axis=0, dtype=xp.float64) / count
        difference = targets - cast(output_mean, xp.float32)
        return replace(
            found,
            cross=to_numpy(cast(difference.T @ centred, xp.float64) / count),
            output_mean=to_numpy(output_mean),
            output_energy=_energy(difference) / count,
        )


class _Sums:
    """Sums of inputs (m,) and targets (n,), and of their products, about the means of the first rows."""

    def __init__(self, rows: Array, targets: Array | None) -> None:
        xp = namespace(rows)
        self.count = 0
        self.origin, self.sum = xp.mean(rows, axis=0), _no_sum(rows)
        # A few chunks in all: their float32 sum is as exact as the float32 products themselves.
        self.second: Array | None = None
        self.cross: Array | None = None
        self.energy = 0.0
        if targets is not None:
            self.target_origin, self.target_sum = xp.mean(targets, axis=0), _no_sum(targets)
            self.cross = zeros((targets.shape[1], rows.shape[1]), rows)

    def add(self, rows: Array, targets: Array | None) -> None:
        """Add what ``rows`` and ``targets`` hold; both are overwritten."""
        xp = namespace(rows)
        rows -= self.origin
        self.count += rows.shape[0]
        self.sum += xp.sum(rows, axis=0, dtype=xp.float64)
        product = rows.T @ rows
        if self.second is None:
            self.second = product
        else:
            self.second += product
        if targets is not None:
            targets -= self.target_origin
            self.target_sum += xp.sum(targets, axis=0, dtype=xp.float64)
            self.cross += targets.T @ rows
            self.energy += _energy(targets)

    def moments(self, name: str) -> Moments:
        """The moments of all rows; the sums are overwritten."""
        second = self.second  # in place: these are the largest arrays there are
        assert second is not None
        xp, count = namespace(second), float(self.count)
        shift = self.sum / count
        second /= count
        second -= _outer(cast(shift, xp.float32), cast(shift, xp.float32))
        found = Moments(
            name=name, count=self.count, mean=to_numpy(self.origin + shift), second=to_numpy(second)
        )
        if self.cross is None:
            return found
        target_shift = self.target_sum / count
        return replace(
            found,
            cross=to_numpy(self.cross / count - cast(_outer(target_shift, shift), xp.float32)),
            output_mean=to_numpy(self.target_origin + target_shift),
            output_energy=max(self.energy / count - float(target_shift @ target_shift), 0.0),
        )


def _no_sum(rows: Array) -> Array:
    """Zeros in double precision, one for each column of ``rows``."""
    return cast(zeros((rows.shape[1],), rows), namespace(rows).float64)


def _energy(rows: Array) -> float:
    """Sum of all squares."""
    xp = namespace(rows)
    return float(xp.sum(cast(rows, xp.float64) ** 2))


def _outer(a: Array, b: Array) -> Array:
    """``a`` (n,) times ``b`` (m,), (n, m)."""
    return a[:, None] * b[None, :]
