"""What is said about a run: measured facts, plain and frozen, for every face of the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite

from onnx_lrsd.types import DENSE, Declined, Layer, Price

ROUNDING = 1e-9
"""Relative error below which two models differ in the order of their sums alone."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What became of one layer. ``form`` is 'dense' where it was left, and ``reason`` says why.

    ``kept`` of each ``of`` input channels are not zero where the pattern is N:M. ``weights`` and
    ``entries`` are the storages of a layer in codes, as in ``Form``. ``output`` is the tensor it gives.
    ``gives`` and ``reads`` are (kept, of) channels, where some were cut; MACs, bytes and parameters after
    are those of what is left.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    form: str
    rank: int
    nonzeros: int
    pattern: str
    macs_before: int
    macs_after: int
    bytes_before: int
    bytes_after: int
    parameters_before: int
    parameters_after: int
    error: float
    reason: str = ""
    kept: int = 0
    of: int = 0
    weights: Mapping[str, int] = field(default_factory=dict)
    entries: str = ""
    output: str = ""
    gives: tuple[int, int] | None = None
    reads: tuple[int, int] | None = None

    @property
    def left(self) -> bool:
        """Whether the layer has the form and the channels it had."""
        return self.form == DENSE and not self.weights and self.gives is None and self.reads is None


@dataclass(frozen=True, kw_only=True)
class GroupError:
    """The error of one group of channels of an output, and its 95 % interval over other samples.

    ``slice`` says which channels these are, '' for all. ``logits_error`` is the error in front of a final
    Sigmoid or Softmax, None where there is none; the larger one is ``relative_error``.
    """

    name: str
    slice: str
    relative_error: float
    interval: tuple[float, float]
    logits_error: float | None = None


@dataclass(frozen=True)
class OutputError:
    """|new - old|^2 / |old - E old|^2 over the held-out samples of one output of the model.

    The error of the whole, and of each group of channels of like role and scale. ``error_interval`` is from
    the lower end of the worst group to the highest upper end of all. ``largest`` is the largest absolute
    difference, ``cosine`` that of the angle between both over all samples, and ``agreement`` the share of
    samples with the same top class, where they hold scores of classes. ``decided_alike`` is the share of
    samples in which the most probable class stays, at every step, of an output of probabilities. The error is
    a share ``of`` the variance, or of the entries where these are no floating numbers: how many differ.
    """

    name: str
    relative_error: float
    groups: tuple[GroupError, ...] = ()
    error_interval: tuple[float, float] | None = None
    largest: float | None = None
    cosine: float | None = None
    agreement: float | None = None
    decided_alike: float | None = None
    of: str = "variance"

    @property
    def worst(self) -> float:
        """Relative error of the group that changed most."""
        return max((group.relative_error for group in self.groups), default=self.relative_error)

    def unchanged(self) -> OutputError:
        """What is found where the second model is the first."""
        groups = tuple(
            replace(
                group,
                relative_error=0.0,
                interval=(0.0, 0.0),
                logits_error=None if group.logits_error is None else 0.0,
            )
            for group in self.groups
        )
        return replace(
            self,
            relative_error=0.0,
            groups=groups,
            error_interval=(0.0, 0.0),
            largest=None if self.largest is None else 0.0,
            cosine=None if self.cosine is None else 1.0,
            agreement=None if self.agreement is None else 1.0,
            decided_alike=None if self.decided_alike is None else 1.0,
        )


@dataclass(frozen=True)
class ModelCost:
    """Measured facts of one model file: bytes of the file(s), parameters, MACs and latency of one run.

    ``not_counted`` says in words what is missing in the MACs.
    """

    bytes: int
    parameters: int
    macs: int
    latency_ms: float | None
    not_counted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Promise:
    """What was asked for, what came out, and whether it holds.

    ``gained`` is False where the original was handed back: nothing is kept by that. ``confidence`` is the
    probability that it holds on other samples as well, None where that is in ``got`` or needs no samples.
    """

    kind: str
    asked: float
    got: float
    kept: bool
    gained: bool = True
    confidence: float | None = None


@dataclass(frozen=True)
class ScoreChange:
    """A score of both models on the same labelled samples; ``interval`` is that of after - before."""

    name: str
    before: float
    after: float
    samples: int
    interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Two models side by side: measured, not predicted. ``device`` is where ONNX Runtime ran both.

    ``samples`` were run, drawn from as many as were ``given``; 0 says that these were all.
    """

    before: ModelCost
    after: ModelCost
    latency_ratio: float | None
    latency_interval: tuple[float, float] | None
    outputs: tuple[OutputError, ...]
    samples: int
    metric: ScoreChange | None = None
    warnings: tuple[str, ...] = ()
    device: str = "cpu"
    given: int = 0

    @property
    def error(self) -> float:
        """Relative error of the group of channels that changed most, of all outputs."""
        return max((output.worst for output in self.outputs), default=0.0)

    @property
    def error_of(self) -> str:
        """What ``error`` is a share of."""
        return max(self.outputs, key=lambda output: output.worst).of if self.outputs else "variance"

    @property
    def error_interval(self) -> tuple[float, float]:
        """Where the error lies on other samples, at 95 %."""
        worst = max(self.outputs, key=lambda output: output.worst, default=None)
        low = 0.0 if worst is None else (worst.error_interval or (worst.worst, worst.worst))[0]
        return low, self.error_bound

    @property
    def error_bound(self) -> float:
        """The upper end of what the error may be on other samples: promises are held by it."""
        ends = [output.error_interval or (0.0, output.worst) for output in self.outputs]
        return max((high for _, high in ends), default=0.0)

    @property
    def decided_otherwise(self) -> float:
        """The largest share of samples in which an output of probabilities names another class."""
        known = (output.decided_alike for output in self.outputs)
        return max((1 - share for share in known if share is not None), default=0.0)

    @property
    def not_counted(self) -> tuple[str, ...]:
        """What the MACs of the first model leave out, in words."""
        return self.before.not_counted

    @property
    def finite(self) -> bool:
        """Whether every value that is finite in one model is so in the other."""
        return isfinite(self.error)


@dataclass(frozen=True)
class Int8:
    """What quantisation did: ``kept`` names the one of ``steps`` that is the result.

    ``nodes`` are int8 in it; ``left`` are Conv, Gemm and MatMul that stay in float, by name, with the
    relative error of the outputs were that one int8. ``steps``: low rank alone, int8 alone, both.
    """

    kept: str
    nodes: int
    left: Mapping[str, float]
    steps: Mapping[str, Verification]


@dataclass(frozen=True)
class LoadCost:
    """What it takes to open a model in ONNX Runtime: seconds, and peak memory of a fresh process in bytes."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class LoadCosts:
    """What it takes to open the model before and after."""

    before: LoadCost
    after: LoadCost


@dataclass(frozen=True, kw_only=True)
class EngineTimes:
    """Milliseconds of one batch in engines of the model before and after, side by side on a GPU.

    ``version`` is TensorRT's, ``shapes`` are those of the inputs with an open dimension. ``ratio`` is the
    median of before / after, ``interval`` that of it at 95 %.
    """

    version: str
    gpu: str
    shapes: Mapping[str, tuple[int, ...]]
    before_ms: float
    after_ms: float
    ratio: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Engine:
    """What TensorRT is to be told: ``command`` builds the engine, by trtexec.

    ``sparse`` are the nodes whose weight is 2:4, which sparse tensor cores may take. ``times`` are there
    where TensorRT was.
    """

    command: str
    sparse: tuple[str, ...]
    notes: tuple[str, ...] = ()
    times: EngineTimes | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Forms that one layer could take, cheapest first, in columns: what each costs and loses.

    ``errors`` are relative errors of the layer's output; ``seconds`` are None where nobody measured.
    ``groups`` name the kind of each form and of its S.
    """

    forms: tuple[str, ...]
    groups: tuple[str, ...]
    errors: tuple[float, ...]
    macs: tuple[int, ...]
    parameters: tuple[int, ...]
    bytes: tuple[int, ...]
    seconds: tuple[float | None, ...]


@dataclass(frozen=True)
class Spectrum:
    """Of the whitened weight: at ``ranks``, singular values relative to the first, and the energy left."""

    ranks: tuple[int, ...]
    values: tuple[float, ...]
    left: tuple[float, ...]


@dataclass(frozen=True)
class Picture:
    """Where S has entries, or which input channels it keeps: rows of digits from 0 to 9.

    ``kind`` is 'entries' (cells are shares of entries that are kept, relative to the fullest cell) or
    'channels' (one cell a channel, row by row). ``shape`` is that of what is shown: (n, m), or (channels,).
    """

    kind: str
    shape: tuple[int, ...]
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Histogram:
    """Shares of a layer's outputs in equal bins from ``low`` to ``high``, in both models."""

    low: float
    high: float
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class LayerDetails:
    """What is drawn of one layer, the one that gives ``output``; None is what was not measured.

    ``planned`` is the form of the plan as the curve calls it. ``seconds_before`` and ``seconds_after`` are of
    one sample in one thread, the second predicted. ``sensitivity`` is the error of the model's outputs for
    each unit of the layer's. ``network_error`` is that of the layer's output in the whole network, with the
    errors of the layers before it.
    """

    output: str
    planned: str = ""
    seconds_before: float | None = None
    seconds_after: float | None = None
    sensitivity: float | None = None
    network_error: float | None = None
    curve: Curve | None = None
    spectrum: Spectrum | None = None
    picture: Picture | None = None
    histogram: Histogram | None = None


@dataclass(frozen=True, order=True)
class Trial:
    """How many times cheaper a model is, and the relative error of its outputs.

    For a measured model the error is the upper end of its interval, which promises are held by.
    """

    ratio: float
    error: float


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """Cost against error of the whole model, in the unit ``cost``.

    ``predicted`` of plans, ``tried`` and measured in a search, and the one that was ``chosen``, as verified.
    """

    cost: str
    predicted: tuple[Trial, ...]
    tried: tuple[Trial, ...]
    chosen: Trial | None


@dataclass(frozen=True, kw_only=True)
class Details:
    """What the report page draws beyond the report itself; collected only where it is asked for."""

    layers: tuple[LayerDetails, ...]
    trade_off: TradeOff | None
    machine: Mapping[str, str]
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """What a run with a ``limit`` held, in bytes; 0 where the system does not tell.

    ``most`` is all that the process held at a time, ``runtime`` the most that sessions of ONNX Runtime did.
    ``aside``: rows, moments and new weights lay in files. ``parted``: the models were run part by part.
    """

    limit: int
    most: int
    runtime: int
    aside: bool
    parted: bool


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the tool says about one run: schema 1 of the JSON, the table, nothing else.

    ``predicted`` is the latency ratio that the table of a machine led to expect of the layers as they are
    now, low rank alone; ``table`` says which table that was. None and empty where nothing was predicted.
    ``time`` is how many seconds the run was allowed, if that was limited, and ``left_out`` what for.
    ``memory`` is what it held, if that was limited.
    ``whole`` are the layers all of whose channels must stay, with the reason; empty where no channels were
    to be cut.
    """

    input: str
    output: str
    target: str
    cost: str
    calibration_samples: int
    calibration_source: str
    verification: Verification | None
    promise: Promise | None
    layers: tuple[LayerReport, ...]
    int8: Int8 | None = None
    loading: LoadCosts | None = None
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    engine: Engine | None = None
    predicted: float | None = None
    table: str = ""
    time: float | None = None
    left_out: tuple[str, ...] = ()
    memory: MemoryUse | None = None
    whole: tuple[Declined, ...] = ()
    details: Details | None = None


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One model of a sweep, measured beside the original.

    ``ratio`` is what was asked of low rank, None for int8 alone; ``int8`` says whether it is quantised.
    ``promise`` says whether the model keeps what the user asked of outputs or score.
    """

    ratio: float | None
    int8: bool
    output: str
    verification: Verification
    promise: Promise


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a model can gain: one model for each ratio, with and without int8.

    ``best`` is the place in ``points`` of the one that gains most, in the unit ``gains``, of those that keep
    the promise; None where none does.
    """

    input: str
    target: str
    cost: str
    gains: str
    calibration_samples: int
    calibration_source: str
    points: tuple[SweepPoint, ...]
    best: int | None
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NodeData:
    """What is known of the nodes of a model, by the name that viewers give them.

    ``seconds`` are those of a node's kernel for one sample in one thread, ``errors`` those of its output
    against the original's, and ``forms`` say what was made of the layer it belongs to.
    """

    seconds: Mapping[str, float]
    errors: Mapping[str, float]
    forms: Mapping[str, str]


@dataclass(frozen=True)
class Inspection:
    """What was found in a model: layers with their dense price, what was declined, and the whole.

    MACs were counted with inputs of ``shapes``: of the first sample of ``source``, or of made-up data where
    that is empty. Open axes of the inputs in ``assumed`` were guessed.
    ``not_counted`` says what is missing in the MACs of the whole, ``notes`` what else is to be known.
    ``widths`` are the channels that may be cut, by the names of the layers that give and that read them, and
    ``whole`` the layers whose channels must stay.
    """

    layers: tuple[tuple[Layer, Price], ...]
    declined: tuple[Declined, ...]
    total: Price
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    source: str = ""
    assumed: tuple[str, ...] = ()
    not_counted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)
    whole: tuple[Declined, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TensorDrift:
    """How far one tensor of the second model is from that of the first.

    ``name`` is the tensor, ``node`` and ``op`` what computes it in the first model. ``error`` is relative
    as an output's, ``inherited`` that of the input which had changed most already: what is above it came
    about in between. ``cosine`` is that of the angle between both, over all samples; None where one is zero.
    ``largest`` is the largest absolute difference.
    """

    name: str
    node: str
    op: str
    error: float
    inherited: float
    cosine: float | None
    largest: float


@dataclass(frozen=True)
class Drift:
    """How far two models are apart after each tensor, in the order of the first graph."""

    tensors: tuple[TensorDrift, ...]

    @property
    def first(self) -> TensorDrift | None:
        """The first tensor that differs by more than rounding."""
        return next((tensor for tensor in self.tensors if tensor.error > ROUNDING), None)

    @property
    def most(self) -> TensorDrift | None:
        """The tensor whose error rises most above that of what it is computed from."""
        differing = [tensor for tensor in self.tensors if tensor.error > ROUNDING]
        return max(differing, key=lambda tensor: tensor.error - tensor.inherited, default=None)
