"""Which samples the fit, the search of a budget and the check of the result see."""

from __future__ import annotations

from typing import Any, NamedTuple

from onnx_lrsd.data.made_up import made_up_samples
from onnx_lrsd.data.padding import without_padding
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.errors import DataError
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.subgraph import inputs_of

HELD_OUT, MOST_HELD_OUT = 0.2, 1 / 3
"""Share of the calibration samples that are kept for verification, where no evaluation data is given; and the
largest share, where a smaller one would leave fewer than FEW."""
FEW = 30
"""Samples to check on below which a warning is due: on fewer an error is not well known."""


class Data(NamedTuple):
    """Samples to fit on (None: there are none) and, apart from them, samples to verify on."""

    fit_on: Samples | None
    check_on: Samples
    warnings: tuple[str, ...]


def fit_and_check(
    source: Model, calibration: Any, evaluation: Any, *, limit: int | None = None, seed: int = 0
) -> Data:
    """Samples from ``calibration`` and ``evaluation``, both as ``read_samples`` takes them, or None.

    ``limit`` is how many calibration samples are read, at most. Without ``evaluation`` some of them are
    kept for the check, drawn by ``seed``. Raises DataError where all samples to fit on are the same.
    """
    specs = inputs_of(source.proto)
    held = None if evaluation is None else without_padding(source, read_samples(evaluation, specs))
    if calibration is None:
        warnings = [
            "No calibration data: the weights alone decide, which costs far more accuracy. "
            "Give a few hundred samples with --calib."
        ]
        if held is None:
            warnings.append("Outputs were compared and timed on made-up data: the errors mean little.")
            held = made_up_samples(source)
        return Data(None, held, tuple(warnings))
    samples = without_padding(source, read_samples(calibration, specs, limit=limit))
    if samples.all_alike:
        raise DataError(
            f"The {samples.count} samples of {samples.source} are all the same, which teaches nothing: "
            "give samples as varied as those the model will meet."
        )
    if held is None:
        samples, held = samples.split(_held_out(samples.count), seed)
    return Data(samples, held, tuple(dict.fromkeys((*samples.notes, *held.notes))))


def _held_out(count: int) -> float:
    """The share of ``count`` samples that is kept for verification."""
    return max(HELD_OUT, min(FEW / count, MOST_HELD_OUT))


def search_and_confirm(samples: Samples) -> tuple[Samples, Samples]:
    """Samples to search a budget on, and others to confirm it on; the same ones if there are too few."""
    if samples.count < 4 * samples.smallest_batch:
        return samples, samples
    return samples.split(0.5, 0)
