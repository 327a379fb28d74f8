"""Layer problems: a weight and the rows of its input, for fitting and, from other samples, for judging."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np

from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.fit.sampling import input_shapes, locate
from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.operators import operator_of
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.solver.moments import sample_positions
from onnx_lrsd.solver.problem import Metric, Problem, pose
from onnx_lrsd.types import Array, Layer, Moments

EXAMPLE = Path(__file__).parent.parent / "models"
FIT_ROWS, HELD_ROWS = 2000, 1500
FEWEST_INPUTS, MOST_INPUTS = 100, 1200


@dataclass(frozen=True)
class LayerProblem:
    """``weight`` (n, m), ``rows`` (N, m) to fit on and ``held`` (N', m) to judge by, grouped by sample.

    ``samples`` is how many samples the rows to fit on come from (0: each row is one).
    """

    layer: Layer
    weight: Array
    rows: Array
    held: Array
    samples: int = 0

    @property
    def name(self) -> str:
        """What a person calls the layer."""
        return self.layer.name

    @property
    def taps(self) -> int:
        """Kernel positions of an input channel."""
        return prod(self.layer.kernel)

    @cached_property
    def moments(self) -> Moments:
        """Mean and centred second moment of all rows, float64; the rows themselves where they are few."""
        return _moments(self.rows, self.samples)

    @property
    def second(self) -> Array:
        """Second moment (m, m) about the mean. Raises ValueError where the rows are fewer than it needs."""
        if self.moments.second is None:
            raise ValueError(f"{self.name} has {len(self.rows)} rows for {self.layer.m} inputs")
        return self.moments.second

    @cached_property
    def folds(self) -> tuple[Problem, Problem]:
        """The problem of the first 70 % of the rows, and of the rest: other samples."""
        cut, seen = int(0.7 * len(self.rows)), int(0.7 * self.samples)
        parts = _moments(self.rows[:cut], seen), _moments(self.rows[cut:], self.samples - seen)
        return self.posed(parts[0]), self.posed(parts[1])

    def posed(self, moments: Moments | None = None) -> Problem:
        """As the package's solver takes it."""
        return pose(self.layer, self.weight, np.zeros(self.layer.n), moments or self.moments)

    @cached_property
    def held_moments(self) -> Moments:
        """E (x − μ)(x − μ)ᵀ over the held-out rows, μ the mean of those fitted on: the bias is fixed."""
        return _about(self.moments.mean, self.held)

    def errors(self, weight: Array) -> tuple[float, float]:
        """tr(D C Dᵀ) / tr(W C Wᵀ) of an approximation, held out and on the rows fitted on."""
        return _relative(self.weight, weight, self.held_moments), _relative(self.weight, weight, self.moments)


def read_problems(folder: Path) -> Iterator[LayerProblem]:
    """Every .npz of ``folder``: W (n, m), X (N, m), XH (N', m), and meta, JSON with weight_shape."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            shape = tuple(json.loads(str(file["meta"]))["weight_shape"])
            weight, rows, held = (file[key].astype(np.float64) for key in ("W", "X", "XH"))
        yield LayerProblem(_layer(path.stem, shape, *weight.shape), weight, rows, held)


def example_problems() -> Iterator[LayerProblem]:
    """The inner layers of the example network on its own calibration and evaluation samples."""
    model = load(EXAMPLE / "digits.onnx")
    graph = model.graph()
    parts = [
        read_samples(EXAMPLE / f"digits_{part}.npz", inputs_of(model.proto)) for part in ("calib", "eval")
    ]
    found = [x for x in find_layers(graph)[0] if FEWEST_INPUTS <= x.m <= MOST_INPUTS]
    layers = locate(found, input_shapes(model, found, parts[0]), parts[0])
    rows = layer_rows(model, layers, parts[0], lambda _: FIT_ROWS)
    held = layer_rows(model, layers, parts[1], lambda _: HELD_ROWS)
    for layer in layers:
        yield LayerProblem(layer, read_weight(graph, layer)[0], rows[layer.output], held[layer.output])


def planted(like: LayerProblem, keep: float, share: float, seed: int = 0) -> tuple[LayerProblem, int, int]:
    """A square weight that is exactly U V + S, with the inputs of ``like``; its rank and its non-zeros."""
    m = like.layer.m
    rank = round(share * keep * m / 2)
    entries = int(keep * m * m) - 2 * rank * m
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, m)) / np.sqrt(rank)
    chosen = rng.permutation(m * m)[:entries]
    weight.reshape(-1)[chosen] += rng.standard_normal(entries)
    return LayerProblem(_layer("planted", (m, m), m, m), weight, like.rows, like.held), rank, entries


def layer_rows(
    model: Model, layers: Sequence[Layer], samples: Samples, wanted: Callable[[Layer], int]
) -> dict[str, Array]:
    """About ``wanted`` rows of the input of every layer, evenly over the samples, float32, by layer name."""
    session = open_session(model.proto, folder=model.folder, outputs=sorted({x.input for x in layers}))
    rng = np.random.default_rng(0)
    parts: dict[str, list[Array]] = {layer.output: [] for layer in layers}
    first = 0
    for feed in samples.batches():
        last = first + samples.size_of(feed)
        seen = session.run(feed)
        for layer in layers:
            share = wanted(layer) * last // samples.count - wanted(layer) * first // samples.count
            operator, x = operator_of(layer), seen[layer.input]
            positions = sample_positions(operator.count_rows(layer, x.shape), share, rng)
            rows = np.empty((len(positions), layer.m), np.float32)
            operator.input_rows(layer, x, positions, rows)
            parts[layer.output].append(rows)
        first = last
    return {name: np.concatenate(batches) for name, batches in parts.items()}


def _layer(name: str, shape: tuple[int, ...], n: int, m: int) -> Layer:
    if len(shape) < 4:
        return Layer(
            output=name, name=name, op="MatMul", input="x", weight="w", shape=shape, dtype="float32", n=n, m=m
        )
    ones = (1, 1)
    return Layer(
        output=name,
        name=name,
        op="Conv",
        input="x",
        weight="w",
        shape=shape,
        dtype="float32",
        n=n,
        m=m,
        axis=1,
        kernel=shape[2:],
        strides=ones,
        pads=(0, 0, 0, 0),
        dilations=ones,
    )


def _moments(rows: Array, samples: int = 0) -> Moments:
    return _about(rows.mean(axis=0, dtype=np.float64), rows, samples)


def _about(mean: Array, rows: Array, samples: int = 0) -> Moments:
    """Second moment (m, m) about ``mean``, float64; the centred rows where they take less than it."""
    centred = rows - mean
    if 2 * len(rows) < rows.shape[1]:
        return Moments(name="rows", count=len(rows), mean=mean, rows=centred, samples=samples)
    return Moments(
        name="rows", count=len(rows), mean=mean, second=centred.T @ centred / len(rows), samples=samples
    )


def _relative(weight: Array, approximation: Array, moments: Moments) -> float:
    metric = Metric(moments.second, moments.rows, 0.0)
    difference = weight - approximation
    missed, energy = (float(np.sum(metric.undamped(x) * x)) for x in (difference, weight))
    return missed / energy
