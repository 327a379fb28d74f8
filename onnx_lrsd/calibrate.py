"""Run the samples through ONNX Runtime and keep the moments of every layer's input.

Activations are fetched, not recomputed; positions are sampled, so that the cost of the moments
depends on the sizes of the layers and not on the number of samples or the size of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnx_lrsd.dataset import Samples, as_fed
from onnx_lrsd.model import Model
from onnx_lrsd.runtime import Feed, open_session
from onnx_lrsd.solver.moments import (
    MomentAccumulator,
    Rows,
    input_rows,
    positions_of,
    sample_positions,
)
from onnx_lrsd.types import Layer, Moments, Progress

ROWS_PER_INPUT = 8
FEWEST_ROWS, MOST_ROWS = 8192, 20_000
"""Rows of a layer that factors are fitted to: eight for each input, between these bounds."""
SURVEY = 4
"""Every fourth row is enough for the error curves that the plan is made from."""
FETCHED_BYTES = 192 << 20
"""Activations fetched in one batch, at most."""

WeightOf = Callable[[Layer], tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]


@dataclass(frozen=True)
class Calibration:
    """What one run over the calibration samples taught.

    ``layers`` know their positions. ``moments`` and ``outputs`` (rows of the layer's original
    outputs, (count, n), at the sampled positions) are by layer name; ``shapes`` are those of the
    layers' inputs in the smallest batch, by tensor. A later run with the same ``samples``,
    ``batch`` and ``seed`` sees the same positions.
    """

    layers: tuple[Layer, ...]
    moments: Mapping[str, Moments]
    outputs: Mapping[str, Rows]
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
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Moments of the inputs of ``layers`` over ``samples``, and the outputs they give.

    ``weight_of`` gives W (n, m) and b (n,) of a layer: outputs are computed from the sampled rows,
    since fetching them would undo the fusions of ONNX Runtime. Memory is bounded by the layers: rows,
    not samples, are kept.

    >>> from functools import partial
    >>> import numpy as np, onnx, onnx_lrsd
    >>> from onnx_lrsd.runtime import inputs_of
    >>> graph = onnx.parser.parse_graph("g (float[n, 64] x) => (float[n, 64] y) { y = MatMul (x, w) }")
    >>> weight = np.outer(np.arange(64), np.ones(64)).astype(np.float32)
    >>> graph.initializer.extend([onnx.numpy_helper.from_array(weight, "w")])
    >>> opset = onnx.helper.make_opsetid("", 17)
    >>> model = onnx_lrsd.load(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8))
    >>> working = model.graph()
    >>> layers, _ = onnx_lrsd.find_layers(working)
    >>> samples = onnx_lrsd.read_samples({"x": np.eye(200, 64, dtype=np.float32)}, inputs_of(model.proto))
    >>> known = onnx_lrsd.calibrate(model, layers, samples, partial(onnx_lrsd.read_weight, working))
    >>> known.outputs["y"].shape, known.moments["y"].mean.shape
    ((200, 64), (64,))
    """
    shapes = input_shapes(model, layers, samples)
    watch = _watcher(model, layers, samples)
    samples = as_fed(samples, watch)
    bytes_each = sum(4 * int(np.prod(shape)) for shape in shapes.values()) // samples.smallest_batch
    batch = samples.batch_size(bytes_each, FETCHED_BYTES)
    located = locate(layers, shapes, samples)
    accumulators = {
        layer.name: MomentAccumulator(layer, _wanted(layer, samples.count) // SURVEY) for layer in located
    }
    outputs: dict[str, list[Rows]] = {layer.name: [] for layer in located}
    weights = {layer.name: tuple(np.float32(part) for part in weight_of(layer)) for layer in located}
    for layer, activations, positions in _observe(watch, located, samples, batch, seed, progress):
        rows = input_rows(layer, activations[layer.input], positions)
        weight, bias = weights[layer.name]
        outputs[layer.name].append(rows @ weight.T + bias)
        accumulators[layer.name].add(np.ascontiguousarray(rows[::SURVEY]))
    kept = {layer.name: np.concatenate(outputs.pop(layer.name)) for layer in located}
    moments = _results(accumulators, samples)
    return Calibration(located, moments, kept, shapes, samples, batch, seed)


def recalibrate(model: Model, layers: Sequence[Layer], reference: Calibration) -> dict[str, Moments]:
    """Moments of the inputs that the rewritten ``model`` feeds to ``layers``, with the cross moment.

    ``layers`` are as ``reference`` has them; what they should give are the original outputs kept there.
    """
    samples, done = reference.samples, dict.fromkeys((layer.name for layer in layers), 0)
    accumulators = {layer.name: MomentAccumulator(layer, _wanted(layer, samples.count)) for layer in layers}
    watch = _watcher(model, layers, samples)
    for layer, activations, positions in _observe(watch, layers, samples, reference.batch, reference.seed):
        at = done[layer.name]
        done[layer.name] = at + len(positions)
        wanted = reference.outputs[layer.name][at : done[layer.name]]
        accumulators[layer.name].add(input_rows(layer, activations[layer.input], positions), wanted)
    return _results(accumulators, samples)


def _results(accumulators: Mapping[str, MomentAccumulator], samples: Samples) -> dict[str, Moments]:
    return {
        name: replace(accumulator.result(), samples=samples.count)
        for name, accumulator in accumulators.items()
    }


def _observe(
    watch: Callable[[Feed], Feed],
    layers: Sequence[Layer],
    samples: Samples,
    batch: int,
    seed: int,
    progress: Progress | None = None,
) -> Iterator[tuple[Layer, Feed, npt.NDArray[np.int64]]]:
    """Layer, activations and sampled positions, batch by batch; the same ones for the same seed and batch."""
    first = 0
    for feed in samples.batches(batch):
        count = samples.size_of(feed)
        activations = watch(feed)
        for layer in layers:
            shape = activations[layer.input].shape
            positions = _positions(layer, shape, first, count, samples.count, seed)
            if len(positions):
                yield layer, activations, positions
        first += count
        if progress is not None:
            progress("calibrate", first, samples.count)


def _positions(
    layer: Layer, shape: tuple[int, ...], first: int, count: int, total: int, seed: int
) -> npt.NDArray[np.int64]:
    """Positions in a batch of samples first..first+count-1, a share of the rows from each sample."""
    each = positions_of(layer, shape) // count
    wanted = _wanted(layer, total)
    chosen = []
    for index in range(count):
        sample = first + index
        quota = (sample + 1) * wanted // total - sample * wanted // total
        rng = np.random.default_rng((seed, sample, layer.n, layer.m))
        chosen.append(index * each + sample_positions(each, quota, rng))
    return np.concatenate(chosen)


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
            positions=positions_of(layer, shapes[layer.input]) // samples.smallest_batch,
            size=shapes[layer.input][2:] if layer.op == "Conv" else (),
        )
        for layer in layers
    )


def input_shapes(model: Model, layers: Sequence[Layer], samples: Samples) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs of ``layers``, by tensor, in the smallest batch the model takes."""
    feed = next(iter(samples.batches(1)))
    return {name: value.shape for name, value in _watcher(model, layers, samples)(feed).items()}


def _watcher(model: Model, layers: Sequence[Layer], samples: Samples) -> Callable[[Feed], Feed]:
    """A function from a feed to the inputs of ``layers``; what is fed needs no run."""
    names = {layer.input for layer in layers}
    fed = names & {*samples.arrays, *samples.constants}
    computed = sorted(names - fed)
    session = open_session(model.proto, folder=model.folder, outputs=computed) if computed else None

    def watch(feed: Feed) -> Feed:
        return {name: feed[name] for name in fed} | (session.run(feed) if session is not None else {})

    return watch
