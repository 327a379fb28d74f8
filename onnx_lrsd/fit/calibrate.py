"""Run the samples through ONNX Runtime and keep the moments of every layer's input.

Activations are fetched, not recomputed; positions are sampled, so that the cost of the moments
depends on the sizes of the layers and not on the number of samples or the size of the images. One
thread runs the network a batch ahead of the moments: ONNX Runtime leaves idle some of the time that
NumPy needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from onnx_lrsd.data.samples import Samples, as_fed
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.subgraph import frontier
from onnx_lrsd.passes.operators import operator_of
from onnx_lrsd.passes.operators.rows import pixel_rows
from onnx_lrsd.runtime.activation_cache import Relay
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.solver.moments import MomentAccumulator, sample_positions
from onnx_lrsd.types import Feed, Layer, Moments, Progress, Rows, Values

ROWS_PER_INPUT = 8
FEWEST_ROWS, MOST_ROWS = 4096, 20_000
"""Rows of a layer that factors are fitted to: eight for each input, between these bounds."""
SURVEY = 4
"""Every fourth row is enough for the error curves that the plan is made from, if so many are left."""
MOST_INPUTS = 6
"""Inputs are kept instead of outputs where there are at most so many for each output."""
ORIGINAL = 3
"""Every third row that a layer behind rewritten ones is fitted to is the original network's, at most."""
ORIGINAL_BYTES = 512 << 20
"""What these rows may take; with large layers there are fewer of them."""
CHUNK = 2048
"""Rows worked on at once, at least: threads of NumPy that wait for those of ONNX Runtime wait less often."""
FETCHED_BYTES = 64 << 20
"""Inputs of layers fetched in one batch, at most, outputs not counted; two batches are held at a time."""

Item = TypeVar("Item")
WeightOf = Callable[[Layer], tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one run over the calibration samples taught.

    ``layers`` know their positions. ``moments`` and ``kept`` are by layer name, for the layers asked
    for: of the sampled positions, either the original outputs (count, n) or, where that takes little
    more memory, the original inputs (count, m), whose product with W is then left to a later run that
    needs it. ``inputs`` are the original inputs of every ``every``-th position. ``shapes`` are those of
    the layers' inputs in the smallest batch, by tensor. A later run with the same ``samples``, ``batch``
    and ``seed`` sees the same positions.
    """

    layers: tuple[Layer, ...]
    moments: Mapping[str, Moments]
    kept: Mapping[str, Rows]
    inputs: Mapping[str, Rows]
    every: int
    shapes: Mapping[str, tuple[int, ...]]
    samples: Samples
    batch: int
    seed: int


def calibrate(
    model: Model,
    layers: Sequence[Layer],
    samples: Samples,
    weight_of: WeightOf,
    *,
    asked: Callable[[Layer], bool] = lambda layer: True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Moments of the inputs of ``layers`` over ``samples``, and what tells the outputs they give.

    ``weight_of`` gives W (n, m) and b (n,) of a layer. Outputs of a Conv are fetched, which undoes a
    fusion but costs less than computing them; those of other operators, whose bias another node may
    add, are computed from the sampled rows. ``asked`` says for which layers
    (located) there shall be moments; the inputs of the others are not even fetched. Memory
    is bounded by the layers: rows, not samples, are kept.

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
    watch = _watcher(model, layers, samples)
    samples = as_fed(samples, watch)
    shapes = _shapes(watch(next(iter(samples.batches(1)))))
    bytes_each = sum(4 * int(np.prod(shape)) for shape in shapes.values()) // samples.smallest_batch
    batch = samples.batch_size(bytes_each, FETCHED_BYTES)
    located = locate(layers, shapes, samples)
    watched = [layer for layer in located if asked(layer)]
    accumulators, kept, inputs, weights, strides = {}, {}, {}, {}, {}
    every = _every(watched, samples.count)
    for layer in watched:
        wanted = _wanted(layer, samples.count)
        if not _keeps_inputs(layer):
            inputs[layer.output] = np.empty((-(-wanted // every), layer.m), np.float32)
        strides[layer.output] = _stride(layer, wanted, samples)
        accumulators[layer.output] = MomentAccumulator(layer, -(-wanted // strides[layer.output]))
        kept[layer.output] = np.empty((wanted, layer.m if _keeps_inputs(layer) else layer.n), np.float32)
        if not _keeps_inputs(layer) and not operator_of(layer).FETCHES_OUTPUTS:
            weights[layer.output] = _single(weight_of(layer))
    done = dict.fromkeys(accumulators, 0)
    into = {layer.output: kept[layer.output] for layer in watched if _keeps_inputs(layer)}
    outputs = {name: rows for name, rows in kept.items() if name not in into and name not in weights}
    runs = _runs(model, watched, samples, batch, outputs, Relay(), ())
    for layer, rows in _observe(runs, watched, samples, seed, into, outputs, progress):
        start, stop = done[layer.output], done[layer.output] + len(rows)
        if layer.output in weights:
            _outputs(rows, weights[layer.output], kept[layer.output][start:stop])
        if layer.output in inputs:
            inputs[layer.output][_which(start, stop, every)] = _nth(rows, start, every)
        accumulators[layer.output].add(_nth(rows, start, strides[layer.output]))  # wherever the batches end
        done[layer.output] = stop
    kept = {name: values[: done[name]] for name, values in kept.items()}
    inputs |= {name: kept[name][::every] for name in into}
    moments = _results(accumulators, samples)
    return Calibration(
        layers=located,
        moments=moments,
        kept=kept,
        inputs=inputs,
        every=every,
        shapes=shapes,
        samples=samples,
        batch=batch,
        seed=seed,
    )


def recalibrate(
    model: Model,
    layers: Sequence[Layer],
    reference: Calibration,
    weight_of: WeightOf,
    paired: Collection[str] = (),
    relay: Relay | None = None,
    later: Sequence[Layer] = (),
) -> tuple[dict[str, Moments], dict[str, tuple[Rows, Rows]]]:
    """Moments of the inputs that the rewritten ``model`` feeds to ``layers``, with the cross moment.

    ``layers`` are as ``reference`` has them; what they should give are the original outputs. For the
    layers named in ``paired`` the rows of both come as well, (count, m) and (count, n). Every
    ``reference.every``-th row is the original input: the errors of the layers before are smaller on the
    samples these were fitted to than on others, and a fit to them alone corrects too much.

    With ``relay`` the run starts where an earlier one left off, and leaves there what is settled as long as
    ``layers`` and ``later`` ones may change.
    """
    samples, kept, every = reference.samples, dict(reference.kept), reference.every
    done = dict.fromkeys((layer.output for layer in layers), 0)
    for layer in layers:
        if _keeps_inputs(layer):
            rows = kept[layer.output]
            outputs = np.empty((len(rows), layer.n), np.float32)
            kept[layer.output] = _outputs(rows, _single(weight_of(layer)), outputs)
    accumulators = {layer.output: MomentAccumulator(layer, _wanted(layer, samples.count)) for layer in layers}
    into = {
        la.output: np.empty((len(kept[la.output]), la.m), np.float32) for la in layers if la.output in paired
    }
    changing = {name for layer in (*layers, *later) for name in (layer.output, layer.weight)}
    handed = [] if relay is None else frontier(model.proto, changing)
    runs = _runs(model, layers, samples, reference.batch, (), relay or Relay(), handed)
    for layer, rows in _observe(runs, layers, samples, reference.seed, into, {}):
        start, stop = done[layer.output], done[layer.output] + len(rows)
        _nth(rows, start, every)[:] = reference.inputs[layer.output][_which(start, stop, every)]
        accumulators[layer.output].add(rows, kept[layer.output][start:stop])
        done[layer.output] = stop
    return _results(accumulators, samples), {name: (rows, kept[name]) for name, rows in into.items()}


def _every(layers: Sequence[Layer], samples: int) -> int:
    """Of how many rows one original input is kept beside the outputs."""
    whole = sum(4 * layer.m * _wanted(layer, samples) for layer in layers if not _keeps_inputs(layer))
    return max(ORIGINAL, -(-whole // ORIGINAL_BYTES))


def _nth(rows: Rows, start: int, every: int) -> Rows:
    """A view of those of ``rows``, which are numbered from ``start``, whose number ``every`` divides."""
    return rows[-start % every :: every]


def _which(start: int, stop: int, every: int) -> slice:
    """Among every ``every``-th row, those between the rows ``start`` and ``stop``."""
    return slice(-(-start // every), -(-stop // every))


def _stride(layer: Layer, wanted: int, samples: Samples) -> int:
    """Of how many rows, padding not counted, one goes into the curves; FEWEST_ROWS are left."""
    real: float = wanted
    if not layer.channels_first:
        real = samples.filled * samples.count * layer.positions
    return min(max(int(min(wanted, real)) // FEWEST_ROWS, 1), SURVEY)


def _keeps_inputs(layer: Layer) -> bool:
    return layer.m <= MOST_INPUTS * layer.n


def _single(affine: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]) -> tuple[Rows, Rows]:
    return affine[0].astype(np.float32), affine[1].astype(np.float32)


def _outputs(rows: Rows, affine: tuple[Rows, Rows], out: Rows) -> Rows:
    """W x + b of every row, into ``out``."""
    np.matmul(rows, affine[0].T, out=out)
    out += affine[1]
    return out


def _results(accumulators: Mapping[str, MomentAccumulator], samples: Samples) -> dict[str, Moments]:
    return {
        name: replace(accumulator.result(), samples=samples.count)
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
) -> Iterator[tuple[int, Values | None, Feed]]:
    """Of each batch its size, where it is no padding, the inputs of ``layers`` and tensors ``also``.

    Those ``handed`` go to ``relay``.
    """
    watch = _watcher(model, layers, samples, {*also, *handed}, relay.types)
    batches = -(-samples.count // batch)
    for index, feed in enumerate(samples.batches(batch)):
        values = watch({**feed, **relay.feed(index)})
        relay.offer(index, batches, values, handed)
        yield samples.size_of(feed), samples.real(feed), values


def _observe(
    runs: Iterator[tuple[int, Values | None, Feed]],
    layers: Sequence[Layer],
    samples: Samples,
    seed: int,
    into: Mapping[str, Rows],
    outputs: Mapping[str, Rows],
    progress: Progress | None = None,
) -> Iterator[tuple[Layer, Rows]]:
    """Each layer with its sampled rows in ``runs``, some thousand at a time; the same for one seed and batch.

    Rows of the layers in ``into`` are gathered there, one after the other; those of others are
    overwritten by the next ones. Outputs of the convolutions in ``outputs`` are gathered there.
    """
    seen = dict.fromkeys(outputs, 0)
    buffers = {layer.output: into.get(layer.output, np.empty((0, layer.m), np.float32)) for layer in layers}
    given = dict.fromkeys(buffers, 0)
    filled = dict.fromkeys(buffers, 0)
    first = 0
    for count, real, activations in _ahead(runs):
        last = first + count == samples.count
        for layer in layers:
            name, values = layer.output, activations[layer.input]
            positions = _positions(layer, values.shape, real, first, count, samples.count, seed)
            start, stop = filled[name], filled[name] + len(positions)
            if stop > len(buffers[name]):  # batches but the last are alike: once, as a rule
                room = np.empty((CHUNK + 2 * len(positions), layer.m), np.float32)
                room[:start] = buffers[name][:start]
                buffers[name] = room
            operator_of(layer).input_rows(layer, values, positions, buffers[name][start:stop])
            if name in outputs:
                there = slice(seen[name], seen[name] + len(positions))
                outputs[name][there] = pixel_rows(activations[name], positions)
                seen[name] += len(positions)
            filled[name] = stop
            if last or stop - given[name] >= CHUNK:
                yield layer, buffers[name][given[name] : stop]
                given[name] = filled[name] = stop if name in into else 0
        first += count
        if progress is not None:
            progress("calibrate", first, samples.count)


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """``items`` in their order, the next one being made in another thread while one is worked on."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def _positions(
    layer: Layer, shape: tuple[int, ...], real: Values | None, first: int, count: int, total: int, seed: int
) -> npt.NDArray[np.int64]:
    """Positions in a batch of samples first..first+count-1, a share of the rows from each, no padding."""
    wanted = _wanted(layer, total)
    share = (first + count) * wanted // total - first * wanted // total
    rng = np.random.default_rng((seed, first, layer.n, layer.m))
    if real is None or layer.channels_first or not _of_tokens(shape, layer.axis, real):
        return sample_positions(operator_of(layer).count_rows(layer, shape), share, rng)
    positions = np.flatnonzero(real)
    return positions[sample_positions(len(positions), share, rng)]


def _of_tokens(shape: tuple[int, ...], axis: int, real: Values) -> bool:
    """Whether a tensor with features along ``axis`` has a row for each position, by samples or flat."""
    return np.delete(shape, axis).tolist() in ([*real.shape], [real.size])


def _wanted(layer: Layer, samples: int) -> int:
    """Rows to gather for a layer in all; never more than the samples hold."""
    wanted = min(max(ROWS_PER_INPUT * layer.m, FEWEST_ROWS), MOST_ROWS)
    return min(wanted, layer.positions * samples) if layer.positions else wanted


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
    return _shapes(_watcher(model, layers, samples)(next(iter(samples.batches(1)))))


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
        session = open_session(model.proto, folder=model.folder, outputs=computed, given=given)

    def watch(feed: Feed) -> Feed:
        return {name: feed[name] for name in fed} | (session.run(feed) if session is not None else {})

    return watch
