"""Which rows of the layers' inputs a calibration takes, and the runs of the network that give them.

A row is what W is applied to once, at one position of one sample. Positions are sampled: how many rows there
are depends on the sizes of the layers, not on the number of samples or the size of the images. Inputs of
layers are fetched from ONNX Runtime, not recomputed; from a GPU each batch is copied once. One thread runs
the network a batch ahead of the rows, since ONNX Runtime leaves idle some of the time that NumPy needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import frexp, isfinite, prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from onnx_lrsd.data.samples import Samples, as_fed
from onnx_lrsd.graph.model import Model
from onnx_lrsd.passes.operators import operator_of
from onnx_lrsd.passes.operators.rows import pixel_rows
from onnx_lrsd.runtime.activation_cache import Relay
from onnx_lrsd.runtime.session import open_model
from onnx_lrsd.solver.moments import sample_positions
from onnx_lrsd.types import Feed, Layer, Progress, Rows, Values
from onnx_lrsd.workers import one_ahead

ROWS_PER_INPUT = 8
FEWEST_ROWS, MOST_ROWS = 4096, 20_000
"""Rows of a layer that factors are fitted to: eight for each input, between these bounds."""
MOST_INPUTS = 6
"""Inputs are kept instead of outputs where there are at most so many for each output."""
CHUNK = 2048
"""Rows worked on at once, at least: threads of NumPy that wait for those of ONNX Runtime wait less often."""
ORDINARY = 2.0**40
"""Where inputs are greater than this, or all smaller than its inverse, the layer's rows are scaled."""
_SPARE = 1.25
"""Where samples differ in shape the number of rows is estimated; there is room for so many times as many."""
_FETCHED_BYTES = 64 << 20
"""Inputs of layers fetched in one batch, at most, outputs not counted; two batches are held at a time."""


@dataclass(frozen=True)
class Quota:
    """How many rows of a layer are ``wanted``, how samples share in them, and what they are scaled by.

    ``ends`` (samples + 1,) are sums of the shares of all samples before. ``scale`` is a power of two, 1 but
    for inputs so large or small that their squares would leave the range of float32.
    """

    wanted: int
    ends: npt.NDArray[np.int64]
    scale: float = 1.0

    def share(self, first: int, count: int) -> int:
        """Rows of the samples first..first+count-1, at most."""
        before, after, whole = (int(self.ends[index]) for index in (first, first + count, -1))
        return after * self.wanted // whole - before * self.wanted // whole


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which rows are taken of which layers, in batches of so many samples: the same in one run and in shards.

    ``layers`` know their positions; rows are taken of those that are ``watched``. ``shapes`` are those of the
    layers' inputs in the example of the samples, by tensor, and ``quotas`` are by ``Layer.output``.
    """

    layers: tuple[Layer, ...]
    watched: tuple[Layer, ...]
    samples: Samples
    batch: int
    quotas: Mapping[str, Quota]
    shapes: Mapping[str, tuple[int, ...]]
    seed: int

    @property
    def fetched(self) -> frozenset[str]:
        """The layers whose outputs are fetched beside their inputs."""
        return frozenset(
            layer.output
            for layer in self.watched
            if not keeps_inputs(layer) and operator_of(layer).FETCHES_OUTPUTS
        )


def sampling_of(
    model: Model, layers: Sequence[Layer], samples: Samples, asked: Callable[[Layer], bool], seed: int
) -> Sampling:
    """What a calibration of the layers that are ``asked`` for takes; a few samples are run for it."""
    watch = _watcher(model, layers, samples)
    samples = as_fed(samples, watch)
    probes = [_probe(watch(feed), feed, samples) for feed in (samples.example(), *samples.extremes())]
    shapes = probes[0].shapes
    bytes_each = max(sum(4 * prod(shape) for shape in probe.shapes.values()) for probe in probes)
    located = locate(layers, shapes, samples)
    watched = tuple(layer for layer in located if asked(layer))
    return Sampling(
        layers=located,
        watched=watched,
        samples=samples,
        batch=samples.batch_size(bytes_each // samples.smallest_batch, _FETCHED_BYTES),
        quotas={layer.output: _quota(layer, samples, probes) for layer in watched},
        shapes=shapes,
        seed=seed,
    )


def keeps_inputs(layer: Layer) -> bool:
    """Whether the inputs of ``layer`` are kept at the sampled positions, and not its outputs."""
    return layer.m <= MOST_INPUTS * layer.n


class GatheredRows(NamedTuple):
    """Sampled rows (count, m) of a layer's input, and of its outputs (count, n) where they are fetched."""

    layer: Layer
    inputs: Rows
    outputs: Rows | None


def gather(
    model: Model, sampling: Sampling, shard: int, of: int, progress: Progress | None = None
) -> list[GatheredRows]:
    """The rows that shard ``shard`` (1 to ``of``) of a calibration takes: those of its share of the batches.

    Rows of all shards, one after the other, are those of a calibration in one run.
    """
    samples, fetched = sampling.samples, sampling.fetched
    counts = [samples.size_of(feed) for feed in samples.batches(sampling.batch)]
    start, stop = (len(counts) * end // of for end in (shard - 1, shard))
    first, last = sum(counts[:start]), sum(counts[:stop])
    inputs, outputs = dict[str, Rows](), dict[str, Rows]()
    for layer in sampling.watched:
        most = sampling.quotas[layer.output].share(first, last - first)
        inputs[layer.output] = np.empty((most, layer.m), np.float32)
        if layer.output in fetched:
            outputs[layer.output] = np.empty((most, layer.n), np.float32)
    done = dict.fromkeys(inputs, 0)
    batches = run_batches(model, sampling, outputs=outputs, part=range(start, stop))
    for layer, rows in sampled_rows(
        batches, sampling, inputs, outputs, progress=progress, part=(first, last)
    ):
        done[layer.output] += len(rows)
    return [
        GatheredRows(
            layer,
            inputs[layer.output][: done[layer.output]],
            outputs[layer.output][: done[layer.output]] if layer.output in fetched else None,
        )
        for layer in sampling.watched
    ]


class RunBatch(NamedTuple):
    """``activations`` of a batch of ``size`` samples, by tensor.

    ``real`` (samples, positions) tells the positions that are no padding; None where all count.
    """

    size: int
    real: Values | None
    activations: Feed


def run_batches(
    model: Model,
    sampling: Sampling,
    *,
    outputs: Collection[str] = (),
    relay: Relay | None = None,
    handed: Sequence[str] = (),
    part: range | None = None,
) -> Iterator[RunBatch]:
    """Run the samples through ``model``: of each batch the inputs of the watched layers, and ``outputs``.

    A run starts from what an earlier one left in ``relay``, and leaves there the tensors ``handed``. Only
    batches whose number is in ``part`` are run, all if it is None.
    """
    if relay is None:
        relay = Relay()
    samples = sampling.samples
    watch = _watcher(model, sampling.watched, samples, {*outputs, *handed}, relay.types)
    batches = samples.batch_count(sampling.batch)
    for index, feed in enumerate(samples.batches(sampling.batch)):
        if part is not None and index not in part:
            continue
        values = watch({**feed, **relay.feed(index)})
        relay.offer(index, batches, values, handed, samples.sizes.max() / samples.sizes[0])
        yield RunBatch(samples.size_of(feed), samples.real(feed), values)


def sampled_rows(
    batches: Iterator[RunBatch],
    sampling: Sampling,
    into: Mapping[str, Rows],
    outputs: dict[str, Rows],
    *,
    progress: Progress | None = None,
    part: tuple[int, int] | None = None,
    held: bool = True,
) -> Iterator[tuple[Layer, Rows]]:
    """Each watched layer with some of its sampled rows (count, m); the same ones for one seed and batch size.

    Rows of the layers in ``into`` are gathered there, one after the other. Those of other layers are
    overwritten by the next ones, and come when there are CHUNK of them; where rows are not ``held``, they
    come with each batch and no room is kept for them. Outputs of the layers in ``outputs`` are gathered
    there, or replaced by those of the next batch where rows are not ``held``. ``part`` are the first of the
    samples in ``batches`` and the one behind the last; None for all.
    """
    layers, quotas, chunk = sampling.watched, sampling.quotas, CHUNK if held else 0
    fetched = dict.fromkeys(outputs, 0)
    buffers = {layer.output: into.get(layer.output, np.empty((0, layer.m), np.float32)) for layer in layers}
    given = dict.fromkeys(buffers, 0)
    filled = dict.fromkeys(buffers, 0)
    first, end = part or (0, sampling.samples.count)
    for batch in one_ahead(batches):
        last = first + batch.size == end
        for layer in layers:
            name, values, quota = layer.output, batch.activations[layer.input], quotas[layer.output]
            share = quota.share(first, batch.size)
            positions = _positions(layer, values.shape, batch.real, first, share, sampling.seed)
            start, stop = filled[name], filled[name] + len(positions)
            if stop > len(buffers[name]):  # batches but the last are alike: once, as a rule
                buffers[name] = _enlarged(buffers[name][:start], chunk + 2 * len(positions))
            rows = buffers[name][start:stop]
            with np.errstate(over="ignore"):  # of double precision, to infinity
                operator_of(layer).input_rows(layer, values, positions, rows)
                if name in outputs:
                    if not held:
                        outputs[name], fetched[name] = np.empty((len(positions), layer.n), np.float32), 0
                    there = slice(fetched[name], fetched[name] + len(positions))
                    outputs[name][there] = pixel_rows(batch.activations[name], positions)
                    fetched[name] = there.stop
                    if quota.scale != 1:
                        outputs[name][there] *= quota.scale
            if quota.scale != 1:
                rows *= quota.scale
            filled[name] = stop
            if last or stop - given[name] >= chunk:
                yield layer, buffers[name][given[name] : stop]
                given[name] = filled[name] = stop if name in into else 0
                if not held:
                    buffers[name] = buffers[name][:0].copy()
        first += batch.size
        if progress is not None:
            progress("calibrate", first, sampling.samples.count)


def _enlarged(rows: Rows, count: int) -> Rows:
    """``rows`` at the beginning of an array that has room for ``count``."""
    room = np.empty((count, rows.shape[1]), np.float32)
    room[: len(rows)] = rows
    return room


def _positions(
    layer: Layer, shape: tuple[int, ...], real: Values | None, first: int, share: int, seed: int
) -> npt.NDArray[np.int64]:
    """``share`` positions in the batch that begins with sample ``first``, all if fewer, no padding."""
    rng = np.random.default_rng((seed, first, *(layer.full or (layer.n, layer.m))))
    if real is None or layer.channels_first or not _of_tokens(shape, layer.axis, real):
        return sample_positions(operator_of(layer).count_rows(layer, shape), share, rng)
    positions = np.flatnonzero(real)
    return positions[sample_positions(len(positions), share, rng)]


def _of_tokens(shape: tuple[int, ...], axis: int, real: Values) -> bool:
    """Whether a tensor with features along ``axis`` has a row for each position, by samples or flat."""
    return np.delete(shape, axis).tolist() in ([*real.shape], [real.size])


class _Probe(NamedTuple):
    """What one smallest batch tells of the samples and of the layers' inputs.

    ``entries`` are those of one sample; ``shapes`` and ``peaks``, the greatest finite magnitudes, are by
    tensor.
    """

    entries: float
    shapes: Mapping[str, tuple[int, ...]]
    peaks: Mapping[str, float]


def _probe(activations: Feed, feed: Feed, samples: Samples) -> _Probe:
    entries = sum(feed[name].size for name in samples.inputs) / samples.size_of(feed)
    return _Probe(entries, _shapes(activations), {name: _peak(value) for name, value in activations.items()})


def _peak(values: Values) -> float:
    """The greatest finite magnitude; 0 where there is none."""
    if values.dtype.kind != "f" or not values.size:
        return 0.0
    low, high = float(values.min()), float(values.max())
    if not (isfinite(low) and isfinite(high)):
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return max(-low, high)


def _quota(layer: Layer, samples: Samples, probes: Sequence[_Probe]) -> Quota:
    """Rows to gather for a layer: never more than the samples hold, and from each as it has positions.

    Where samples differ in shape, positions are estimated: they are taken to grow with the entries of a
    sample, as between the ``probes``.
    """
    most = min(max(ROWS_PER_INPUT * layer.m, FEWEST_ROWS), MOST_ROWS)
    peak = max(probe.peaks[layer.input] for probe in probes)
    scale = 1.0 if not peak or 1 / ORDINARY <= peak <= ORDINARY else 2.0 ** -frexp(peak)[1]
    if not samples.ragged:
        wanted = min(most, layer.positions * samples.count) if layer.positions else most
        return Quota(wanted, np.arange(samples.count + 1), scale)
    counts = [
        operator_of(layer).count_rows(layer, probe.shapes[layer.input]) / samples.smallest_batch
        for probe in probes
    ]
    entries = np.array([[1.0, probe.entries] for probe in probes])
    start, slope = np.linalg.lstsq(entries, np.array(counts), rcond=None)[0]
    each = np.maximum(np.ceil(_SPARE * (start + slope * samples.sizes)), 1).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(each)])
    return Quota(min(most, int(ends[-1])), ends, scale)


def locate(
    layers: Sequence[Layer], shapes: Mapping[str, tuple[int, ...]], samples: Samples
) -> tuple[Layer, ...]:
    """``layers`` with positions and size, from the shapes of their inputs in the smallest batch."""
    return tuple(
        replace(
            layer,
            positions=operator_of(layer).count_rows(layer, shapes[layer.input]) // samples.smallest_batch,
            size=shapes[layer.input][2:] if layer.channels_first else (),
        )
        for layer in layers
    )


def input_shapes(model: Model, layers: Sequence[Layer], samples: Samples) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs of ``layers``, by tensor, in the smallest batch the model takes."""
    return _shapes(_watcher(model, layers, samples)(samples.example()))


def _shapes(activations: Feed) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in activations.items()}


def _watcher(
    model: Model,
    layers: Sequence[Layer],
    samples: Samples,
    also: Collection[str] = (),
    given: Mapping[str, npt.DTypeLike] | None = None,
) -> Callable[[Feed], Feed]:
    """A function from a feed to the inputs of ``layers`` and the tensors ``also``, by name.

    What is fed, or ``given`` in the feed by an earlier run, needs no run; ``given`` has its types.
    """
    names = {layer.input for layer in layers} | {*also}
    fed = names & {*samples.inputs, *samples.constants, *(given or ())}
    computed = sorted(names - fed)
    session = None
    if computed:
        session = open_model(model, outputs=computed, given=given)

    def watch(feed: Feed) -> Feed:
        return {name: feed[name] for name in fed} | (session.run(feed) if session is not None else {})

    return watch
