"""Run the samples through ONNX Runtime and keep the moments of every layer's input.

Activations are fetched, not recomputed; positions are sampled, so that the cost of the moments
depends on the sizes of the layers and not on the number of samples or the size of the images. One
thread runs the network a batch ahead of the moments: ONNX Runtime leaves idle some of the time that
NumPy needs. From a GPU each batch of activations is copied once; sampled rows go back there for the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from math import ceil, frexp, isfinite, prod
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from onnx_lrsd.data.samples import Samples, as_fed
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.subgraph import frontier
from onnx_lrsd.passes.operators import operator_of
from onnx_lrsd.passes.operators.rows import pixel_rows
from onnx_lrsd.runtime.activation_cache import Relay
from onnx_lrsd.runtime.session import open_model
from onnx_lrsd.scratch import OnDemand, Scratch, ScratchArray
from onnx_lrsd.solver.moments import MomentAccumulator, sample_positions
from onnx_lrsd.types import Feed, Layer, Moments, Progress, Rows, Values
from onnx_lrsd.wording import counted
from onnx_lrsd.work_dir import Keep
from onnx_lrsd.workers import one_ahead

ROWS_PER_INPUT = 8
FEWEST_ROWS, MOST_ROWS = 4096, 20_000
"""Rows of a layer that factors are fitted to: eight for each input, between these bounds."""
SURVEY = 4
"""Every fourth row is enough for the error curves that the plan is made from, if so many are left."""
MOST_INPUTS = 6
"""Inputs are kept instead of outputs where there are at most so many for each output."""
EVERY_ORIGINAL = 3
"""Every third row that a layer behind rewritten ones is fitted to is the original network's, at most."""
ORIGINAL_BYTES = 512 << 20
"""What these rows may take; with large layers there are fewer of them."""
CHUNK = 2048
"""Rows worked on at once, at least: threads of NumPy that wait for those of ONNX Runtime wait less often."""
_LARGEST = 2.0**56
"""Rows with greater values are left out as infinite ones are: their squares would overflow in sums."""
ORDINARY = 2.0**40
"""Where inputs are greater than this, or all smaller than its inverse, the layer's rows are scaled."""
_SPARE = 1.25
"""Rows of samples that differ in shape are estimated; so many times as many find room."""
_FETCHED_BYTES = 64 << 20
"""Inputs of layers fetched in one batch, at most, outputs not counted; two batches are held at a time."""

Item = TypeVar("Item")
Kind = TypeVar("Kind", bound=np.generic)
WeightOf = Callable[[Layer], tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one run over the calibration samples taught.

    ``layers`` know their positions, those of a sample of middle size where samples differ in shape.
    ``moments`` and ``kept`` are by layer name, for the layers asked
    for: of the sampled positions, either the original outputs (count, n) or, for those ``by_inputs``, the
    original inputs (count, m), where that takes little more memory: their product with W is then left to a
    later run that needs it. ``inputs`` are the original inputs of every ``every``-th position. ``shapes`` are
    those of the layers' inputs in the example of the samples, by tensor. A later run with the same
    ``samples``, ``batch``, ``seed`` and ``quotas`` sees the same positions. ``left_out`` says of how many
    rows how many were not finite, where there were any, and ``silent`` how many were zero throughout.
    With ``scratch`` rows and moments lie in such a file, and are read layer by layer.
    """

    layers: tuple[Layer, ...]
    moments: Mapping[str, Moments]
    kept: Mapping[str, Rows]
    by_inputs: frozenset[str]
    inputs: Mapping[str, Rows]
    every: int
    shapes: Mapping[str, tuple[int, ...]]
    samples: Samples
    batch: int
    seed: int
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    silent: Mapping[str, int] = field(default_factory=dict)
    scratch: Scratch | None = None


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
    layers' inputs in the example of the samples.
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
            if not _keeps_inputs(layer) and operator_of(layer).FETCHES_OUTPUTS
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
    samples, batch = sampling.samples, sampling.batch
    counts = [samples.size_of(feed) for feed in samples.batches(batch)]
    start, stop = (len(counts) * end // of for end in (shard - 1, shard))
    first, last = sum(counts[:start]), sum(counts[:stop])
    most = {name: quota.share(first, last - first) for name, quota in sampling.quotas.items()}
    into = {la.output: np.empty((most[la.output], la.m), np.float32) for la in sampling.watched}
    fetched = sampling.fetched
    outputs = {
        la.output: np.empty((most[la.output], la.n), np.float32)
        for la in sampling.watched
        if la.output in fetched
    }
    done = dict.fromkeys(into, 0)
    watched, seed, quotas = sampling.watched, sampling.seed, sampling.quotas
    runs = _runs(model, watched, samples, batch, outputs, Relay(), (), range(start, stop))
    observed = _observe(runs, watched, samples, seed, quotas, into, outputs, progress, (first, last))
    for layer, rows in observed:
        done[layer.output] += len(rows)
    return [
        GatheredRows(
            layer,
            into[layer.output][: done[layer.output]],
            outputs[layer.output][: done[layer.output]] if layer.output in fetched else None,
        )
        for layer in sampling.watched
    ]


class LeftOut(NamedTuple):
    """Rows of a layer that were not finite, of how many."""

    rows: int
    of: int


def calibrate(
    model: Model,
    layers: Sequence[Layer],
    samples: Samples,
    weight_of: WeightOf,
    *,
    asked: Callable[[Layer], bool] = lambda layer: True,
    seed: int = 0,
    progress: Progress | None = None,
    gathered: Callable[[Sampling], Iterator[GatheredRows]] | None = None,
    scratch_for: Callable[[Sampling], Scratch | None] = lambda sampling: None,
) -> Calibration:
    """Moments of the inputs of ``layers`` over ``samples``, and what tells the outputs they give.

    ``weight_of`` gives W (n, m) and b (n,) of a layer. Outputs of a Conv are fetched, which undoes a
    fusion but costs less than computing them; those of other operators, whose bias another node may
    add, are computed from the sampled rows. ``asked`` says for which layers
    (located) there shall be moments; the inputs of the others are not even fetched. Memory
    is bounded by the layers: rows, not samples, are kept, in the file that ``scratch_for`` gives if it does.
    Rows that were ``gathered`` before, in shards, stand in for a run.

    >>> from functools import partial
    >>> import numpy as np, onnx, onnx_lrsd
    >>> from onnx_lrsd.graph.subgraph import inputs_of
    >>> graph = onnx.parser.parse_graph("g (float[n, 64] x) => (float[n, 64] y) { y = MatMul (x, w) }")
    >>> weight = np.outer(np.arange(64), np.ones(64)).astype(np.float32)
    >>> graph.initializer.extend([onnx.numpy_helper.from_array(weight, "w")])
    >>> opset = onnx.helper.make_opsetid("", 17)
    >>> model = onnx_lrsd.load(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8))
    >>> working = model.graph()
    >>> layers, _ = onnx_lrsd.find_layers(working)
    >>> samples = onnx_lrsd.read_samples({"x": np.eye(200, 64, dtype=np.float32)}, inputs_of(model.proto))
    >>> known = onnx_lrsd.calibrate(model, layers, samples, partial(onnx_lrsd.read_weight, working))
    >>> known.kept["y"].shape, known.moments["y"].mean.shape
    ((200, 64), (64,))
    """
    sampling = sampling_of(model, layers, samples, asked, seed)
    scratch = scratch_for(sampling)
    if scratch is not None:
        return _calibrate_aside(model, sampling, scratch, weight_of, progress, gathered)
    samples, watched, quotas = sampling.samples, sampling.watched, sampling.quotas
    accumulators, kept, inputs, weights, strides = {}, {}, {}, {}, {}
    every = _every(watched, quotas)
    for layer in watched:
        wanted, scale = quotas[layer.output].wanted, quotas[layer.output].scale
        if not _keeps_inputs(layer):
            inputs[layer.output] = np.empty((ceil(wanted / every), layer.m), np.float32)
        strides[layer.output] = _stride(layer, wanted, samples)
        expected = ceil(wanted / strides[layer.output])
        accumulators[layer.output] = MomentAccumulator(layer, expected, _beside(model))
        kept[layer.output] = np.empty((wanted, layer.m if _keeps_inputs(layer) else layer.n), np.float32)
        if not _keeps_inputs(layer) and not operator_of(layer).FETCHES_OUTPUTS:
            weights[layer.output] = _single(weight_of(layer), scale)
    bad, silent = dict.fromkeys(accumulators, 0), dict.fromkeys(accumulators, 0)
    done = dict.fromkeys(accumulators, 0)
    into = {layer.output: kept[layer.output] for layer in watched if _keeps_inputs(layer)}
    outputs = {name: rows for name, rows in kept.items() if name not in into and name not in weights}
    if gathered is None:
        runs = _runs(model, watched, samples, sampling.batch, outputs, Relay(), ())
        stream = _observe(runs, watched, samples, seed, quotas, into, outputs, progress)
    else:
        stream = _taken(gathered(sampling), into, outputs)
    for layer, rows in stream:
        start, stop = done[layer.output], done[layer.output] + len(rows)
        if layer.output in weights:
            _outputs(rows, weights[layer.output], kept[layer.output][start:stop])
        if layer.output in inputs:
            inputs[layer.output][_places(start, stop, every)] = _every_nth(rows, start, every)
        usable = _usable(rows)
        bad[layer.output] += len(rows) - int(np.count_nonzero(usable))
        silent[layer.output] += len(rows) - int(np.count_nonzero(rows.any(axis=1)))
        stride = strides[layer.output]
        accumulators[layer.output].add(
            _only(_every_nth(rows, start, stride), _every_nth(usable, start, stride))
        )
        done[layer.output] = stop
    kept = {name: values[: done[name]] for name, values in kept.items()}
    inputs |= {name: kept[name][::every] for name in into}
    moments = _results(accumulators, samples, quotas, silent)
    return Calibration(
        layers=sampling.layers,
        moments=moments,
        kept=kept,
        by_inputs=frozenset(into),
        inputs=inputs,
        every=every,
        shapes=sampling.shapes,
        samples=samples,
        batch=sampling.batch,
        seed=seed,
        quotas=quotas,
        left_out={name: LeftOut(rows, done[name]) for name, rows in bad.items() if rows},
        silent=silent,
    )


def _calibrate_aside(
    model: Model,
    sampling: Sampling,
    scratch: Scratch,
    weight_of: WeightOf,
    progress: Progress | None,
    gathered: Callable[[Sampling], Iterator[GatheredRows]] | None,
) -> Calibration:
    """What ``calibrate`` gives, with the rows in ``scratch`` and what follows from them made on demand."""
    samples, quotas = sampling.samples, sampling.quotas
    by_name = {layer.output: layer for layer in sampling.watched}
    aside = _Aside(sampling, scratch, sampling.fetched)
    if gathered is None:
        aside.observe(model, progress)
    else:
        for layer, rows, given in gathered(sampling):
            aside.take(layer, rows, given)
    by_inputs = frozenset(layer.output for layer in sampling.watched if _keeps_inputs(layer))
    every = _every(sampling.watched, quotas)
    made: dict[str, Moments] = {}

    def kept_of(name: str) -> Rows:
        if name in by_inputs or name in aside.outputs:
            return aside.rows(name, aside.inputs if name in by_inputs else aside.outputs)
        rows, layer = aside.rows(name, aside.inputs), by_name[name]
        affine, found = (
            _single(weight_of(layer), quotas[name].scale),
            np.empty((len(rows), layer.n), np.float32),
        )
        for start, stop in pairwise(aside.ends[name]):
            _outputs(rows[start:stop], affine, found[start:stop])
        return found

    def moments_of(name: str) -> Moments:
        if name not in made:
            layer, rows = by_name[name], aside.rows(name, aside.inputs)
            stride = _stride(layer, quotas[name].wanted, samples)
            accumulator = MomentAccumulator(layer, ceil(quotas[name].wanted / stride), _beside(model))
            for start, stop in pairwise(aside.ends[name]):
                here = _every_nth(rows[start:stop], start, stride)
                accumulator.add(_only(here, _usable(here)) if len(here) else here)
            found = _results({name: accumulator}, samples, quotas, aside.silent)[name]
            made[name] = replace(
                found,
                second=None if found.second is None else scratch.put(found.second),
                rows=None if found.rows is None else scratch.put(found.rows),
            )
        return _read(made[name])

    def inputs_of(name: str) -> Rows:
        return np.ascontiguousarray(aside.rows(name, aside.inputs)[::every])

    return Calibration(
        layers=sampling.layers,
        moments=OnDemand(by_name, moments_of),
        kept=OnDemand(by_name, kept_of),
        by_inputs=by_inputs,
        inputs=OnDemand(by_name, inputs_of),
        every=every,
        shapes=sampling.shapes,
        samples=samples,
        batch=sampling.batch,
        seed=sampling.seed,
        quotas=quotas,
        left_out={name: LeftOut(rows, aside.done[name]) for name, rows in aside.bad.items() if rows},
        silent=aside.silent,
        scratch=scratch,
    )


def _read(moments: Moments) -> Moments:
    """``moments`` with the arrays of a scratch file that it refers to."""
    read: dict[str, Any] = {
        one.name: value.read()
        for one in fields(moments)
        if isinstance(value := getattr(moments, one.name), ScratchArray)
    }
    return replace(moments, **read)


class _Aside:
    """Sampled rows of layers in a scratch file: of all inputs, and of the outputs ``fetched``.

    ``ends`` are the numbers of the rows at which those that are worked on at once begin and end. ``bad`` ones
    are not finite, ``silent`` ones zero throughout.
    """

    def __init__(self, sampling: Sampling, scratch: Scratch, fetched: Collection[str] = ()) -> None:
        self.sampling, quotas = sampling, sampling.quotas
        self.inputs, self.outputs = dict[str, ScratchArray](), dict[str, ScratchArray]()
        for layer in sampling.watched:
            name, wanted = layer.output, quotas[layer.output].wanted
            self.inputs[name] = scratch.reserve((wanted, layer.m), np.float32)
            if name in fetched:
                self.outputs[name] = scratch.reserve((wanted, layer.n), np.float32)
        self.ends = {name: [0] for name in self.inputs}
        self.done, self.bad, self.silent = (dict.fromkeys(self.inputs, 0) for _ in range(3))

    def observe(self, model: Model, progress: Progress | None) -> None:
        """Take the rows of a run of all samples, batch by batch."""
        of = self.sampling
        outputs = {name: np.empty((0, stored.shape[1]), np.float32) for name, stored in self.outputs.items()}
        runs = _runs(model, of.watched, of.samples, of.batch, outputs, Relay(0), ())
        last = dict.fromkeys(self.inputs, 0)
        observed = _observe(
            runs, of.watched, of.samples, of.seed, of.quotas, {}, outputs, progress, chunk=0, passing=True
        )
        for layer, rows in observed:
            given = outputs.get(layer.output)
            self.take(layer, rows, given, ends=False)
            done, name = self.done[layer.output], layer.output
            if done - last[name] >= CHUNK:
                self.ends[name].append(done)
                last[name] = done
        for name, done in self.done.items():
            if self.ends[name][-1] < done:
                self.ends[name].append(done)

    def take(self, layer: Layer, rows: Rows, outputs: Rows | None, *, ends: bool = True) -> None:
        """Take some more rows of a layer."""
        name, start = layer.output, self.done[layer.output]
        self.inputs[name].write(start, rows)
        if outputs is not None:
            self.outputs[name].write(start, outputs)
        if len(rows):
            self.bad[name] += len(rows) - int(np.count_nonzero(_usable(rows)))
            self.silent[name] += len(rows) - int(np.count_nonzero(rows.any(axis=1)))
        self.done[name] = start + len(rows)
        if ends:
            self.ends[name].append(self.done[name])

    def rows(self, name: str, stored: Mapping[str, ScratchArray]) -> Rows:
        """Those of one layer, mapped."""
        return stored[name].first(self.done[name]).read()


def kept_calibration(
    keep: Keep, facts: object, samples: Samples, make: Callable[[], Calibration]
) -> Calibration:
    """What ``make`` gives, or what was kept of an earlier run over ``samples`` for the same ``facts``.

    Rows in a scratch file are not kept.
    """

    def without_samples() -> dict[str, Any]:
        made = make()
        found = {one.name: getattr(made, one.name) for one in fields(made) if one.name != "samples"}
        return found | {"fixed": made.samples.fixed}

    found = keep("calibration", facts, without_samples, (LeftOut, Layer, Moments, Quota))
    fixed = found.pop("fixed")
    return Calibration(samples=replace(samples, fixed=fixed), **found)


def what_was_left_out(known: Calibration) -> str:
    """A sentence on the rows that were not finite; empty where all were."""
    if not known.left_out:
        return ""
    names = {layer.output: layer.name for layer in known.layers}
    worst = max(known.left_out, key=lambda output: known.left_out[output].rows)
    rows, of = known.left_out[worst]
    others = len(known.left_out) - 1
    more = f", and of {counted(others, 'other layer')}" if others else ""
    return (
        f"{rows} of {of} sampled rows of the inputs of {names[worst]}{more} hold NaN, infinite or huge "
        "values and were left out: check the samples, or name layers to leave alone with --exclude."
    )


def recalibrate(
    model: Model,
    layers: Sequence[Layer],
    reference: Calibration,
    weight_of: WeightOf,
    paired: Collection[str] = (),
    relay: Relay | None = None,
    later: Sequence[Layer] = (),
) -> tuple[Mapping[str, Moments], Mapping[str, tuple[Rows, Rows]]]:
    """Moments of the inputs that the rewritten ``model`` feeds to ``layers``, with the cross moment.

    ``layers`` are as ``reference`` has them; what they should give are the original outputs. For the
    layers named in ``paired`` the rows of both come as well, (count, m) and (count, n). Every
    ``reference.every``-th row is the original input: the errors of the layers before are smaller on the
    samples these were fitted to than on others, and a fit to them alone corrects too much.

    With ``relay`` the run starts where an earlier one left off, and leaves there what is settled as long as
    ``layers`` and ``later`` ones may change.
    """
    changing = {name for layer in (*layers, *later) for name in (layer.output, layer.weight)}
    handed = [] if relay is None else frontier(model.proto, changing)
    if reference.scratch is not None:
        return _recalibrate_aside(model, layers, reference, weight_of, paired, relay or Relay(), handed)
    samples, kept, every = reference.samples, dict(reference.kept), reference.every
    quotas = reference.quotas
    done = dict.fromkeys((layer.output for layer in layers), 0)
    for layer in layers:
        if layer.output in reference.by_inputs:
            kept[layer.output] = original_outputs(layer, reference, weight_of)
    accumulators = {
        layer.output: MomentAccumulator(layer, quotas[layer.output].wanted, _beside(model))
        for layer in layers
    }
    fine = {layer.output: np.ones(len(kept[layer.output]), bool) for layer in layers}
    into = {
        la.output: np.empty((len(kept[la.output]), la.m), np.float32) for la in layers if la.output in paired
    }
    runs = _runs(model, layers, samples, reference.batch, (), relay or Relay(), handed)
    for layer, rows in _observe(runs, layers, samples, reference.seed, quotas, into, {}):
        start, stop = done[layer.output], done[layer.output] + len(rows)
        _every_nth(rows, start, every)[:] = reference.inputs[layer.output][_places(start, stop, every)]
        targets = kept[layer.output][start:stop]
        usable = fine[layer.output][start:stop] = _usable(rows) & _usable(targets)
        accumulators[layer.output].add(_only(rows, usable), _only(targets, usable))
        done[layer.output] = stop
    pairs = {name: (_only(rows, fine[name]), _only(kept[name], fine[name])) for name, rows in into.items()}
    return _results(accumulators, samples, quotas, reference.silent), pairs


def _recalibrate_aside(
    model: Model,
    layers: Sequence[Layer],
    reference: Calibration,
    weight_of: WeightOf,
    paired: Collection[str],
    relay: Relay,
    handed: Sequence[str],
) -> tuple[Mapping[str, Moments], Mapping[str, tuple[Rows, Rows]]]:
    """What ``recalibrate`` gives, with rows in a scratch file of their own and the rest made on demand."""
    assert reference.scratch is not None
    samples, quotas, every = reference.samples, reference.quotas, reference.every
    sampling = Sampling(
        layers=tuple(layers),
        watched=tuple(layers),
        samples=samples,
        batch=reference.batch,
        quotas=quotas,
        shapes=reference.shapes,
        seed=reference.seed,
    )
    aside, by_name = _Aside(sampling, reference.scratch.new()), {layer.output: layer for layer in layers}
    runs = _runs(model, layers, samples, reference.batch, (), relay, handed)
    for layer, rows in _observe(runs, layers, samples, reference.seed, quotas, {}, {}, chunk=0):
        aside.take(layer, rows, None)

    def rows_of(name: str) -> tuple[Rows, Rows]:
        rows, layer = np.array(aside.rows(name, aside.inputs)), by_name[name]
        rows[::every] = reference.inputs[name][_places(0, len(rows), every)]
        targets = original_outputs(layer, reference, weight_of)[: len(rows)]
        usable = _usable(rows) & _usable(targets)
        return _only(rows, usable), _only(targets, usable)

    def moments_of(name: str) -> Moments:
        accumulator = MomentAccumulator(by_name[name], quotas[name].wanted, _beside(model))
        accumulator.add(*rows_of(name))
        return _results({name: accumulator}, samples, quotas, reference.silent)[name]

    return OnDemand(by_name, moments_of), OnDemand([name for name in by_name if name in paired], rows_of)


def original_outputs(layer: Layer, reference: Calibration, weight_of: WeightOf) -> Rows:
    """What the original layer gave at the sampled positions, (count, n)."""
    rows = reference.kept[layer.output]
    if layer.output not in reference.by_inputs:
        return rows
    affine = _single(weight_of(layer), reference.quotas[layer.output].scale)
    return _outputs(rows, affine, np.empty((len(rows), layer.n), np.float32))


def original_inputs(layer: Layer, reference: Calibration) -> Rows | None:
    """What was kept of the original inputs (count, m), finite rows in their order; None if nothing was."""
    kept = reference.kept if layer.output in reference.by_inputs else reference.inputs
    rows = kept.get(layer.output)
    return None if rows is None else _only(rows, _usable(rows))


class _Probe(NamedTuple):
    """What one smallest batch tells: entries of a sample, and shape and size of the layers' inputs."""

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


def _usable(rows: Rows) -> npt.NDArray[np.bool_]:
    """Which rows (count, m) are finite, and not so large that their squares overflow."""
    usable: npt.NDArray[np.bool_] = (rows.max(axis=1) < _LARGEST) & (rows.min(axis=1) > -_LARGEST)
    return usable


def _only(rows: Rows, usable: npt.NDArray[np.bool_]) -> Rows:
    return rows if usable.all() else rows[usable]


def _every(layers: Sequence[Layer], quotas: Mapping[str, Quota]) -> int:
    """Of how many rows one original input is kept beside the outputs."""
    whole = sum(4 * layer.m * quotas[layer.output].wanted for layer in layers if not _keeps_inputs(layer))
    return max(EVERY_ORIGINAL, ceil(whole / ORIGINAL_BYTES))


def _every_nth(rows: npt.NDArray[Kind], start: int, every: int) -> npt.NDArray[Kind]:
    """A view of those of ``rows``, which are numbered from ``start``, whose number ``every`` divides."""
    first = ceil(start / every) * every
    return rows[first - start :: every]


def _places(start: int, stop: int, every: int) -> slice:
    """Where an array of every ``every``-th row has those between the rows ``start`` and ``stop``."""
    return slice(ceil(start / every), ceil(stop / every))


def _stride(layer: Layer, wanted: int, samples: Samples) -> int:
    """Of how many rows, padding not counted, one goes into the curves; FEWEST_ROWS are left."""
    real: float = wanted
    if not layer.channels_first:
        real = samples.filled * samples.count * layer.positions
    return min(max(int(min(wanted, real)) // FEWEST_ROWS, 1), SURVEY)


def _keeps_inputs(layer: Layer) -> bool:
    return layer.m <= MOST_INPUTS * layer.n


def _single(
    affine: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]], scale: float
) -> tuple[Rows, Rows]:
    """W and ``scale`` b in single precision."""
    return affine[0].astype(np.float32), (scale * affine[1]).astype(np.float32)


def _outputs(rows: Rows, affine: tuple[Rows, Rows], out: Rows) -> Rows:
    """W x + b of every row, into ``out``; not finite where the row is not."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.matmul(rows, affine[0].T, out=out)
        out += affine[1]
    return out


def _beside(model: Model) -> str:
    """Where moments are accumulated: on the GPU if ``model`` runs there and CuPy finds it."""
    return "cpu" if model.device == "cpu" else "auto"


def _results(
    accumulators: Mapping[str, MomentAccumulator],
    samples: Samples,
    quotas: Mapping[str, Quota],
    silent: Mapping[str, int],
) -> dict[str, Moments]:
    return {
        name: replace(
            accumulator.result(), samples=samples.count, scale=quotas[name].scale, silent=silent[name]
        )
        for name, accumulator in accumulators.items()
    }


def _runs(
    model: Model,
    layers: Sequence[Layer],
    samples: Samples,
    batch: int,
    also: Collection[str],
    relay: Relay,
    handed: Sequence[str],
    part: range | None = None,
) -> Iterator[tuple[int, Values | None, Feed]]:
    """Of each batch its size, where it is no padding, the inputs of ``layers`` and tensors ``also``.

    Those ``handed`` go to ``relay``. Of the batches those in ``part`` are run, all if it is None.
    """
    watch = _watcher(model, layers, samples, {*also, *handed}, relay.types)
    batches = samples.batch_count(batch)
    for index, feed in enumerate(samples.batches(batch)):
        if part is not None and index not in part:
            continue
        values = watch({**feed, **relay.feed(index)})
        relay.offer(index, batches, values, handed, samples.sizes.max() / samples.sizes[0])
        yield samples.size_of(feed), samples.real(feed), values


def _observe(
    runs: Iterator[tuple[int, Values | None, Feed]],
    layers: Sequence[Layer],
    samples: Samples,
    seed: int,
    quotas: Mapping[str, Quota],
    into: Mapping[str, Rows],
    outputs: dict[str, Rows],
    progress: Progress | None = None,
    part: tuple[int, int] | None = None,
    chunk: int = CHUNK,
    passing: bool = False,
) -> Iterator[tuple[Layer, Rows]]:
    """Each layer with its sampled rows in ``runs``, some thousand at a time; the same for one seed and batch.

    Rows of the layers in ``into`` are gathered there, one after the other; those of others are
    overwritten by the next ones. Outputs of the convolutions in ``outputs`` are gathered there. ``part`` are
    the first of the samples that ``runs`` are of and the one behind the last; None for all. Of a layer that
    is not gathered rows come when there are ``chunk``, and none are held then; where outputs are ``passing``
    each batch of them replaces the one before.
    """
    seen = dict.fromkeys(outputs, 0)
    buffers = {layer.output: into.get(layer.output, np.empty((0, layer.m), np.float32)) for layer in layers}
    given = dict.fromkeys(buffers, 0)
    filled = dict.fromkeys(buffers, 0)
    first, end = part or (0, samples.count)
    for count, real, activations in one_ahead(runs):
        last = first + count == end
        for layer in layers:
            name, values = layer.output, activations[layer.input]
            quota = quotas[name]
            positions = _positions(layer, values.shape, real, first, quota.share(first, count), seed)
            start, stop = filled[name], filled[name] + len(positions)
            if stop > len(buffers[name]):  # batches but the last are alike: once, as a rule
                room = np.empty((chunk + 2 * len(positions), layer.m), np.float32)
                room[:start] = buffers[name][:start]
                buffers[name] = room
            rows = buffers[name][start:stop]
            with np.errstate(over="ignore"):  # of double precision, to infinity
                operator_of(layer).input_rows(layer, values, positions, rows)
                if name in outputs:
                    if passing:
                        outputs[name], seen[name] = np.empty((len(positions), layer.n), np.float32), 0
                    there = slice(seen[name], seen[name] + len(positions))
                    outputs[name][there] = pixel_rows(activations[name], positions)
                    seen[name] += len(positions)
                    if quota.scale != 1:
                        outputs[name][there] *= quota.scale
            if quota.scale != 1:
                rows *= quota.scale
            filled[name] = stop
            if last or stop - given[name] >= chunk:
                yield layer, buffers[name][given[name] : stop]
                given[name] = filled[name] = stop if name in into else 0
                if not chunk:
                    buffers[name] = buffers[name][:0].copy()
        first += count
        if progress is not None:
            progress("calibrate", first, samples.count)


def _taken(
    gathered: Iterable[GatheredRows], into: Mapping[str, Rows], outputs: Mapping[str, Rows]
) -> Iterator[tuple[Layer, Rows]]:
    """What ``_observe`` gives, of rows that were gathered before."""
    taken: dict[str, int] = {}
    for layer, rows, given in gathered:
        start = taken.get(layer.output, 0)
        taken[layer.output] = stop = start + len(rows)
        if layer.output in into:
            into[layer.output][start:stop] = rows
        if layer.output in outputs:
            outputs[layer.output][start:stop] = given
        yield layer, rows


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
    """A function from a feed to the inputs of ``layers``; what is fed or ``given`` needs no run."""
    names = {layer.input for layer in layers} | {*also}
    fed = names & {*samples.inputs, *samples.constants, *(given or ())}
    computed = sorted(names - fed)
    session = None
    if computed:
        session = open_model(model, outputs=computed, given=given)

    def watch(feed: Feed) -> Feed:
        return {name: feed[name] for name in fed} | (session.run(feed) if session is not None else {})

    return watch
