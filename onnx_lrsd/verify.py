"""Two models side by side on the same samples: measured, not predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lrsd.dataset import GUESSES, Samples, made_up
from onnx_lrsd.errors import DataError, LrsdError, VerificationError
from onnx_lrsd.model import Model, model_bytes
from onnx_lrsd.passes import compute_tensors, macs, parameters
from onnx_lrsd.runtime import inputs_of, open_session, shapes
from onnx_lrsd.timing import pair_latency
from onnx_lrsd.types import Cost, Metric, OutputError, Price, Progress, Verification

BATCH_BYTES = 64 << 20
TRIAL_SECONDS, COMPARE_SECONDS = 0.25, 4.0

THREADS = 1
"""Timings are of one thread: what a second one adds depends on what else the machine does."""

Feed = Mapping[str, npt.NDArray[Any]]


def total_price(model: Model, samples: Samples) -> Price:
    """MACs of one sample, parameters and bytes of the whole model."""
    return Price(total_macs(model, samples), parameters(model.proto), model_bytes(model))


def total_macs(model: Model, samples: Samples) -> int:
    """Multiply-accumulates of one sample, from the shapes of a real run."""
    feed = next(iter(samples.batches(1)))
    known = shapes(model.proto, feed, compute_tensors(model.proto), model.folder)
    return round(sum(macs(model.proto, known).values()) / samples.smallest_batch)


def made_up_samples(model: Model) -> Samples:
    """Made-up data the model runs on: sizes are tried in turn for what the model leaves open."""
    problem: LrsdError | None = None
    for size in GUESSES:
        samples = made_up(inputs_of(model.proto), size)
        try:
            open_session(model.proto, folder=model.folder).run(next(iter(samples.batches(1))))
        except LrsdError as error:
            problem = error
            continue
        return samples
    raise DataError(f"The model does not run on made-up data ({problem}) give real samples with --calib or --data.")


def compare(
    before: Model,
    after: Model,
    samples: Samples,
    *,
    latency: bool = True,
    progress: Progress | None = None,
) -> Verification:
    """Errors of every output over ``samples``, costs, paired latency of one smallest batch, and a score.

    With ``samples.labels`` and an output that looks like class scores the score is top-1. Raises
    VerificationError when the two models do not have the same inputs and outputs.
    """
    _same_interface(before.proto, after.proto)
    sessions = [open_session(m.proto, folder=m.folder) for m in (before, after)]
    names = [output.name for output in before.proto.graph.output]
    errors = {name: _Error() for name in names}
    predictions: list[list[npt.NDArray[np.int64]]] = [[], []]
    scored = _scores_name(samples)
    feed_bytes = sum(array[:1].nbytes for array in samples.arrays.values())
    done = 0
    for feed in samples.batches(samples.batch_size(feed_bytes * 16, BATCH_BYTES)):
        old, new = (session.run(feed) for session in sessions)
        for name in names:
            errors[name].add(old[name], new[name])
        done += samples.size_of(feed)
        if scored:
            for outputs, kept in zip((old, new), predictions, strict=True):
                classes = _classes(outputs[name] for name in names)
                if classes is not None:
                    kept.append(classes)
        if progress is not None:
            progress("verify", done, samples.count)
    facts = _costs(before, after, samples, latency)
    metric = None
    if scored and samples.labels is not None and sum(map(len, predictions[0])) == len(samples.labels):
        metric = _top1(*(np.concatenate(kept) for kept in predictions), samples.labels)
    outputs = tuple(OutputError(name, errors[name].relative()) for name in names)
    return Verification(*facts, outputs, samples.count, metric)


def time_pair(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    feed: Feed,
    *,
    folder: Path | None = None,
    threads: int = THREADS,
    seconds: float = TRIAL_SECONDS,
) -> tuple[float, tuple[float, float], float, float]:
    """How many times faster ``after`` runs, its 95 % interval, and both medians in milliseconds."""
    runs: list[Callable[[], object]] = []
    for proto in (before, after):
        session = open_session(proto, folder=folder, threads=threads, spinning=False)
        runs.append(lambda session=session: session.run(feed))  # type: ignore[misc]
    old, new, ratio, interval = pair_latency(runs[0], runs[1], seconds=seconds)
    return ratio, interval, old, new


def _costs(
    before: Model, after: Model, samples: Samples, latency: bool
) -> tuple[Cost, Cost, float | None, tuple[float, float] | None]:
    prices = [total_price(model, samples) for model in (before, after)]
    ratio, interval, times = None, None, [None, None]
    if latency:
        feed = next(iter(samples.batches(1)))
        protos = before.proto, after.proto
        ratio, interval, *times = time_pair(*protos, feed, folder=before.folder, seconds=COMPARE_SECONDS)
    one, two = (
        Cost(price.bytes, price.parameters, price.macs, time) for price, time in zip(prices, times, strict=True)
    )
    return one, two, ratio, interval


class _Error:
    """Streams |new - old|^2 / |old - E old|^2 of one output, float64; what is no number counts as 0 or 1."""

    def __init__(self) -> None:
        self.missed = self.squares = 0.0
        self.sum: Any = 0.0
        self.count = 0

    def add(self, old: Any, new: Any) -> None:
        if not isinstance(old, np.ndarray) or old.dtype.kind not in "f":
            same = np.array_equal(old, new) if not isinstance(old, np.ndarray) else old == new
            self.missed += float(np.sum(~np.asarray(same, dtype=bool)))
            self.squares += float(np.size(same))
            return
        if old.shape != new.shape:
            raise VerificationError(f"An output changed its shape from {old.shape} to {new.shape}: please report this.")
        old, new = old.astype(np.float64), new.astype(np.float64)
        good = np.isfinite(old)
        difference = np.where(good, new - np.where(good, old, 0), 0)
        self.missed += float(np.sum(difference**2)) if np.isfinite(difference).all() else np.inf
        kept = np.where(good, old, 0)
        self.squares += float(np.sum(kept**2))
        rows = kept.reshape(len(kept), -1) if kept.ndim > 1 else kept.reshape(-1, 1)
        total = rows.sum(axis=0)
        if np.shape(self.sum) in ((), total.shape):
            self.sum = self.sum + total
            self.count += len(rows)

    def relative(self) -> float:
        mean_part = float(np.sum(np.asarray(self.sum) ** 2)) / self.count if self.count > 1 else 0.0
        energy = self.squares - mean_part
        if energy <= 1e-12 * self.squares:
            energy = self.squares
        if energy <= 0:
            return 0.0 if self.missed <= 0 else float("inf")
        return self.missed / energy


def _scores_name(samples: Samples) -> bool:
    return samples.labels is not None and samples.labels.ndim == 1 and samples.labels.dtype.kind in "iu"


def _classes(outputs: Any) -> npt.NDArray[np.int64] | None:
    """Top class of each sample from the first output that holds scores of two or more classes."""
    for output in outputs:
        if isinstance(output, np.ndarray) and output.dtype.kind == "f" and output.ndim > 1:
            scores = output.reshape(len(output), -1)
            if scores.shape[1] > 1:
                return np.asarray(scores.argmax(axis=1))
    return None


def _top1(old: npt.NDArray[np.int64], new: npt.NDArray[np.int64], labels: npt.NDArray[Any]) -> Metric:
    """Top-1 of both, and the 95 % interval of the difference from the samples on which they disagree.

    Source: Agresti, Categorical Data Analysis, section 10.1 (paired proportions, Wald with +2 samples).
    """
    right, still = old == labels, new == labels
    count = len(labels)
    won, lost = int(np.sum(still & ~right)), int(np.sum(right & ~still))
    difference = (won - lost) / count
    total = count + 2
    centre = (won - lost) / total
    half = 1.96 * np.sqrt(max((won + lost + 1) / total - centre**2, 0.0) / total)
    interval = float(min(centre - half, difference)), float(max(centre + half, difference))
    return Metric("top1", float(right.mean()), float(still.mean()), count, interval)


def _same_interface(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    def ends(proto: onnx.ModelProto) -> list[tuple[str, bytes]]:
        values = (*proto.graph.input, *proto.graph.output)
        return [(value.name, value.type.SerializeToString(deterministic=True)) for value in values]

    if [name for name, _ in ends(before)] != [name for name, _ in ends(after)]:
        raise VerificationError("The two models differ in their inputs or outputs: compare models of one interface.")
