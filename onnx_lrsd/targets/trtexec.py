"""The command that builds an engine with TensorRT, the nodes that sparse tensor cores may run, and times."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from onnx_lrsd.data.input_layout import Slot
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.errors import ModelError
from onnx_lrsd.facts import Engine
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.engines import engine_times
from onnx_lrsd.passes.two_of_four import two_of_four

BATCH = 16
"""Samples in a batch that the fixed costs of kernels are shared by: GPUs are for throughput."""
HALF = "float16"
IN_FLOAT32 = (
    "Sparse tensor cores take half precision, and these weights are float32: --precision fp16 writes them "
    "so that they run there."
)
NOT_TIMED = (
    "The latency above is that of ONNX Runtime and says nothing of TensorRT, which was not run: beside a GPU "
    "with tensorrt-cu13 and onnx-lrsd[gpu] installed and without --time, engines of both models are timed."
)


def engine(model: Model, samples: Samples, output: Path | None, before: Model | None = None) -> Engine:
    """How to build an engine from ``model``, written to ``output``.

    With ``before``, the model that it was made of, engines of both are built and timed where TensorRT and a
    GPU are present.

    Tensors keep the types they have in the file (strong typing, the only one from TensorRT 11 on; its older
    versions from 10.12 take the same command).
    Source: TensorRT documentation, Migrating trtexec Usage from TensorRT 10.x to 11.x.
    """
    path = Path("model.onnx") if output is None else output
    sparse = two_of_four(model.graph())
    command = [
        "trtexec",
        f"--onnx={path}",
        f"--saveEngine={path.with_suffix('.engine')}",
        "--sparsity=enable",
        "--stronglyTyped",
    ]
    least, most = open_shapes(model, samples)
    for flag, shapes in (("min", least), ("opt", most), ("max", most)):
        if shapes:
            listed = ",".join(f"{_quoted(name)}:{'x'.join(map(str, s))}" for name, s in shapes.items())
            command.append(f"--{flag}Shapes={listed}")
    idle = bool(sparse) and all(node.dtype != HALF for node in sparse)
    times, said = None, NOT_TIMED
    if before is not None:
        try:
            times = engine_times(before, model, samples.example(), least, most)
        except ModelError as error:
            said = f"The latency above is that of ONNX Runtime. {error}"
    notes = (IN_FLOAT32,) if idle else ()
    names = tuple(node.name for node in sparse)
    return Engine(shlex.join(command), names, notes if times is not None else (*notes, said), times)


def open_shapes(
    model: Model, samples: Samples
) -> tuple[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]]:
    """Least and greatest shapes of the inputs with an open dimension.

    An open batch ranges from one to BATCH, for which times are predicted. Other open dimensions have those
    of ``samples``.
    """
    feed = samples.example()
    least, most = {}, {}
    for spec in inputs_of(model.proto):
        if spec.ranked and all(isinstance(size, int) for size in spec.shape):
            continue
        shape = feed[spec.name].shape
        axis = samples.slots.get(spec.name, Slot()).axis if spec.name in samples.inputs else None
        free = axis is not None and not (spec.ranked and isinstance(spec.shape[axis], int))
        least[spec.name] = shape
        most[spec.name] = tuple(BATCH if free and i == axis else size for i, size in enumerate(shape))
    return least, most


def _quoted(name: str) -> str:
    """``name`` for trtexec: in single quotes if it has a colon or comma, which separate names and shapes."""
    return f"'{name}'" if set(name) & {":", ","} else name
