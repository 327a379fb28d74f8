"""How samples enter the inputs of a model: which axis is the batch, which values fit, and the way in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from onnx_lrsd.errors import DataError
from onnx_lrsd.types import InputSpec, Values

BATCH_NAMES = ("b", "n")
"""What the size of a batch is called, in small letters, if not something with batch in it."""
SCANNED_BYTES = 32 << 20
"""Bytes of an array that are checked at a time."""


@dataclass(frozen=True)
class Slot:
    """How samples enter one input: cast to ``dtype`` (None: as they are), side by side along ``axis``.

    ``axis`` None means that the input has no batch axis: it is fed one sample, as it is. ``shape``
    is the model's own, None where its rank is open.
    """

    dtype: str | None = None
    axis: int | None = 0
    shape: tuple[int | str | None, ...] | None = None

    def lay_out(self, samples: Values) -> Values:
        """Samples (first axis) as the model takes them, contiguous."""
        laid = samples[0] if self.axis is None else np.moveaxis(samples, 0, self.axis)
        if self.dtype == "object" and laid.dtype.kind == "S":
            laid = np.char.decode(laid, "utf-8")
        return np.asarray(laid, dtype=self.dtype, order="C")

    def size_of(self, laid: Values) -> int:
        """How many samples an array holds that was laid out."""
        return 1 if self.axis is None else laid.shape[self.axis]

    def samples_first(self, given: Values) -> Values | None:
        """The array that a user gave, with samples along the first axis; None where it does not fit.

        The rank tells what it is: a batch, one sample (one axis less), or a stack of feeds (one
        more). A batch may have its samples along the model's axis or along the first.
        """
        arrangement = self._arrangement(given.shape)
        if arrangement is None:
            return None
        if arrangement == "one":
            return given[None]
        if arrangement == "stack" and self.axis is not None:
            stacked = np.moveaxis(given, 1 + self.axis, 1)
            return stacked.reshape(-1, *stacked.shape[2:])
        if arrangement == "batch" and self.axis is not None:
            return np.moveaxis(given, self.axis, 0)
        return given

    def leading_entries(self, shape: tuple[int, ...], count: int) -> tuple[int, int] | None:
        """For an array of this ``shape``: its samples, and entries of its first axis that hold ``count``.

        None where the samples do not lie along the first axis, or the shape does not fit.
        """
        arrangement = self._arrangement(shape)
        if arrangement is None or arrangement == "one":
            return None
        if arrangement == "stack" and self.axis is not None:
            each = shape[1 + self.axis]
            return shape[0] * each, min(math.ceil(count / max(each, 1)), shape[0])
        if arrangement == "batch" and self.axis != 0:
            return None
        return shape[0], min(count, shape[0])

    def _arrangement(self, shape: tuple[int, ...]) -> str | None:
        """What an array of this ``shape`` holds; None where it does not fit the input.

        'batch': samples along the model's axis; 'listed': along the first; 'one': one sample; 'stack': feeds
        along the first axis.
        """
        if self.shape is None:
            return "listed" if shape else "one"
        missing = len(self.shape) - len(shape)
        if self.axis is None:
            held = {0: shape, -1: shape[1:]}.get(missing)
            if held is None or not _fits(held, self.shape):
                return None
            return "one" if missing == 0 else "listed"
        rest = _without(self.shape, self.axis)
        if missing == 0 and _fits(_without(shape, self.axis), rest):
            return "batch"
        if missing == 0 and _fits(shape[1:], rest):
            return "listed"
        if missing == 1 and _fits(shape, rest):
            return "one"
        if missing == -1 and _fits(_without(shape[1:], self.axis), rest):
            return "stack"
        return None


Size = TypeVar("Size")


def _without(shape: tuple[Size, ...], axis: int) -> tuple[Size, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _fits(found: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    return len(found) == len(wanted) and all(
        not isinstance(want, int) or want == have for have, want in zip(found, wanted, strict=True)
    )


class InputLayout(NamedTuple):
    """The slot of every input, and the model's fixed batch size if it has one."""

    slots: dict[str, Slot]
    fixed: int | None


def input_layout_of(inputs: Sequence[InputSpec]) -> InputLayout:
    """How samples enter ``inputs``.

    The batch axis is the first, with three exceptions. A named dimension that all inputs share is the
    batch wherever it stands, if it is called so or comes first in most inputs: (sequence, batch, 64) with
    (2, batch, 128). An input whose first size is fixed where others are open has its batch along its
    one open axis, as recurrent states do, or none: (2, ?, 128) beside (?, ?). A scalar has
    none, nor has a lone vector of floating numbers (a sound, say): unless its size is called a batch, it is
    one sample.
    """
    ranked = [spec for spec in inputs if spec.shape]
    if len(ranked) == 1 and all(spec.ranked for spec in inputs) and _is_one_sample(ranked[0]):
        return InputLayout({spec.name: Slot(spec.dtype, None, spec.shape) for spec in inputs}, None)
    shared = _shared_batch(ranked)
    leads = [spec.shape[0] for spec in ranked]
    sizes = [lead for lead in leads if isinstance(lead, int)]
    fixed = None
    if shared is None and sizes and len(sizes) == len(leads):
        fixed = 1 if 1 in sizes else sizes[0]
    found = {}
    for spec in inputs:
        shape = spec.shape if spec.ranked else None
        found[spec.name] = Slot(spec.dtype, _batch_axis(spec, shared, fixed), shape)
    return InputLayout(found, fixed)


def _is_one_sample(spec: InputSpec) -> bool:
    """Whether an input is a vector of floating numbers, and not a batch of such numbers."""
    if len(spec.shape) > 1 or not spec.dtype.startswith(("float", "bfloat")):
        return False
    size = spec.shape[0]
    if isinstance(size, str):
        return size.lower() not in BATCH_NAMES and "batch" not in size.lower()
    return size != 1


def _shared_batch(ranked: Sequence[InputSpec]) -> str | None:
    """The name of the batch dimension, if all inputs have one in common that can be told to be it."""
    names = [d for d in ranked[0].shape if isinstance(d, str)] if ranked else []
    common = [name for name in names if all(name in spec.shape for spec in ranked)]
    for name in common:
        if "batch" in name.lower():
            return name
    leading = [name for name in common if 2 * sum(spec.shape[0] == name for spec in ranked) >= len(ranked)]
    return leading[0] if leading else None


def _batch_axis(spec: InputSpec, shared: str | None, fixed: int | None) -> int | None:
    if not spec.ranked:
        return 0
    if not spec.shape:
        return None
    if shared is not None:
        return spec.shape.index(shared)
    lead = spec.shape[0]
    if not isinstance(lead, int) or lead == fixed:
        return 0
    free = [axis for axis, size in enumerate(spec.shape) if not isinstance(size, int)]
    return free[0] if fixed is None and lead > 1 and len(free) == 1 else None


def check_values(array: Values, spec: InputSpec, where: str) -> str:
    """A note when the values must be cast to what the model wants. Raises DataError when they cannot."""
    have, want = array.dtype, spec.dtype
    if want == "object" or have.kind not in "biuf":
        if want == "object" and (have.kind in "US" or all(isinstance(x, str) for x in array.flat)):
            return ""
        if have.name == want:  # a type that NumPy itself does not know, such as bfloat16
            return ""
        wants = "text" if want == "object" else want
        raise DataError(f"{where} holds {have.name} but the model wants {wants}: convert it first.")
    low, high, whole = _range(array, where, have.kind == "f" and np.dtype(want).kind in "biu")
    if have.name == want:
        return ""
    if not whole:
        raise DataError(f"{where} holds fractions but the model wants {want}: check which array is which.")
    if not _holds(want, low, high):
        raise DataError(f"{where} reaches from {low:g} to {high:g}, which {want} cannot hold: rescale it.")
    return f"{spec.name} was converted from {have.name} to {want}, values as they are."


def _range(array: Values, where: str, fractions: bool) -> tuple[float, float, bool]:
    """Least and greatest value, and whether all are whole numbers where ``fractions`` asks for it.

    Part by part, to save memory.
    """
    low, high, whole = math.inf, -math.inf, True
    rows = max(1, SCANNED_BYTES // max(array[:1].nbytes, 1))
    for start in range(0, len(array) if array.size else 0, rows):
        part = array[start : start + rows]
        least, most = float(part.min()), float(part.max())  # NaN if there is one
        if not math.isfinite(least) or not math.isfinite(most):
            raise DataError(f"{where} has NaN or infinite values: clean the samples first.")
        low, high = min(low, least), max(high, most)
        whole = whole and (not fractions or bool((part == np.rint(part)).all()))
    return low, high, whole


def _holds(dtype: str, low: float, high: float) -> bool:
    kind = np.dtype(dtype).kind
    if kind == "b":
        return low >= 0 and high <= 1
    if kind in "iu":
        limits = np.iinfo(dtype)
        return low >= limits.min and high <= limits.max
    return max(-low, high) <= float(np.finfo(dtype).max) if kind == "f" else True
