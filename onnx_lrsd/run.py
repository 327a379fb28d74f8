"""One call of ``optimize``: what was asked for, what it is for, and the journal its stages write."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import onnx

import onnx_lrsd.passes
from onnx_lrsd.arrays import DEVICES
from onnx_lrsd.data.samples import Samples, run_on
from onnx_lrsd.errors import DataError, OptionError
from onnx_lrsd.graph.external_data import content_hash
from onnx_lrsd.graph.model import Model
from onnx_lrsd.measure.judge import GroupsOf
from onnx_lrsd.memory_limit import MemoryLimit
from onnx_lrsd.option import (
    Address,
    ByteCount,
    Duration,
    Flag,
    FolderName,
    Function,
    Number,
    OneOf,
    Option,
    Regex,
    SomeOf,
    Whole,
    check_options,
)
from onnx_lrsd.runtime.quantiser import saturates
from onnx_lrsd.runtime.session import RUNTIME_MEMORY, inference_device
from onnx_lrsd.storage import FP16, STORAGES
from onnx_lrsd.targets import TARGETS, Machine, Target, built_in, processor, this_machine
from onnx_lrsd.targets.machine import command_to_profile, runtime
from onnx_lrsd.time_limit import TimeLimit, seconds_of
from onnx_lrsd.types import COSTS, KINDS, Plan, Progress, Score
from onnx_lrsd.wording import bytes_of
from onnx_lrsd.work_dir import KEEP_NOTHING, Keep, Kept, hash_of, open_work_dir
from onnx_lrsd.workers import IN_PROCESS, Workers

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")

NO_FORM = "no smaller form is predicted to be faster"
NO_STORAGE = "no storage that the runtime folds makes it smaller"
NO_TIME = "no time was left to try smaller forms"
OUT_OF_REACH = "the budget is out of reach"
NOT_NEEDED = "the budget is met at less error without it"
REFITTED = "refitted to its new inputs"

DEFAULT_TARGET = "onnxruntime"
DEFAULT_ERROR = 0.01
"""What the outputs may change by where nothing else is asked for."""
TOP1 = "top1"
PRECISIONS = ("fp16",)
GOALS = ("ratio", "max_error", "max_drop", "metric", "samples", "work_dir", "int8", "time", "jobs", "dask")
"""Options that nothing in the work dir depends on: the samples themselves are part of the key."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to aim at and what to work on. At most one of ``ratio``, ``max_error`` and ``max_drop``.

    Each option stands here once, with its type, its default, what it takes and its help, for the API, the
    command line (``--max-error``) and the file of ``--config`` (``max-error``). ``ratio`` is in the unit of
    ``cost``; ``max_error`` is the relative squared error of the model's outputs; a point of ``max_drop`` is a
    hundredth. ``target`` None: that of the plan, otherwise ``onnxruntime``. ``cost`` None: what the target
    counts. ``metric`` None: top1. ``forms`` None: all. Raises OptionError for what is wrong by itself or does
    not go together.
    """

    samples: Annotated[
        int | None, Option("Calibrate on the first N samples only.", Whole(1), metavar="N")
    ] = None
    target: Annotated[str | None, Option("What is to run it.", OneOf(TARGETS), default=DEFAULT_TARGET)] = None
    cost: Annotated[
        str | None,
        Option(
            "What --ratio counts.",
            OneOf(COSTS, spelled={"parameters": "params"}),
            default="macs; bytes for the target size",
        ),
    ] = None
    ratio: Annotated[
        float | None, Option("Make the whole model R times cheaper.", Number(1), metavar="R")
    ] = None
    max_error: Annotated[
        float | None,
        Option(
            "Let the outputs change by at most this part of their variance.",
            Number(0, 1),
            metavar="E",
            default=f"{DEFAULT_ERROR:g}",
        ),
    ] = None
    max_drop: Annotated[
        float | None,
        Option(
            "Let the score on the labelled samples of --eval fall by at most D points.",
            Number(0, 100),
            metavar="D",
        ),
    ] = None
    metric: Annotated[
        str | Score | None,
        Option(
            "The score of --max-drop; FUNCTION(outputs, labels[, inputs]) gives one number, more is better.",
            Function(TOP1),
            default=TOP1,
        ),
    ] = None
    weights: Annotated[
        str | None,
        Option("Store all weights so, with the target size.", OneOf(STORAGES), default="the best mix"),
    ] = None
    precision: Annotated[
        str | None,
        Option("Write the result in half precision, for the target tensorrt.", OneOf(PRECISIONS)),
    ] = None
    int8: Annotated[bool, Option("Then have ONNX Runtime quantise the layers that bear it.", Flag())] = False
    forms: Annotated[
        tuple[str, ...] | None, Option(f"Use only these forms, of {','.join(KINDS)}.", SomeOf(KINDS))
    ] = None
    include: Annotated[str | None, Option("Work on the layers so named only.", Regex())] = None
    exclude: Annotated[str | None, Option("Leave the layers so named as they are.", Regex())] = None
    device: Annotated[
        str, Option("Where ONNX Runtime runs the models and the layers are fitted.", OneOf(DEVICES))
    ] = "auto"
    time: Annotated[
        str | float | None,
        Option("Take at most T (90s, 10min, 2h); say what was left out for it.", Duration(), metavar="T"),
    ] = None
    memory: Annotated[
        str | int | None,
        Option(
            "Hold at most SIZE (4GB, 512MB) beside what ONNX Runtime takes; the rest lies in files.",
            ByteCount(),
            metavar="SIZE",
        ),
    ] = None
    seed: Annotated[int, Option("For what is drawn at random.", Whole(0), metavar="N")] = 0
    jobs: Annotated[
        int,
        Option("Share out curves and fits between N processes.", Whole(1), metavar="N"),
    ] = 1
    dask: Annotated[
        str | None,
        Option("Share them out between the workers of this Dask scheduler.", Address(), metavar="ADDRESS"),
    ] = None
    work_dir: Annotated[
        str | Path | None,
        Option(
            "Keep there what is worked out, for the next run or to go on after an interruption.",
            FolderName(),
            metavar="DIR",
        ),
    ] = None

    def __post_init__(self) -> None:
        """Check each option by itself, then those that have to do with each other."""
        check_options(self)
        self._check_goals(None)
        if self.dask is not None and self.jobs > 1:
            raise OptionError("{dask} and {jobs} exclude each other: give one.")
        if self.metric is not None and self.max_drop is None:
            raise OptionError("{metric} goes with {max_drop}, which it measures: give both.")
        self._check_target(TARGETS[self.target or DEFAULT_TARGET])

    def check_with(
        self,
        *,
        calibration: object,
        evaluation: object,
        plan: object,
        output: object,
        dry_run: bool,
        moments: object = None,
    ) -> None:
        """Raise OptionError where the options do not go with what else is given; None is what is not."""
        self._check_goals(plan)
        if self.max_drop is not None and evaluation is None:
            raise OptionError("{max_drop} needs labelled samples: give them with {evaluation}.")
        if self.int8 and calibration is None:
            raise OptionError(
                "{int8} takes the ranges of activations from samples: give them with {calibration}."
            )
        if moments is not None and calibration is None:
            raise OptionError("{moments} goes with the samples it was taken of: give {calibration}.")
        names = ("target", "cost", "forms", "weights", "include", "exclude")
        settled = [name for name in names if getattr(self, name) is not None]
        if plan is not None and settled:
            raise OptionError(f"{_listed(settled)} cannot go with {{plan}}, which settles it: edit the plan.")
        if dry_run and output is not None:
            raise OptionError("{output} cannot go with {dry_run}, which writes no model: leave one out.")

    def with_goal(self) -> Options:
        """The same with the default promise where nothing is asked for."""
        asked = (self.ratio, self.max_error, self.max_drop)
        return self if any(goal is not None for goal in asked) else replace(self, max_error=DEFAULT_ERROR)

    def _check_goals(self, plan: object) -> None:
        goals = {"ratio": self.ratio, "max_error": self.max_error, "max_drop": self.max_drop, "plan": plan}
        given = [name for name, value in goals.items() if value is not None]
        if len(given) > 1:
            raise OptionError(f"{_listed(given)} exclude each other: give one.")

    def _check_target(self, target: Target) -> None:
        if self.weights is not None and not target.stores_codes:
            able = next(name for name, other in TARGETS.items() if other.stores_codes)
            raise OptionError(
                "{weights} goes with {target}, which stores weights in codes: give both.", target=able
            )
        if self.cost == "latency" and not target.times:
            raise OptionError(
                "{cost} cannot go with {target}, which has no table of times: choose another cost.",
                cost=self.cost,
                target=target.name,
            )
        if self.int8 and not target.timed_here:
            raise OptionError(
                "{int8} quantises for ONNX Runtime and measures there, not for {target}: leave it out.",
                target=target.name,
            )


def _listed(names: Iterable[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in names)


@dataclass
class Journal:
    """What the stages note for the report: warnings, why a layer was left as it is, seconds by stage."""

    warnings: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def warn(self, *said: str) -> None:
        """Note each sentence that is not empty, once."""
        self.warnings.extend(sentence for sentence in said if sentence and sentence not in self.warnings)

    def leave(self, layers: Iterable[str], reason: str, *, unless_known: bool = False) -> None:
        """Note why ``layers``, by output, are left as they are."""
        for layer in layers:
            if not (unless_known and layer in self.reasons):
                self.reasons[layer] = reason

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Add the seconds that the block takes to those of ``stage``, less those of stages inside it."""
        start, before = time.perf_counter(), sum(self.seconds.values())
        yield
        inside = sum(self.seconds.values()) - before
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start - inside


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every stage of one call knows; only the journal changes.

    ``target`` has the times of ``machine``, which is None where the target has none. ``device``, 'cpu' or
    'cuda', is where ONNX Runtime runs the models. ``cost`` is what a ratio is of. ``groups`` are those that
    all comparisons judge outputs in, so that a search and the check of what it found go by the same; None
    until there are samples. ``bears_int8`` tells whether the model has weights that --int8 could work on.
    ``keep`` looks into the work dir first, where there is one. ``time`` and
    ``memory`` are what the run may take; ``workers`` do what is shared out.
    """

    options: Options
    target: Target
    cost: str
    machine: Machine | None = None
    device: str = "cpu"
    groups: GroupsOf | None = None
    bears_int8: bool = True
    journal: Journal = field(default_factory=Journal)
    progress: Progress | None = None
    keep: Keep = KEEP_NOTHING
    time: TimeLimit = field(default_factory=TimeLimit)
    memory: MemoryLimit = field(default_factory=MemoryLimit)
    workers: Workers = IN_PROCESS

    @property
    def table(self) -> str:
        """Which table of times predictions are from; empty for a target without."""
        if self.machine is None:
            return ""
        made = "built in" if self.machine is built_in() else "measured on this machine"
        gpu = "" if self.machine.device == "cpu" else " (GPU)"
        return f"{made}: {self.machine.processor}{gpu}, ONNX Runtime {self.machine.runtime}"

    def shared(
        self,
        kind: str,
        facts: Sequence[object],
        task: Callable[[_Argument], _Result],
        given: Callable[[int], _Argument],
        classes: Collection[type],
        *,
        share: float,
        step: str = "",
    ) -> list[_Result]:
        """What ``task`` makes of ``given(index)`` for each of the ``facts``, by index.

        The workers do what is not kept under ``kind`` and its fact. Of a limited time no more than this
        ``share`` is taken: the first of the facts alone are done then. Progress is told as that of ``step``.
        """
        found = list[_Result]()
        size = self.workers.count if self.time.limited else max(len(facts), 1)
        for start in range(0, len(facts), size):
            if self.time.passed(share):
                break
            here = facts[start : start + size]
            kept = [self.keep.look(kind, fact, classes) for fact in here]
            missing = [index for index, known in enumerate(kept) if known is None]

            def argument(place: int, start: int = start, missing: Sequence[int] = missing) -> _Argument:
                return given(start + missing[place])

            def told(done: int, before: int = len(found) + len(here) - len(missing)) -> None:
                if self.progress is not None and step:
                    self.progress(step, before + done, len(facts))

            made = iter(self.workers.map(task, argument, len(missing), told))
            for fact, known in zip(here, kept, strict=True):
                found.append(
                    self.keep(kind, fact, partial(next, made), classes) if known is None else known[0]
                )
        return found

    def announce(self, step: str) -> None:
        """Tell who watches that this step of a search begins, which the stages after it belong to."""
        if self.progress is not None:
            self.progress(step, 0, 1)

    @property
    def metric(self) -> str | Score | None:
        """The score to keep; None where none is asked for."""
        return None if self.options.max_drop is None else self.options.metric or TOP1

    @property
    def int8_may_gain(self) -> bool:
        """Whether --int8, which was not asked for, is likely to make the result faster on this processor."""
        return self.bears_int8 and not self.options.int8 and self.target.timed_here and not saturates()

    @property
    def weights(self) -> str | None:
        """The storage of weights in codes, None for the best mix; where bits do not count, the plainest."""
        return self.options.weights or (FP16.name if self.cost == "parameters" else None)


def start(options: Options, plan: Plan | None = None, progress: Progress | None = None) -> Run:
    """A run for ``options``, of which ``plan`` settles target and cost.

    Raises DataError for a plan whose target or cost is not known, OptionError for half precision where the
    target does not compute in it, DeviceError for a GPU that ONNX Runtime does not run on.
    """
    if plan is not None:
        for asked, offered in ((plan.target, TARGETS), (plan.cost, COSTS)):
            if asked not in offered:
                raise DataError(
                    f"The plan asks for {asked}, which is none of {', '.join(offered)}: change it there."
                )
    target = TARGETS[plan.target if plan is not None else options.target or DEFAULT_TARGET]
    if options.precision is not None and not target.half:
        able = next(name for name, other in TARGETS.items() if other.half)
        raise OptionError(
            "{precision} goes with {target}, which computes in half precision: give both.", target=able
        )
    cost = plan.cost if plan is not None else options.cost or target.counts
    limit = TimeLimit((options.time and seconds_of(options.time)) or math.inf)
    RUNTIME_MEMORY.start_anew()
    memory = MemoryLimit((options.memory and bytes_of(options.memory)) or math.inf)
    run = Run(
        options=options,
        target=target,
        cost=cost,
        device=inference_device(options.device),
        progress=memory.watching(limit.watching(progress)),
        time=limit,
        memory=memory,
    )
    if not target.times:
        return run
    machine, said = this_machine(run.device)
    run = replace(run, target=target.on(machine), machine=machine)
    if said:
        run.journal.warn(said)
    elif machine.processor != processor(run.device) and (cost == "latency" or run.device != "cpu"):
        run.journal.warn(
            f"Times were predicted with a table measured on {machine.processor}: "
            f"run `{command_to_profile(run.device)}` once for a better plan on this machine."
        )
    return run


def with_work_dir(run: Run, model: Model, samples: Samples, *, calibrated: bool) -> Run:
    """``run``, to keep in its work dir, if it has one, what is worked out of ``model`` and ``samples``.

    ``calibrated``: the samples are fitted to. What is asked for in the end (a ratio, a promise) is no part of
    the key: all that comes before it serves the next run as well. Raises LrsdError for a folder that is no
    work dir.
    """
    options = run.options
    if options.work_dir is None:
        return run
    work_dir = open_work_dir(Path(options.work_dir))
    base = {
        "model": content_hash(model.proto, model.folder),
        "samples": [run_on(samples), calibrated],
        "target": [run.target.name, run.cost, run.machine],
        "options": {one.name: getattr(options, one.name) for one in fields(options) if one.name not in GOALS},
        "processor": [processor(), run.device, processor(run.device)],
        "versions": versions(),
    }
    said = {"model": "a model in memory" if model.path is None else model.path.name}
    return replace(run, keep=Kept(work_dir, hash_of(base), said, run.journal.warn))


@cache
def versions() -> tuple[str, ...]:
    """What results depend on beside their inputs: the source of this package, and versions of others."""
    hashed = blake2b(digest_size=16)
    for package in (onnx_lrsd, onnx_lrsd.passes):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            hashed.update(path.read_bytes())
    return hashed.hexdigest(), np.__version__, onnx.__version__, runtime()
