"""What the samples teach of every layer: moments of its inputs, and the outputs that the original gives.

``calibrate`` runs the original network, ``recalibrate`` a rewritten one at the same positions; ``sampling``
says which these are. With a bound on memory, rows lie in a scratch file, and what follows from them is made
layer by layer when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from math import ceil
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from onnx_lrsd.data.samples import Samples
from onnx_lrsd.fit.sampling import (
    CHUNK,
    FEWEST_ROWS,
    GatheredRows,
    Quota,
    RunBatch,
    Sampling,
    keeps_inputs,
    run_batches,
    sampled_rows,
    sampling_of,
)
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.subgraph import frontier
from onnx_lrsd.passes.operators import operator_of
from onnx_lrsd.runtime.activation_cache import Relay
from onnx_lrsd.scratch import OnDemand, Scratch, ScratchArray
from onnx_lrsd.solver.moments import MomentAccumulator
from onnx_lrsd.types import Layer, Moments, Progress, Rows
from onnx_lrsd.wording import counted
from onnx_lrsd.work_dir import Keep

SURVEY = 4
"""Every fourth row is enough for the error curves that the plan is made from, if so many are left."""
EVERY_ORIGINAL = 3
"""Every third row that a layer behind rewritten ones is fitted to is the original network's, at most."""
ORIGINAL_BYTES = 512 << 20
"""What these rows may take; with large layers there are fewer of them."""
_LARGEST = 2.0**56
"""Rows with greater values are left out as infinite ones are: their squares would overflow in sums."""

Kind = TypeVar("Kind", bound=np.generic)
WeightOf = Callable[[Layer], tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]
Gathered = Callable[[Sampling], Iterator[GatheredRows]]
"""Gives the rows of a calibration that were gathered before, in shards."""


class LeftOut(NamedTuple):
    """Rows of a layer that were not finite, of how many."""

    rows: int
    of: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one run over the calibration samples taught; everything of a layer is by ``Layer.output``.

    ``layers`` know their positions, those of a sample of middle size where samples differ in shape.
    ``moments`` and ``kept`` are of the layers asked for. ``kept`` has, at the sampled positions, the original
    outputs (count, n) or, for the layers in ``by_inputs``, the original inputs (count, m): they take little
    more memory, and their product with W is left to a later run that needs it. ``inputs`` are the original
    inputs at every ``every``-th of these positions. ``shapes`` are those of the layers' inputs in the example
    of the samples, by tensor.

    A later run with the same ``samples``, ``batch``, ``seed`` and ``quotas`` sees the same positions.
    ``left_out`` counts the rows that were not finite, where there were any, and ``silent`` those that were
    zero throughout. With ``scratch`` rows and moments lie in such a file, and are read layer by layer.
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


def calibrate(
    model: Model,
    layers: Sequence[Layer],
    samples: Samples,
    weight_of: WeightOf,
    *,
    asked: Callable[[Layer], bool] = lambda layer: True,
    seed: int = 0,
    progress: Progress | None = None,
    gathered: Gathered | None = None,
    scratch_for: Callable[[Sampling], Scratch | None] = lambda sampling: None,
) -> Calibration:
    """Moments of the inputs of ``layers`` over ``samples``, and what tells the outputs they give.

    ``weight_of`` gives W (n, m) and b (n,) of a layer. Outputs of a Conv are fetched, which undoes a fusion
    but costs less than computing them; those of other operators, whose bias another node may add, are
    computed from the sampled rows. ``asked`` says for which layers (located) there shall be moments; the
    inputs of the others are not even fetched. Memory is bounded by the layers, since rows are kept and not
    samples; they lie in the file that ``scratch_for`` gives, if it gives one. Rows that were ``gathered``
    before, in shards, stand in for a run.

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
    return _calibrate_in_memory(model, sampling, weight_of, progress, gathered)


def _calibrate_in_memory(
    model: Model,
    sampling: Sampling,
    weight_of: WeightOf,
    progress: Progress | None,
    gathered: Gathered | None,
) -> Calibration:
    quotas, every = sampling.quotas, _every(sampling)
    taken: dict[str, _LayerRows] = {}
    for layer in sampling.watched:
        quota = quotas[layer.output]
        stride = _stride(layer, quota.wanted, sampling.samples)
        rows = taken[layer.output] = _LayerRows(layer, quota.wanted, stride, every, _sums_on(model))
        if not keeps_inputs(layer) and not operator_of(layer).FETCHES_OUTPUTS:
            rows.affine = _single(weight_of(layer), quota.scale)
    by_inputs = frozenset(layer.output for layer in sampling.watched if keeps_inputs(layer))
    into = {name: taken[name].kept for name in by_inputs}
    outputs = {name: taken[name].kept for name in sampling.fetched}
    if gathered is None:
        batches = run_batches(model, sampling, outputs=outputs)
        stream = sampled_rows(batches, sampling, into, outputs, progress=progress)
    else:
        stream = _copied(gathered(sampling), into, outputs)
    for layer, some in stream:
        taken[layer.output].take(some)
    silent = {name: rows.silent for name, rows in taken.items()}
    accumulators = {name: rows.accumulator for name, rows in taken.items()}
    return Calibration(
        layers=sampling.layers,
        moments=_results(accumulators, sampling.samples, quotas, silent),
        kept={name: rows.kept[: rows.done] for name, rows in taken.items()},
        by_inputs=by_inputs,
        inputs={name: rows.original_inputs() for name, rows in taken.items()},
        every=every,
        shapes=sampling.shapes,
        samples=sampling.samples,
        batch=sampling.batch,
        seed=sampling.seed,
        quotas=quotas,
        left_out={name: LeftOut(rows.bad, rows.done) for name, rows in taken.items() if rows.bad},
        silent=silent,
    )


class _LayerRows:
    """What is kept of the sampled rows of one layer, which come some thousand at a time.

    ``kept`` are the inputs (wanted, m) where these are kept, else the outputs (wanted, n). These are computed
    where ``affine`` has W and b; otherwise whoever runs the network puts them there. The moments take every
    ``stride``-th row. Rows are counted: those ``done``, ``bad`` ones that are not finite, ``silent`` ones
    that are zero throughout.
    """

    def __init__(self, layer: Layer, wanted: int, stride: int, every: int, device: str) -> None:
        by_inputs = keeps_inputs(layer)
        self.affine: tuple[Rows, Rows] | None = None
        self.accumulator = MomentAccumulator(layer, ceil(wanted / stride), device)
        self.kept = np.empty((wanted, layer.m if by_inputs else layer.n), np.float32)
        self.done = self.bad = self.silent = 0
        self._stride, self._every = stride, every
        self._inputs = None if by_inputs else np.empty((ceil(wanted / every), layer.m), np.float32)

    def take(self, rows: Rows) -> None:
        """Take some more rows (count, m)."""
        start, stop = self.done, self.done + len(rows)
        if self.affine is not None:
            _outputs(rows, self.affine, self.kept[start:stop])
        if self._inputs is not None:
            self._inputs[_places(start, stop, self._every)] = _every_nth(rows, start, self._every)
        usable = _usable(rows)
        self.bad += len(rows) - int(np.count_nonzero(usable))
        self.silent += len(rows) - int(np.count_nonzero(rows.any(axis=1)))
        of_moments = _every_nth(rows, start, self._stride)
        self.accumulator.add(_only(of_moments, _every_nth(usable, start, self._stride)))
        self.done = stop

    def original_inputs(self) -> Rows:
        """Every ``every``-th of the rows."""
        if self._inputs is None:
            return self.kept[: self.done : self._every]
        return self._inputs[: ceil(self.done / self._every)]


def _copied(
    gathered: Iterable[GatheredRows], into: Mapping[str, Rows], outputs: Mapping[str, Rows]
) -> Iterator[tuple[Layer, Rows]]:
    """What ``sampled_rows`` gives, of rows that were gathered before."""
    taken: dict[str, int] = {}
    for layer, rows, given in gathered:
        start = taken.get(layer.output, 0)
        taken[layer.output] = stop = start + len(rows)
        if layer.output in into:
            into[layer.output][start:stop] = rows
        if layer.output in outputs:
            outputs[layer.output][start:stop] = given
        yield layer, rows


def _calibrate_aside(
    model: Model,
    sampling: Sampling,
    scratch: Scratch,
    weight_of: WeightOf,
    progress: Progress | None,
    gathered: Gathered | None,
) -> Calibration:
    """What ``_calibrate_in_memory`` gives, with the rows in ``scratch`` and the rest made on demand."""
    samples, quotas, every = sampling.samples, sampling.quotas, _every(sampling)
    by_name = {layer.output: layer for layer in sampling.watched}
    by_inputs = frozenset(layer.output for layer in sampling.watched if keeps_inputs(layer))
    stored = _StoredRows(sampling, scratch, sampling.fetched)
    if gathered is None:
        stored.observe(model, progress)
    else:
        for layer, rows, given in gathered(sampling):
            stored.take(layer, rows, given)
            stored.end_chunk(layer)
    made: dict[str, Moments] = {}

    def kept_of(name: str) -> Rows:
        if name in by_inputs:
            return stored.inputs_of(name)
        if name in stored.outputs:
            return stored.outputs_of(name)
        rows, layer = stored.inputs_of(name), by_name[name]
        affine = _single(weight_of(layer), quotas[name].scale)
        found = np.empty((len(rows), layer.n), np.float32)
        for start, stop in pairwise(stored.ends[name]):
            _outputs(rows[start:stop], affine, found[start:stop])
        return found

    def moments_of(name: str) -> Moments:
        if name not in made:
            accumulator = _accumulated(stored, by_name[name], _sums_on(model))
            found = _results({name: accumulator}, samples, quotas, stored.silent)[name]
            made[name] = replace(
                found,
                second=None if found.second is None else scratch.put(found.second),
                rows=None if found.rows is None else scratch.put(found.rows),
            )
        return _read(made[name])

    def every_nth_input(name: str) -> Rows:
        return np.ascontiguousarray(stored.inputs_of(name)[::every])

    return Calibration(
        layers=sampling.layers,
        moments=OnDemand(by_name, moments_of),
        kept=OnDemand(by_name, kept_of),
        by_inputs=by_inputs,
        inputs=OnDemand(by_name, every_nth_input),
        every=every,
        shapes=sampling.shapes,
        samples=samples,
        batch=sampling.batch,
        seed=sampling.seed,
        quotas=quotas,
        left_out={name: LeftOut(rows, stored.done[name]) for name, rows in stored.bad.items() if rows},
        silent=stored.silent,
        scratch=scratch,
    )


def _accumulated(stored: _StoredRows, layer: Layer, device: str) -> MomentAccumulator:
    """The stored rows of ``layer`` that its moments are taken of, chunk by chunk."""
    wanted = stored.sampling.quotas[layer.output].wanted
    stride = _stride(layer, wanted, stored.sampling.samples)
    accumulator = MomentAccumulator(layer, ceil(wanted / stride), device)
    rows = stored.inputs_of(layer.output)
    for start, stop in pairwise(stored.ends[layer.output]):
        here = _every_nth(rows[start:stop], start, stride)
        accumulator.add(_only(here, _usable(here)) if len(here) else here)
    return accumulator


def _read(moments: Moments) -> Moments:
    """``moments`` with the arrays of a scratch file that it refers to."""
    read: dict[str, Any] = {
        one.name: value.read()
        for one in fields(moments)
        if isinstance(value := getattr(moments, one.name), ScratchArray)
    }
    return replace(moments, **read)


class _StoredRows:
    """Sampled rows of layers in a scratch file: of all inputs, and of the outputs ``fetched``.

    Rows are worked on in chunks, later on too: ``ends`` are the numbers of rows at which these begin and end.
    Rows are counted by layer: those ``done``, ``bad`` ones that are not finite, ``silent`` ones that are zero
    throughout.
    """

    def __init__(self, sampling: Sampling, scratch: Scratch, fetched: Collection[str] = ()) -> None:
        self.sampling = sampling
        self.inputs, self.outputs = dict[str, ScratchArray](), dict[str, ScratchArray]()
        for layer in sampling.watched:
            name, wanted = layer.output, sampling.quotas[layer.output].wanted
            self.inputs[name] = scratch.reserve((wanted, layer.m), np.float32)
            if name in fetched:
                self.outputs[name] = scratch.reserve((wanted, layer.n), np.float32)
        self.ends = {name: [0] for name in self.inputs}
        self.done, self.bad, self.silent = (dict.fromkeys(self.inputs, 0) for _ in range(3))

    def observe(self, model: Model, progress: Progress | None) -> None:
        """Take the rows of a run of all samples, batch by batch."""
        outputs = {name: np.empty((0, stored.shape[1]), np.float32) for name, stored in self.outputs.items()}
        batches = run_batches(model, self.sampling, outputs=outputs)
        for layer, rows in sampled_rows(batches, self.sampling, {}, outputs, progress=progress, held=False):
            self.take(layer, rows, outputs.get(layer.output))
            if self.done[layer.output] - self.ends[layer.output][-1] >= CHUNK:
                self.end_chunk(layer)
        for layer in self.sampling.watched:
            if self.ends[layer.output][-1] < self.done[layer.output]:
                self.end_chunk(layer)

    def take(self, layer: Layer, rows: Rows, outputs: Rows | None) -> None:
        """Take some more rows of a layer: inputs (count, m), and outputs (count, n) if they are fetched."""
        name, start = layer.output, self.done[layer.output]
        self.inputs[name].write(start, rows)
        if outputs is not None:
            self.outputs[name].write(start, outputs)
        if len(rows):
            self.bad[name] += len(rows) - int(np.count_nonzero(_usable(rows)))
            self.silent[name] += len(rows) - int(np.count_nonzero(rows.any(axis=1)))
        self.done[name] = start + len(rows)

    def end_chunk(self, layer: Layer) -> None:
        """A chunk of rows ends with those taken last."""
        self.ends[layer.output].append(self.done[layer.output])

    def inputs_of(self, name: str) -> Rows:
        """The inputs (count, m) of one layer, mapped."""
        return self.inputs[name].first(self.done[name]).read()

    def outputs_of(self, name: str) -> Rows:
        """The outputs (count, n) of one layer, mapped."""
        return self.outputs[name].first(self.done[name]).read()


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

    With ``relay`` the run starts where an earlier one left off, and leaves there what no longer changes,
    however ``layers`` and ``later`` ones are rewritten.
    """
    handed: Sequence[str] = ()
    if relay is not None:
        changing = {name for layer in (*layers, *later) for name in (layer.output, layer.weight)}
        handed = frontier(model.proto, changing)
    sampling = Sampling(
        layers=tuple(layers),
        watched=tuple(layers),
        samples=reference.samples,
        batch=reference.batch,
        quotas=reference.quotas,
        shapes=reference.shapes,
        seed=reference.seed,
    )
    batches = run_batches(model, sampling, relay=relay, handed=handed)
    if reference.scratch is not None:
        scratch, device = reference.scratch.new(), _sums_on(model)
        return _recalibrate_aside(batches, sampling, reference, scratch, device, weight_of, paired)
    samples, quotas, every = reference.samples, reference.quotas, reference.every
    targets = {layer.output: original_outputs(layer, reference, weight_of) for layer in layers}
    done = dict.fromkeys(targets, 0)
    accumulators = {
        layer.output: MomentAccumulator(layer, quotas[layer.output].wanted, _sums_on(model))
        for layer in layers
    }
    usable = {name: np.ones(len(rows), bool) for name, rows in targets.items()}
    into = {
        layer.output: np.empty((len(targets[layer.output]), layer.m), np.float32)
        for layer in layers
        if layer.output in paired
    }
    for layer, rows in sampled_rows(batches, sampling, into, {}):
        name = layer.output
        start, stop = done[name], done[name] + len(rows)
        _every_nth(rows, start, every)[:] = reference.inputs[name][_places(start, stop, every)]
        wanted = targets[name][start:stop]
        fine = usable[name][start:stop] = _usable(rows) & _usable(wanted)
        accumulators[name].add(_only(rows, fine), _only(wanted, fine))
        done[name] = stop
    pairs = {
        name: (_only(rows, usable[name]), _only(targets[name], usable[name])) for name, rows in into.items()
    }
    return _results(accumulators, samples, quotas, reference.silent), pairs


def _recalibrate_aside(
    batches: Iterator[RunBatch],
    sampling: Sampling,
    reference: Calibration,
    scratch: Scratch,
    device: str,
    weight_of: WeightOf,
    paired: Collection[str],
) -> tuple[Mapping[str, Moments], Mapping[str, tuple[Rows, Rows]]]:
    """What ``recalibrate`` gives: rows of ``batches`` lie in ``scratch``, the rest is made on demand."""
    stored, by_name = _StoredRows(sampling, scratch), {layer.output: layer for layer in sampling.watched}
    for layer, rows in sampled_rows(batches, sampling, {}, {}, held=False):
        stored.take(layer, rows, None)

    def rows_of(name: str) -> tuple[Rows, Rows]:
        rows = np.array(stored.inputs_of(name))
        rows[:: reference.every] = reference.inputs[name][_places(0, len(rows), reference.every)]
        targets = original_outputs(by_name[name], reference, weight_of)[: len(rows)]
        usable = _usable(rows) & _usable(targets)
        return _only(rows, usable), _only(targets, usable)

    def moments_of(name: str) -> Moments:
        accumulator = MomentAccumulator(by_name[name], reference.quotas[name].wanted, device)
        accumulator.add(*rows_of(name))
        return _results({name: accumulator}, reference.samples, reference.quotas, reference.silent)[name]

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


def _usable(rows: Rows) -> npt.NDArray[np.bool_]:
    """Which rows (count, m) are finite, and not so large that their squares overflow."""
    usable: npt.NDArray[np.bool_] = (rows.max(axis=1) < _LARGEST) & (rows.min(axis=1) > -_LARGEST)
    return usable


def _only(rows: Rows, usable: npt.NDArray[np.bool_]) -> Rows:
    return rows if usable.all() else rows[usable]


def _every(sampling: Sampling) -> int:
    """Of how many rows one original input is kept beside the outputs."""
    outputs_kept = [layer for layer in sampling.watched if not keeps_inputs(layer)]
    whole = sum(4 * layer.m * sampling.quotas[layer.output].wanted for layer in outputs_kept)
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


def _sums_on(model: Model) -> str:
    """The device on which moments are summed: a GPU if ``model`` runs there and CuPy finds it."""
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
