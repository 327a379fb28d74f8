"""How far apart two streams of outputs are."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnx_lrsd.types import Values

ROUNDING = 1e-14
"""A spread below this share of the energy is what float32 leaves of a constant."""


class Divergence:
    """Streams |new - old|^2 / |old - E old|^2 of one output in float64, batch by batch.

    E old is taken over all samples, element by element; where an output never varies, or its shape
    does, |old|^2 stands below the line. What is no floating number counts as the share of entries that
    differ, and a batch whose shape changed as wholly different. NaN equals NaN and infinity itself;
    a value that is finite in one stream only makes the error infinite.

    Entries along ``positions``, axes whose size differs from sample to sample, count as samples do.
    """

    def __init__(self, positions: tuple[int, ...] = ()) -> None:
        self.positions = positions
        self.missed = self.squares = self.spread = 0.0
        self.shift: Values | None = None
        self.sum: Any = 0.0
        self.rows = 0
        self.uneven = False

    def add(self, old: Any, new: Any, real: Values | None = None) -> None:
        """Take in the outputs of one batch; where ``real`` (samples, positions) says so, without padding."""
        one, two = (positions_first(as_array(value), real, self.positions) for value in (old, new))
        if one.shape != two.shape:
            self.uneven = True
            energy = float(np.sum(_finite(one) ** 2)) if one.dtype.kind == "f" else float(max(one.size, 1))
            self.missed += energy or 1.0
            self.squares += energy or 1.0
        elif one.dtype.kind != "f":
            self.missed += float(np.sum(one != two))
            self.squares += float(one.size)
            self.uneven = True
        elif one.size:
            self._add_numbers(one.astype(np.float64), two.astype(np.float64))

    def _add_numbers(self, old: Values, new: Values) -> None:
        same = (old == new) | (np.isnan(old) & np.isnan(new))
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.where(same, 0.0, new - old)
        squares = float(np.sum(difference**2))
        self.missed += squares if np.isfinite(squares) else np.inf
        old = _finite(old)
        self.squares += float(np.sum(old**2))
        rows = old.reshape(len(old), -1) if old.ndim else old.reshape(1, 1)
        if self.shift is None:
            self.shift = rows.mean(axis=0)  # near the mean, so that the difference below keeps its digits
        if rows.shape[1] != len(self.shift):
            self.uneven = True
            return
        rows = rows - self.shift
        self.sum = self.sum + rows.sum(axis=0)
        self.spread += float(np.sum(rows**2))
        self.rows += len(rows)

    def relative(self) -> float:
        """The error so far; 0 where nothing differs."""
        if self.missed <= 0:
            return 0.0
        energy = self.squares
        if not self.uneven and self.rows > 1:
            centred = self.spread - float(np.sum(np.square(self.sum))) / self.rows
            energy = centred if centred > ROUNDING * self.squares else energy
        return self.missed / energy if energy > 0 else float("inf")


def as_array(value: Any) -> Values:
    """An output as one array: a list of equal dicts (ZipMap) or of equal arrays becomes a table.

    What fits no table becomes an array of texts, one for each entry.
    """
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind != "V" else value.astype(np.float32)
    if not isinstance(value, list):
        return np.asarray(value) if np.isscalar(value) else np.array([repr(value)])
    if value and all(isinstance(item, dict) and item.keys() == value[0].keys() for item in value):
        return np.array([[item[key] for key in value[0]] for item in value])
    arrays = [np.asarray(item) for item in value]
    if arrays and all(a.shape == arrays[0].shape and a.dtype.kind in "biufUS" for a in arrays):
        return np.stack(arrays)
    return np.array([repr(item) for item in value])


def positions_first(values: Values, real: Values | None, positions: tuple[int, ...]) -> Values:
    """``values`` without padding, as ``unpadded`` has them, or with ``positions`` counted as samples."""
    found = unpadded(values, real)
    if found is not values or not positions or values.ndim <= max(positions):
        return found
    moved = np.moveaxis(values, positions, range(1, 1 + len(positions)))
    return moved.reshape(-1, *moved.shape[1 + len(positions) :])


def unpadded(values: Values, real: Values | None) -> Values:
    """``values`` (samples, ..., positions, ...) at ``real`` positions, (k, ...); else as they are.

    The first axis of that length holds the positions: (samples, heads, positions, features) is what caches of
    attention hold. Two axes alone may be features of whole samples, as many as there are positions.
    """
    if real is None or values.ndim < 3 or len(values) != len(real) or real.shape[1] not in values.shape[1:]:
        return values
    return np.moveaxis(values, values.shape.index(real.shape[1], 1), 1)[real]


def is_scores(output: Values, size: int) -> bool:
    """Whether an output for ``size`` samples holds scores of two or more classes.

    It is floating and, beside its first axis, has one axis with more than one entry.
    """
    if output.dtype.kind != "f" or output.shape[:1] != (size,) or not output.size:
        return False
    return [extent > 1 for extent in output.shape[1:]].count(True) == 1


def _finite(values: Values) -> Values:
    return np.where(np.isfinite(values), values, 0.0)
