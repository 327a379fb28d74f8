"""How fast TensorRT runs two models, side by side, by the clock of the GPU."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_lrsd.arrays import GpuQueue, gpu_name
from onnx_lrsd.errors import LrsdError, ModelError
from onnx_lrsd.facts import EngineTimes
from onnx_lrsd.graph.model import Model
from onnx_lrsd.measure.compare import ENOUGH
from onnx_lrsd.runtime.engine import SEE_COMMAND, open_engine, tensorrt
from onnx_lrsd.runtime.session import gist
from onnx_lrsd.runtime.timing import pair_latency
from onnx_lrsd.types import Feed

ENGINE_SECONDS = 4.0
"""About how long both engines run, once they are built."""


def engine_times(
    before: Model,
    after: Model,
    feed: Feed,
    least: Mapping[str, tuple[int, ...]],
    most: Mapping[str, tuple[int, ...]],
) -> EngineTimes | None:
    """What engines of both take for one batch; None where there is no TensorRT, or no GPU that CuPy finds.

    Inputs with an open dimension range from their ``least`` shape to the ``most``, at which they are timed:
    ``feed`` is repeated so often. Inputs are on the GPU and outputs stay there. Raises ModelError for
    whatever goes wrong.
    """
    gpu = gpu_name()
    trt = tensorrt() if gpu else None
    if trt is None:
        return None
    batch = {name: _repeated(value, most.get(name, value.shape)) for name, value in feed.items()}
    try:
        queue = GpuQueue()
        old, new = (open_engine(trt, model, batch, least, most, queue) for model in (before, after))
        before_ms, after_ms, ratio, interval = pair_latency(
            old.run, new.run, seconds=ENGINE_SECONDS, enough=ENOUGH, clock=queue.seconds
        )
    except LrsdError:
        raise
    except Exception as error:  # TensorRT and CuPy raise what they like, and it must not cost the result
        raise ModelError(f"TensorRT's engines were not timed ({gist(error)}): {SEE_COMMAND}.") from error
    return EngineTimes(
        version=str(trt.__version__),
        gpu=gpu,
        shapes={name: batch[name].shape for name in most},
        before_ms=before_ms,
        after_ms=after_ms,
        ratio=ratio,
        interval=interval,
    )


def _repeated(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """``value`` over and over along each axis on which ``shape`` is longer."""
    for axis, size in enumerate(shape):
        if size != value.shape[axis]:
            value = np.take(value, np.arange(size) % value.shape[axis], axis=axis)
    return value
