"""Fit the chosen forms in graph order, each layer for the inputs it will really see.

A layer behind rewritten layers gets other inputs than in the original network. It is fitted to give
the *original* outputs on those inputs (asymmetric reconstruction; Zhang, Zou, He, Sun, TPAMI 2016),
so that errors do not pile up; where a rectifier follows, what it cuts off need not be right, and an
error counts by what the layers that read it make of it. Layers that stay dense behind them are refitted in
the same way, if the samples hold rows enough. Layers are taken in a bounded number of stages, with one run of
the rewritten network before each, which starts where what is settled ends. Constants that are the weight of
no layer are rounded first, so that the layers behind make good what they can of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import numpy as np
import onnx_graphsurgeon as gs

from onnx_lrsd.arrays import to_device
from onnx_lrsd.fit.calibrate import Calibration, WeightOf, recalibrate
from onnx_lrsd.fit.shared import fit_shared
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.memory_limit import give_back
from onnx_lrsd.passes.consumers import Reading, consumers
from onnx_lrsd.passes.operators import operator_of
from onnx_lrsd.passes.order_sums import order_sums
from onnx_lrsd.passes.rectifiers import rectifiers
from onnx_lrsd.passes.split import split
from onnx_lrsd.passes.writer import Stored
from onnx_lrsd.runtime.activation_cache import Relay, most_held
from onnx_lrsd.scratch import Scratch
from onnx_lrsd.solver.decompose import decompose, refit
from onnx_lrsd.solver.problem import Problem, output_metric, pose
from onnx_lrsd.solver.rectified import Rectified
from onnx_lrsd.types import UNSTRUCTURED, Factors, Form, Layer, Moments, Progress, Rows, Values
from onnx_lrsd.workers import IN_PROCESS, Workers

STAGES = 32
"""Runs of the network, at most."""
ROWS_TO_REFIT, PULL = 12, 8.0
"""Rows for each input that the samples must hold for a dense layer to be refitted, and the ridge that holds
it to the weight it has: so many times as strong as for factors, which have to move. Both were found on
samples kept apart (results/parts.md)."""
TOUCHED = 1e-6
"""Relative error from which a dense layer is one that rewritten layers reach."""
MOST_OUTPUTS = 4096
"""Outputs of a layer up to which the errors of them are weighed against each other."""


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
    """The model with every layer in ``forms`` rewritten, and the factors by layer name.

    ``layers`` are in graph order. Without ``calibration`` the weights alone decide. A layer that was
    refitted alone has factors of a dense form; those in ``refitted`` are in any case, their bias alone where
    the samples hold few rows. Layers that apply one weight in one form are fitted once, to the inputs of all,
    where the first of them stands; what they have in common is stored once.
    """
    working = model.graph()
    constants = [layer for layer in layers if layer.output in forms and layer.constant]
    changed = {*forms, *refitted}
    chosen = [layer for layer in layers if layer.output in changed and not layer.constant]
    # Where outputs are sums of rows a rectifier does not act on rows.
    limits = rectifiers(working, [layer.output for layer in chosen if layer.rows_per_bias == 1])
    read = consumers(working, chosen, layers)
    if calibration is not None:
        chosen = _with_dense(working, layers, changed, weight_of, calibration)

    def task_of(
        layer: Layer, moments: Mapping[str, Moments], pairs: Mapping[str, tuple[Rows, Rows]]
    ) -> FitTask:
        form, name = forms.get(layer.output), layer.output
        return FitTask(
            layer=layer,
            affine=weight_of(layer),
            moments=moments.get(name),
            form=form,
            refitted=name in refitted,
            bias_alone=calibration is None or not _rows_enough(layer, calibration),
            outputs=None if form is None else _output_metric(layer, read.get(name, ()), weight_of),
            pairs=pairs.get(name),
            limits=limits.get(name),
            device=device,
        )

    fitted: dict[str, Factors] = {}
    for constant in constants:
        rounded = decompose(pose(constant, *weight_of(constant), None, device), forms[constant.output])
        fitted[constant.output] = rounded
        split(working, constant, rounded)
    rewritten, done = model.splice(working) if constants else model, 0
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
        single = [unit[0] for unit in stage if len(unit) == 1]
        tasks = partial(_task_at, single, partial(task_of, moments=moments, pairs=pairs))
        fits = workers.map(fit_alone, tasks, len(single), store=partial(_aside, scratch=model.aside))
        made = dict(zip((layer.output for layer in single), fits, strict=True))
        for unit in stage:
            if len(unit) > 1:
                shared = fit_shared(unit, forms[unit[0].output], weight_of, moments, device)
                found = {name: _aside(one, model.aside) for name, one in shared.items()}
            else:
                found = {unit[0].output: made[unit[0].output]}
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


def _aside(factors: Factors | None, scratch: Scratch | None) -> Factors | None:
    """``factors`` that lie in ``scratch``, if there is one and they are not in codes, which are few bytes."""
    if factors is None or scratch is None:
        return factors
    kernels = tuple(scratch.put(np.asarray(kernel)).read() for kernel in factors.kernels)
    sparse = None if factors.sparse is None else scratch.put(np.asarray(factors.sparse)).read()
    give_back()
    return replace(factors, kernels=kernels, sparse=sparse)


def biases_added(layers: Sequence[Layer], factors: Mapping[str, Factors], weight_of: WeightOf) -> str:
    """A sentence on the layers that got a bias and had none; empty where there are none."""
    added = [
        layer.name
        for layer in layers
        if layer.output in factors and factors[layer.output].bias.any() and not weight_of(layer)[1].any()
    ]
    if not added:
        return ""
    more = f" and {len(added) - 1} more" if len(added) > 1 else ""
    return (
        f"A bias was added where there was none ({added[0]}{more}): inputs of zeros, such as silence, no "
        "longer give zeros there; add samples with such inputs to keep it so."
    )


@dataclass(frozen=True, kw_only=True)
class FitTask:
    """A layer to fit alone, for a worker: W and b, moments of its inputs, and its form, None for a dense one.

    A dense layer is ``refitted`` in any case, by its ``bias_alone`` where rows are few, or if what comes
    before it reaches it. ``outputs`` is what an error of its outputs counts; ``pairs`` are rows of inputs and
    outputs, where a rectifier with these ``limits`` follows.
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
    """Factors of the layer of a task; None where it stays dense and nothing reaches it."""
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


def _task_at(layers: Sequence[Layer], task_of: Callable[[Layer], FitTask], index: int) -> FitTask:
    return task_of(layers[index])


def _rectified(task: FitTask, problem: Problem) -> Rectified | None:
    """What the rectifier behind a layer lets pass, if there is one."""
    if task.pairs is None or task.limits is None:
        return None
    low, high = (problem.scale * limit for limit in task.limits)
    return Rectified(*task.pairs, low, high)


def _rows_enough(layer: Layer, calibration: Calibration) -> bool:
    """Whether the samples hold rows enough for a dense weight; with fewer it fits these and no others."""
    samples = calibration.samples
    return layer.positions * samples.count * samples.filled >= ROWS_TO_REFIT * layer.m


def _with_dense(
    working: WorkingGraph,
    layers: Sequence[Layer],
    changed: Collection[str],
    weight_of: WeightOf,
    calibration: Calibration,
) -> list[Layer]:
    """The layers that are ``changed``, and those behind the first of them that may be refitted.

    These have a weight of their own, for which the samples hold rows enough, and a place for a bias.
    Constants, which come before all layers, are not among them.
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
    """What an error of the outputs of ``layer`` counts, by the layers that read them; None if unknown."""
    if not read or layer.n > MOST_OUTPUTS:
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
    return factors.sparse is not None and bool(factors.kernels)


def _units(layers: Sequence[Layer], forms: Mapping[str, Form]) -> list[tuple[Layer, ...]]:
    """``layers``, those together that apply one weight in one form: where the first of them stands.

    There the inputs of all are known as the layers before the first one leave them.
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
