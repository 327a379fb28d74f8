"""ONNX Runtime as it looks where there is a GPU, with the CPU in its place."""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from onnx_lrsd.commands import doctor
from onnx_lrsd.runtime import session as runtime


class FallsBack:
    """A session of ONNX Runtime that takes the CPU, whatever it was asked for, as it does in silence."""

    def __init__(self, *given: Any, **named: Any) -> None:
        named["providers"] = ["CPUExecutionProvider"]
        self._session = importlib.import_module("onnxruntime").InferenceSession(*given, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


class DoesNotLoad:
    """A session of ONNX Runtime whose provider cannot be loaded."""

    def __init__(self, *_: object, **__: object) -> None:
        raise RuntimeError("Failed to load library libonnxruntime_providers_cuda.so")


class OnTheGpu(FallsBack):
    """A session that says that it took CUDA, as it does where there is a GPU; here the CPU stands in."""

    placed: ClassVar[list[str]] = []
    asked: ClassVar[list[str]] = []

    def __init__(self, *given: Any, **named: Any) -> None:
        self.asked.append(named["providers"][0])
        super().__init__(*given, **named)

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> Any:
        self.placed.append("bound")
        return Binding(self._session.io_binding())


class Binding:
    """A binding in which the CPU stands in for the GPU."""

    def __init__(self, binding: Any) -> None:
        self._iobinding = binding._iobinding
        self._binding = binding

    def bind_output(self, name: str, device: str) -> None:
        assert device == "cuda"
        self._binding.bind_output(name, "cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._binding, name)


def runtime_with_cuda(monkeypatch: pytest.MonkeyPatch, session: type) -> ModuleType:
    """ONNX Runtime for CUDA 13 that lists the provider, with a ``session`` of that class."""
    real = importlib.import_module("onnxruntime")
    placed = real.OrtValue.ortvalue_from_numpy
    module = ModuleType("onnxruntime")
    module.__dict__.update(vars(real))
    module.__dict__.update(
        cuda_version="13.0",
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        preload_dlls=lambda: print("libcudart.so.13 is missing"),
        InferenceSession=session,
        OrtValue=SimpleNamespace(ortvalue_from_numpy=lambda value, device="cpu", place=0: placed(value)),
    )
    for place in (runtime, doctor):
        monkeypatch.setattr(place, "onnxruntime", lambda: module)
    return module
