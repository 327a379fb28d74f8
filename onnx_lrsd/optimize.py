"""The whole way from a trained model to a smaller, faster one, in the order of the paper.

load -> find -> calibrate -> curves -> plan -> reconstruct (decompose and rewrite) -> verify.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from onnx_lrsd.allocate import COSTS, allocate
from onnx_lrsd.calibrate import Calibration, calibrate, input_shapes
from onnx_lrsd.dataset import Samples, read_samples
from onnx_lrsd.errors import BudgetError, ModelError, UnsupportedModelError
from onnx_lrsd.model import Model, check, load, save, size_on_disk
from onnx_lrsd.passes import find_layers, read_weight
from onnx_lrsd.reconstruct import reconstruct
from onnx_lrsd.solver.curve import errors
from onnx_lrsd.solver.moments import positions_of
from onnx_lrsd.solver.whiten import pose
from onnx_lrsd.targets import TARGETS, Target, price
from onnx_lrsd.trial import CLEARLY, speedups
from onnx_lrsd.types import (
    DENSE,
    KINDS,
    Choice,
    Declined,
    ErrorCurve,
    Factors,
    Form,
    Inspection,
    Layer,
    LayerReport,
    Plan,
    Point,
    Price,
    Progress,
    Promise,
    Report,
    Verification,
)
from onnx_lrsd.verify import compare, total_macs

HELD_OUT = 0.2
"""Share of the calibration samples that only verification sees, where no evaluation data is given."""
MOST_ERROR = 0.5
"""A form that loses half of a layer's output energy is no approximation and never planned."""
SEARCHES = 6
"""Fits of the whole model that a search for --max-error may take."""


@dataclass(frozen=True)
class Options:
    """What to aim at and what to work on. At most one of ``ratio`` and ``max_error`` is given.

    ``ratio``: how many times cheaper the whole model gets, in the unit of ``cost``. ``max_error``:
    the relative squared error of the model's outputs that may be reached; .01 where neither is
    given. ``include`` and ``exclude`` are regular expressions over the names of nodes.
    """

    target: str = "onnxruntime"
    cost: str = "macs"
    ratio: float | None = None
    max_error: float | None = None
    forms: tuple[str, ...] | None = None
    include: str | None = None
    exclude: str | None = None
    samples: int | None = None
    device: str = "auto"
    seed: int = 0


class Result(NamedTuple):
    """The optimised model, what is to be said about it, and the plan that leads to it again."""

    model: Model
    report: Report
    plan: Plan


@dataclass
class _Run:
    """One call of ``optimize``: what every stage needs to see."""

    options: Options
    source: Model
    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    trials: dict[object, float] = field(default_factory=dict)

    @property
    def target(self) -> Target:
        return TARGETS[self.options.target]

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def optimize(
    model: str | Path | onnx.ModelProto,
    calibration: Any = None,
    *,
    evaluation: Any = None,
    output: Path | None = None,
    plan: Plan | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Make ``model`` smaller and faster with outputs close to the original's.

    ``calibration`` and ``evaluation`` are anything ``read_samples`` takes; without calibration the
    weights alone decide, and the report warns of it. With ``output`` the result is written there,
    atomically. ``plan`` replays an earlier plan; ``dry_run`` stops once there is a plan. ``options``
    are the fields of ``Options``. Raises LrsdError for anything that is wrong with the input.

    >>> import onnx_lrsd
    >>> optimised, report, plan = onnx_lrsd.optimize(  # doctest: +SKIP
    ...     "model.onnx", calibration="calib.npz", ratio=2
    ... )
    """
    settings = Options(**options)
    if settings.ratio is None and settings.max_error is None and plan is None:
        settings = replace(settings, max_error=0.01)
    run = _Run(settings, progress)
    with run.clock("load"):
        source = load(model)
        graph = source.graph()
        found, declined = find_layers(graph)
    layers, excluded = _select(found, settings)
    declined = (*declined, *excluded)
    if not layers:
        raise UnsupportedModelError(_nothing_to_do(declined))
    weight_of = partial(read_weight, graph)
    fit_on, check_on = _samples(run, source, calibration, evaluation)
    with run.clock("calibrate"):
        known = _calibrate(run, source, layers, weight_of, fit_on, check_on)
    layers = known.layers
    total = total_price(source, check_on)
    fit = partial(
        reconstruct,
        source,
        layers,
        weight_of=weight_of,
        calibration=known if fit_on is not None else None,
        device=settings.device,
        progress=progress,
    )
    if plan is None:
        with run.clock("curves"):
            curves = _curves(run, layers, weight_of, known)
        plan = _plan(run, source, curves, total, known, fit, check_on)
    else:
        _fits(plan, layers)
    if dry_run:
        return Result(source, _report(run, source, output, layers, declined, plan, {}, known, None, total), plan)
    with run.clock("decompose"):
        rewritten, factors = fit(forms=_forms(plan))
    with run.clock("verify"):
        check(rewritten, source)
        rewritten, factors, verification = _verify(run, source, rewritten, factors, check_on, output)
    if output is not None:
        save(rewritten, output)
    report = _report(run, source, output, layers, declined, plan, factors, known, verification, total)
    return Result(rewritten, report, plan)


def inspect(model: str | Path | onnx.ModelProto) -> Inspection:
    """The layers of ``model`` with their dense price, what was declined and why, and the whole.

    Shapes come from one run on made-up data.
    """
    source = load(model)
    layers, declined = find_layers(source.graph())
    samples = made_up_samples(source)
    shapes = input_shapes(source, layers, samples)
    located = _locate(layers, shapes)
    return Inspection(
        tuple((layer, price(layer, Form(DENSE))) for layer in located), declined, total_price(source, samples)
    )


def _select(found: Sequence[Layer], options: Options) -> tuple[tuple[Layer, ...], tuple[Declined, ...]]:
    """The layers that --include and --exclude leave, and the others with the reason."""
    kept, out = [], []
    for layer in found:
        if options.include is not None and not re.search(options.include, layer.node):
            out.append(Declined(layer.node, layer.op, "not named by --include"))
        elif options.exclude is not None and re.search(options.exclude, layer.node):
            out.append(Declined(layer.node, layer.op, "named by --exclude"))
        else:
            kept.append(layer)
    return tuple(kept), tuple(out)


def _nothing_to_do(declined: Sequence[Declined]) -> str:
    if not declined:
        return "The model has no Conv, Gemm or MatMul with a constant weight: there is nothing to optimise in it."
    reasons = Counter(entry.reason for entry in declined)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    return f"No layer of the model can be worked on ({listed}): use it as it is."


def _samples(
    run: _Run, source: Model, calibration: Any, evaluation: Any
) -> tuple[Samples | None, Samples]:
    """Samples to fit on (None: no data) and, apart from them, samples to verify on."""
    specs = inputs_of(source.proto)
    held = None if evaluation is None else read_samples(evaluation, specs)
    if calibration is None:
        run.warnings.append(
            "No calibration data: the weights alone decide, which costs far more accuracy. "
            "Give a few hundred samples with --calib."
        )
        if held is None:
            run.warnings.append("Outputs were compared and timed on made-up data: the errors mean little.")
            held = made_up_samples(source)
        return None, held
    samples = read_samples(calibration, specs, limit=run.options.samples)
    if held is None:
        samples, held = samples.split(HELD_OUT, run.options.seed)
    run.warnings.extend(dict.fromkeys((*samples.notes, *held.notes)))
    return samples, held


def _calibrate(
    run: _Run,
    source: Model,
    layers: Sequence[Layer],
    weight_of: WeightOf,
    fit_on: Samples | None,
    check_on: Samples,
) -> Calibration:
    if fit_on is None:
        shapes = input_shapes(source, layers, check_on)
        return Calibration(_locate(layers, shapes), {}, {}, shapes, check_on, 1, run.options.seed)
    weights = {}
    for layer in layers:
        weight, bias = weight_of(layer)
        weights[layer.name] = (weight.astype(np.float32), bias.astype(np.float32))
    return calibrate(source, layers, fit_on, weights, seed=run.options.seed, progress=run.progress)


def _curves(
    run: _Run, layers: Sequence[Layer], weight_of: WeightOf, known: Calibration
) -> list[ErrorCurve]:
    """An error curve for each layer; what is left out of a curve is noted as the layer's reason."""
    kinds = run.options.forms or KINDS
    curves = []
    for done, layer in enumerate(layers):
        dense = Point(Form(DENSE), 0.0, price(layer, Form(DENSE)))
        forms = run.target.forms(layer, kinds)
        moments = known.moments.get(layer.name)
        if not forms:
            run.reasons[layer.name] = "no smaller form is predicted to be faster"
        elif moments is not None and not np.isfinite(moments.mean).all():
            run.reasons[layer.name] = "its input is not finite on the calibration data"
            forms = ()
        points = [dense]
        if forms:
            problem = pose(layer, *weight_of(layer), moments, run.options.device)
            found = errors(problem, forms)
            points += [Point(f, e, price(layer, f)) for f, e in found.items() if e <= MOST_ERROR]
            if len(points) == 1:
                run.reasons[layer.name] = "every smaller form loses too much of its output"
        curves.append(ErrorCurve(layer, tuple(points)))
        if run.progress is not None:
            run.progress("curves", done + 1, len(layers))
    return curves
