"""Rows of a layer's input, and their moments, streamed batch by batch.

A row is what one output position of the layer reads: a vector for Gemm and MatMul, a patch for
Conv. Positions are sampled, because all patches of a k x k convolution would cost k^2 times the
activations (and their second moment many times the network itself).
"""

from __future__ import annotations

from math import ceil, prod

import numpy as np
import numpy.typing as npt

from onnx_lrsd.types import Layer, Moments, Rows


def pads_of(layer: Layer, size: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Begin and end padding of every spatial axis for an input of that spatial ``size``."""
    axes = len(layer.kernel)
    if layer.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for length, kernel, stride, dilation in zip(
            size, layer.kernel, layer.strides, layer.dilations, strict=True
        ):
            outputs = ceil(length / stride)
            total = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - length, 0)
            small = total // 2
            pads.append((small, total - small) if layer.auto_pad == "SAME_UPPER" else (total - small, small))
        return tuple(pads)
    if layer.auto_pad == "VALID" or not layer.pads:
        return ((0, 0),) * axes
    return tuple(zip(layer.pads[:axes], layer.pads[axes:], strict=True))


def output_size(layer: Layer, size: tuple[int, ...]) -> tuple[int, ...]:
    """Spatial size of a Conv's output for an input of that spatial ``size``."""
    return tuple(
        (length + sum(pads) - (kernel - 1) * dilation - 1) // stride + 1
        for length, kernel, stride, dilation, pads in zip(
            size, layer.kernel, layer.strides, layer.dilations, pads_of(layer, size), strict=True
        )
    )


def positions_of(layer: Layer, shape: tuple[int, ...]) -> int:
    """How many rows an input of that ``shape`` (batch included) holds."""
    if layer.op == "Conv":
        return shape[0] * prod(output_size(layer, shape[2:]))
    return prod(shape) // layer.m


def sample_positions(total: int, wanted: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """``wanted`` of ``total`` positions, ascending, one drawn from each of equal strata; all if few."""
    if wanted >= total:
        return np.arange(total)
    edges = np.arange(wanted) * total // wanted
    widths = np.diff(edges, append=total)
    return np.asarray(edges + (rng.random(wanted) * widths).astype(np.int64))


def input_rows(
    layer: Layer,
    x: npt.NDArray[np.floating],
    positions: npt.NDArray[np.int64],
    out: Rows | None = None,
) -> Rows:
    """The rows (len(positions), m) that the layer's output positions read from its input ``x``.

    Positions count the layer's outputs in C order, batch first: (batch, *output size) for Conv, all
    axes but the feature axis otherwise. Padding reads as zero.
    """
    rows = np.empty((len(positions), layer.m), np.float32) if out is None else out
    if layer.op != "Conv":
        features = np.moveaxis(x, layer.axis, -1).reshape(-1, layer.m)
        rows[:] = features[positions]
        return rows
    size, kernel = x.shape[2:], layer.kernel
    if output_size(layer, size) == size and prod(kernel) == 1:
        rows[:] = pixel_rows(x, positions)
        return rows
    where = np.unravel_index(positions, (x.shape[0], *output_size(layer, size)))
    flat = np.zeros((len(positions),) + (1,) * len(kernel), dtype=np.int64)
    inside = np.ones((len(positions), *kernel), dtype=bool)
    for axis, (begin, _) in enumerate(pads_of(layer, size)):
        offsets = np.arange(kernel[axis]) * layer.dilations[axis] - begin
        at = (where[axis + 1] * layer.strides[axis])[:, None] + offsets
        ok = (at >= 0) & (at < size[axis])
        shape = [len(positions)] + [1] * len(kernel)
        shape[axis + 1] = kernel[axis]
        inside &= ok.reshape(shape)
        flat = flat * size[axis] + np.where(ok, at, 0).reshape(shape)
    taps = prod(kernel)
    flat, inside = flat.reshape(-1, taps), inside.reshape(-1, 1, taps)
    patches = rows.reshape(len(positions), layer.channels, taps)
    # Image by image and channel by channel: each channel's map is read while it is in the cache.
    for image, start, stop in _runs(where[0]):
        picked = x[image].reshape(layer.channels, -1).take(flat[start:stop].ravel(), axis=1)
        patches[start:stop] = picked.reshape(layer.channels, -1, taps).transpose(1, 0, 2)
    border = np.flatnonzero(~inside.all(axis=(1, 2)))
    patches[border] *= inside[border]
    return rows


def pixel_rows(x: npt.NDArray[np.floating], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
    """All channels of ``x`` (batch, channels, *size) at ``positions``, counted batch first: (k, channels)."""
    pixels = x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)
    return pixels[np.divmod(positions, pixels.shape[1])]


def _runs(batch: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """(value, start, stop) of each run of equal values in an ascending array."""
    values, starts = np.unique(batch, return_index=True)
    stops = [*starts[1:].tolist(), len(batch)]
    return list(zip(values.tolist(), starts.tolist(), stops, strict=True))


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
        mean = rows.mean(axis=0, dtype=np.float64) if count else np.zeros(self.layer.m)
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
