"""The solver's arrays: NumPy on a CPU, CuPy on a GPU, any array-API library in tests.

The solver calls only functions of the array API standard, and those below, which the standard lacks.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np

from onnx_lrsd.errors import DeviceError
from onnx_lrsd.types import Array

DEVICES = ("auto", "cpu", "cuda")
"""Where arrays may be; 'auto' is a GPU where there is one."""


_NO_GPU = "CuPy finds no CUDA device: install onnx-lrsd[gpu], or use --device cpu."


def namespace(x: Array) -> Any:
    """The module whose functions work on ``x``."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    return sys.modules[type(x).__module__.partition(".")[0]]  # CuPy's arrays do not say it themselves


def cupy() -> ModuleType | None:
    """CuPy with a usable device, or None."""
    try:
        import cupy as module

        module.cuda.runtime.getDeviceCount()
    except Exception:  # CuPy raises its own classes when the driver is missing
        return None
    found: ModuleType = module
    return found


def gpu_name() -> str:
    """The name of the GPU that arrays are taken to; empty where CuPy finds none."""
    module = cupy()
    return "" if module is None else str(module.cuda.runtime.getDeviceProperties(0)["name"].decode())


def on_gpu(device: str) -> bool:
    """Whether ``to_device`` takes arrays to a GPU."""
    return device != "cpu" and cupy() is not None


def to_device(x: Array, device: str) -> Array:
    """``x`` on the device: 'cpu' gives NumPy, 'cuda' CuPy, 'auto' CuPy where there is a GPU.

    Raises DeviceError when 'cuda' is asked for and CuPy finds no device.
    """
    module = None if device == "cpu" else cupy()
    if module is not None:
        return module.asarray(x)
    if device == "cuda":
        raise DeviceError(_NO_GPU)
    return np.asarray(x)


class GpuQueue:
    """Work that is queued on the GPU, what it reads and writes there, and a clock of the GPU's own events.

    ``handle`` is the stream of CUDA. Raises DeviceError where CuPy finds no GPU.
    """

    def __init__(self) -> None:
        module = cupy()
        if module is None:
            raise DeviceError(_NO_GPU)
        self._cupy, self._stream = module, module.cuda.Stream()
        self.handle = int(self._stream.ptr)
        self._held = list[Any]()
        self._start = self._event()

    def put(self, values: np.ndarray) -> int:
        """The address of a copy of ``values`` on the GPU."""
        return self._hold(self._cupy.asarray(values))

    def room(self, size: int) -> int:
        """The address of ``size`` bytes on the GPU."""
        return self._hold(self._cupy.empty(max(size, 1), dtype=np.uint8))

    def seconds(self) -> float:
        """Seconds of the GPU's time until all that was queued is done, from when this was made."""
        event = self._event()
        event.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(self._start, event)) / 1e3

    def _event(self) -> Any:
        event = self._cupy.cuda.Event()
        event.record(self._stream)
        return event

    def _hold(self, array: Any) -> int:
        self._held.append(array)
        return int(array.data.ptr)


def to_numpy(x: Array) -> np.ndarray:
    """``x`` in host memory."""
    return np.asarray(x.get() if hasattr(x, "get") else x)


def cast(x: Array, dtype: Any) -> Array:
    """``x`` as ``dtype``: a method in NumPy and CuPy, a function in the standard."""
    return x.astype(dtype) if hasattr(x, "astype") else namespace(x).astype(x, dtype)


def top_eigenvectors(a: Array, count: int) -> tuple[Array, Array]:
    """The ``count`` largest eigenvalues (descending) of symmetric ``a`` (n, n) and their vectors (n, count).

    Signs are fixed (largest entry of each vector positive), so that equal input gives equal output
    whatever the library's convention.
    """
    xp = namespace(a)
    values, vectors = xp.linalg.eigh(a)
    values, vectors = xp.flip(values)[:count], xp.flip(vectors, axis=1)[:, :count]
    largest = xp.take_along_axis(vectors, xp.argmax(xp.abs(vectors), axis=0)[None, :], axis=0)
    return values, vectors * (1 - 2 * cast(largest < 0, vectors.dtype))


def kth_largest(values: Array, k: int) -> Array:
    """The ``k``-th largest entry of a 1-D array, as an array without axes: no copy to the host."""
    xp = namespace(values)
    place = values.shape[0] - k
    order = xp.partition(values, place) if hasattr(xp, "partition") else xp.sort(values)
    return order[place, ...]


def from_numpy(values: np.ndarray, like: Array) -> Array:
    """``values`` in the namespace, precision and device of ``like``."""
    xp = namespace(like)
    return xp.asarray(values.astype(str(like.dtype).rpartition(".")[2], copy=False), **_where(like))


def indices(values: np.ndarray, like: Array) -> Array:
    """Whole numbers ``values`` in the namespace and on the device of ``like``."""
    return namespace(like).asarray(values, **_where(like))


def _where(like: Array) -> dict[str, Any]:
    """NumPy has one device, and CuPy uses the current one; other libraries are told."""
    return {} if namespace(like).__name__ in ("numpy", "cupy") else {"device": like.device}


def identity(size: int, like: Array) -> Array:
    """The identity (size, size) in the namespace, precision and device of ``like``."""
    return from_numpy(np.eye(size), like)


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros in the namespace, precision and device of ``like``."""
    return namespace(like).zeros(shape, dtype=like.dtype, **_where(like))


def add_to_diagonal(a: Array, value: float) -> Array:
    """``a`` (n, n) + ``value`` I."""
    xp = namespace(a)
    size = a.shape[0]
    flat = xp.reshape(xp.asarray(a, copy=True), (size * size,))
    flat[:: size + 1] = flat[:: size + 1] + value
    return xp.reshape(flat, (size, size))


DIRECT = 512
"""Rows up to which a matrix is inverted as any other is."""


def spd_inverse(a: Array) -> Array:
    """Inverse of a symmetric positive definite (n, n), symmetric to the last bit.

    Halves of a large one are eliminated one after the other: half the work of a general inverse, and nearly
    all of it long products.
    """
    xp = namespace(a)
    size = a.shape[0]
    if size <= DIRECT:
        inverse = xp.linalg.inv(a)
        return (inverse + inverse.T) / 2
    half = size // 2
    beside = a[:half, half:]
    first = spd_inverse(a[:half, :half])
    carried = first @ beside
    rest = a[half:, half:] - beside.T @ carried
    second = spd_inverse((rest + rest.T) / 2)
    moved = carried @ second
    corner = first + moved @ carried.T
    rows = xp.concat([(corner + corner.T) / 2, -moved], axis=1)
    return xp.concat([rows, xp.concat([-moved.T, second], axis=1)], axis=0)


def diagonal(a: Array) -> Array:
    """Diagonals of the matrices in the last two axes of ``a`` (..., n, n): (..., n)."""
    xp = namespace(a)
    if hasattr(xp.linalg, "diagonal"):
        return xp.linalg.diagonal(a)
    return xp.diagonal(a, axis1=-2, axis2=-1)


def trace(a: Array) -> float:
    """Sum of the diagonal of ``a`` (n, n)."""
    return float(namespace(a).sum(diagonal(a)))
