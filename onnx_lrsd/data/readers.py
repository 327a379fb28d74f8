"""Where samples come from: files, folders, scripts, readers. Everything becomes a stream of feeds."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import math
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn, TypeAlias

import numpy as np
from numpy.lib import format as npy

from onnx_lrsd.errors import DataError
from onnx_lrsd.types import Values

RawFeed: TypeAlias = Mapping[str, Any]

LABELS = "labels"
LONE = ""
"""The name of an array that came without one: it is meant for the model's only input."""
MAPPED_BYTES = 64 << 20
"""From this size on an array stays in its file and is read as it is needed."""
DAMAGE = (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What NumPy and zipfile raise on a file that is not as it should be."""


def feeds(source: Any, inputs: Sequence[str]) -> tuple[str, Iterator[RawFeed]]:
    """What to call ``source`` and its feeds, each a dict of arrays, which may hold one or many samples.

    ``inputs`` are the names the model wants. Nothing is unpickled; only ``file.py:function`` runs code.
    Raises DataError, at once or while the feeds are read.
    """
    if isinstance(source, (str, Path)):
        return str(source), _read(str(source), set(inputs))
    name = "the given data"
    if isinstance(source, np.ndarray):
        return name, iter([{LONE: source}])
    if isinstance(source, Mapping):
        return name, iter([source])
    if hasattr(source, "get_next"):
        return name, iter(source.get_next, None)
    if isinstance(source, Iterable):
        return name, iter(source)
    raise DataError(
        f"Samples of type {type(source).__name__} cannot be read: "
        "give a path, a dict of arrays, an iterable of dicts, or a CalibrationDataReader."
    )


def _read(text: str, inputs: set[str]) -> Iterator[RawFeed]:
    script, _, function = text.rpartition(":")
    if script.endswith(".py"):
        return _run(Path(script), function)
    path = Path(text)
    if not path.exists():
        raise DataError(f"There is no file {path}: check the path of the samples.")
    return _read_folder(path, inputs) if path.is_dir() else _read_file(path)


def _read_folder(path: Path, inputs: set[str]) -> Iterator[RawFeed]:
    """One feed per file, by name; but files called like the inputs are the arrays of one feed."""
    files = sorted(file for file in path.iterdir() if file.suffix in (".npy", ".npz", ".json"))
    if not files:
        raise DataError(f"The folder {path} holds no .npy, .npz or .json file: put the samples there.")
    named = {file.stem: file for file in files if file.suffix == ".npy"}
    if inputs and inputs <= set(named):
        wanted = sorted(inputs | ({LABELS} & set(named)))
        return iter([{name: _read_npy(named[name]) for name in wanted}])
    return (feed for file in files for feed in _read_file(file))


def _read_file(path: Path) -> Iterator[RawFeed]:
    if path.suffix == ".npy":
        return iter([{LONE: _read_npy(path)}])
    if path.suffix == ".npz":
        return iter([_read_npz(path)])
    if path.suffix == ".json":
        return iter(_read_polygraphy(path))
    if path.suffix == ".py":
        raise DataError(f"{path} is a script: name the function that yields the samples, {path}:FUNCTION.")
    raise DataError(
        f"{path} is no data that can be read: give .npz, .npy, .json, a folder, or FILE.py:FUNCTION."
    )


def _refuse(path: Path, error: Exception) -> NoReturn:
    if isinstance(error, PermissionError):
        raise DataError(f"{path} cannot be read: check its permissions.") from error
    reason = "it holds Python objects" if "ickle" in str(error) else "it is damaged, or not a NumPy file"
    raise DataError(f"{path} cannot be read ({reason}): write it again with numpy.savez.") from error


def _read_npy(path: Path) -> Values:
    try:
        large = path.stat().st_size >= MAPPED_BYTES
        loaded = np.load(path, mmap_mode="r" if large else None, allow_pickle=False)
    except DAMAGE as error:
        _refuse(path, error)
    if not isinstance(loaded, np.ndarray):
        raise DataError(f"{path} is an .npz archive: name it so.")
    return loaded


def _read_npz(path: Path) -> dict[str, Values]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            return {info.filename.removesuffix(".npy"): _member(path, archive, info) for info in members}
    except DAMAGE as error:
        _refuse(path, error)


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Values:
    """One array of an archive; mapped where it lies in the file as it is, large and not compressed."""
    with archive.open(info) as stream:
        shape, fortran, dtype = _header(stream)
        begin = stream.tell()
        if dtype.hasobject:
            raise ValueError("pickled objects")
        if begin + math.prod(shape) * dtype.itemsize != info.file_size:  # before anything is allocated
            raise ValueError("the size of an array is not what its header says")
        if info.file_size < MAPPED_BYTES or info.compress_type != zipfile.ZIP_STORED:
            stream.seek(0)
            array: Values = npy.read_array(stream, allow_pickle=False)
            return array
        while stream.read(1 << 24):  # to its end, where zipfile compares the checksum
            pass
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
    offset = info.header_offset + 30 + int(lengths.sum()) + begin
    mapped: Values = np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
    return mapped


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    return read(stream)


def _read_polygraphy(path: Path) -> list[RawFeed]:
    """Feeds as ``polygraphy run --save-inputs`` writes them: a list of dicts, arrays as base64 of .npy."""

    def decode(item: dict[str, Any]) -> Any:
        if item.get("polygraphy_class") != "ndarray":
            return item
        loaded = np.load(io.BytesIO(base64.b64decode(item["array"], validate=True)), allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else next(iter(loaded.values()))

    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_hook=decode)
    except (*DAMAGE, RecursionError, StopIteration) as error:
        raise DataError(
            f"{path} cannot be read as Polygraphy's inputs: save them again with --save-inputs."
        ) from error
    if not isinstance(found, list) or not all(isinstance(feed, dict) for feed in found):
        raise DataError(f"{path} is no list of feeds: save it with polygraphy run --save-inputs.")
    return found


def _run(path: Path, function: str) -> Iterator[RawFeed]:
    """Feeds that ``function`` of a Python file yields. This runs the file's code."""
    called = script_function(path, function)
    with _mishaps(f"{path}:{function}"):
        found = called()
        found = iter([found] if isinstance(found, Mapping) else found)
    return _guarded(found, f"{path}:{function}")


def script_function(path: Path, function: str) -> Callable[..., Any]:
    """``function`` of a Python file, whose code is run. Raises DataError where there is none."""
    if not path.is_file():
        raise DataError(f"There is no file {path}: check the path of the script.")
    name = f"_onnx_lrsd_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DataError(f"{path} is no Python file: give FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(spec)
    with _mishaps(f"{path}:{function}"):
        sys.modules[name] = module  # dataclasses and the like look their module up
        if (folder := str(path.parent.resolve())) not in sys.path:
            sys.path.append(folder)  # for what it imports from beside it
        spec.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            raise DataError(f"{path} has no function {function!r}: check the name behind the colon.")
    found: Callable[..., Any] = getattr(module, function)
    return found


def _guarded(found: Iterator[RawFeed], name: str) -> Iterator[RawFeed]:
    while True:
        with _mishaps(name):
            try:
                feed = next(found)
            except StopIteration:
                return
        yield feed


@contextmanager
def _mishaps(name: str) -> Iterator[None]:
    """Say in one sentence what went wrong in the user's own code."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # it may raise anything
        said = " ".join(str(error).split())[:200]
        raise DataError(f"{name} failed ({type(error).__name__}: {said}): mend the script.") from error
