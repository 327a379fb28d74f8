"""One call of ``optimize``: what was asked for, and what its stages note for the report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from onnx_lrsd.facts import Engine, Int8, LoadCosts
from onnx_lrsd.storage import FP16, STORAGES
from onnx_lrsd.targets import TARGETS, Machine, Target, built_in, processor, this_machine
from onnx_lrsd.types import COSTS, Progress, Score

NO_FORM = "no smaller form is predicted to be faster"
NO_STORAGE = "no storage that the runtime folds makes it smaller"
OUT_OF_REACH = "the budget is out of reach"
NOT_NEEDED = "the budget is met at less error without it"
REFITTED = "refitted to its new inputs"


@dataclass(frozen=True)
class Options:
    """What to aim at and what to work on. At most one of ``ratio``, ``max_error`` and ``max_drop``.

    ``ratio``: how many times cheaper the whole model gets, in the unit of ``cost``. ``max_error``:
    the relative squared error of the model's outputs that may be reached; .01 where none is given.
    ``max_drop``: by how many points (hundredths) the score of ``metric`` on labelled evaluation samples
    may fall: 'top1', or a function of the outputs by name and the labels. ``cost`` None: what the target
    counts. ``weights``: the one storage of the target size. ``int8``: have ONNX Runtime quantise the
    result where its layers bear it. ``include`` and ``exclude``
    are regular expressions over the names of nodes.
    """

    target: str = "onnxruntime"
    cost: str | None = None
    ratio: float | None = None
    max_error: float | None = None
    max_drop: float | None = None
    metric: str | Score = "top1"
    weights: str | None = None
    int8: bool = False
    forms: tuple[str, ...] | None = None
    include: str | None = None
    exclude: str | None = None
    samples: int | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for an option that cannot be; the command line has refused it before."""
        for name, value, offered in (
            ("target", self.target, TARGETS),
            ("cost", self.cost, (None, *COSTS)),
            ("weights", self.weights, (None, *STORAGES)),
        ):
            if value not in offered:
                raise ValueError(f"{name} is one of {', '.join(str(o) for o in offered if o)}")
        if self.weights and self.target != "size":
            raise ValueError("weights are stored in codes by the target size alone")
        if [self.ratio, self.max_error, self.max_drop].count(None) < 2:
            raise ValueError("give one of ratio, max_error and max_drop")
        if self.cost == "latency" and not TARGETS[self.target].times:
            raise ValueError(f"the target {self.target} has no table of times: choose another cost")


@dataclass
class Run:
    """Options, and the notes taken on the way: seconds by stage, warnings, why a layer was left alone."""

    options: Options
    progress: Progress | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    int8: Int8 | None = None
    loading: LoadCosts | None = None
    engine: Engine | None = None
    target: Target = field(init=False)
    machine: Machine | None = field(init=False, default=None)
    whole: float | None = None
    """Measured seconds of the model as it came."""

    def __post_init__(self) -> None:
        """Give the target the table of times of this machine, if it takes one."""
        self.target = TARGETS[self.options.target]
        if not self.target.times:
            return
        self.machine, said = this_machine()
        self.target = self.target.on(self.machine)
        if said:
            self.warnings.append(said)
        elif self.cost == "latency" and self.machine.processor != processor():
            self.warnings.append(
                f"Times were predicted with a table measured on {self.machine.processor}: "
                "run `onnx-lrsd profile` once for a better plan on this machine."
            )

    @property
    def table(self) -> str:
        """Which table of times predictions are from; empty for a target without."""
        if self.machine is None:
            return ""
        made = "built in" if self.machine is built_in() else "measured on this machine"
        return f"{made}: {self.machine.processor}, ONNX Runtime {self.machine.runtime}"

    @property
    def cost(self) -> str:
        """What a ratio is of."""
        return self.options.cost or self.target.counts

    @property
    def weights(self) -> str | None:
        """The storage of weights in codes, None for the best mix; where bits do not count, the plainest."""
        return self.options.weights or (FP16.name if self.cost == "parameters" else None)

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Add the seconds that the block takes to those of ``stage``, less those of stages inside it."""
        start, before = time.perf_counter(), sum(self.seconds.values())
        yield
        inside = sum(self.seconds.values()) - before
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start - inside
