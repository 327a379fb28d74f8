"""One call of ``optimize``: what was asked for, what it is for, and the journal its stages write."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral, Real

from onnx_lrsd.arrays import DEVICES
from onnx_lrsd.errors import DataError, OptionError
from onnx_lrsd.storage import FP16, STORAGES
from onnx_lrsd.targets import TARGETS, Machine, Target, built_in, processor, this_machine
from onnx_lrsd.types import COSTS, KINDS, Plan, Progress, Score

NO_FORM = "no smaller form is predicted to be faster"
NO_STORAGE = "no storage that the runtime folds makes it smaller"
OUT_OF_REACH = "the budget is out of reach"
NOT_NEEDED = "the budget is met at less error without it"
REFITTED = "refitted to its new inputs"

DEFAULT_TARGET = "onnxruntime"
DEFAULT_ERROR = 0.01
"""What the outputs may change by where nothing else is asked for."""
TOP1 = "top1"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to aim at and what to work on. At most one of ``ratio``, ``max_error`` and ``max_drop``.

    ``target`` None: that of the plan, otherwise ``onnxruntime``. ``cost`` None: what the target counts.
    ``ratio``: how many times cheaper the whole model gets, in the unit of ``cost``. ``max_error``: the
    relative squared error of the model's outputs that may be reached. ``max_drop``: by how many points
    (hundredths) the score of ``metric`` on labelled evaluation samples may fall: 'top1' (None), or a
    function of the outputs by name and the labels. ``weights``: the one storage of the target size.
    ``int8``: have ONNX Runtime quantise the result where its layers bear it. ``forms``: kinds of factors,
    all if None. ``include`` and ``exclude`` are regular expressions over the names of layers. ``samples``:
    how many calibration samples are read, at most. ``device``: where to solve. ``seed``: for what is drawn
    at random. Raises OptionError for what is wrong by itself or does not go together.
    """

    target: str | None = None
    cost: str | None = None
    ratio: float | None = None
    max_error: float | None = None
    max_drop: float | None = None
    metric: str | Score | None = None
    weights: str | None = None
    int8: bool = False
    forms: tuple[str, ...] | None = None
    include: str | None = None
    exclude: str | None = None
    samples: int | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check each option by itself, then those that have to do with each other."""
        _check_choice(TARGETS, target=self.target)
        _check_choice(COSTS, cost=self.cost)
        _check_choice(STORAGES, weights=self.weights)
        _check_choice(DEVICES, device=self.device)
        _check_number(1, math.inf, ratio=self.ratio)
        _check_number(0, 1, max_error=self.max_error)
        _check_number(0, 100, max_drop=self.max_drop)
        _check_whole(1, samples=self.samples)
        _check_whole(0, seed=self.seed)
        _check_pattern(include=self.include)
        _check_pattern(exclude=self.exclude)
        _check_forms(self.forms)
        if not (self.metric in (None, TOP1) or callable(self.metric)):
            raise OptionError("{metric} is neither top1 nor a function: give one.", metric=self.metric)
        self._check_goals(None)
        if self.metric is not None and self.max_drop is None:
            raise OptionError("{metric} goes with {max_drop}, which it measures: give both.")
        self._check_target(TARGETS[self.target or DEFAULT_TARGET])

    def check_with(
        self, *, calibration: object, evaluation: object, plan: object, output: object, dry_run: bool
    ) -> None:
        """Raise OptionError where the options do not go with what else is given; None is what is not."""
        self._check_goals(plan)
        if self.max_drop is not None and evaluation is None:
            raise OptionError("{max_drop} needs labelled samples: give them with {evaluation}.")
        if self.int8 and calibration is None:
            raise OptionError(
                "{int8} takes the ranges of activations from samples: give them with {calibration}."
            )
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


def _check_choice(offered: Collection[str], **option: object) -> None:
    """Raise OptionError for an option that is not None and none of ``offered``."""
    for name, value in option.items():
        if value is not None and not (isinstance(value, str) and value in offered):
            raise OptionError(f"{{{name}}} is none of {', '.join(offered)}: choose one of them.", **option)


def _check_number(least: float, most: float, **option: object) -> None:
    wanted = f"a number of at least {least:g}" if most == math.inf else f"a number from {least:g} to {most:g}"
    for name, value in option.items():
        if value is None:
            continue
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
        if not (math.isfinite(number) and least <= number <= most):
            raise OptionError(f"{{{name}}} is not {wanted}: give one.", **option)


def _check_whole(least: int, **option: object) -> None:
    for name, value in option.items():
        if value is None:
            continue
        number = least - 1 if isinstance(value, bool) or not isinstance(value, Integral) else int(value)
        if number < least:
            raise OptionError(f"{{{name}}} is not a whole number of at least {least}: give one.", **option)


def _check_pattern(**option: str | None) -> None:
    for name, value in option.items():
        try:
            re.compile(value or "")
        except (re.error, TypeError) as error:
            said = str(error).replace("{", "{{").replace("}", "}}")
            raise OptionError(
                f"{{{name}}} is not a regular expression ({said}): mend it.", **option
            ) from None


def _check_forms(forms: object) -> None:
    if forms is None:
        return
    if not isinstance(forms, tuple | list) or not forms or any(kind not in KINDS for kind in forms):
        raise OptionError(
            f"{{forms}} is no list of some of {', '.join(KINDS)}: choose from them.", forms=forms
        )


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

    ``target`` has the times of ``machine``, which is None where the target has none. ``cost`` is what a
    ratio is of.
    """

    options: Options
    target: Target
    cost: str
    machine: Machine | None = None
    journal: Journal = field(default_factory=Journal)
    progress: Progress | None = None

    @property
    def table(self) -> str:
        """Which table of times predictions are from; empty for a target without."""
        if self.machine is None:
            return ""
        made = "built in" if self.machine is built_in() else "measured on this machine"
        return f"{made}: {self.machine.processor}, ONNX Runtime {self.machine.runtime}"

    def announce(self, step: str) -> None:
        """Tell who watches that this step of a search begins, which the stages after it belong to."""
        if self.progress is not None:
            self.progress(step, 0, 1)

    @property
    def metric(self) -> str | Score | None:
        """The score to keep; None where none is asked for."""
        return None if self.options.max_drop is None else self.options.metric or TOP1

    @property
    def weights(self) -> str | None:
        """The storage of weights in codes, None for the best mix; where bits do not count, the plainest."""
        return self.options.weights or (FP16.name if self.cost == "parameters" else None)


def start(options: Options, plan: Plan | None = None, progress: Progress | None = None) -> Run:
    """A run for ``options``, of which ``plan`` settles target and cost.

    Raises DataError for a plan whose target or cost is not known.
    """
    if plan is not None:
        for asked, offered in ((plan.target, TARGETS), (plan.cost, COSTS)):
            if asked not in offered:
                raise DataError(
                    f"The plan asks for {asked}, which is none of {', '.join(offered)}: change it there."
                )
    target = TARGETS[plan.target if plan is not None else options.target or DEFAULT_TARGET]
    cost = plan.cost if plan is not None else options.cost or target.counts
    if not target.times:
        return Run(options=options, target=target, cost=cost, progress=progress)
    machine, said = this_machine()
    run = Run(options=options, target=target.on(machine), cost=cost, machine=machine, progress=progress)
    if said:
        run.journal.warn(said)
    elif cost == "latency" and machine.processor != processor():
        run.journal.warn(
            f"Times were predicted with a table measured on {machine.processor}: "
            "run `onnx-lrsd profile` once for a better plan on this machine."
        )
    return run
