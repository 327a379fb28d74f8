"""Data made up for a model that is to run without samples: shapes and costs, not accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TypeAlias

import numpy as np

from onnx_lrsd.data.input_layout import input_layout_of
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.errors import DataError, LrsdError, OptionError
from onnx_lrsd.graph.model import Model
from onnx_lrsd.runtime.session import open_model
from onnx_lrsd.types import InputSpec, Values

MADE_UP = "made up"
"""The source of such samples."""
GUESSES = (32, 64, 128, 224, 256, 512)
"""Sizes to try for open dimensions."""
MOST_ENTRIES = 1 << 30
"""Of an input that is made up."""

InputShapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Input name -> shape of what is fed, with the batch."""


def made_up_samples(model: Model, shapes: InputShapes | None = None) -> Samples:
    """Random samples that the model runs on; sizes for its open dimensions are tried in turn.

    Inputs in ``shapes`` have these, which ``check_shapes`` accepts. Raises DataError when the model runs with
    none of the sizes.
    """
    session = open_model(model)
    problem: LrsdError | None = None
    for size in GUESSES:
        for fill in (1, 0):
            samples = random_samples(session.inputs, size=size, fill=fill, shapes=shapes)
            try:
                session.run(samples.example())
            except LrsdError as error:
                problem = problem or error
                continue
            return samples
    if shapes:
        said = str(problem).rstrip(".")
        raise DataError(f"The model does not run with {spelled_shapes(shapes)} ({said}): give others.")
    raise DataError(f"The model runs on no data that can be made up: give samples. {problem}") from problem


def check_shapes(shapes: InputShapes, inputs: Sequence[InputSpec]) -> None:
    """Raise OptionError for shapes that ``inputs`` cannot have, or that hold different numbers of samples."""
    specs = {spec.name: spec for spec in inputs}
    slots = input_layout_of(inputs).slots
    batches = set[int]()
    for name, shape in shapes.items():
        spec = specs.get(name)
        if spec is None:
            listed = ", ".join(map(_wanted, inputs)) or "none"
            raise _wrong({name: shape}, f"names no input of the model, which has {listed}", inputs[:1])
        fits = len(shape) == len(spec.shape) and all(
            not isinstance(want, int) or want == size for want, size in zip(spec.shape, shape, strict=True)
        )
        if min(shape, default=1) < 1 or (spec.ranked and not fits):
            raise _wrong({name: shape}, f"does not fit the input {_wanted(spec)}", [spec])
        axis = slots[name].axis
        if axis is not None and axis < len(shape):
            batches.add(shape[axis])
    if len(batches) > 1:
        raise _wrong(shapes, "holds different numbers of samples", [specs[name] for name in shapes])


def _wrong(shapes: InputShapes, said: str, like: Sequence[InputSpec]) -> OptionError:
    slots = input_layout_of(like).slots
    proper = {spec.name: _example(spec, slots[spec.name].axis) for spec in like if spec.shape}
    remedy = f"write {spelled_shapes(proper)}, say" if proper else "leave it out"
    text = f"{said}: {remedy}.".replace("{", "{{").replace("}", "}}")
    return OptionError(f"{{shapes}} {text}", shapes=dict(shapes))


def _example(spec: InputSpec, batch: int | None) -> tuple[int, ...]:
    free = [1 if axis == batch else GUESSES[0] for axis in range(len(spec.shape))]
    return tuple(want if isinstance(want, int) else size for want, size in zip(spec.shape, free, strict=True))


def _wanted(spec: InputSpec) -> str:
    sizes = ", ".join("?" if size is None else str(size) for size in spec.shape)
    return f"{spec.name} ({sizes if spec.ranked else '...'})"


def spelled_shapes(shapes: InputShapes) -> str:
    """Shapes as they are typed, ``image:1x3x224x224``."""
    return ", ".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def named_sizes(shapes: InputShapes, inputs: Sequence[InputSpec]) -> dict[str, int]:
    """What ``shapes`` say of the open dimensions that have a name: other inputs may share them."""
    return {
        want: size
        for spec in inputs
        if spec.name in shapes
        for want, size in zip(spec.shape, shapes[spec.name], strict=spec.ranked)
        if isinstance(want, str)
    }


def random_samples(
    inputs: Sequence[InputSpec],
    count: int = 1,
    seed: int = 0,
    *,
    size: int = GUESSES[0],
    fill: int = 1,
    shapes: InputShapes | None = None,
) -> Samples:
    """Random samples for ``count`` feeds, to learn shapes and to time models, and for nothing else.

    Floating numbers are standard normal, integers and booleans are ``fill``, every open dimension but the
    batch is ``size``. Inputs in ``shapes`` have these, batch and all, and so have dimensions of their names.
    The model may refuse them: the caller has to try. Raises DataError for a shape that no memory holds.
    """
    rng = np.random.default_rng(seed)
    layout, fixed = input_layout_of(inputs)
    shapes = shapes or {}
    named = named_sizes(shapes, inputs)
    for name, given in shapes.items():
        axis = layout[name].axis
        if axis is not None and axis < len(given):
            fixed = given[axis]
    samples = count * (fixed or 1)
    arrays, constants = {}, {}
    for spec in inputs:
        axis = layout[spec.name].axis
        wanted = shapes.get(spec.name, spec.shape)
        dims = [
            d if isinstance(d, int) else named.get(str(d), size) for k, d in enumerate(wanted) if k != axis
        ]
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
