"""TensorRT and CuPy as far as engines are built and timed with them; an engine takes 1 us for 1000 weights.

Methods have the names and arguments of TensorRT's Python API. What must be done before a run is asserted.
"""

from __future__ import annotations

import sys
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lrsd import arrays

NAME = "NVIDIA Stand-in 80GB"
Shape = tuple[int, ...]


class Card:
    """Milliseconds that passed on the GPU, and the arrays that lie there, by address."""

    def __init__(self) -> None:
        self.now, self.placed = 0.0, dict[int, np.ndarray]()

    def take(self, values: np.ndarray) -> SimpleNamespace:
        address = 1024 * (len(self.placed) + 1)
        self.placed[address] = values
        return SimpleNamespace(data=SimpleNamespace(ptr=address))


CARD = Card()


class Event:
    at = -1.0

    def record(self, stream: Any = None) -> None:
        self.at = CARD.now

    def synchronize(self) -> None:
        assert self.at >= 0


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    return end_event.at - start_event.at


class Logger:
    INTERNAL_ERROR = 0

    def __init__(self, min_severity: int) -> None:
        assert min_severity == self.INTERNAL_ERROR


class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1


class BuilderFlag:
    SPARSE_WEIGHTS = 8


class TensorIOMode:
    INPUT, OUTPUT = "input", "output"


class TensorLocation:
    DEVICE, HOST = "device", "host"


class INetworkDefinition:
    proto: onnx.ModelProto


class IOptimizationProfile:
    def __init__(self) -> None:
        self.ranges = dict[str, tuple[Shape, Shape, Shape]]()

    def set_shape(self, input: str, min: Shape, opt: Shape, max: Shape) -> None:
        self.ranges[input] = (min, opt, max)


class IBuilderConfig:
    def __init__(self) -> None:
        self.flags, self.profiles = list[int](), list[IOptimizationProfile]()

    def set_flag(self, flag: int) -> None:
        self.flags.append(flag)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class Builder:
    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> Any:
        assert config.flags == [BuilderFlag.SPARSE_WEIGHTS]
        return network.proto, dict(config.profiles[0].ranges) if config.profiles else {}


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: Logger) -> None:
        self.network = network

    def parse_from_file(self, model: str) -> bool:
        self.network.proto = onnx.load(model)
        return True

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(desc=lambda: "No importer registered for op: Abacus.")


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self.engine = engine
        self.shapes, self.addresses = dict[str, Shape](), dict[str, int]()

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        self.shapes[name] = shape
        declared = self.engine.inputs[name].type.tensor_type.shape.dim
        low, _, high = self.engine.ranges.get(name, (shape, shape, shape))
        fits = all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
        return fits and all(d.dim_value in (0, size) for d, size in zip(declared, shape, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_max_output_size(self, name: str) -> int:
        assert not self.infer_shapes()
        return 4096

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == 7
        for name in self.engine.names:
            lies = CARD.placed.get(self.addresses[name])
            if name in self.engine.on_host:
                assert lies is None and self.addresses[name]
            else:
                assert lies is not None and lies.shape == self.shapes.get(name, (4096,))
        CARD.now += sum(prod(tensor.dims) for tensor in self.engine.proto.graph.initializer) * 1e-6
        return True


class ICudaEngine:
    on_host: frozenset[str] = frozenset()

    def __init__(self, proto: onnx.ModelProto, ranges: dict[str, tuple[Shape, Shape, Shape]]) -> None:
        self.proto, self.ranges = proto, ranges
        weights = {tensor.name for tensor in proto.graph.initializer}
        self.inputs = {value.name: value for value in proto.graph.input if value.name not in weights}
        self.names = [*self.inputs, *(value.name for value in proto.graph.output)]

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return str(self.names[index])

    def get_tensor_mode(self, name: str) -> str:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> str:
        return TensorLocation.HOST if name in self.on_host else TensorLocation.DEVICE

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)


class Runtime:
    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine:
        return ICudaEngine(*serialized_engine)


CLASSES = (
    *(Builder, IBuilderConfig, ICudaEngine, IExecutionContext, IOptimizationProfile, Logger, OnnxParser),
    Runtime,
)
ENUMERATIONS = (BuilderFlag, NetworkDefinitionCreationFlag, TensorIOMode, TensorLocation)


def with_tensorrt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """TensorRT and CuPy as if both were installed beside a GPU; what lies there is in CARD."""
    CARD.now, CARD.placed = 0.0, {}
    module = ModuleType("tensorrt")
    module.__dict__.update({one.__name__: one for one in (*CLASSES, *ENUMERATIONS)}, __version__="11.4.0.106")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    cuda = SimpleNamespace(
        Stream=lambda: SimpleNamespace(ptr=7),
        Event=Event,
        get_elapsed_time=get_elapsed_time,
        runtime=SimpleNamespace(getDeviceProperties=lambda place: {"name": NAME.encode()}),
    )
    stand_in = SimpleNamespace(
        cuda=cuda,
        asarray=lambda values: CARD.take(np.array(values)),
        empty=lambda shape, dtype: CARD.take(np.empty(shape, dtype)),
    )
    monkeypatch.setattr(arrays, "cupy", lambda: stand_in)
    return module
