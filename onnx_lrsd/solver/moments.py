"""Moments of rows of a layer's input, streamed batch by batch.

A row is what W is applied to once: a vector for Gemm and MatMul, a patch for Conv. Positions are
sampled, because all patches of a k x k convolution would cost k^2 times the activations (and their
second moment many times the network itself).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnx_lrsd.types import Layer, Moments, Rows


def sample_positions(total: int, wanted: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """``wanted`` of ``total`` positions, ascending, one drawn from each of equal strata; all if few."""
    if wanted >= total:
        return np.arange(total)
    edges = np.arange(wanted) * total // wanted
    widths = np.diff(edges, append=total)
    return np.asarray(edges + (rng.random(wanted) * widths).astype(np.int64))


class MomentAccumulator:
    """Streams rows into the moments of one layer; of ``expected`` rows, more may come only if not ``thin``.

    All are centred on the mean of the first chunk, so that the moment never is a difference of two large
    numbers and float32 products are exact enough. Where there are fewer rows than half the inputs
    (``thin``) the rows themselves are kept and no (m, m) matrix is formed.

    With ``targets`` (rows of the original outputs) the cross moment is streamed as well.
    Source: shifted data algorithm; Chan, Golub, LeVeque, The American Statistician 37 (1983).
    """

    CHUNK = 6144
    """Rows of one product: each costs a pass over the (m, m) sum, too."""

    def __init__(self, layer: Layer, expected: int) -> None:
        self.layer = layer
        self.thin = 2 * expected < layer.m
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

    def _waiting(self) -> tuple[Rows, Rows]:
        rows = self._rows[: self._count]
        return rows, self._targets[: self._count] if self._targets is not None else rows[:, :0]

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
        if self._sums is None:
            m = self.layer.m
            return Moments(name=self.layer.output, count=0, mean=np.zeros(m), second=np.zeros((m, m)))
        return self._sums.moments(self.layer.output)

    def _thin_result(self) -> Moments:
        rows, targets = self._waiting()
        count = len(rows)
        if not count:
            return Moments(name=self.layer.output, count=0, mean=np.zeros(self.layer.m), rows=rows)
        mean = rows.mean(axis=0, dtype=np.float64)
        centred = rows - mean.astype(np.float32)
        if self._targets is None:
            return Moments(name=self.layer.output, count=count, mean=mean, rows=centred)
        output_mean = targets.mean(axis=0, dtype=np.float64)
        difference = targets - output_mean.astype(np.float32)
        return Moments(
            name=self.layer.output,
            count=count,
            mean=mean,
            rows=centred,
            cross=(difference.T @ centred).astype(np.float64) / count,
            output_mean=output_mean,
            output_energy=float(np.sum(difference.astype(np.float64) ** 2)) / count,
        )


class _Sums:
    """Sums of inputs and targets, and of their products, about fixed origins."""

    def __init__(self, rows: Rows, targets: Rows) -> None:
        self.count = 0
        self.origin, self.target_origin = rows.mean(axis=0), targets.mean(axis=0)
        self.sum, self.target_sum = np.zeros(rows.shape[1]), np.zeros(targets.shape[1])
        # A few chunks in all: their float32 sum is as exact as the float32 products themselves.
        self.second: Rows | None = None
        self.cross, self.energy = np.zeros((targets.shape[1], rows.shape[1]), np.float32), 0.0

    def add(self, rows: Rows, targets: Rows) -> None:
        """Add what ``rows`` and ``targets`` hold; both are overwritten."""
        rows -= self.origin
        targets -= self.target_origin
        self.count += len(rows)
        self.sum += rows.sum(axis=0, dtype=np.float64)
        product = rows.T @ rows
        if self.second is None:
            self.second = product
        else:
            self.second += product
        self.target_sum += targets.sum(axis=0, dtype=np.float64)
        self.cross += targets.T @ rows
        self.energy += float(np.sum(targets.astype(np.float64) ** 2))

    def moments(self, name: str) -> Moments:
        shift, target_shift = self.sum / self.count, self.target_sum / self.count
        second = self.second  # in place: these are the largest arrays there are
        assert second is not None
        second /= np.float32(self.count)
        second -= np.outer(shift.astype(np.float32), shift.astype(np.float32))
        mean = self.origin + shift
        if not len(target_shift):
            return Moments(name=name, count=self.count, mean=mean, second=second)
        return Moments(
            name=name,
            count=self.count,
            mean=mean,
            second=second,
            cross=self.cross / np.float32(self.count) - np.outer(target_shift, shift).astype(np.float32),
            output_mean=self.target_origin + target_shift,
            output_energy=max(self.energy / self.count - float(target_shift @ target_shift), 0.0),
        )
