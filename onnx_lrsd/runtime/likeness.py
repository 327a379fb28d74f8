"""How alike two streams of values are, beside their relative error: angle, largest difference, top class."""

from __future__ import annotations

import numpy as np

from onnx_lrsd.runtime.divergence import row_blocks
from onnx_lrsd.types import Values


class Likeness:
    """Takes in rows of both streams, batch by batch; entries that are not finite in either are passed over.

    Batches whose shape changed, or that are no floating numbers, are passed over as well.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        """The largest absolute difference."""
        self._dot = self._old = self._new = 0.0
        self._same = self._rows = 0

    def add(self, old: Values, new: Values, size: int) -> None:
        """Take in one batch of ``size`` samples, its rows along the first axis."""
        if old.shape != new.shape or not old.size or not old.dtype.kind == new.dtype.kind == "f":
            return
        if len(old) == size and [extent > 1 for extent in old.shape[1:]].count(True) == 1:
            classes = (values.reshape(size, -1).argmax(axis=1) for values in (old, new))
            self._same += int(np.equal(*classes).sum())
            self._rows += size
        old, new = (values.reshape(len(values), -1) for values in (old, new))
        for rows in row_blocks(old.shape):
            one, two = (values[rows].astype(np.float64).ravel() for values in (old, new))
            finite = np.isfinite(one) & np.isfinite(two)  # masks of attention hold infinities
            if not finite.all():
                one, two = one[finite], two[finite]
            self.largest = max(self.largest, float(np.max(np.abs(one - two), initial=0.0)))
            self._dot += float(one @ two)
            self._old += float(one @ one)
            self._new += float(two @ two)

    @property
    def cosine(self) -> float | None:
        """That of the angle between both streams; None where one of them is zero."""
        product = (self._old * self._new) ** 0.5
        return min(max(self._dot / product, -1.0), 1.0) if product > 0 else None

    @property
    def agreement(self) -> float | None:
        """Share of the samples whose largest entry is the same; None where samples hold no such scores."""
        return self._same / self._rows if self._rows else None
