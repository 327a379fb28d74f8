"""Arrays that lie in a file while nobody works on them.

The file has no name, so that nothing is left of it however the process ends, and its room is free again when
nothing refers to it any more. What is read is mapped: it takes memory while it is held, and only as far as it
is looked at.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from onnx_lrsd.errors import LrsdError
from onnx_lrsd.whole_files import TEMPORARY_PREFIX

_ALIGNMENT = 4096
_BLOCK = 64 << 20
"""Bytes written at once."""

_Item = TypeVar("_Item")

_OPEN: WeakValueDictionary[str, Scratch] = WeakValueDictionary()
"""The files that something refers to, by key."""
_NUMBERS = count()


class Scratch:
    """A file of arrays in ``folder``, that of the system for such files if it is None.

    ``key`` finds it as long as it is there. Raises LrsdError where no such file can be made.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        try:
            # It stays open as long as this object is there.
            self._file = tempfile.TemporaryFile(dir=folder, prefix=TEMPORARY_PREFIX)  # noqa: SIM115
        except OSError as error:
            raise _full(folder, error) from None
        self.key = f"onnx-lrsd scratch {next(_NUMBERS)}"
        self.bytes = 0
        self._lock = Lock()
        _OPEN[self.key] = self

    def reserve(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> ScratchArray:
        """Room for an array, to be written row by row."""
        with self._lock:
            start = self.bytes + -self.bytes % _ALIGNMENT
            found = ScratchArray(self, start, shape, np.dtype(dtype))
            self.bytes = start + found.nbytes
        return found

    def put(self, values: npt.NDArray[Any]) -> ScratchArray:
        """Write ``values``."""
        found = self.reserve(values.shape, values.dtype)
        if values.ndim == 0:
            values = values.reshape(1)
        rows = max(_BLOCK // max(values[:1].nbytes, 1), 1)
        for start in range(0, len(values), rows):
            found.write(start, values[start : start + rows])
        return found

    def new(self) -> Scratch:
        """Another file in the same place."""
        return Scratch(self.folder)

    def write(self, offset: int, values: npt.NDArray[Any]) -> None:
        """Write ``values`` at ``offset``. Raises LrsdError where the disk is full."""
        try:
            with self._lock:
                self._file.seek(offset)
                self._file.write(np.ascontiguousarray(values).data)
                self._file.flush()
        except OSError as error:
            raise _full(self.folder, error) from None

    def mapped(self, offset: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The array at ``offset``, read from the file as it is looked at."""
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        return np.memmap(self._file, dtype, "r", offset, shape)


@dataclass(frozen=True)
class ScratchArray:
    """An array in a scratch file."""

    scratch: Scratch
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def write(self, start: int, rows: npt.NDArray[Any]) -> None:
        """Put ``rows`` in the place of those from ``start`` on."""
        each = math.prod(self.shape[1:]) * self.dtype.itemsize
        self.scratch.write(self.offset + start * each, rows.astype(self.dtype, copy=False))

    def first(self, rows: int) -> ScratchArray:
        """The first ``rows`` of it."""
        return replace(self, shape=(rows, *self.shape[1:]))

    def read(self) -> npt.NDArray[Any]:
        """The array, mapped."""
        return self.scratch.mapped(self.offset, self.shape, self.dtype)


def scratch_of(key: str) -> Scratch | None:
    """The file of that key; None where there is none, or none any more."""
    return _OPEN.get(key)


class OnDemand(Mapping[str, _Item]):
    """Values by name that ``make`` makes whenever one is asked for."""

    def __init__(self, names: Collection[str], make: Callable[[str], _Item]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> _Item:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def made_for_each(values: Mapping[str, _Item], make: Callable[[str], _Item]) -> Mapping[str, _Item]:
    """What ``make`` gives for each name of ``values``: at once, or on demand where they are made so."""
    if isinstance(values, OnDemand):
        return OnDemand(values, make)
    return {name: make(name) for name in values}


def _full(folder: Path | None, error: OSError) -> LrsdError:
    where = folder or tempfile.gettempdir()
    return LrsdError(
        f"{where} cannot hold what --memory keeps out of memory ({error.strerror}): make room there, or "
        "name another folder with --work-dir."
    )
