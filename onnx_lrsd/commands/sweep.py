"""What can be gained: models for several ratios from one calibration, each measured beside the original."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import onnx

from onnx_lrsd.arrays import on_gpu
from onnx_lrsd.commands.optimize import verify
from onnx_lrsd.commands.prepare import Prepared, make_planner, prepare
from onnx_lrsd.errors import OptionError
from onnx_lrsd.facts import Sweep, SweepPoint, Verification
from onnx_lrsd.fit.fitter import BOTH, LOW_RANK, Fitted
from onnx_lrsd.graph.model import ensure_writable, save
from onnx_lrsd.measure.compare import groups_on
from onnx_lrsd.option import Numbers, Option
from onnx_lrsd.plan.promise import no_gain, promised, ratio_of
from onnx_lrsd.plan.search import RatioSearch
from onnx_lrsd.run import Options, Run, start
from onnx_lrsd.types import Progress
from onnx_lrsd.workers import workers_for

SWEEP_RATIOS = (1.2, 1.5, 2.0, 3.0)


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Options):
    """``Options``, with several ratios in the place of one.

    ``max_error`` or ``max_drop`` is the promise that a model of the sweep keeps or not.
    """

    ratios: Annotated[
        tuple[float, ...], Option("Make a model for each of these ratios.", Numbers(1), metavar="LIST")
    ] = SWEEP_RATIOS

    def __post_init__(self) -> None:
        """Check the options. Raises OptionError as ``Options`` does, and for a single ratio."""
        super().__post_init__()
        if self.ratio is not None:
            raise OptionError("{ratio} cannot go with a sweep: give {ratios}.", ratio=self.ratio)
        if self.time is not None:
            raise OptionError("{time} is for a single model, not for a sweep: leave it out.", time=self.time)


def sweep(
    model: str | Path | onnx.ModelProto,
    calibration: Any = None,
    *,
    folder: Path,
    evaluation: Any = None,
    options: SweepOptions | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Write a model for each ratio of ``options`` into ``folder``, with and without int8, and measure all.

    Calibration, curves and sensitivities are those of one run; ``calibration`` and ``evaluation`` are as for
    ``optimize``. Each model is run side by side with the original. A ratio that the layers do not bear is
    named in the warnings. Raises OptionError for options that do not go together, another LrsdError for
    anything that is wrong with the input.
    """
    options = options or SweepOptions()
    options.check_with(calibration=calibration, evaluation=evaluation, plan=None, output=None, dry_run=False)
    run = start(options.with_goal(), progress=progress)
    gpu = on_gpu(options.device)
    with workers_for(options.jobs, None, options.dask, run.journal.warn, on_gpu=gpu) as workers:
        return _swept(replace(run, workers=workers), model, calibration, evaluation, folder, options.ratios)


def _swept(
    run: Run,
    model: str | Path | onnx.ModelProto,
    calibration: Any,
    evaluation: Any,
    folder: Path,
    ratios: Sequence[float],
) -> Sweep:
    """The models for ``ratios``; all is as ``sweep`` has it."""
    ensure_writable(folder / "model.onnx", None)
    ready = prepare(run, model, calibration, evaluation)
    original, fit_on = ready.found.original, ready.found.fit_on
    run = replace(ready.found.run, groups=groups_on(ready.found.source, ready.found.check_on))
    stem = "model" if original.path is None else original.path.stem
    points = list[SweepPoint]()
    for ratio, fitted in _models(run, ready, sorted(set(ratios))):
        named = [stem]
        if ratio is not None:
            named.append(f"{ratio:g}x")
        if fitted.nodes:
            named.append("int8")
        path = folder / ".".join([*named, "onnx"])
        ensure_writable(path, original.path)
        found = _found(run, ready, fitted)
        save(fitted.model, path)
        promise = promised(found, run.options, run.cost)
        assert promise is not None, "a sweep has a goal"
        run.journal.warn(*fitted.notes, *found.warnings)
        points.append(
            SweepPoint(
                ratio=ratio, int8=fitted.nodes > 0, output=str(path), verification=found, promise=promise
            )
        )
    points = _beside_one_original(sorted(points, key=lambda point: (point.int8, point.ratio or 0.0)))
    gains = "latency" if run.target.timed_here and run.cost in ("macs", "latency") else run.cost
    return Sweep(
        input=str(original.path or "model"),
        target=run.target.name,
        cost=run.cost,
        gains=gains,
        calibration_samples=0 if fit_on is None else fit_on.count,
        calibration_source="" if fit_on is None else fit_on.source,
        points=tuple(points),
        best=_best(run, points, gains),
        warnings=tuple(run.journal.warnings),
        seconds=dict(run.journal.seconds),
    )


def _models(run: Run, ready: Prepared, ratios: Sequence[float]) -> Iterator[tuple[float | None, Fitted]]:
    """Each model with its ratio, which is None for int8 alone; of a ratio low rank first, then with int8."""
    planner, _, _ = make_planner(run, ready)
    if run.options.int8:
        alone = ready.fitter.fit({})
        if alone.nodes:
            yield None, alone
    for ratio in ratios:
        search = RatioSearch(ratio, planner.for_ratio, partial(ratio_of, cost=run.cost), run.announce)
        steps = _fitted(run, ready, ratio, search)
        yield from ((ratio, step) for step in steps)
        if not steps:
            run.journal.warn(
                search.why_nothing().replace(" The original is handed back.", "")
                or f"For {ratio:g} x no form of a layer was measured to be faster: there is no model of it."
            )


def _fitted(run: Run, ready: Prepared, ratio: float, search: RatioSearch) -> list[Fitted]:
    """Low rank for ``ratio``, and the same with int8 if that was asked for; empty where it is out of reach.

    What a plan costs is known once it is written, so that it is planned anew where the ratio was missed.
    """
    steps = list[Fitted]()
    while True:
        with run.journal.clock("plan"):
            forms = search.propose()
        if not forms:
            return steps
        fitted = ready.fitter.fit(forms)
        steps = [step for step in (*fitted.alternatives(), fitted) if step.step in (LOW_RANK, BOTH)]
        if run.cost == "latency":
            return steps  # the planner has timed the whole model
        found = _found(run, ready, steps[0], latency=False)
        if ratio_of(found, run.cost) >= ratio:
            return steps
        search.refuse(found)


def _found(run: Run, ready: Prepared, fitted: Fitted, *, latency: bool = True) -> Verification:
    with run.journal.clock("verify"):
        found = ready.found
        return verify(run, found.original, ready.known.layers, fitted, found.check_on, latency=latency)


def _beside_one_original(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """The points with one latency of the original, the median of all, and with their own to match its ratio.

    Each was timed in turns with the original, at its own time: ratios compare, milliseconds do not.
    """
    seen = [point.verification for point in points]
    known = [found.before.latency_ms for found in seen if found.before.latency_ms is not None]
    if not known:
        return list(points)
    common = median(known)
    timed = [
        replace(
            found,
            before=replace(found.before, latency_ms=common),
            after=replace(found.after, latency_ms=common / found.latency_ratio),
        )
        if found.latency_ratio
        else found
        for found in seen
    ]
    return [replace(point, verification=found) for point, found in zip(points, timed, strict=True)]


def _best(run: Run, points: Sequence[SweepPoint], gains: str) -> int | None:
    """The place of the point that gains most of those that keep the promise and gain something."""
    able = [
        place
        for place, point in enumerate(points)
        if point.promise.kept and not no_gain(point.verification, run.options, run.target, run.cost)
    ]
    return max(able, key=lambda place: ratio_of(points[place].verification, gains), default=None)
