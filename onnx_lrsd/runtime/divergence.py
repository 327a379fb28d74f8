"""How far apart two streams of outputs are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lrsd.types import Values

_ROUNDING = 1e-14
"""A spread below this share of the energy is what float32 leaves of a constant."""
LITTLE = 1e-4
"""A spread below this share of the energy is little: 1 % of the values, as a root."""
MOST_LOGIT = 8.0
"""Logits count up to here: beyond it, where probabilities are within .0004 of 0 or 1, nobody looks."""

CACHED_ENTRIES = 1 << 16
"""Entries of a block that is worked on at once."""

Owners = npt.NDArray[np.int64]


class Divergence:
    """Streams |new - old|^2 / |old - E old|^2 of one output in float64, batch by batch.

    E old is taken over all samples, element by element; where an output never varies, or its shape
    does, |old|^2 stands below the line. What is no floating number counts as the share of entries that
    differ, and a batch whose shape changed as wholly different. NaN equals NaN and infinity itself;
    a value that is finite in one stream only makes the error infinite.

    What each sample adds above and below the line is kept, for intervals. Below it these are shares of the
    exact sum: deviations are from the mean of the batches so far.

    Entries along ``positions``, axes whose size differs from sample to sample, count as samples do.
    """

    def __init__(self, positions: tuple[int, ...] = ()) -> None:
        self.positions = positions
        self._missed: list[Values] = []
        self._energy: list[Values] = []
        self._spread: list[Values] = []
        self._mean: Values | None = None
        self._rows = 0
        self._uneven = False

    def add(self, old: Any, new: Any, real: Values | None = None, size: int | None = None) -> None:
        """Take in the outputs of one batch of ``size`` samples, one where that is not known.

        Where ``real`` (samples, positions) says so, without padding.
        """
        one, two = (positions_first(as_array(value), real, self.positions) for value in (old, new))
        self.add_rows(one, two, owners(one, real, size))

    def add_rows(self, old: Values, new: Values, owner: Owners) -> None:
        """Take in one batch; its rows, along the first axis, are of the samples in ``owner``, (rows,)."""
        count = int(owner.max(initial=0)) + 1
        if old.shape != new.shape:
            self._uneven = True
            energy = _energy(old) if old.dtype.kind == "f" else float(max(old.size, 1))
            self._keep(np.array([energy or 1.0]), np.array([energy or 1.0]), np.zeros(1))
        elif old.dtype.kind != "f":
            self._uneven = True
            differ = _by_row(old != new).astype(np.float64).sum(axis=1)
            sizes = np.full(len(differ), old.size / max(len(differ), 1))
            self._keep(_per_owner(differ, owner, count), _per_owner(sizes, owner, count), np.zeros(count))
        elif old.size:
            self._add_numbers(_by_row(old), _by_row(new), owner, count)

    def _add_numbers(self, old: Values, new: Values, owner: Owners, count: int) -> None:
        missed, energy = np.empty(len(old)), np.empty(len(old))
        for rows in row_blocks(old.shape):
            known = old[rows].astype(np.float64)
            missed[rows] = _squared_change(known, new[rows])
            energy[rows] = _squares(known)
        if not np.isfinite(energy).all():
            old = _finite(old)
            energy = np.concatenate(
                [_squares(old[rows].astype(np.float64)) for rows in row_blocks(old.shape)]
            )
        self._keep(
            _per_owner(missed, owner, count),
            _per_owner(energy, owner, count),
            _per_owner(self._deviations(old), owner, count),
        )

    def _deviations(self, rows: Values) -> Values:
        """Squared deviations of ``rows`` from the mean so far, scaled to what they add to the exact sum."""
        first = self._mean is None
        if self._mean is None:
            self._mean = rows.mean(axis=0, dtype=np.float64)
        if rows.shape[1] != len(self._mean):
            self._uneven = True
            return np.zeros(len(rows))
        found, shift = np.empty(len(rows)), np.zeros_like(self._mean)
        for block in row_blocks(rows.shape):
            centred = rows[block] - self._mean
            found[block] = _squares(centred)
            with np.errstate(over="ignore", invalid="ignore"):
                shift += centred.sum(axis=0)
        with np.errstate(over="ignore", invalid="ignore"):
            total, known = float(found.sum()), 0 if first else self._rows
            shift /= len(rows)
            self._rows = known + len(rows)
            self._mean = self._mean + shift * (len(rows) / self._rows)
            exact = total - float(np.sum(shift**2)) * len(rows) ** 2 / self._rows
            return found * (max(exact, 0.0) / total) if total > 0 else found

    def _keep(self, missed: Values, energy: Values, spread: Values) -> None:
        self._missed.append(missed)
        self._energy.append(energy)
        self._spread.append(spread)

    def relative(self) -> float:
        """The error so far; 0 where nothing differs."""
        missed, energy = (float(values.sum()) for values in self.by_sample())
        if missed <= 0:
            return 0.0
        return missed / energy if energy > 0 else float("inf")

    def by_sample(self) -> tuple[Values, Values]:
        """Numerator and denominator for each sample, or for each batch where samples are not told apart."""
        below = self._spread if self._varies(_ROUNDING) else self._energy
        nothing = [np.zeros(0)]
        return np.concatenate(self._missed or nothing), np.concatenate(below or nothing)

    @property
    def constant(self) -> bool:
        """Whether what was compared did not vary over several rows."""
        return self._rows > 1 and not self._uneven and not self._varies(_ROUNDING)

    @property
    def hardly_varies(self) -> bool:
        """Whether the spread of the original's values is small beside their mean square."""
        return self._rows > 1 and not self._uneven and not self._varies(LITTLE)

    def _varies(self, share: float) -> bool:
        if self._uneven or self._rows < 2:
            return False
        spread, energy = (sum(float(v.sum()) for v in values) for values in (self._spread, self._energy))
        return spread > share * energy


def owners(values: Values, real: Values | None, size: int | None) -> Owners:
    """The sample that each row of ``values`` belongs to: of ``size`` samples, or of ``real`` positions.

    All belong to the first where that cannot be told: a batch is then one sample.
    """
    rows = len(values) if values.ndim else 1
    if real is not None and rows == np.count_nonzero(real):
        return np.asarray(np.nonzero(real)[0], dtype=np.int64)
    if size and rows and rows % size == 0:
        return np.repeat(np.arange(size), rows // size)
    return np.zeros(rows, dtype=np.int64)


def clipped_logits(probabilities: Values) -> Values:
    """log(p / (1 - p)), at most MOST_LOGIT either way: what stood in front of a Sigmoid.

    For a Softmax it is the logit of each class against all others. So saturated probabilities keep a
    difference that they hide themselves, and logits that are far from any decision count for nothing.
    """
    edge = 1 / (1 + np.exp(MOST_LOGIT))
    given = _by_row(probabilities)
    values = np.empty(given.shape)
    for rows in row_blocks(given.shape):
        p = np.clip(given[rows].astype(np.float64), edge, 1 - edge)
        values[rows] = np.log(p / (1 - p))
    return values.reshape(probabilities.shape)


def change(old: Values, new: Values) -> float:
    """|new - old|^2 of a batch, as ``Divergence`` has it."""
    if old.shape != new.shape:
        return _energy(old) or 1.0
    return float(_squared_change(_by_row(old), _by_row(new)).sum()) if old.size else 0.0


def _energy(values: Values) -> float:
    """The sum of the squares of what is finite, in float64."""
    with np.errstate(over="ignore"):
        return float(np.sum(np.square(_finite(values), dtype=np.float64)))


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the rows of (rows, entries), small enough for a processor's cache in double precision."""
    size = max(CACHED_ENTRIES // max(shape[1], 1), 1)
    return (slice(start, start + size) for start in range(0, shape[0], size))


def _squares(rows: Values) -> Values:
    """|row|^2 of each row; not finite where an entry is not, or overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        found: Values = np.einsum("ij,ij->i", rows, rows)
    return found


def _squared_change(old: Values, new: Values) -> Values:
    """|new - old|^2 of each row, in float64."""
    with np.errstate(invalid="ignore", over="ignore"):
        moved = np.subtract(new, old, dtype=np.float64)
        squares: Values = np.einsum("ij,ij->i", moved, moved)
        if not np.isfinite(squares).all():
            same = (old == new) | (np.isnan(old) & np.isnan(new))
            squares = (np.where(same, 0.0, moved) ** 2).sum(axis=1)
    return np.where(np.isfinite(squares), squares, np.inf)


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
    """``values`` without padding, as ``unpadded`` has them, or with ``positions`` counted as samples.

    A value without axes is one row.
    """
    values = np.atleast_1d(values)
    found = unpadded(values, real)
    if found is not values or not positions or values.ndim <= max(positions):
        return found
    moved = np.moveaxis(values, positions, range(1, 1 + len(positions)))
    return moved.reshape(-1, *moved.shape[1 + len(positions) :])


def row_axes(values: Values, real: Values | None, positions: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of ``values`` that ``positions_first`` puts into its rows, beside the first."""
    if unpadded(values, real) is not values and real is not None:
        return (values.shape.index(real.shape[1], 1),)
    return positions if positions and values.ndim > max(positions) else ()


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


def _by_row(values: Values) -> Values:
    return values.reshape(len(values), -1) if values.ndim and values.size else values.reshape(1, -1)


def _per_owner(values: Values, owner: Owners, count: int) -> Values:
    if not np.isfinite(values).all():
        return np.array([values[owner == index].sum() for index in range(count)])
    return np.bincount(owner, values, count)


def _finite(values: Values) -> Values:
    return np.where(np.isfinite(values), values, 0.0)
