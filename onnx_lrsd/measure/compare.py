"""Two models side by side on the same samples: measured, not predicted."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lrsd.data.made_up import MADE_UP
from onnx_lrsd.data.samples import Samples, as_fed, batch_to_run, position_axes
from onnx_lrsd.errors import DataError, LrsdError, VerificationError
from onnx_lrsd.facts import ModelCost, ScoreChange, Verification
from onnx_lrsd.graph.model import Model, model_bytes
from onnx_lrsd.measure.judge import GroupsOf, OutputJudge
from onnx_lrsd.passes.count import compute_tensors, node_macs, not_counted, parameters, without_functions
from onnx_lrsd.runtime.divergence import is_scores
from onnx_lrsd.runtime.session import Session, open_model, open_session, shapes
from onnx_lrsd.runtime.timing import FEWEST_ROUNDS, busy_clock, pair_latency
from onnx_lrsd.types import Feed, Layer, Price, Progress, Score

TRIAL_SECONDS, COMPARE_SECONDS = 0.25, 4.0
SCALES_ON = 32
"""Samples on which the groups of channels are found that all comparisons of a run judge by."""
ENOUGH = 0.01
"""Timing ends once the interval of the ratio is narrower than this: sessions differ by more."""
LOOKED_AFTER, KNOWN_WITHIN = 256, 0.1
"""Samples after which it is looked whether errors are known well enough, and within which share of them their
intervals must lie then."""
BASELINE_BYTES = 256 << 20
"""Outputs of the original that are kept between the comparisons of a search, at most."""
STARTS = 6
"""Sessions that a whole model is timed in."""

THREADS = 1
"""Timings are of one thread: what a second one adds depends on what else the machine does."""

Classes = npt.NDArray[np.int64]
Collect = Callable[[Mapping[str, Any], int], list[Any]]

GROUPS = 20
"""Groups of samples that are left out in turn to estimate the variance of a user's score."""


class Pace(NamedTuple):
    """How many times faster the second model is, the 95 % interval, and median milliseconds of both."""

    ratio: float
    interval: tuple[float, float]
    before_ms: float
    after_ms: float


def total_price(model: Model, samples: Samples) -> Price:
    """MACs of one sample, parameters and bytes of the whole model."""
    return price_and_macs_beside(model, samples, ())[0]


def price_and_macs_beside(
    model: Model, samples: Samples, layers: Iterable[Layer]
) -> tuple[Price, dict[str, float]]:
    """The price of the whole model, and the MACs of every node of the main graph but those of ``layers``.

    Both are of one sample. Nodes are named by their first output, and have MACs.
    """
    feed = samples.example()
    size, (counted, _) = samples.size_of(feed), _counted(model, feed)
    weights = {layer.weight for layer in layers}
    nodes = without_functions(model.proto).graph.node
    own = {node.output[0] for node in nodes if not weights.isdisjoint(node.input)}
    beside = {name: macs / size for name, macs in counted.items() if name not in own}
    price = Price(round(sum(counted.values()) / size), parameters(model.proto), model_bytes(model))
    return price, beside


def cost(model: Model, path_bytes: int, feed: Feed, samples: int = 1) -> ModelCost:
    """What ``model`` costs for each of the ``samples`` in ``feed``; latency is left open.

    MACs are counted from the shapes of a real run. Raises as ``runtime.shapes`` does.
    """
    counted, missed = _counted(model, feed)
    total = round(sum(counted.values()) / samples)
    return ModelCost(path_bytes, parameters(model.proto), total, None, missed)


def _counted(model: Model, feed: Feed) -> tuple[dict[str, int], tuple[str, ...]]:
    """MACs of all nodes for ``feed``, from one run within the memory there is, and what is not counted."""
    proto = without_functions(model.proto)
    known = shapes(proto, feed, compute_tensors(proto), model.folder, model.most_bytes)
    return node_macs(proto, known), not_counted(proto, known)


def compare(
    before: Model,
    after: Model,
    samples: Samples,
    *,
    bytes_before: int | None = None,
    bytes_after: int | None = None,
    metric: str | Score | None = None,
    groups: GroupsOf | None = None,
    latency: bool = True,
    threads: int | None = THREADS,
    seconds: float = COMPARE_SECONDS,
    baseline: Baseline | None = None,
    as_needed: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Run both models over ``samples``: errors of every output, costs, latency of one smallest batch.

    Bytes are those given, or what the models take when they are written. ``metric`` 'top1' asks for the
    score of both on ``samples.labels``, a function is such a score itself; None gives top1 where there are
    labels of classes and an output with scores. ``groups`` are those that outputs are judged in, by default
    such as ``groups_on`` finds on the first of the samples. ``latency`` takes ``seconds`` on ``threads``.
    With ``baseline``, that of ``before`` on ``samples``, the runs of ``before`` serve many comparisons.
    ``as_needed``: where nothing is scored, samples are drawn at random until errors are known within a tenth.
    Raises VerificationError when the models differ in their inputs or outputs or only the first one runs,
    DataError when the metric cannot be had.

    >>> import numpy as np, onnx, onnx_lrsd
    >>> graph = onnx.parser.parse_graph("g (float[n, 8] x) => (float[n, 8] y) { y = Relu (x) }")
    >>> opset = onnx.helper.make_opsetid("", 17)
    >>> model = onnx_lrsd.load(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8))
    >>> from onnx_lrsd.data.made_up import made_up_samples
    >>> found = onnx_lrsd.compare(model, model, made_up_samples(model), latency=False)
    >>> found.outputs[0].name, found.error, found.error_interval, found.before.macs
    ('y', 0.0, (0.0, 0.0), 0)
    """
    _same_interface(before.proto, after.proto)
    labels = labels_for(metric, samples)
    collect: Collect | None = None
    if labels is not None:
        collect = _whole if callable(metric) else _classes
    baseline = baseline or Baseline(before, samples, most=0)
    some = as_needed and collect is None and samples.count > LOOKED_AFTER
    found, kept = _differences(baseline, after, collect, groups, LOOKED_AFTER if some else None, progress)
    outputs, warnings = found.errors(), found.warnings()
    score = None
    if labels is not None:
        score = _scored(metric, *kept, labels, samples) if callable(metric) else _score(*kept, labels, metric)
    feed = samples.example()
    pace = None
    if latency:
        openers = partial(open_model, before, threads=threads), partial(open_model, after, threads=threads)
        pace = _pace(openers, feed, seconds, STARTS, progress, clock=_clock(threads, before.device))
    one = replace(baseline.cost, bytes=bytes_before or baseline.cost.bytes)
    two = cost(after, bytes_after or model_bytes(after), feed, samples.size_of(feed))
    if pace is not None:
        one, two = replace(one, latency_ms=pace.before_ms), replace(two, latency_ms=pace.after_ms)
    ratio, interval = (pace.ratio, pace.interval) if pace else (None, None)
    return Verification(
        before=one,
        after=two,
        latency_ratio=ratio,
        latency_interval=interval,
        outputs=outputs,
        samples=found.samples,
        given=samples.count,
        metric=score,
        warnings=() if samples.source == MADE_UP or not any(output.worst for output in outputs) else warnings,
        device=before.device,
    )


def time_pair(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    feed: Feed,
    *,
    folder: Path | None = None,
    threads: int | None = THREADS,
    seconds: float = TRIAL_SECONDS,
    restarts: int = 1,
    line: float = 0.0,
    device: str = "cpu",
) -> Pace:
    """How many times faster ``after`` runs on ``feed``; both find their external data in ``folder``.

    With ``line`` it is enough to know whether the ratio is above it: timing ends once that is clear.
    """
    openers = (
        partial(open_session, proto, folder=folder, threads=threads, device=device)
        for proto in (before, after)
    )
    return _pace(tuple(openers), feed, seconds, restarts, line=line, clock=_clock(threads, device))


def _clock(threads: int | None, device: str) -> Callable[[], float]:
    """The clock to time sessions with: for one thread on a CPU it leaves out what other programs do."""
    return busy_clock() if threads == 1 and device == "cpu" else time.perf_counter


def _pace(
    openers: Sequence[Callable[[], Session]],
    feed: Feed,
    seconds: float,
    restarts: int = 1,
    progress: Progress | None = None,
    *,
    line: float = 0.0,
    clock: Callable[[], float],
) -> Pace:
    """Time the two models that ``openers`` open, side by side.

    Where the weights of a session come to lie in memory makes it up to 5 % slower or faster for as long as it
    is open. So both models are opened ``restarts`` times, each first in turn. The ratio is the median of
    these; six of them span its interval (the true median lies outside with probability 2 / 2^6).
    """
    found: list[Pace] = []
    for start in range(restarts):
        sessions = {}
        first = start % 2
        for which in (first, 1 - first):
            sessions[which] = openers[which]().timed(feed)
        rounds = 1 if restarts > 1 else FEWEST_ROUNDS
        old, new, ratio, interval = pair_latency(
            sessions[0],
            sessions[1],
            min_rounds=rounds,
            seconds=seconds / restarts,
            enough=ENOUGH,
            line=line,
            clock=clock,
        )
        found.append(Pace(ratio, interval, old, new))
        if progress is not None:
            progress("timing", start + 1, restarts)
    if restarts > 1:
        ratios = [pace.ratio for pace in found]
        interval = min(ratios), max(ratios)
    return Pace(
        float(np.median([pace.ratio for pace in found])),
        interval,
        float(np.median([pace.before_ms for pace in found])),
        float(np.median([pace.after_ms for pace in found])),
    )


def groups_on(model: Model, samples: Samples) -> GroupsOf:
    """The groups of channels that the outputs of ``model`` have on some of ``samples``.

    They are found once for all comparisons: where scales are just unlike enough for two groups, other samples
    might give one.
    """
    session = open_model(model)
    samples = as_fed(samples, session.run).some(SCALES_ON)
    judge = OutputJudge(model, session.outputs, position_axes(samples, session.run), look=SCALES_ON)
    for feed in samples.batches(batch_to_run(samples)):
        outputs = session.run(feed)
        judge.add(feed, outputs, outputs, samples.real(feed), samples.size_of(feed))
    return judge.found_groups()


class Baseline:
    """What the first of two models costs and gives on some samples: computed once, for many comparisons.

    At most ``most`` bytes of its outputs are kept; the rest is run again each time.
    """

    def __init__(self, model: Model, samples: Samples, most: int = BASELINE_BYTES) -> None:
        self.model, self._given, self._most = model, samples, most
        self._kept: list[Mapping[str, Any]] = []

    @cached_property
    def cost(self) -> ModelCost:
        """What the model costs for one sample; latency is left open."""
        feed = self._given.example()
        return cost(self.model, model_bytes(self.model), feed, self._given.size_of(feed))

    @cached_property
    def session(self) -> Session:
        """The open model."""
        return open_model(self.model)

    @cached_property
    def samples(self) -> Samples:
        """The samples, to be fed as the model takes them."""
        return as_fed(self._given, self.session.run)

    @cached_property
    def axes(self) -> Mapping[str, tuple[int, ...]]:
        """The axes of each output along which positions lie."""
        return position_axes(self.samples, self.session.run)

    def outputs(self, index: int, feed: Feed) -> Mapping[str, Any]:
        """The outputs of batch ``index``, which is ``feed``; batches come in order."""
        if index < len(self._kept):
            return self._kept[index]
        found = self.session.run(feed)
        arrays = [value for value in found.values() if isinstance(value, np.ndarray)]
        self._most -= sum(value.nbytes for value in arrays)
        if self._most >= 0 and len(arrays) == len(found) and index == len(self._kept):
            self._kept.append(found)
        return found


def _differences(
    baseline: Baseline,
    after: Model,
    collect: Collect | None,
    groups: GroupsOf | None,
    part: int | None,
    progress: Progress | None,
) -> tuple[OutputJudge, tuple[list[Any], list[Any]]]:
    """What tells errors of all outputs where there is no padding, and what ``collect`` keeps of both.

    With ``part`` samples are taken in such parts until the errors are known.
    """
    samples, old = baseline.samples, baseline.session
    with _second():
        new = open_model(after)
    judge = OutputJudge(baseline.model, old.outputs, baseline.axes, groups)
    kept: tuple[list[Any], list[Any]] = [], []
    size, index = batch_to_run(samples), 0
    for some in [samples] if part is None else samples.parts(part):
        for feed in some.batches(size):
            one = baseline.outputs(index, feed)
            with _second():
                two = new.run(feed)
            index, count = index + 1, samples.size_of(feed)
            judge.add(feed, one, two, samples.real(feed), count)
            if collect is not None:
                for outputs, part_kept in zip((one, two), kept, strict=True):
                    part_kept.extend(collect(outputs, count))
            if progress is not None:
                progress("verify", judge.samples, samples.count)
        if part is not None and judge.known_within(KNOWN_WITHIN):
            break
    return judge, kept


@contextmanager
def _second() -> Iterator[None]:
    """Turn an error into one of the second model: the first did the same without."""
    try:
        yield
    except LrsdError as error:
        said = str(error).rstrip(".")
        raise VerificationError(
            f"The second model fails where the first runs ({said}): do not use it."
        ) from error


def labels_for(metric: str | Score | None, samples: Samples) -> npt.NDArray[Any] | None:
    """The label of every sample, where ``metric`` can use it. Raises DataError if ``metric`` needs them."""
    if callable(metric):
        if samples.labels is None:
            raise DataError(f"{samples.source} has no labels to score by: add an array named labels.")
        return samples.labels
    if metric not in (None, "top1"):
        raise DataError(f"There is no metric {metric!r}: choose top1.")
    labels = samples.labels
    if labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu" and len(labels) == samples.count:
        return labels
    if metric is not None:
        said = "no class labels for top1: add an integer array named labels"
        if labels is not None and len(labels) != samples.count:
            said = f"{len(labels)} labels for {samples.count} samples: top1 wants a class for each"
        raise DataError(f"{samples.source} has {said}.")
    return None


def _whole(outputs: Mapping[str, Any], size: int) -> list[Mapping[str, Any]]:
    """All outputs of a batch, for a user's own score."""
    return [outputs]


def _classes(outputs: Mapping[str, Any], size: int) -> list[int]:
    """Top class of each of ``size`` samples, from the first output with scores of classes; empty without."""
    for output in outputs.values():
        if isinstance(output, np.ndarray) and is_scores(output, size):
            return list(output.reshape(size, -1).argmax(axis=1))
    return []


def _score(
    old: list[int], new: list[int], labels: npt.NDArray[Any], metric: str | None
) -> ScoreChange | None:
    if len(old) != len(labels) or len(new) != len(labels):
        if metric is None:
            return None
        raise DataError("No output of the model holds the scores of classes: leave out the metric top1.")
    return _top1(np.array(old), np.array(new), labels)


def _scored(
    score: Score, old: list[Feed], new: list[Feed], labels: npt.NDArray[Any], samples: Samples
) -> ScoreChange:
    """The user's own score of both models, and the 95 % interval of the difference.

    A function with a parameter ``inputs`` gets the samples, (count, ...) by name of the input. Where shapes
    differ from sample to sample, inputs or outputs come as a list of arrays without the axis of the batch.

    Source: delete-a-group jackknife; Shao and Tu, The Jackknife and Bootstrap (1995), section 2.2.
    """
    count, labelled = len(labels), samples.labelled

    def scored(outputs: Mapping[str, Any], which: npt.NDArray[np.int64]) -> float:
        rows = (which[:, None] * labelled + np.arange(labelled)).ravel()
        inputs = {"inputs": _picked(samples.by_input(), rows)} if asks else {}
        return float(score(_picked(outputs, rows), labels[which], **inputs))

    def difference(which: npt.NDArray[np.int64]) -> float:
        return scored(two, which) - scored(one, which)

    try:
        one, two = ({name: _by_sample([f[name] for f in fs]) for name in fs[0]} for fs in (old, new))
        asks = "inputs" in inspect.signature(score).parameters
        whole = scored(one, np.arange(count)), scored(two, np.arange(count))
        order, groups = np.random.default_rng(0).permutation(count), min(GROUPS, count)
        group = np.arange(count) % groups
        left_out = [difference(np.sort(order[group != each])) for each in range(groups)]
    except Exception as error:  # the user's code may raise anything
        said = " ".join(str(error).split())[:200]
        raise DataError(f"The metric failed ({type(error).__name__}: {said}): mend its function.") from error
    spread = 1.96 * float(np.sqrt((groups - 1) * np.var(left_out)))
    middle = whole[1] - whole[0]
    name = getattr(score, "__name__", "metric")
    return ScoreChange(name, *whole, count, (middle - spread, middle + spread))


def _by_sample(batches: list[Any]) -> Any:
    """One array, or a list of one for each sample where their shapes differ."""
    if len({np.shape(batch)[1:] for batch in batches}) == 1:
        return np.concatenate(batches)
    return [sample for batch in batches for sample in batch]


def _picked(values: Mapping[str, Any], rows: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {
        name: [value[row] for row in rows] if isinstance(value, list) else value[rows]
        for name, value in values.items()
    }


def _top1(old: Classes, new: Classes, labels: npt.NDArray[Any]) -> ScoreChange:
    """Top-1 of both, and the 95 % interval of the difference, from the samples where only one is right.

    Half a sample is added to each of the four cells of the paired table: the interval then has a width even
    where hardly any sample differs, or none.
    Source: Agresti and Min, Statistics in Medicine 24 (2005), 729-740.
    """
    right, still = old == labels, new == labels
    count = len(labels)
    won, lost = int(np.sum(still & ~right)), int(np.sum(right & ~still))
    total = count + 2
    centre = (won - lost) / total
    half = 1.96 * float(np.sqrt(((won + lost + 1) / total - centre**2) / total))
    difference = (won - lost) / count
    interval = min(max(centre - half, -1.0), difference), max(min(centre + half, 1.0), difference)
    return ScoreChange("top1", float(right.mean()), float(still.mean()), count, interval)


def _same_interface(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    for kind, of in (("inputs", _fed), ("outputs", _given)):
        old, new = of(before), of(after)
        if old != new:
            raise VerificationError(
                f"The two models differ in their {kind} ({', '.join(old)}; {', '.join(new)}): "
                "compare models with one interface."
            )


def _fed(proto: onnx.ModelProto) -> list[str]:
    """Inputs by name and type; one with a default need not be fed, and its shape is the weight's own."""
    defaults = {tensor.name for tensor in proto.graph.initializer}
    return [_end(value) for value in proto.graph.input if value.name not in defaults]


def _given(proto: onnx.ModelProto) -> list[str]:
    """Outputs by name and type; one may be a weight."""
    return [_end(value) for value in proto.graph.output]


def _end(value: onnx.ValueInfoProto) -> str:
    return f"{value.name} {_type(value.type)}"


def _type(proto: onnx.TypeProto) -> str:
    kind = proto.WhichOneof("value") or "of no type"
    if kind in ("tensor_type", "sparse_tensor_type"):
        return str(onnx.TensorProto.DataType.Name(getattr(proto, kind).elem_type)).lower()
    return kind.removesuffix("_type")
