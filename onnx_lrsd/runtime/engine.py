"""Build engines with TensorRT and run them on the GPU. Only this file imports TensorRT.

It takes what versions 10.12 to 11 have in common. Source: TensorRT documentation, Python API.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from onnx_lrsd.arrays import GpuQueue
from onnx_lrsd.errors import ModelError
from onnx_lrsd.graph.model import Model, save
from onnx_lrsd.types import Feed

SEE_COMMAND = "see what the command above says of it"


def tensorrt() -> ModuleType | None:
    """TensorRT, or None where it is not installed or does not load."""
    try:
        return importlib.import_module("tensorrt")
    except Exception:  # it loads libraries itself and raises what it likes
        return None


class OpenEngine:
    """An engine of a model that can be run again and again on one batch.

    Inputs lie on the GPU and outputs stay there; shapes, if any are inputs, lie in host memory.
    """

    def __init__(self, trt: ModuleType, engine: Any, feed: Feed, queue: GpuQueue) -> None:
        self._engine, self._queue = engine, queue
        self._context = engine.create_execution_context()
        if self._context is None:
            raise ModelError(f"TensorRT has no memory left to run the model: {SEE_COMMAND}.")
        self._host = list[np.ndarray]()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        given = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        for name in given:
            value = np.asarray(feed[name], order="C")
            if not self._context.set_input_shape(name, value.shape):
                raise ModelError(f"TensorRT does not take {name} of shape {value.shape}: {SEE_COMMAND}.")
            self._context.set_tensor_address(name, self._put(trt, name, value))
        missing = self._context.infer_shapes()
        if missing:
            raise ModelError(f"TensorRT does not know the shapes of {', '.join(missing)}: {SEE_COMMAND}.")
        for name in names:
            if name not in given:
                self._context.set_tensor_address(name, self._room(trt, name))

    def _put(self, trt: ModuleType, name: str, value: np.ndarray) -> int:
        """The address of an input."""
        if self._engine.get_tensor_location(name) != trt.TensorLocation.HOST:
            return self._queue.put(value)
        self._host.append(value)
        return value.ctypes.data

    def _room(self, trt: ModuleType, name: str) -> int:
        """The address of an output, which has as much room there as it may need."""
        size = self._context.get_max_output_size(name)
        if size < 0:
            raise ModelError(f"TensorRT does not know how large {name} can be: {SEE_COMMAND}.")
        if self._engine.get_tensor_location(name) != trt.TensorLocation.HOST:
            return self._queue.room(size)
        self._host.append(np.empty(max(size, 1), np.uint8))
        return self._host[-1].ctypes.data

    def run(self) -> None:
        """Queue one run. Raises ModelError where TensorRT refuses it."""
        if not self._context.execute_async_v3(self._queue.handle):
            raise ModelError(f"TensorRT does not run the engine that it built: {SEE_COMMAND}.")


def open_engine(
    trt: ModuleType,
    model: Model,
    feed: Feed,
    least: Mapping[str, tuple[int, ...]],
    most: Mapping[str, tuple[int, ...]],
    queue: GpuQueue,
) -> OpenEngine:
    """Build an engine of ``model`` as trtexec would by the command of the report, to be run on ``feed``.

    Inputs with an open dimension range from their ``least`` shape to the ``most``, for which kernels are
    chosen. Raises ModelError where TensorRT does not take the model.
    """
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        if not parser.parse_from_file(str(path)):
            said = " ".join(str(parser.get_error(0).desc()).split()).rstrip(".")
            raise ModelError(f"TensorRT does not parse the model ({said}): {SEE_COMMAND}.")
        if least:
            profile = builder.create_optimization_profile()
            for name, shape in least.items():
                profile.set_shape(name, shape, most[name], most[name])
            config.add_optimization_profile(profile)
        built = builder.build_serialized_network(network, config)
    if built is None:
        raise ModelError(f"TensorRT does not build an engine of the model: {SEE_COMMAND}.")
    engine = trt.Runtime(logger).deserialize_cuda_engine(built)
    if engine is None:
        raise ModelError(f"TensorRT does not load the engine that it built: {SEE_COMMAND}.")
    return OpenEngine(trt, engine, feed, queue)
