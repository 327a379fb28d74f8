"""Outputs are judged in groups of channels of like role and scale, each relative to its own variance.

A detector joins boxes (0 to 320) and scores (0 to 1) in one tensor: together the scores count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import inf, prod
from typing import Any, NamedTuple

import numpy as np

from onnx_lrsd.data.holdout import FEW
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.facts import GroupError, OutputError
from onnx_lrsd.graph.model import Model
from onnx_lrsd.measure.confidence import ratio_interval
from onnx_lrsd.passes.output_groups import LOG_SOFTMAX, SOFTMAX, Ending, Operand, endings
from onnx_lrsd.runtime.divergence import (
    LITTLE,
    Divergence,
    Owners,
    as_array,
    clipped_logits,
    owners,
    positions_first,
    row_axes,
)
from onnx_lrsd.runtime.likeness import Likeness
from onnx_lrsd.runtime.session import shapes
from onnx_lrsd.types import Feed, Values
from onnx_lrsd.wording import counted

UNLIKE = 10.0
"""Ratio of standard deviations from which channels are of unlike scale, if none lies between."""
MOST_CHANNELS, MOST_KINDS = 4096, 4
"""A longer axis holds positions, not channels; more scales than this are a spectrum, not unlike parts."""
STILL = 1e-6
"""A channel that deviates by less than this share of its largest value has no scale to go by."""
SUMS_TO_ONE = 1e-3
OVER_CLASSES = (SOFTMAX, LOG_SOFTMAX)
"""Activations of classes of which the largest value is the answer."""

LOOK = 16
"""Samples on which scales are found."""
NAMED = 3
"""Outputs that a warning names, at most."""

Range = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class OutputGroup:
    """Channels of ``output`` along ``axis`` of its rows, in ``ranges``; all of it where there are none.

    ``activation`` is Sigmoid, Softmax or LogSoftmax where they are probabilities. ``part`` says which
    channels these are, along the output's own axis, ``made_by`` the operand of a Concat that they are, where
    one is.
    """

    output: str
    axis: int = 0
    ranges: tuple[Range, ...] = ()
    activation: str = ""
    part: str = ""
    made_by: str = ""

    @property
    def name(self) -> str:
        """Such as 'output0[:, 4:22] Sigmoid'."""
        return f"{self.output}{self.part} {self.made_by}".rstrip()

    def of(self, rows: Values) -> Values:
        """The channels of this group in ``rows``, an output with its samples, or positions, first."""
        if not self.ranges or rows.ndim <= self.axis or rows.shape[self.axis] < self.ranges[-1][1]:
            return rows
        channels = np.concatenate([np.arange(*ends) for ends in self.ranges])
        return np.take(rows, channels, axis=self.axis)

    def logits(self, channels: Values) -> Values:
        """What stood in front of the activation of this group's ``channels``, clipped."""
        logarithms = self.activation == LOG_SOFTMAX
        return clipped_logits(np.exp(np.minimum(channels, 0)) if logarithms else channels)


GroupsOf = Mapping[str, tuple[OutputGroup, ...]]
"""The groups of each output, by its name."""


class _Batch(NamedTuple):
    """Outputs of both models for ``size`` samples; ``real`` (samples, positions) are no padding."""

    feed: Feed
    old: Mapping[str, Values]
    new: Mapping[str, Values]
    real: Values | None
    size: int


class OutputJudge:
    """Takes in what two models give, batch by batch, and says how far apart their outputs are.

    ``positions`` are the axes of each output that count as samples do. ``groups`` are those to judge by;
    without them those of ``model``, the first of the two, on its first ``look`` samples.
    """

    def __init__(
        self,
        model: Model,
        outputs: Sequence[str],
        positions: Mapping[str, tuple[int, ...]],
        groups: GroupsOf | None = None,
        look: int = LOOK,
    ) -> None:
        self.model, self.outputs, self.positions, self.groups = model, outputs, positions, groups
        self._look = look
        self.samples = 0
        self._waiting: list[_Batch] = []
        self._streams: dict[str, _Stream] = {}

    def add(
        self, feed: Feed, old: Mapping[str, Any], new: Mapping[str, Any], real: Values | None, size: int
    ) -> None:
        """Take in the outputs of both models for one batch of ``size`` samples."""
        one, two = ({name: as_array(given[name]) for name in self.outputs} for given in (old, new))
        self._waiting.append(_Batch(feed, one, two, real, size))
        self.samples += size
        if self._streams or self.samples >= self._look:
            self._flush()

    def _flush(self) -> None:
        if not self._streams and self.groups is not None:
            self._streams = {n: _Stream(self.groups[n], self.positions.get(n, ())) for n in self.outputs}
        elif not self._streams and self._waiting:
            first = self._waiting[0]
            axes, rows = dict[str, tuple[int, ...]](), dict[str, list[Values]]()
            for name in self.outputs:
                along = self.positions.get(name, ())
                axes[name] = row_axes(first.old[name], first.real, along)
                rows[name] = [positions_first(b.old[name], b.real, along) for b in self._waiting]
            groups = output_groups(self.model, first.feed, rows, axes)
            self._streams = {n: _Stream(groups[n], self.positions.get(n, ())) for n in self.outputs}
        for batch in self._waiting:
            for name, stream in self._streams.items():
                stream.add(batch.old[name], batch.new[name], batch.real, batch.size)
        self._waiting.clear()

    def found_groups(self) -> GroupsOf:
        """The groups that outputs are judged in."""
        self._flush()
        return {name: tuple(stream.groups) for name, stream in self._streams.items()}

    def errors(self) -> tuple[OutputError, ...]:
        """What was found of every output."""
        self._flush()
        return tuple(stream.error() for stream in self._streams.values())

    def known_within(self, share: float) -> bool:
        """Whether no end of an interval is farther from its error than this share of it."""
        found = [(output.worst, output.error_interval or (inf, inf)) for output in self.errors()]
        return all((1 - share) * e <= low and high <= (1 + share) * e for e, (low, high) in found)

    def warnings(self) -> tuple[str, ...]:
        """Why the errors say less than they seem to, and what to do about it."""
        self._flush()
        said = []
        if self.samples < FEW:
            said.append(
                f"The output error was measured on {counted(self.samples, 'sample')} "
                f"only, so it is not well known: give at least {FEW} to check on."
            )
        poor = {name: stream.sameness for name, stream in self._streams.items() if stream.sameness}
        for what in dict.fromkeys(poor.values()):
            names = [name for name in poor if poor[name] == what]
            listed = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
            said.append(
                f"On the samples to check on, {listed} {'is' if len(names) == 1 else 'are'} {what}, so the "
                "error says little about others: give samples as varied as those the model will meet."
            )
        return tuple(said)


class _Stream:
    """Streams both models' values of one output into the errors of its groups, batch by batch.

    Probabilities are judged twice: as they are, and in front of their Sigmoid or Softmax, as clipped logits.
    The larger error is the group's: the first sees nothing of what saturates, the second nothing that is far
    from a decision.
    """

    def __init__(self, groups: Sequence[OutputGroup], positions: tuple[int, ...]) -> None:
        self.groups, self.positions = groups, positions
        self.whole, self.likeness = Divergence(), Likeness()
        self.plain = [Divergence() if group.ranges else self.whole for group in groups]
        self.front = [Divergence() if group.activation else None for group in groups]
        self.classes: set[int] = set()
        self.numbers = True
        self.alike = self.decided = 0
        """Samples in which the most probable classes stay, and all."""

    def add(self, old: Values, new: Values, real: Values | None, size: int) -> None:
        """Take in one batch of ``size`` samples; ``real`` (samples, positions) are no padding."""
        one, two = (positions_first(value, real, self.positions) for value in (old, new))
        owner = owners(one, real, size)
        self.numbers = self.numbers and one.dtype.kind == "f"
        self.whole.add_rows(one, two, owner)
        self.likeness.add(one, two, size)
        self._decide(one, two, owner, size)
        for group, plain, front in zip(self.groups, self.plain, self.front, strict=True):
            old_part, new_part = group.of(one), group.of(two)
            if plain is not self.whole:
                plain.add_rows(old_part, new_part, owner)
            if front is not None:
                front.add_rows(group.logits(old_part), group.logits(new_part), owner)
                self._see(group, old_part)

    def _decide(self, one: Values, two: Values, owner: Owners, size: int) -> None:
        """Count the samples whose most probable class, at every step, is the same."""
        if len(self.groups) > 1 or self.groups[0].activation not in OVER_CLASSES or one.shape != two.shape:
            return
        if one.ndim < 2 or not one.size:
            return
        other = (one.argmax(axis=-1) != two.argmax(axis=-1)).reshape(len(one), -1).any(axis=1)
        self.alike += size - len(np.unique(owner[other]))
        self.decided += size

    def _see(self, group: OutputGroup, rows: Values) -> None:
        """Note the classes that are most probable somewhere."""
        if group.activation in OVER_CLASSES and rows.size:
            self.classes.update(np.unique(rows.argmax(axis=-1)).tolist())
        elif prod(rows.shape[1:]) == 1:
            self.classes.update(np.unique(rows > 0.5).astype(int).tolist())
        else:
            self.classes.update((0, 1))

    @property
    def sameness(self) -> str:
        """How the outputs are too much alike to tell of others; '' where they are not."""
        if any(plain.constant for plain in self.plain):
            return "the same for all"
        if len(self.classes) == 1:
            return "of one class for all"
        if any(plain.hardly_varies for plain in self.plain):
            return f"nearly the same for all (they vary by less than {LITTLE**0.5:.0%})"
        return ""

    def error(self) -> OutputError:
        """The output's own error, those of its groups, and the interval of the worst of these."""
        found = []
        for group, plain, front in zip(self.groups, self.plain, self.front, strict=True):
            logits = None if front is None else front.relative()
            worse = plain if front is None or front.relative() <= plain.relative() else front
            found.append(
                GroupError(
                    name=group.name,
                    slice=group.part,
                    relative_error=worse.relative(),
                    interval=ratio_interval(*worse.by_sample()),
                    logits_error=logits,
                )
            )
        worst = max(found, key=lambda group: group.relative_error)
        bound = max(group.interval[1] for group in found)
        whole = self.whole.relative()
        return OutputError(
            self.groups[0].output,
            whole,
            tuple(found),
            (worst.interval[0], bound),
            largest=self.likeness.largest,
            cosine=self.likeness.cosine,
            agreement=self.likeness.agreement,
            decided_alike=self.alike / self.decided if self.decided else None,
            of="variance" if self.numbers else "entries",
        )


def output_groups(
    model: Model,
    feed: Feed,
    rows: Mapping[str, Sequence[Values]],
    positions: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[OutputGroup, ...]]:
    """The groups of each output of ``model`` in ``rows``: some batches of it, by ``positions_first``.

    Operands of the last Concat on the way to an output are groups of their own where their activation or
    their scale is another; elsewhere the standard deviations of channels over the samples tell, along any
    axis but the first. ``positions`` are the axes of each output that lie within its rows. ``feed`` is a
    batch that the operands' shapes are measured with.
    """
    found = endings(model.proto)
    sizes = _shapes(model, feed, [t for ending in found.values() for t in ending.tensors])
    return {
        name: _groups(name, found[name], batches, positions.get(name, ()), sizes)
        for name, batches in rows.items()
    }


def _shapes(model: Model, feed: Feed, tensors: Iterable[str]) -> dict[str, tuple[int, ...]]:
    wanted = list(tensors)
    if not wanted:
        return {}
    try:
        return shapes(model.proto, feed, wanted, model.folder, model.most_bytes)
    except LrsdError:  # operands of a Concat on sequences, say: values tell then
        return {}


def _groups(
    name: str,
    ending: Ending,
    batches: Sequence[Values],
    positions: tuple[int, ...],
    sizes: Mapping[str, tuple[int, ...]],
) -> tuple[OutputGroup, ...]:
    """The groups of one output: by the operands of its last Concats, or by scale along one axis.

    It is one group where batches differ in shape, and where all of it are probabilities of one kind.
    """
    activations = {part.activation for part in ending.parts}
    whole = OutputGroup(output=name, activation=activations.pop() if len(activations) == 1 else "")
    if not all(b.dtype.kind == "f" and b.shape[1:] == batches[0].shape[1:] for b in batches):
        return (OutputGroup(output=name),)
    if batches[0].ndim < 2 or not batches[0].size:
        return (whole,)
    rows = np.concatenate(batches).astype(np.float64)
    own_axes = [0, *(axis for axis in range(1, rows.ndim + len(positions)) if axis not in positions)]
    labelled = partial(_labelled, name, own_axes)
    best = tuple[OutputGroup, ...]()
    most = False, 1.0
    for parts, slices in ending.partitions(sizes) if sizes and ending.path else []:
        if slices.axis not in own_axes:
            continue
        axis = own_axes.index(slices.axis)
        deviations = _deviations(rows, axis)
        if slices.bounds[-1] == len(deviations):
            groups, unlike = _of_parts(name, parts, axis, slices.bounds, deviations, labelled)
            if len(groups) > 1 and unlike > most:
                best, most = groups, unlike
    if best:
        return best
    if whole.activation:
        return (whole,)
    if _sums_to_one(rows):
        return (OutputGroup(output=name, activation=SOFTMAX),)
    best_axis, best_ranges, widest = 0, list[Range](), 0.0
    for axis in range(1, rows.ndim):
        ranges, gap = _by_scale(_deviations(rows, axis))
        if len(ranges) > 1 and gap > widest:
            best_axis, best_ranges, widest = axis, ranges, gap
    if not best_ranges:
        return (whole,)
    return tuple(labelled(best_axis, (ends,), "", "") for ends in best_ranges)


def _of_parts(
    output: str,
    parts: Sequence[Operand],
    axis: int,
    bounds: Sequence[int],
    deviations: Values,
    labelled: Callable[[int, tuple[Range, ...], str, str], OutputGroup],
) -> tuple[tuple[OutputGroup, ...], tuple[bool, float]]:
    """Groups of the operands of a Concat: those of one activation and like scale are one group.

    And how unlike they are: whether only some are probabilities, and the ratio of their scales.
    """
    groups: list[tuple[str, float, list[Range], list[str]]] = []
    for part, (start, stop) in zip(parts, pairwise(bounds), strict=True):
        if start == stop:  # an empty cache, say
            continue
        within = [(0, stop - start)] if part.activation else _by_scale(deviations[start:stop])[0]
        for low, high in within:
            ends = (start + low, start + high)
            scale = float(np.sqrt(np.mean(deviations[slice(*ends)] ** 2)))
            alike = (
                group
                for group in groups
                if group[0] == part.activation and (part.activation or _alike(group[1], scale))
            )
            group = next(alike, None)
            if group is None:
                groups.append((part.activation, scale, [ends], [part.tensor]))
            else:
                group[2].append(ends)
                group[3].append(part.tensor)
    scales = [group[1] for group in groups if group[1] > 0]
    unlike = len({group[0] for group in groups}) > 1, max(scales, default=1.0) / min(scales, default=1.0)
    if len(groups) == 1:
        return (OutputGroup(output=output, activation=groups[0][0]),), unlike
    labels = (
        labelled(axis, _joined(ranges), activation, _short(tensors[0]) if len(tensors) == 1 else "")
        for activation, _, ranges, tensors in groups
    )
    return tuple(labels), unlike


def _labelled(
    output: str, own_axes: Sequence[int], axis: int, ranges: tuple[Range, ...], activation: str, made_by: str
) -> OutputGroup:
    before = [":"] * own_axes[axis]
    slices = (", ".join([*before, f"{start}:{stop}"]) for start, stop in ranges)
    part = ", ".join(f"[{each}]" for each in slices)
    return OutputGroup(
        output=output, axis=axis, ranges=ranges, activation=activation, part=part, made_by=made_by
    )


def _deviations(rows: Values, axis: int) -> Values:
    """Standard deviation over the samples of each entry along ``axis``; 0 where it keeps still."""
    others = tuple(place for place in range(rows.ndim) if place != axis)
    finite = np.where(np.isfinite(rows), rows, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        centred = finite - finite.mean(axis=0) if len(rows) > 1 else finite
        found = np.sqrt(np.mean(centred**2, axis=others))
        largest = np.abs(finite).max(axis=others)
    return np.where(np.isfinite(found) & (found > STILL * largest), found, 0.0)


def _by_scale(deviations: Values) -> tuple[list[Range], float]:
    """Runs of channels of like scale, and the ratio that parts them; one run where they are all alike.

    Scales are unlike where no channel lies within a factor of UNLIKE between them, and channels of one scale
    stand together: a dead channel among others, or a spectrum that falls, makes no group.
    """
    one = [(0, len(deviations))]
    moving = np.flatnonzero(deviations)
    if len(moving) < 2 or len(deviations) > MOST_CHANNELS:
        return one, 1.0
    ordered = np.sort(deviations[moving])
    ratios = ordered[1:] / ordered[:-1]
    limits = ordered[1:][ratios >= UNLIKE]
    kinds = np.searchsorted(limits, deviations[moving], side="right")
    changes = np.flatnonzero(np.diff(kinds))
    if not len(limits) or len(limits) >= MOST_KINDS or len(changes) != len(limits):
        return one, 1.0
    starts = [0, *(int(moving[change + 1]) for change in changes), len(deviations)]
    return list(pairwise(starts)), float(ratios.max())


def _alike(one: float, other: float) -> bool:
    """Whether two scales are of one kind; a scale of 0 is like any."""
    low, high = sorted((one, other))
    return high < UNLIKE * low if low > 0 else high < inf


def _sums_to_one(rows: Values) -> bool:
    """Whether entries along the last axis are probabilities of classes."""
    if rows.shape[-1] < 2 or not np.isfinite(rows).all() or rows.min() < 0:
        return False
    return bool(np.abs(rows.sum(axis=-1) - 1).max() < SUMS_TO_ONE)


def _joined(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """``ranges``, ascending, with neighbours that touch made one."""
    found = [ranges[0]]
    for start, stop in ranges[1:]:
        if start == found[-1][1]:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def _short(tensor: str) -> str:
    """The part of a tensor's name that a person recognises."""
    return tensor.split("/")[-1].removesuffix("_output_0").removesuffix(":0")
