"""Data made up for a model that is to run without samples: shapes and costs, not accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from onnx_lrsd.data.input_layout import input_layout_of
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.errors import DataError, LrsdError
from onnx_lrsd.graph.model import Model
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.types import InputSpec, Values

MADE_UP = "made up"
"""The source of such samples."""
GUESSES = (32, 64, 128, 224, 256, 512)
"""Sizes to try for open dimensions."""
MOST_ENTRIES = 1 << 30
"""Of an input that is made up."""


def made_up_samples(model: Model) -> Samples:
    """Random samples that the model runs on; sizes for its open dimensions are tried in turn.

    Raises DataError when it runs with none of them.
    """
    session = open_session(model.proto, folder=model.folder)
    problem: LrsdError | None = None
    for size in GUESSES:
        for fill in (1, 0):
            samples = random_samples(session.inputs, size=size, fill=fill)
            try:
                session.run(samples.example())
            except LrsdError as error:
                problem = problem or error
                continue
            return samples
    raise DataError(f"The model runs on no data that can be made up: give samples. {problem}") from problem


def random_samples(
    inputs: Sequence[InputSpec], count: int = 1, seed: int = 0, *, size: int = GUESSES[0], fill: int = 1
) -> Samples:
    """Random samples for ``count`` feeds, to learn shapes and to time models, and for nothing else.

    Floating numbers are standard normal, integers and booleans are ``fill``, every open dimension but the
    batch is ``size``. The model may refuse them: the caller has to try. Raises DataError for a shape that no
    memory holds.
    """
    rng = np.random.default_rng(seed)
    layout, fixed = input_layout_of(inputs)
    samples = count * (fixed or 1)
    arrays, constants = {}, {}
    for spec in inputs:
        axis = layout[spec.name].axis
        dims = [d if isinstance(d, int) else size for k, d in enumerate(spec.shape) if k != axis]
        shape = (1 if axis is None else samples, *dims)
        if prod(shape) > MOST_ENTRIES:
            raise DataError(
                f"Input {spec.name} has the shape {spec.shape}, which is too large to make up: give samples."
            )
        floating = spec.dtype != "object" and np.dtype(spec.dtype).kind in "fV"  # V: bfloat16 and smaller
        values: Values = rng.standard_normal(shape, np.float32) if floating else np.full(shape, fill)
        values = np.full(shape, "a") if spec.dtype == "object" else values.astype(spec.dtype)
        if axis is None:
            constants[spec.name] = layout[spec.name].lay_out(values)
        else:
            arrays[spec.name] = values
    return Samples(groups=(arrays,), constants=constants, source=MADE_UP, fixed=fixed, slots=layout)
