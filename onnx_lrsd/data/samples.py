"""Samples: read from what users have, checked against what the model wants.

Samples that differ in shape (texts, sounds, pictures of their own sizes) are held in groups of like shape,
and no batch mixes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from math import ceil, lcm, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lrsd.data.input_layout import Slot, check_values, input_layout_of
from onnx_lrsd.data.readers import LABELS, UNNAMED, RawFeed, ShapesByInput, read_feeds
from onnx_lrsd.errors import DataError, LrsdError
from onnx_lrsd.types import Feed, InputSpec, Values
from onnx_lrsd.wording import counted

MOST_IN_BATCH = 32
BATCH_BYTES = 256 << 20
"""Inputs and activations of one batch, at most."""
RUN_BYTES, ACTIVATIONS_PER_INPUT = 64 << 20, 16
"""Bytes of activations that may live at once in a run of a whole model, and how many there are, at a guess on
the high side, for each byte of input."""

Group = Mapping[str, Values]
"""Input name -> array whose first axis counts samples; all of one length, as their samples of one shape."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples for a model, in groups of like shape.

    The arrays in ``groups`` are as the user gave them, possibly mapped from a file; ``batches`` casts and
    lays them out as the model wants, by ``slots``. What is the same for every sample and has no batch
    axis (a sampling rate, say) is in ``constants``. ``labels`` has one entry for each ``labelled``
    samples that follow each other: 1, or 2 for pairs that are compared, say.
    ``fixed`` is the model's fixed batch size, or None; each group is a multiple of it. ``notes`` say what was
    converted or dropped.
    ``mask`` is the input (samples, positions) that is 0 at padding, where padding is known not to matter.
    """

    groups: Sequence[Group]
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
        return sum(self._counts)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that samples differ in; the others are in ``constants``."""
        return tuple(self.groups[0])

    @property
    def ragged(self) -> bool:
        """Whether samples differ in shape."""
        return len({_shape_key(group) for group in self.groups}) > 1

    @property
    def all_alike(self) -> bool:
        """Whether two samples or more are all the same in every input."""
        return self.count > 1 and not self.ragged and all(map(self._same_as_first, self.groups))

    def _same_as_first(self, group: Group) -> bool:
        for name, array in group.items():
            first = self.groups[0][name][:1]
            for start in range(0, self.count, MOST_IN_BATCH):
                block = array[start : start + MOST_IN_BATCH]
                numbers = block.dtype.kind == "f"
                if not np.array_equal(block, np.broadcast_to(first, block.shape), equal_nan=numbers):
                    return False
        return True

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Entries of all inputs of each sample, (count,)."""
        return np.repeat([_entries(group) for group in self.groups], self._counts)

    @property
    def smallest_batch(self) -> int:
        """Samples in the smallest feed the model takes."""
        return self.fixed or 1

    @property
    def _together(self) -> int:
        """Samples that are taken together or not at all: a batch, and all that share a label."""
        return lcm(self.smallest_batch, self.labelled)

    @property
    def _counts(self) -> list[int]:
        return [min((len(array) for array in group.values()), default=1) for group in self.groups]

    def batch_size(self, bytes_each: int = 0, most_bytes: int = BATCH_BYTES) -> int:
        """Samples to run at once when activations take ``bytes_each`` per sample beside the inputs.

        The fixed batch size, if there is one; else at most 32, and at most ``most_bytes`` in all.
        """
        each = bytes_each + max(_bytes_each(group) for group in self.groups)
        return self.fixed or max(1, min(MOST_IN_BATCH, most_bytes // max(each, 1)))

    def batches(self, size: int | None = None) -> Iterator[dict[str, Values]]:
        """Feeds of ``size`` samples (the fixed size, if there is one); the last of a group may be smaller.

        Samples keep their order.
        """
        size = self.fixed or size or self.batch_size()
        for group, count in zip(self.groups, self._counts, strict=True):
            for start in range(0, count, size):
                yield self._feed(group, slice(start, start + size))

    def batch_count(self, size: int) -> int:
        """How many feeds ``batches(size)`` gives."""
        return sum(ceil(count / (self.fixed or size)) for count in self._counts)

    def example(self) -> Feed:
        """A smallest batch of samples of a middle size: what costs and times are stated for.

        The first batch where all have one shape.
        """
        if not self.ragged:
            return self._feed(self.groups[0], slice(0, self.smallest_batch))
        middle = int(np.argsort(self.sizes, kind="stable")[self.count // 2])
        owner = np.repeat(np.arange(len(self.groups)), self._counts)[middle]
        return self._feed(self.groups[owner], slice(0, self.smallest_batch))

    def extremes(self) -> list[Feed]:
        """A smallest batch of the shortest and of the longest samples along every axis that varies."""
        lengths = np.array([_lengths(group) for group in self.groups])
        varying = np.flatnonzero(np.ptp(lengths, axis=0))
        chosen = {int(end(lengths[:, axis])) for axis in varying for end in (np.argmin, np.argmax)}
        return [self._feed(self.groups[index], slice(0, self.smallest_batch)) for index in sorted(chosen)]

    def _feed(self, group: Group, which: slice) -> dict[str, Values]:
        laid = {name: self.slots.get(name, Slot()).lay_out(array[which]) for name, array in group.items()}
        return laid | dict(self.constants)

    def size_of(self, feed: Mapping[str, Values]) -> int:
        """How many samples a feed holds."""
        return min((self.slots.get(name, Slot()).size_of(feed[name]) for name in self.inputs), default=1)

    def real(self, feed: Mapping[str, Values]) -> Values | None:
        """Which positions of a feed are no padding, (samples, positions); None where all count."""
        return None if self.mask is None else feed[self.mask] != 0

    @property
    def filled(self) -> float:
        """Share of the positions that are no padding."""
        if self.mask is None:
            return 1.0
        masks = [group[self.mask] for group in self.groups]
        return sum(int(np.count_nonzero(mask)) for mask in masks) / sum(mask.size for mask in masks)

    def by_input(self) -> dict[str, Any]:
        """The samples by name of the input: an array, or a list of one array each where shapes differ."""
        if not self.ragged and len(self.groups) == 1:
            return dict(self.groups[0])
        return {name: [sample for group in self.groups for sample in group[name]] for name in self.inputs}

    def take(self, which: slice | npt.NDArray[np.int64] | Sequence[int]) -> Samples:
        """The samples at these positions. A slice leaves a mapped array in its file, positions copy.

        Samples that share a label are taken together or not at all.
        """
        index = np.arange(self.count)[which if isinstance(which, slice) else np.asarray(which, np.int64)]
        labels = self.labels
        if labels is not None:
            labels = labels[index[:: self.labelled] // self.labelled]
        if len(self.groups) == 1:
            chosen = which if isinstance(which, slice) else index
            return replace(self, groups=(_part(self.groups[0], chosen),), labels=labels)
        owners = np.repeat(np.arange(len(self.groups)), self._counts)[index]
        starts = np.cumsum([0, *self._counts])
        bounds = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(index)]
        groups = [
            _part(self.groups[owners[begin]], index[begin:end] - starts[owners[begin]])
            for begin, end in pairwise(bounds)
            if begin < end
        ]
        return replace(self, groups=groups or (_part(self.groups[0], slice(0)),), labels=labels)

    def some(self, most: int) -> Samples:
        """At most ``most`` samples: the first ones, or where they differ in shape, some of all sizes.

        They fill whole batches; one batch at least.
        """
        if self.count <= most:
            return self.take(slice(most))
        each = self._together
        if not self.ragged:
            return self.take(slice(max(most - most % each, each)))
        blocks = np.linspace(0, self.count // each - 1, max(most // each, 1)).astype(np.int64)
        return self.take(_blocks(np.unique(blocks), each))

    def split(self, share: float | int, seed: int) -> tuple[Samples, Samples]:
        """Two disjoint parts drawn at random, in their old order; each holds at least one batch.

        Samples that share a label stay together. The second has ``share`` of the samples, or ``share``
        samples when that is a whole number. Raises DataError when there are not enough for two parts.
        """
        each = self._together
        blocks = self.count // each
        if blocks < 2:
            raise DataError(
                f"{self.source} holds {counted(self.count, 'sample')}; at least {2 * each} are needed, "
                "to calibrate on some and verify on others: give more samples."
            )
        wanted = share / each if isinstance(share, int) else blocks * share
        second = min(max(round(wanted), 1), blocks - 1)
        order = np.random.default_rng(seed).permutation(blocks)
        return (
            self.take(_blocks(np.sort(order[second:]), each)),
            self.take(_blocks(np.sort(order[:second]), each)),
        )

    def parts(self, size: int, seed: int = 0) -> Iterator[Samples]:
        """All samples in disjoint parts of about ``size``, drawn at random, each in its old order."""
        each = self._together
        order = np.random.default_rng(seed).permutation(ceil(self.count / each))
        some = max(size // each, 1)
        for start in range(0, len(order), some):
            positions = _blocks(np.sort(order[start : start + some]), each)
            yield self.take(positions[positions < self.count])


def read_samples(
    source: Any, inputs: Sequence[InputSpec], *, limit: int | None = None, fewest: int = 2
) -> Samples:
    """Read samples and check them against the model's ``inputs``; at most ``limit``, the first ones.

    ``source`` is a path: .npz with arrays named like the inputs (and ``labels``), .npy for a model
    with one input, Polygraphy's JSON inputs, a folder of these, or ``file.py:function`` that yields
    feeds (dicts of arrays); or in Python Samples, a dict of arrays, an array, an iterable of feeds, or
    anything with ``get_next`` as ONNX Runtime's CalibrationDataReader.

    The rank tells what an array is: that of the model's input, a batch (any number of samples,
    along the model's batch axis or the first); one less, a single sample; one more, a stack of
    feeds. An input without a batch axis may be given once for all samples or once for each.

    Samples may differ in shape: from feed to feed; in a dict that holds lists of arrays; in an .npz whose
    arrays are numbered, ``ids/0``, ``ids/1``, and so on, or, for a model with one input, were given to
    numpy.savez one after the other. Those of one shape are put together then, labels with them.
    Raises DataError when there are fewer than ``fewest`` samples, 2 or 1, or they do not fit.

    >>> import numpy as np
    >>> image = InputSpec("image", "float32", ("N", 3, None, None))
    >>> samples = read_samples({"image": np.zeros((10, 3, 8, 8), np.uint8)}, [image])
    >>> samples.count, [len(feed["image"]) for feed in samples.batches(4)]
    (10, [4, 4, 2])
    >>> samples.notes
    ('image was converted from uint8 to float32, values as they are.',)
    >>> pictures = [np.zeros((3, height, 8), np.float32) for height in (6, 8, 6)]
    >>> [feed["image"].shape for feed in read_samples({"image": pictures}, [image]).batches(4)]
    [(2, 3, 6, 8), (1, 3, 8, 8)]
    """
    if isinstance(source, Samples):
        _must_be_named({*source.inputs, *source.constants}, source.source, inputs)
        return source if limit is None else source.some(limit)
    gathered = _Gathered(inputs)

    def needed(shapes: ShapesByInput) -> Mapping[str, int]:
        return {} if limit is None else gathered.needed(shapes, limit)

    gathered.source, stream = read_feeds(source, [spec.name for spec in inputs], needed)
    return gathered.take_in(stream, limit).samples(limit, fewest)


def batch_to_run(samples: Samples) -> int:
    """Samples to run at once through a whole model."""
    each = ACTIVATIONS_PER_INPUT * max(_bytes_each(group) for group in samples.groups)
    return samples.batch_size(each, RUN_BYTES)


def run_on(samples: Samples) -> Samples:
    """``samples`` with nothing but what a run of a model depends on, in arrays of plain types."""

    def plain(array: Values) -> Values:
        return array.astype(str) if array.dtype.kind == "O" else array

    groups = tuple({name: plain(array) for name, array in group.items()} for group in samples.groups)
    constants = {name: plain(array) for name, array in samples.constants.items()}
    return replace(samples, groups=groups, constants=constants, labels=None, source="", notes=())


def as_fed(samples: Samples, run: Callable[[Mapping[str, Values]], Any]) -> Samples:
    """``samples``, to be fed one by one where ``run`` takes one but not two.

    An exporter may declare an open batch and yet write a batch of one into a Reshape.
    """
    if samples.fixed is not None:
        return samples
    pair = next((feed for feed in samples.batches(2) if samples.size_of(feed) == 2), None)
    if pair is None:
        return samples
    try:
        run(pair)
    except LrsdError:
        run(next(samples.batches(1)))  # raises what is wrong where the batch is not to blame
        return replace(samples, fixed=1)
    return samples


def position_axes(
    samples: Samples, run: Callable[[Mapping[str, Values]], Mapping[str, Any]]
) -> dict[str, tuple[int, ...]]:
    """The axes of each output of ``run`` whose sizes go with those of the samples; none for most.

    Along these lie positions (of a text, a sound, a picture), which are counted as samples are. They are
    looked for with the smallest and the largest samples.
    """
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for feed in samples.extremes():
        for name, value in run(feed).items():
            shapes.setdefault(name, set()).add(np.shape(value))
    of_one_rank = {name: found for name, found in shapes.items() if len({*map(len, found)}) == 1}
    return {name: _varying(found) for name, found in of_one_rank.items()}


def _varying(shapes: Set[tuple[int, ...]]) -> tuple[int, ...]:
    """The axes behind the first along which ``shapes``, of one rank, have different sizes."""
    by_axis = enumerate(zip(*shapes, strict=True))
    return tuple(axis for axis, sizes in by_axis if axis > 0 and len({*sizes}) > 1)


@dataclass(frozen=True)
class _Part:
    """One feed as it was read: arrays with samples first, and how many samples they hold."""

    arrays: dict[str, Values]
    count: int


class _Gathered:
    """The feeds of a stream, samples first, until they are put together."""

    def __init__(self, inputs: Sequence[InputSpec]) -> None:
        self.source, self.inputs = "the given data", inputs
        self.slots, self.fixed = input_layout_of(inputs)
        self.parts: list[_Part] = []
        self.labels: list[Values] = []
        self.notes: list[str] = []
        self.count = 0

    def needed(self, shapes: ShapesByInput, limit: int) -> dict[str, int]:
        """How many entries of the first axis hold the first ``limit`` samples, for arrays of these shapes.

        Labels that several samples share are cut where those end. Empty where not all can be cut alike.
        """
        scored = LABELS in shapes and LABELS not in self.slots
        slots = dict(self.slots)
        arrays = {name: shape for name, shape in shapes.items() if not (scored and name == LABELS)}
        if len(arrays) == len(slots) == 1:
            slots = dict.fromkeys(arrays, next(iter(slots.values())))
        if arrays.keys() != slots.keys():
            return {}
        batched = {name: shape for name, shape in arrays.items() if slots[name].axis is not None}
        totals = {(slots[name].leading_entries(shape, limit) or (0, 0))[0] for name, shape in batched.items()}
        labels = prod(shapes[LABELS]) if scored else max(totals, default=0)
        if len(totals) != 1 or not labels or max(totals) % labels:
            return {}
        labelled = max(totals) // labels
        count = ceil(limit / labelled) * labelled
        led = {name: slots[name].leading_entries(shape, count) for name, shape in arrays.items()}
        found = {name: lead[1] for name, lead in led.items() if lead is not None}
        if scored:
            found[LABELS] = min(count // labelled, shapes[LABELS][0]) if shapes[LABELS] else 1
        return found

    def take_in(self, stream: Iterator[RawFeed], limit: int | None) -> _Gathered:
        for feed in stream:
            arrays, found = self._named(feed), {}
            for spec in self.inputs:
                part = self.slots[spec.name].samples_first(arrays[spec.name])
                if part is None:
                    raise DataError(
                        f"{spec.name} in {self.source} has shape {list(arrays[spec.name].shape)}; "
                        f"the model wants {_wants(self.inputs)}: bring the samples to that shape."
                    )
                found[spec.name] = part
            self.parts.append(self._even(found))
            self.count += self.parts[-1].count
            if limit is not None and self.count >= limit:
                break
        if not self.count:
            raise DataError(f"{self.source} holds no samples: give at least two.")
        return self

    def _named(self, feed: Any) -> dict[str, Values]:
        """The arrays of one feed by input name; its labels are put aside."""
        if isinstance(feed, np.ndarray):
            feed = {UNNAMED: feed}
        if not isinstance(feed, Mapping):
            raise DataError(
                f"{self.source} yields {type(feed).__name__} where a dict of input name to array is wanted: "
                f"yield {_wants(self.inputs)}."
            )
        arrays = {str(name): np.asarray(value) for name, value in feed.items()}
        if LABELS not in self.slots and LABELS in arrays:
            self.labels.append(np.atleast_1d(arrays.pop(LABELS)))
        if len(arrays) == 1 and len(self.inputs) == 1 and self.inputs[0].name not in arrays:
            arrays = {self.inputs[0].name: next(iter(arrays.values()))}
        _must_be_named(set(arrays), self.source, self.inputs)
        return arrays

    def _even(self, arrays: dict[str, Values]) -> _Part:
        """Repeat what a feed gives once for all of its samples; everything else must agree in number."""
        sizes = {name: len(array) for name, array in arrays.items()}
        size = max((n for name, n in sizes.items() if self.slots[name].axis is not None), default=0)
        size = size or max(sizes.values(), default=1)
        for name, found in sizes.items():
            if found == 1 and self.slots[name].axis is None:
                arrays[name] = np.broadcast_to(arrays[name], (size, *arrays[name].shape[1:]))
            elif found != size:
                listed = ", ".join(f"{name} {n}" for name, n in sizes.items())
                raise DataError(
                    f"{self.source} holds different numbers of samples ({listed}): give as many for each."
                )
        return _Part(arrays, size)

    def samples(self, limit: int | None, fewest: int) -> Samples:
        """Everything taken in, at most the first ``limit``, as samples: ``fewest`` or more."""
        count = self.count if limit is None else min(limit, self.count)
        labels, labelled = self._labels(count)
        self._end_at(count)
        for spec in self.inputs:
            where = f"{spec.name} in {self.source}"
            self.notes += [check_values(part.arrays[spec.name], spec, where) for part in self.parts]
        constants = self._constants()
        fixed = self._fixed()
        groups, order = self._grouped(together=labelled == 1)
        if labels is not None and labelled == 1:
            labels = labels[order]
        found = Samples(
            groups=groups,
            constants=constants,
            labels=labels,
            source=self.source,
            fixed=fixed,
            slots=self.slots,
            labelled=labelled,
        )
        found = self._whole_batches(found, fewest, cut=limit is not None and self.count >= limit)
        if found.ragged:
            self.notes.append(
                f"The samples in {self.source} differ in shape: those of one shape are run together, and "
                "MACs and times are those of a sample of middle size."
            )
        return replace(found, notes=tuple(dict.fromkeys(note for note in self.notes if note)))

    def _end_at(self, count: int) -> None:
        """Leave out what comes behind the first ``count`` samples."""
        kept = list[_Part]()
        room = count
        for part in self.parts:
            if room > 0:
                arrays = {name: array[:room] for name, array in part.arrays.items()}
                kept.append(_Part(arrays, min(part.count, room)))
                room -= part.count
        self.parts, self.count = kept, count

    def _labels(self, count: int) -> tuple[Values | None, int]:
        """Labels of the first ``count`` samples, and how many samples share one."""
        if not self.labels:
            return None, 1
        labels = np.concatenate([np.ravel(part) for part in self.labels])
        if len(labels) > 1 and self.count % len(labels) == 0:
            labelled = self.count // len(labels)
            return labels[: ceil(count / labelled)], labelled
        be, they = ("is", "it was") if len(labels) == 1 else ("are", "they were")
        given = f"{counted(len(labels), 'label')} for {counted(self.count, 'sample')}"
        self.notes.append(f"There {be} {given}: {they} not used.")
        return None, 1

    def _constants(self) -> dict[str, Values]:
        """What is the same for every sample and has no batch axis; it is taken out of the parts."""
        loose = [spec.name for spec in self.inputs if self.slots[spec.name].axis is None]
        if len(loose) == len(self.inputs):
            return {}
        found = {}
        for name in loose:
            arrays = [part.arrays[name] for part in self.parts]
            first = arrays[0][:1]
            if all(a.shape[1:] == first.shape[1:] and bool((a == first).all()) for a in arrays):
                found[name] = self.slots[name].lay_out(first)
                for part in self.parts:
                    del part.arrays[name]
        return found

    def _fixed(self) -> int | None:
        """The batch size that the model takes; one where an input without a batch axis varies."""
        varying = [name for name in self.parts[0].arrays if self.slots[name].axis is None]
        if varying and self.fixed is not None and self.fixed > 1:
            raise DataError(
                f"{', '.join(varying)} in {self.source} must be the same for all samples of a batch of "
                f"{self.fixed}: give one value."
            )
        return 1 if varying else self.fixed

    def _grouped(self, *, together: bool) -> tuple[tuple[Group, ...], npt.NDArray[np.int64]]:
        """Groups of like shape and the old positions of their samples.

        All samples of one shape ``together``, or only those that follow each other.
        """
        keys = [_shape_key(part.arrays) for part in self.parts]
        if together:
            members = {
                key: [i for i, other in enumerate(keys) if other == key] for key in dict.fromkeys(keys)
            }
            runs = list(members.values())
        else:
            runs = [list(run) for _, run in groupby(range(len(keys)), key=keys.__getitem__)]
        starts = np.cumsum([0, *(part.count for part in self.parts)])
        groups, order = list[Group](), list[Values]()
        for run in runs:
            parts = [self.parts[index].arrays for index in run]
            groups.append({name: _joined([arrays[name] for arrays in parts]) for name in parts[0]})
            order += [np.arange(starts[index], starts[index + 1]) for index in run]
        return tuple(groups), np.concatenate(order)

    def _whole_batches(self, samples: Samples, fewest: int, *, cut: bool) -> Samples:
        """Without what fills no batch, or shares a label with what is missing.

        ``cut``: more samples were there than are to be used.
        """
        count, fixed, labelled = samples.count, samples.fixed or 1, samples.labelled
        if len(samples.groups) == 1:
            kept = samples.take(slice(count - count % lcm(fixed, labelled)))
        elif labelled == 1:
            starts = np.cumsum([0, *(len(next(iter(group.values()))) for group in samples.groups)])
            ends = starts[1:] - np.diff(starts) % fixed
            whole = [np.arange(start, end) for start, end in zip(starts[:-1], ends, strict=True)]
            kept = samples.take(np.concatenate(whole))
        elif fixed == 1:
            kept = samples.take(slice(count - count % labelled))
        else:
            raise DataError(
                f"{self.source} holds samples of different shape that share a label, and the model takes "
                f"batches of {fixed}: bring them to one shape, by padding for example."
            )
        if not samples.groups[0]:  # nothing but constants
            kept = samples
        if kept.count < fewest:
            why = f"the model takes batches of {fixed}" if fixed > 1 else "one is needed to verify on"
            held = counted(count, "sample")
            said = f"{self.source} holds {held}"
            if cut:
                said = f"Only {held} of {self.source} may be used"
            raise DataError(f"{said} but {why}: give at least {fewest * fixed}.")
        if kept.count < count:
            why = f"The model takes batches of {fixed}" if fixed > 1 else f"{labelled} samples share a label"
            each = " of one shape" if len(samples.groups) > 1 else ""
            self.notes.append(f"{why}{each}: {counted(count - kept.count, 'sample')} left out.")
        return kept


def _joined(arrays: Sequence[Values]) -> Values:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _shape_key(group: Mapping[str, Values]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What samples must have in common to be run together."""
    return tuple((name, array.shape[1:]) for name, array in group.items())


def _entries(group: Group) -> int:
    """Entries of all inputs of one sample."""
    return sum(prod(array.shape[1:]) for array in group.values())


def _lengths(group: Group) -> list[int]:
    """Sizes of all axes of one sample, input by input."""
    return [size for array in group.values() for size in array.shape[1:]]


def _bytes_each(group: Group) -> int:
    return sum(array[:1].nbytes for array in group.values())


def _part(group: Group, which: slice | npt.NDArray[np.int64]) -> Group:
    return {name: array[which] for name, array in group.items()}


def _blocks(which: npt.NDArray[np.int64], each: int) -> npt.NDArray[np.int64]:
    """The positions in these blocks of ``each`` consecutive samples."""
    positions: npt.NDArray[np.int64] = (which[:, None] * each + np.arange(each)).ravel()
    return positions


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
