"""Fit the chosen forms in graph order, each layer for the inputs it will really see.

A layer behind rewritten layers gets other inputs than in the original network. It is fitted to give the
*original* outputs on those inputs (asymmetric reconstruction; Zhang, Zou, He, Sun, TPAMI 2016), so errors do
not pile up. Where a rectifier follows, errors that it cuts off do not count, and an error of the outputs is
weighted by what the layers that read them make of it. Layers that stay dense behind rewritten ones are
refitted in the same way, if the samples hold rows enough. Layers are taken in a bounded number of stages.
Before each stage the rewritten network is run once, from the point up to which nothing changes any more.
Constants that are the weight of no layer are rounded first, so the layers behind them can compensate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import numpy as np
import onnx_graphsurgeon as gs

from onnx_lrsd.arrays import to_device
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.fit.calibrate import Calibration, WeightOf, recalibrate
from onnx_lrsd.fit.shared import fit_shared
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.memory_limit import METRIC_UP_TO, give_back
from onnx_lrsd.passes.consumers import Reading, consumers
from onnx_lrsd.passes.operators import operator_of
from onnx_lrsd.passes.order_sums import order_sums
from onnx_lrsd.passes.rectifiers import rectifiers
from onnx_lrsd.passes.split import split
from onnx_lrsd.passes.writer import Stored
from onnx_lrsd.runtime.activation_cache import Relay, most_held
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.scratch import Scratch
from onnx_lrsd.solver.decompose import decompose, refit
from onnx_lrsd.solver.problem import Problem, output_metric, pose
from onnx_lrsd.solver.rectified import Rectified
from onnx_lrsd.types import UNSTRUCTURED, Factors, Feed, Form, Layer, Moments, Progress, Rows, Values
from onnx_lrsd.workers import IN_PROCESS, Workers

STAGES = 32
"""Runs of the network, at most."""
ROWS_TO_REFIT, PULL = 12, 8.0
"""Rows for each input that the samples must hold for a dense layer to be refitted; and how many times as
strong as for factors the ridge is that holds it to the weight it has. Both were found on samples kept apart
(results/parts.md)."""
TOUCHED = 1e-6
"""Relative error of a dense layer with its old weight from which it is refitted: its inputs have changed."""


def reconstruct(
    model: Model,
    layers: Sequence[Layer],
    forms: Mapping[str, Form],
    weight_of: WeightOf,
    calibration: Calibration | None,
    *,
    refitted: Collection[str] = (),
    device: str = "cpu",
    progress: Progress | None = None,
    workers: Workers = IN_PROCESS,
) -> tuple[Model, dict[str, Factors]]:
    """The model with every layer in ``forms`` rewritten, and the factors by ``Layer.output``.

    ``layers`` are in graph order. Without ``calibration`` the weights alone decide. A layer that stays dense
    and was refitted has factors of a dense form. Those in ``refitted`` always are, or their bias alone where
    the samples hold few rows. Layers that apply one weight in one form are fitted once, to the inputs of all,
    where the first of them stands; what they have in common is stored once.
    """
    working = model.graph()
    changed = {*forms, *refitted}
    chosen = [layer for layer in layers if layer.output in changed and not layer.constant]
    # Where outputs are sums of rows a rectifier does not act on rows.
    limits = rectifiers(working, [layer.output for layer in chosen if layer.rows_per_bias == 1])
    tasks = _Tasks(
        forms=forms,
        refitted=refitted,
        weight_of=weight_of,
        calibration=calibration,
        readings=consumers(working, chosen, layers),
        limits=limits,
        device=device,
    )
    if calibration is not None:
        chosen = _with_dense(working, layers, changed, weight_of, calibration)
    fitted = _round_constants(working, layers, forms, weight_of, device)
    rewritten, done = model.splice(working) if fitted else model, 0
    relay = Relay(most_held(model))
    units = _units(chosen, forms)
    waiting = [layer for unit in units for layer in unit]
    for stage in _stages(units):
        moments: Mapping[str, Moments] = {}
        pairs: Mapping[str, tuple[Rows, Rows]] = {}
        if calibration is not None:
            alone = [unit[0].output for unit in stage if len(unit) == 1]
            behind = [name for name in alone if name in limits]
            here = [layer for unit in stage for layer in unit]
            later = waiting[done:]
            moments, pairs = recalibrate(rewritten, here, calibration, weight_of, behind, relay, later)
        for unit, found in _fit_stage(stage, tasks, moments, pairs, workers, model.aside):
            stored: Stored | None = {} if len(unit) > 1 else None
            for layer in unit:
                factors = found[layer.output]
                if factors is not None:
                    split(working, layer, factors, stored)
                    fitted[layer.output] = factors
            model.put_aside(working)
            done += len(unit)
            if progress is not None:
                progress("decompose", done, len(chosen))
        rewritten = model.splice(working)
    if order_sums(working, [name for name, factors in fitted.items() if _branched(factors)]):
        rewritten = model.splice(working)
    return rewritten, fitted


def _round_constants(
    working: WorkingGraph,
    layers: Sequence[Layer],
    forms: Mapping[str, Form],
    weight_of: WeightOf,
    device: str,
) -> dict[str, Factors]:
    """Write the constants among ``layers`` in codes; returns these by output."""
    rounded: dict[str, Factors] = {}
    for constant in layers:
        if constant.output in forms and constant.constant:
            problem = pose(constant, *weight_of(constant), None, device)
            rounded[constant.output] = decompose(problem, forms[constant.output])
            split(working, constant, rounded[constant.output])
    return rounded


@dataclass(frozen=True, kw_only=True)
class _Tasks:
    """What the fits of all stages have in common.

    By ``Layer.output``: ``readings``, the layers that read a layer, and the ``limits`` of the rectifier
    behind it. The rest is as in ``reconstruct``.
    """

    forms: Mapping[str, Form]
    refitted: Collection[str]
    weight_of: WeightOf
    calibration: Calibration | None
    readings: Mapping[str, Sequence[Reading]]
    limits: Mapping[str, tuple[float, float]]
    device: str

    def of(
        self, layer: Layer, moments: Mapping[str, Moments], pairs: Mapping[str, tuple[Rows, Rows]]
    ) -> FitTask:
        """The task for ``layer``, from what its stage has seen."""
        form, name = self.forms.get(layer.output), layer.output
        outputs = None
        if form is not None:
            outputs = _output_metric(layer, self.readings.get(name, ()), self.weight_of)
        return FitTask(
            layer=layer,
            affine=self.weight_of(layer),
            moments=moments.get(name),
            form=form,
            refitted=name in self.refitted,
            bias_alone=self.calibration is None or not _rows_enough(layer, self.calibration),
            outputs=outputs,
            pairs=pairs.get(name),
            limits=self.limits.get(name),
            device=self.device,
        )


def _fit_stage(
    stage: Sequence[tuple[Layer, ...]],
    tasks: _Tasks,
    moments: Mapping[str, Moments],
    pairs: Mapping[str, tuple[Rows, Rows]],
    workers: Workers,
    scratch: Scratch | None,
) -> Iterator[tuple[tuple[Layer, ...], Mapping[str, Factors | None]]]:
    """Each unit of a stage with the factors of its layers, by output; None for one that stays as it is."""
    alone = [unit[0] for unit in stage if len(unit) == 1]

    def task_at(index: int) -> FitTask:
        return tasks.of(alone[index], moments, pairs)

    fits = workers.map(fit_alone, task_at, len(alone), store=partial(_aside, scratch=scratch))
    fitted_alone = dict(zip((layer.output for layer in alone), fits, strict=True))
    for unit in stage:
        first = unit[0].output
        if len(unit) == 1:
            yield unit, {first: fitted_alone[first]}
        else:
            shared = fit_shared(unit, tasks.forms[first], tasks.weight_of, moments, tasks.device)
            yield unit, {name: _aside(factors, scratch) for name, factors in shared.items()}


def _aside(factors: Factors | None, scratch: Scratch | None) -> Factors | None:
    """``factors`` with their arrays in ``scratch``, if there is one. Codes stay in memory: they are small."""
    if factors is None or scratch is None:
        return factors
    kernels = tuple(scratch.put(np.asarray(kernel)).read() for kernel in factors.kernels)
    sparse = None if factors.sparse is None else scratch.put(np.asarray(factors.sparse)).read()
    give_back()
    return replace(factors, kernels=kernels, sparse=sparse)


def biases_added(
    model: Model, feed: Feed, layers: Sequence[Layer], factors: Mapping[str, Factors], weight_of: WeightOf
) -> str:
    """A sentence on the layers that got a bias and had none, where silence in was silence out.

    ``feed`` is an example of what the original ``model`` is fed. Empty where there are no such layers.
    """
    added = [
        layer
        for layer in layers
        if layer.output in factors and factors[layer.output].bias.any() and not weight_of(layer)[1].any()
    ]
    silent = _silent(model, feed, {layer.input for layer in added})
    names = [layer.name for layer in added if layer.input in silent]
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"A bias was added where there was none ({names[0]}{more}): inputs of zeros, such as silence, no "
        "longer give zeros there; add samples with such inputs to keep it so."
    )


def _silent(model: Model, feed: Feed, tensors: set[str]) -> set[str]:
    """Those of ``tensors`` that are zero where all floating inputs are; all if that is not known."""
    if not tensors or model.parted:
        return tensors
    zeros = {name: x * 0 if x.dtype.kind in "fV" else x for name, x in feed.items()}  # V: bfloat16
    try:
        session = open_session(model.proto, folder=model.folder, outputs=sorted(tensors), device=model.device)
        return {name for name, value in session.run(zeros).items() if not np.any(value)}
    except LrsdError:
        return tensors


@dataclass(frozen=True, kw_only=True)
class FitTask:
    """A layer that shares its fit with no other, for a worker.

    ``affine`` is W (n, m) and b (n,), ``moments`` are those of its inputs; ``form`` is None where it stays
    dense. It is then refitted if its inputs have changed, or in any case if ``refitted``: only its bias if
    ``bias_alone``, as rows are few. ``outputs`` (n, n) is the metric of its outputs. ``pairs`` are rows of
    inputs (count, m) and outputs (count, n), where a rectifier with these ``limits`` follows.
    """

    layer: Layer
    affine: tuple[Values, Values]
    moments: Moments | None
    form: Form | None
    refitted: bool
    bias_alone: bool
    outputs: Values | None
    pairs: tuple[Rows, Rows] | None
    limits: tuple[float, float] | None
    device: str


def fit_alone(task: FitTask) -> Factors | None:
    """Factors of the layer of a task; None where it stays dense and its inputs have not changed."""
    (weight, bias), layer, device = task.affine, task.layer, task.device
    if task.form is None and task.refitted:
        problem = pose(layer, weight, bias, task.moments, device)
        if task.bias_alone:
            return refit(replace(problem, weight=to_device(weight, device)))
        return refit(problem, _rectified(task, problem))
    if task.form is None:
        problem = pose(layer, weight, bias, task.moments, device, pull=PULL)
        touched = problem.error(to_device(weight, device)) > TOUCHED
        return refit(problem) if touched else None
    entries = task.form.pattern.kind == UNSTRUCTURED
    problem = pose(layer, weight, bias, task.moments, device, task.outputs, entries)
    return decompose(problem, task.form, rectified=_rectified(task, problem))


def _rectified(task: FitTask, problem: Problem) -> Rectified | None:
    """The rectifier behind the layer of a task, with rows to refine the fit on; None where there is none."""
    if task.pairs is None or task.limits is None:
        return None
    low, high = (problem.scale * limit for limit in task.limits)
    return Rectified(*task.pairs, low, high)


def _rows_enough(layer: Layer, calibration: Calibration) -> bool:
    """Whether the samples hold rows enough to refit a dense weight; with fewer it would be overfitted."""
    samples = calibration.samples
    return layer.positions * samples.count * samples.filled >= ROWS_TO_REFIT * layer.m


def _with_dense(
    working: WorkingGraph,
    layers: Sequence[Layer],
    changed: Collection[str],
    weight_of: WeightOf,
    calibration: Calibration,
) -> list[Layer]:
    """The layers that are ``changed``, and the dense ones behind the first of them that may be refitted.

    Such a layer has a weight of its own, rows enough in the samples, and a bias or an input for one.
    Constants are left out: they come before all layers.
    """
    tensors, found = working.tensors(), list[Layer]()

    def may_be_refitted(layer: Layer) -> bool:
        weight = tensors[layer.weight]
        if not isinstance(weight, gs.Constant) or len(weight.outputs) > 1:
            return False
        return (
            _rows_enough(layer, calibration)
            and layer.output in calibration.kept
            and (operator_of(layer).HAS_BIAS_INPUT or bool(weight_of(layer)[1].any()))
        )

    for layer in layers:
        if layer.output in changed or (found and may_be_refitted(layer)):
            found.append(layer)
    return [layer for layer in found if not layer.constant]


def _output_metric(layer: Layer, read: Sequence[Reading], weight_of: WeightOf) -> Values | None:
    """The metric (n, n) of the outputs of ``layer``, from the layers that read them; None if unknown."""
    if not read or layer.n > METRIC_UP_TO:
        return None
    weights = []
    for reader, channels_last in read:
        channels = layer.output_channels
        shape = (reader.n, -1, channels) if channels_last else (reader.n, channels, -1)
        weight = weight_of(reader)[0].reshape(shape)
        weights.append(weight if channels_last else weight.transpose(0, 2, 1))
    by_row: Values = np.kron(output_metric(weights), np.eye(layer.rows_per_bias))
    return by_row


def _branched(factors: Factors) -> bool:
    """Whether there is a sum of factors and S."""
    return factors.sparse is not None and bool(factors.kernels)


def _units(layers: Sequence[Layer], forms: Mapping[str, Form]) -> list[tuple[Layer, ...]]:
    """``layers`` in units: those that apply one weight in one form are one, where the first of them stands.

    They are fitted there, to inputs that only the layers before the first one have changed.
    """
    units = dict[object, list[Layer]]()
    for layer in layers:
        form = forms.get(layer.output)
        key = layer.output if form is None else (layer.shares or layer.output, form)
        units.setdefault(key, []).append(layer)
    return [tuple(unit) for unit in units.values()]


def _stages(units: Sequence[tuple[Layer, ...]]) -> list[list[tuple[Layer, ...]]]:
    """Consecutive units in at most STAGES groups of like size; layers of one input stay together."""
    size = ceil(len(units) / STAGES)
    stages: list[list[tuple[Layer, ...]]] = []
    for unit in units:
        together = stages and stages[-1][-1][0].input == unit[0].input
        if stages and (together or len(stages[-1]) < size):
            stages[-1].append(unit)
        else:
            stages.append([unit])
    return stages
