"""Samples: read from what users have, checked against what the model wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lrsd.data.input_layout import Slot, check_values, slots
from onnx_lrsd.data.readers import LABELS, LONE, RawFeed, feeds
from onnx_lrsd.errors import DataError, LrsdError
from onnx_lrsd.types import InputSpec, Values

MOST_IN_BATCH = 32
BATCH_BYTES = 256 << 20
"""Inputs and activations of one batch, at most."""
RUN_BYTES, ACTIVATIONS_PER_INPUT = 64 << 20, 16
"""Bytes of activations that may live at once in a run of a whole model, and how many there are, at a guess on
the high side, for each byte of input."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples for a model: input name -> array whose first axis counts samples.

    ``arrays`` are as the user gave them, possibly mapped from a file; ``batches`` casts and lays
    them out as the model wants, by ``slots``. What is the same for every sample and has no batch
    axis (a sampling rate, say) is in ``constants``. ``labels`` has one entry for each ``labelled``
    samples that follow each other: 1, or 2 for pairs that are compared, say.
    ``fixed`` is the model's fixed batch size, or None. ``notes`` say what was converted or dropped.
    ``mask`` is the input (samples, positions) that is 0 at padding, where padding is known not to matter.
    """

    arrays: Mapping[str, Values]
    constants: Mapping[str, Values] = field(default_factory=dict)
    labels: Values | None = None
    source: str = "the given data"
    fixed: int | None = None
    notes: tuple[str, ...] = ()
    slots: Mapping[str, Slot] = field(default_factory=dict)
    labelled: int = 1
    mask: str | None = None

    @property
    def count(self) -> int:
        """Number of samples; 1 for a model that is fed nothing but constants."""
        return min((len(array) for array in self.arrays.values()), default=1)

    @property
    def smallest_batch(self) -> int:
        """Samples in the smallest feed the model takes."""
        return self.fixed or 1

    def batch_size(self, bytes_each: int = 0, most_bytes: int = BATCH_BYTES) -> int:
        """Samples to run at once when activations take ``bytes_each`` per sample beside the inputs.

        The fixed batch size, if there is one; else at most 32, and at most ``most_bytes`` in all.
        """
        each = bytes_each + sum(array[:1].nbytes for array in self.arrays.values())
        return self.fixed or max(1, min(MOST_IN_BATCH, most_bytes // max(each, 1)))

    def batches(self, size: int | None = None) -> Iterator[dict[str, Values]]:
        """Feeds of ``size`` samples (the fixed size, if there is one); the last may be smaller."""
        size = self.fixed or size or self.batch_size()
        for start in range(0, self.count, size):
            feed = {
                name: self.slots.get(name, Slot()).lay_out(array[start : start + size])
                for name, array in self.arrays.items()
            }
            yield feed | dict(self.constants)

    def size_of(self, feed: Mapping[str, Values]) -> int:
        """How many samples a feed holds."""
        return min((self.slots.get(name, Slot()).size_of(feed[name]) for name in self.arrays), default=1)

    def real(self, feed: Mapping[str, Values]) -> Values | None:
        """Which positions of a feed are no padding, (samples, positions); None where all count."""
        return None if self.mask is None else feed[self.mask] != 0

    @property
    def filled(self) -> float:
        """Share of the positions that are no padding."""
        return 1.0 if self.mask is None else float(np.mean(self.arrays[self.mask] != 0))

    def take(self, which: slice | npt.NDArray[np.int64] | Sequence[int]) -> Samples:
        """The samples at these positions. A slice leaves a mapped array in its file, positions copy.

        Samples that share a label are taken together or not at all.
        """
        index = which if isinstance(which, slice) else np.asarray(which, dtype=np.int64)
        arrays = {name: array[index] for name, array in self.arrays.items()}
        labels = self.labels
        if labels is not None:
            labels = labels[np.arange(self.count)[index][:: self.labelled] // self.labelled]
        return replace(self, arrays=arrays, labels=labels)

    def split(self, share: float | int, seed: int) -> tuple[Samples, Samples]:
        """Two disjoint parts drawn at random, in their old order; each holds at least one batch.

        Samples that share a label stay together.

        The second has ``share`` of the samples, or ``share`` samples when that is a whole number.
        Raises DataError when there are not enough for two parts.
        """
        each = lcm(self.smallest_batch, self.labelled)
        groups = self.count // each
        if groups < 2:
            raise DataError(
                f"{self.source} holds {_counted(self.count)}; at least {2 * each} are needed, "
                "to calibrate on some and verify on others: give more samples."
            )
        wanted = share / each if isinstance(share, int) else groups * share
        second = min(max(round(wanted), 1), groups - 1)
        order = np.random.default_rng(seed).permutation(groups)
        parts = np.sort(order[second:]), np.sort(order[:second])
        first, last = ((part[:, None] * each + np.arange(each)).ravel() for part in parts)
        return self.take(first), self.take(last)


def read_samples(source: Any, inputs: Sequence[InputSpec], *, limit: int | None = None) -> Samples:
    """Read samples and check them against the model's ``inputs``; at most ``limit``, the first ones.

    ``source`` is a path: .npz with arrays named like the inputs (and ``labels``), .npy for a model
    with one input, Polygraphy's JSON inputs, a folder of these, or ``file.py:function`` that yields
    feeds (dicts of arrays); or in Python Samples, a dict of arrays, an array, an iterable of feeds, or
    anything with ``get_next`` as ONNX Runtime's CalibrationDataReader.

    The rank tells what an array is: that of the model's input, a batch (any number of samples,
    along the model's batch axis or the first); one less, a single sample; one more, a stack of
    feeds. An input without a batch axis may be given once for all samples or once for each.
    Raises DataError when there are fewer than two samples, or they do not fit.

    >>> import numpy as np
    >>> image = InputSpec("image", "float32", ("N", 3, 8, 8))
    >>> samples = read_samples({"image": np.zeros((10, 3, 8, 8), np.uint8)}, [image])
    >>> samples.count, [len(feed["image"]) for feed in samples.batches(4)]
    (10, [4, 4, 2])
    >>> samples.notes
    ('image was converted from uint8 to float32, values as they are.',)
    """
    if isinstance(source, Samples):
        _must_be_named({*source.arrays, *source.constants}, source.source, inputs)
        return source if limit is None else source.take(slice(limit))
    name, stream = feeds(source, [spec.name for spec in inputs])
    return _Gathered(name, inputs).take_in(stream, limit).samples(limit)


def batch_to_run(samples: Samples) -> int:
    """Samples to run at once through a whole model."""
    each = ACTIVATIONS_PER_INPUT * sum(array[:1].nbytes for array in samples.arrays.values())
    return samples.batch_size(each, RUN_BYTES)


def as_fed(samples: Samples, run: Callable[[Mapping[str, Values]], Any]) -> Samples:
    """``samples``, to be fed one by one where ``run`` takes one but not two.

    An exporter may declare an open batch and yet write a batch of one into a Reshape.
    """
    if samples.fixed is not None or samples.count < 2:
        return samples
    try:
        run(next(samples.batches(2)))
    except LrsdError:
        run(next(samples.batches(1)))  # raises what is wrong where the batch is not to blame
        return replace(samples, fixed=1)
    return samples


class _Gathered:
    """The arrays of a stream of feeds, samples first, until they are put together."""

    def __init__(self, source: str, inputs: Sequence[InputSpec]) -> None:
        self.source, self.inputs = source, inputs
        self.slots, self.fixed = slots(inputs)
        self.parts: dict[str, list[Values]] = {spec.name: [] for spec in inputs}
        self.labels: list[Values] = []
        self.count = 0

    def take_in(self, stream: Iterator[RawFeed], limit: int | None) -> _Gathered:
        for feed in stream:
            arrays = self._named(feed)
            sizes = {}
            for spec in self.inputs:
                part = self.slots[spec.name].samples_first(arrays[spec.name])
                if part is None:
                    raise DataError(
                        f"{spec.name} in {self.source} has shape {list(arrays[spec.name].shape)}; "
                        f"the model wants {_wants(self.inputs)}: bring the samples to that shape."
                    )
                self.parts[spec.name].append(part)
                sizes[spec.name] = len(part)
            self._even_out(sizes)
            if limit is not None and self.count >= limit:
                break
        if not self.count:
            raise DataError(f"{self.source} holds no samples: give at least two.")
        return self

    def _named(self, feed: Any) -> dict[str, Values]:
        """The arrays of one feed by input name; its labels are put aside."""
        if isinstance(feed, np.ndarray):
            feed = {LONE: feed}
        if not isinstance(feed, Mapping):
            raise DataError(
                f"{self.source} yields {type(feed).__name__} where a dict of input name to array is wanted: "
                f"yield {_wants(self.inputs)}."
            )
        arrays = {str(name): np.asarray(value) for name, value in feed.items()}
        if LABELS not in self.parts and LABELS in arrays:
            self.labels.append(np.atleast_1d(arrays.pop(LABELS)))
        if len(arrays) == 1 and len(self.inputs) == 1 and self.inputs[0].name not in arrays:
            arrays = {self.inputs[0].name: next(iter(arrays.values()))}
        _must_be_named(set(arrays), self.source, self.inputs)
        return arrays

    def _even_out(self, sizes: Mapping[str, int]) -> None:
        """Repeat what a feed gives once for all of its samples; everything else must agree."""
        size = max((n for name, n in sizes.items() if self.slots[name].axis is not None), default=0)
        size = size or max(sizes.values(), default=1)
        for name, found in sizes.items():
            if found == 1 and self.slots[name].axis is None:
                part = self.parts[name][-1]
                self.parts[name][-1] = np.broadcast_to(part, (size, *part.shape[1:]))
            elif found != size:
                listed = ", ".join(f"{name} {n}" for name, n in sizes.items())
                raise DataError(
                    f"{self.source} holds different numbers of samples ({listed}): give as many for each."
                )
        self.count += size

    def samples(self, limit: int | None) -> Samples:
        notes: list[str] = []
        count = self.count if limit is None else min(limit, self.count)
        arrays = {name: self._joined(name, parts)[:count] for name, parts in self.parts.items()}
        labels, labelled = self._labels(count, notes)
        for spec in self.inputs:
            if note := check_values(arrays[spec.name], spec, f"{spec.name} in {self.source}"):
                notes.append(note)
        loose = [spec.name for spec in self.inputs if self.slots[spec.name].axis is None]
        constants = {}
        for name in loose if len(loose) < len(self.inputs) else ():
            array = arrays[name]
            if array.strides[0] == 0 or (array == array[:1]).all():
                constants[name] = self.slots[name].lay_out(arrays.pop(name)[:1])
        fixed = self.fixed
        if any(name in arrays for name in loose):  # it differs from sample to sample, so feed one by one
            if fixed is not None and fixed > 1:
                raise DataError(
                    f"{', '.join(n for n in loose if n in arrays)} in {self.source} must be the same for all "
                    f"samples of a batch of {fixed}: give one value."
                )
            fixed = 1
        whole = count - count % lcm(fixed or 1, labelled)
        if whole < count:
            notes.append(f"The model takes batches of {fixed}: {_counted(count - whole)} left out.")
        if whole < 2:
            why = f"the model takes batches of {fixed}" if (fixed or 1) > 1 else "one is needed to verify on"
            least = 2 * (fixed or 1)
            raise DataError(f"{self.source} holds {_counted(count)} but {why}: give at least {least}.")
        found = Samples(
            arrays=arrays,
            constants=constants,
            labels=labels,
            source=self.source,
            fixed=fixed,
            notes=tuple(notes),
            slots=self.slots,
            labelled=labelled,
        )
        return found if whole == count or not arrays else found.take(slice(whole))

    def _joined(self, name: str, parts: Sequence[Values]) -> Values:
        if len(parts) == 1:
            return parts[0]
        try:
            return np.concatenate(parts)
        except ValueError as error:
            sizes = sorted({part.shape[1:] for part in parts})
            raise DataError(
                f"The samples of {name} in {self.source} differ in shape, as {list(sizes[0])} and "
                f"{list(sizes[-1])} do: bring them to one shape, by padding for example."
            ) from error

    def _labels(self, count: int, notes: list[str]) -> tuple[Values | None, int]:
        """Labels, and how many samples share one."""
        if not self.labels:
            return None, 1
        labels = np.concatenate([np.ravel(part) for part in self.labels])
        if len(labels) > 1 and self.count % len(labels) == 0:
            labelled = self.count // len(labels)
            return labels[: -(-count // labelled)], labelled
        notes.append(f"There are {len(labels)} labels for {_counted(self.count)}: they were not used.")
        return None, 1


def _must_be_named(names: set[str], source: str, inputs: Sequence[InputSpec]) -> None:
    wanted = {spec.name for spec in inputs}
    if names == wanted:
        return
    missing, unknown = sorted(wanted - names), sorted(names - wanted)
    strangers = ", ".join(name or "one array without a name" for name in unknown)
    if missing:
        said = f"has no {', '.join(missing)}" + (f" but {strangers}" if unknown else "")
    else:
        said = f"has {strangers}, which the model does not take"
    raise DataError(f"{source} {said}: name the arrays as the model does, {_wants(inputs)}.")


def _wants(inputs: Sequence[InputSpec]) -> str:
    def dims(spec: InputSpec) -> str:
        return ", ".join("?" if d is None else str(d) for d in spec.shape) if spec.ranked else "..."

    return ", ".join(f"{spec.name} {spec.dtype}[{dims(spec)}]" for spec in inputs) or "no inputs"


def _counted(count: int) -> str:
    return f"{count} sample{'s' * (count != 1)}"
