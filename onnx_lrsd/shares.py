"""Who sees which samples: the fit, the search of a budget, and the check of the result."""

from __future__ import annotations

from typing import Any

from onnx_lrsd.dataset import Samples, read_samples
from onnx_lrsd.model import Model
from onnx_lrsd.padding import without_padding
from onnx_lrsd.run import Run
from onnx_lrsd.runtime import inputs_of
from onnx_lrsd.verify import made_up_samples

HELD_OUT = 0.2
"""Share of the calibration samples that only verification sees, where no evaluation data is given."""


def fit_and_check(
    run: Run, source: Model, calibration: Any, evaluation: Any
) -> tuple[Samples | None, Samples]:
    """Samples to fit on (None: no data) and, apart from them, samples to verify on."""
    specs = inputs_of(source.proto)
    held = None if evaluation is None else without_padding(source, read_samples(evaluation, specs))
    if calibration is None:
        run.warnings.append(
            "No calibration data: the weights alone decide, which costs far more accuracy. "
            "Give a few hundred samples with --calib."
        )
        if held is None:
            run.warnings.append("Outputs were compared and timed on made-up data: the errors mean little.")
            held = made_up_samples(source)
        return None, held
    samples = without_padding(source, read_samples(calibration, specs, limit=run.options.samples))
    if held is None:
        samples, held = samples.split(HELD_OUT, run.options.seed)
    run.warnings.extend(dict.fromkeys((*samples.notes, *held.notes)))
    return samples, held


def search_and_confirm(samples: Samples) -> tuple[Samples, Samples]:
    """Samples to search a budget on, and others to confirm it on; the same ones if there are too few."""
    if samples.count < 4 * samples.smallest_batch:
        return samples, samples
    return samples.split(0.5, 0)
