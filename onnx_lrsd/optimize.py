"""The whole way from a trained model to a smaller, faster one, in the order of the paper.

load -> find -> calibrate -> curves -> plan -> reconstruct (decompose and rewrite) -> verify.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from onnx_lrsd.allocate import COSTS, allocate, by_time, spend
from onnx_lrsd.calibrate import Calibration, WeightOf, calibrate, input_shapes, locate
from onnx_lrsd.dataset import Samples, read_samples
from onnx_lrsd.errors import BudgetError, DataError, UnsupportedModelError
from onnx_lrsd.model import Model, check, load, save
from onnx_lrsd.passes import find_layers, read_weight
from onnx_lrsd.reconstruct import reconstruct
from onnx_lrsd.runtime import inputs_of
from onnx_lrsd.solver.curve import errors
from onnx_lrsd.solver.decompose import check_form
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
from onnx_lrsd.verify import compare, made_up_samples, total_price

HELD_OUT = 0.2
"""Share of the calibration samples that only verification sees, where no evaluation data is given."""
MOST_ERROR = 0.5
"""A form that loses half of a layer's output energy is no approximation and never planned."""
NO_FORM = "no smaller form is predicted to be faster"
OUT_OF_REACH = "the budget is out of reach"
NOT_NEEDED = "the budget is met at less error without it"
MUCH = 0.1
"""Output error from which a result that only met its ratio carries a warning."""
MARGIN = 0.9
"""What a search for --max-error aims at, as a share of what was asked: other samples must confirm it."""
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

    def __post_init__(self) -> None:
        """Raise ValueError for an option that cannot be; the command line has refused it before."""
        if self.target not in TARGETS or self.cost not in COSTS:
            raise ValueError(f"target is one of {', '.join(TARGETS)}, cost one of {', '.join(COSTS)}")
        if self.ratio is not None and self.max_error is not None:
            raise ValueError("give ratio or max_error, not both")


class Result(NamedTuple):
    """The optimised model, what is to be said about it, and the plan that leads to it again."""

    model: Model
    report: Report
    plan: Plan


@dataclass
class _Run:
    """One call of ``optimize``: what every stage needs to see."""

    options: Options
    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

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

    >>> import numpy as np, onnx, onnx_lrsd
    >>> graph = onnx.parser.parse_graph("g (float[n, 64] x) => (float[n, 64] y) { y = MatMul (x, w) }")
    >>> weight = np.outer(np.arange(64), np.ones(64)).astype(np.float32)
    >>> graph.initializer.extend([onnx.numpy_helper.from_array(weight, "w")])
    >>> opset = onnx.helper.make_opsetid("", 17)
    >>> model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    >>> x = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    >>> optimised, report, plan = onnx_lrsd.optimize(model, {"x": x}, ratio=2, dry_run=True)
    >>> report.calibration_samples, list(plan.choices)
    (32, ['y'])
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
    if plan is None:
        with run.clock("decompose"):
            curves = _curves(run, layers, weight_of, known)
    known = replace(known, moments={})  # the fit takes moments of its own; these may be large
    fit = partial(
        reconstruct,
        source,
        layers,
        weight_of=weight_of,
        calibration=known if fit_on is not None else None,
        device=settings.device,
        progress=progress,
    )
    chosen: Mapping[str, Form]
    if plan is None:
        total = total_price(source, known.samples)
        planner = _Planner(run, source, curves, total, known)
        with run.clock("plan"):
            if settings.ratio is not None:
                try:
                    chosen = planner.for_ratio(settings.ratio)
                except BudgetError as error:
                    chosen = {}
                    run.warnings.append(f"{error} The original is handed back.")
                    for layer in layers:
                        run.reasons.setdefault(layer.name, OUT_OF_REACH)
            else:
                search_on, check_on = _search_samples(check_on)
                chosen = planner.for_error(settings.max_error or 0.0, fit, search_on)
        plan = _as_plan(settings, curves, chosen, run.reasons)
    else:
        chosen = _forms_of(plan, layers)
    rewritten, verification = source, None
    factors: dict[str, Factors] = {}
    if not dry_run:
        with run.clock("decompose"):
            rewritten, factors = fit(forms=chosen)
        with run.clock("verify"):
            check(rewritten, source)
            verification = compare(source, rewritten, check_on, progress=progress)
            if _worse(verification):
                run.warnings.append(
                    "The rewritten model was not better as a whole: the original is handed back."
                )
                run.reasons.update(dict.fromkeys(factors, "the whole model was not better for it"))
                rewritten, factors = source, {}
                verification = compare(source, source, check_on)
            worst = max((o.relative_error for o in verification.outputs), default=0.0)
            if settings.ratio is not None and worst > MUCH:
                run.warnings.append(
                    f"The outputs changed by {worst:.0%} of their variance: this model does not bear "
                    f"{settings.ratio:g} x; ask for less, or name what may be lost with --max-error."
                )
        if output is not None:
            save(rewritten, output)
    report = _report(run, source, output, layers, declined, plan, factors, fit_on, verification)
    return Result(rewritten, report, plan)


def inspect(model: str | Path | onnx.ModelProto) -> Inspection:
    """The layers of ``model`` that a smaller form is predicted to speed up, with their dense price.

    What was declined and why, and the price of the whole. Shapes come from one run on made-up data.
    """
    source = load(model)
    layers, declined = find_layers(source.graph())
    samples = made_up_samples(source)
    located = locate(layers, input_shapes(source, layers, samples), samples)
    forms = TARGETS[Options.target].forms
    useful = [layer for layer in located if forms(layer, KINDS)]
    useless = [Declined(layer.node, layer.op, NO_FORM) for layer in located if layer not in useful]
    return Inspection(
        tuple((layer, price(layer, Form(DENSE))) for layer in useful),
        (*declined, *useless),
        total_price(source, samples),
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
        return "The model has no Conv, Gemm or MatMul with a constant weight: use it as it is."
    reasons = Counter(entry.reason for entry in declined)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    return f"No layer of the model can be worked on ({listed}): use it as it is."


def _samples(run: _Run, source: Model, calibration: Any, evaluation: Any) -> tuple[Samples | None, Samples]:
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


def _search_samples(samples: Samples) -> tuple[Samples, Samples]:
    """Samples to search a budget on, and others to confirm it on; the same ones if there are too few."""
    if samples.count < 4 * samples.smallest_batch:
        return samples, samples
    return samples.split(0.5, 0)


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
        return Calibration(locate(layers, shapes, check_on), {}, {}, shapes, check_on, 1, run.options.seed)
    return calibrate(source, layers, fit_on, weight_of, seed=run.options.seed, progress=run.progress)


def _curves(run: _Run, layers: Sequence[Layer], weight_of: WeightOf, known: Calibration) -> list[ErrorCurve]:
    """An error curve for each layer; what is left out of a curve is noted as the layer's reason."""
    kinds = run.options.forms or KINDS
    curves = []
    for done, layer in enumerate(layers):
        dense = _point(run.target, layer, Form(DENSE), 0.0)
        forms = run.target.forms(layer, kinds)
        moments = known.moments.get(layer.name)
        if not forms:
            run.reasons[layer.name] = NO_FORM
        elif moments is not None and not np.isfinite(moments.mean).all():
            run.reasons[layer.name] = "its input is not finite on the calibration data"
            forms = ()
        points = [dense]
        if forms:
            problem = pose(layer, *weight_of(layer), moments, run.options.device)
            found = errors(problem, forms)
            points += [_point(run.target, layer, f, e) for f, e in found.items() if e <= MOST_ERROR]
            if len(points) == 1:
                run.reasons[layer.name] = "every smaller form loses too much of its output"
        curves.append(ErrorCurve(layer, tuple(points)))
        if run.progress is not None:
            run.progress("curves", done + 1, len(layers))
    return curves


def _point(target: Target, layer: Layer, form: Form, error: float) -> Point:
    return Point(form, error, price(layer, form), target.cost(layer, form))


class _Planner:
    """Chooses a form for every layer; what measurement finds to be no faster is left dense."""

    ROUNDS = 4

    def __init__(
        self, run: _Run, source: Model, curves: Sequence[ErrorCurve], total: Price, known: Calibration
    ) -> None:
        self.run, self.source, self.known = run, source, known
        self.curves = list(curves)
        self.cost = COSTS[run.options.cost]
        self.whole = self.cost(Point(Form(DENSE), 0.0, total))
        self.rest = max(self.whole - sum(self.cost(curve.points[0]) for curve in curves), 0.0)
        self.times: dict[object, float] = {}

    def for_ratio(self, ratio: float) -> dict[str, Form]:
        """Forms that make the whole model ``ratio`` times cheaper, each measured to be faster.

        Raises BudgetError where the layers do not bear it.
        """
        for _ in range(self.ROUNDS):
            points = allocate(self.curves, self.whole / ratio, self.rest, self.cost)
            if self.run.options.cost == "macs":
                points = self._by_time(points, self.whole / ratio)
            chosen = {name: point.form for name, point in points.items() if point.form.kind != DENSE}
            slow = self._drop_slow(chosen)
            if not slow:
                break
        return {name: form for name, form in chosen.items() if name not in slow}

    def for_error(self, most: float, fit: Callable[..., Any], samples: Samples) -> dict[str, Form]:
        """The cheapest forms found whose outputs stay within ``most`` on ``samples``.

        A tenth is left as margin, since other samples confirm. The search brackets the ratio.
        """
        low, high, best = 1.0, 0.0, dict[str, Form]()
        ratio = 2.0
        for _ in range(SEARCHES):
            try:
                chosen = self.for_ratio(ratio)
            except BudgetError:
                high = ratio
            else:
                rewritten, _ = fit(forms=chosen, progress=None)
                outputs = compare(self.source, rewritten, samples, latency=False).outputs
                if max(output.relative_error for output in outputs) <= MARGIN * most:
                    low, best = ratio, chosen
                else:
                    high = ratio
            ratio = ratio * 1.5 if not high else low + (high - low) / 2
            if high and high / low < 1.05:
                break
        return best

    def _by_time(self, points: dict[str, Point], most_macs: float) -> dict[str, Point]:
        """Points with the same MACs that are predicted to run faster, if there are any.

        MACs are what was asked for, time is what is wanted: allocate by predicted time and bisect its
        budget until the MACs are met.
        """
        low, high = 0.0, sum(point.time for point in points.values())
        best, slack = points, 0.0
        for _ in range(16):
            budget = (low + high) / 2
            try:
                found = allocate(self.curves, budget, 0.0, by_time)
            except BudgetError:
                low = budget
                continue
            left = most_macs - self.rest - sum(point.price.macs for point in found.values())
            if left >= 0:
                best, slack, low = found, left, budget
            else:
                high = budget
        return spend(self.curves, best, slack, self.cost)

    def _drop_slow(self, chosen: dict[str, Form]) -> set[str]:
        """Names of the layers whose form is not faster here; only much cheaper ones stay in their curves."""
        layers = [curve.layer for curve in self.curves]
        measured = speedups(self.source, layers, chosen, self.known.shapes, self.times, self.run.progress)
        slow = {name: ratio for name, ratio in measured.items() if ratio < CLEARLY}
        for index, curve in enumerate(self.curves):
            name = curve.layer.name
            if name in slow:
                form = chosen[name]
                self.run.reasons[name] = f"as {form} it ran {slow[name]:.2f} times as fast as before"
                faster = tuple(
                    p for p in curve.points if p.form.kind == DENSE or p.price.macs < _macs(curve, form)
                )
                self.curves[index] = ErrorCurve(curve.layer, faster)
        return set(slow)


def _macs(curve: ErrorCurve, form: Form) -> int:
    """MACs below which a form may still be tried after ``form`` was too slow: a quarter less."""
    return price(curve.layer, form).macs * 3 // 4


def _as_plan(
    options: Options, curves: Sequence[ErrorCurve], chosen: Mapping[str, Form], reasons: Mapping[str, str]
) -> Plan:
    choices = {}
    for curve in curves:
        form = chosen.get(curve.layer.name, Form(DENSE))
        point = next(p for p in curve.points if p.form == form)
        reason = "" if form.kind != DENSE else reasons.get(curve.layer.name, NOT_NEEDED)
        choices[curve.layer.name] = Choice(form, point.error, curve.points[0].price, point.price, reason)
    return Plan(options.target, options.cost, choices)


def _forms_of(plan: Plan, layers: Sequence[Layer]) -> dict[str, Form]:
    """The forms of a plan that change something. Raises DataError for those this model cannot take."""
    for asked, offered in ((plan.target, TARGETS), (plan.cost, COSTS)):
        if asked not in offered:
            raise DataError(
                f"The plan asks for {asked}, which is none of {', '.join(offered)}: change it there."
            )
    known = {layer.name: layer for layer in layers}
    forms = {name: choice.form for name, choice in plan.choices.items() if choice.form.kind != DENSE}
    for name, form in forms.items():
        if name not in known:
            raise DataError(
                f"The plan names the layer {name}, which this model does not have: "
                "make a plan for this model with --save-plan."
            )
        try:
            check_form(known[name], form)
        except ValueError as error:
            raise DataError(f"The plan does not fit ({error}): change it there.") from error
    return forms


def _worse(found: Verification) -> bool:
    """Larger, or slower beyond what the measurement leaves open."""
    larger = found.after.bytes > found.before.bytes
    slower = found.latency_interval is not None and found.latency_interval[1] < 1
    return larger or slower


def _report(
    run: _Run,
    source: Model,
    output: Path | None,
    layers: Sequence[Layer],
    declined: Sequence[Declined],
    plan: Plan,
    factors: Mapping[str, Factors],
    fit_on: Samples | None,
    verification: Verification | None,
) -> Report:
    options = run.options
    rows = [_layer_report(layer, plan, factors.get(layer.name), run.reasons) for layer in layers]
    rows += [_declined_report(entry) for entry in declined]
    versions = {}
    for package in ("onnx-lrsd", "onnx", "onnxruntime", "onnx-graphsurgeon", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return Report(
        str(source.path or "model"),
        str(output or ""),
        plan.target,
        plan.cost,
        0 if fit_on is None else fit_on.count,
        "" if fit_on is None else fit_on.source,
        verification,
        _promise(options, plan, verification),
        tuple(rows),
        tuple(run.warnings),
        dict(run.seconds),
        versions,
    )


def _promise(options: Options, plan: Plan, found: Verification | None) -> Promise | None:
    if found is None:
        return None
    if options.ratio is not None:
        before, after = (
            COSTS[plan.cost](Point(Form(DENSE), 0.0, Price(cost.macs, cost.parameters, cost.bytes)))
            for cost in (found.before, found.after)
        )
        got = before / max(after, 1)
        return Promise("ratio", options.ratio, got, got >= options.ratio * 0.995)
    if options.max_error is not None:
        got = max((output.relative_error for output in found.outputs), default=0.0)
        return Promise("max_error", options.max_error, got, got <= options.max_error)
    return None


def _layer_report(
    layer: Layer, plan: Plan, factors: Factors | None, reasons: Mapping[str, str]
) -> LayerReport:
    choice = plan.choices.get(layer.name)
    before = price(layer, Form(DENSE))
    form = Form(DENSE)
    error, reason = 0.0, reasons.get(layer.name) or (choice.reason if choice else "") or NOT_NEEDED
    if factors is not None:
        form, error, reason = factors.form, factors.error, ""
    elif choice is not None and choice.form.kind != DENSE and layer.name not in reasons:
        form, error, reason = choice.form, choice.error, "planned"
    after = price(layer, form)
    taps = layer.m // layer.channels
    return LayerReport(
        layer.node,
        layer.op,
        layer.shape,
        form.kind,
        form.rank,
        layer.n * form.channels * taps,
        "channels" if form.channels else "none",
        before.macs,
        after.macs,
        before.bytes,
        after.bytes,
        before.parameters,
        after.parameters,
        error,
        reason,
    )


def _declined_report(entry: Declined) -> LayerReport:
    return LayerReport(entry.node, entry.op, (), DENSE, 0, 0, "none", 0, 0, 0, 0, 0, 0, 0.0, entry.reason)
