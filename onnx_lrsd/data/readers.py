"""Where samples come from: files, folders, scripts, readers. Everything becomes a stream of feeds.

A feed is a dict of arrays and holds one sample or a batch. Feeds may differ in shape.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import math
import re
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
from onnx_lrsd.wording import counted

RawFeed: TypeAlias = Mapping[str, Any]
ShapesByInput: TypeAlias = Mapping[str, tuple[int, ...]]
Needed: TypeAlias = Callable[[ShapesByInput], Mapping[str, int]]
"""From the shapes of the arrays of one feed to how many entries of their first axis are needed, at least.

Arrays that it does not name are needed whole.
"""

LABELS = "labels"
UNNAMED = ""
"""The name of an array that came without one: it is meant for the model's only input."""
NUMBERED = re.compile(r"(?P<name>.+)/(?P<index>\d+)")
"""How an archive names the samples of an input one by one: ``ids/0``, ``ids/1``, ..."""
POSITIONAL = re.compile(r"arr_(?P<index>\d+)")
"""How numpy.savez names arrays that came without a name."""
MAPPED_BYTES = 64 << 20
"""From this size on an array stays in its file and is read as it is needed."""
_PIECE = 16 << 20
"""Bytes that are unpacked at a time."""
DAMAGE = (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What NumPy and zipfile raise on a file that is not as it should be."""


def read_feeds(
    source: Any, inputs: Sequence[str], needed: Needed = lambda shapes: {}
) -> tuple[str, Iterator[RawFeed]]:
    """What to call ``source`` and its feeds, each a dict of arrays, which may hold one or many samples.

    ``inputs`` are the names the model wants. Of large compressed arrays no more is unpacked than what
    ``needed`` says. Nothing is unpickled; only ``file.py:function`` runs code.
    Raises DataError, at once or while the feeds are read.
    """
    if isinstance(source, (str, Path)):
        return str(source), _read(str(source), inputs, needed)
    name = "the given data"
    if isinstance(source, np.ndarray):
        return name, iter([{UNNAMED: source}])
    if isinstance(source, Mapping):
        return name, _one_by_one(source)
    if hasattr(source, "get_next"):
        return name, iter(source.get_next, None)
    if isinstance(source, Iterable):
        return name, iter(source)
    raise DataError(
        f"Samples of type {type(source).__name__} cannot be read: "
        "give a path, a dict of arrays, an iterable of dicts, or a CalibrationDataReader."
    )


def _one_by_one(feed: RawFeed) -> Iterator[RawFeed]:
    """The feed as it is; sample by sample where it holds lists of arrays that differ in shape."""
    lists = {
        name: value for name, value in feed.items() if isinstance(value, (list, tuple)) and name != LABELS
    }
    uneven = [len(value) for value in lists.values() if len({np.shape(item) for item in value}) > 1]
    if not uneven:
        return iter([feed])
    count = uneven[0]
    if any(len(value) != count for value in lists.values()):
        listed = ", ".join(f"{name} {len(value)}" for name, value in lists.items())
        raise DataError(f"The lists of samples differ in length ({listed}): give as many for each.")
    if LABELS in feed:
        lists[LABELS] = _label_each(feed[LABELS], count)
    return ({**feed, **{name: value[index] for name, value in lists.items()}} for index in range(count))


def _label_each(labels: Any, count: int) -> Any:
    if len(labels) != count:
        given = f"{counted(len(labels), 'label')} for {counted(count, 'sample')}"
        raise DataError(f"The data has {given}: give one for each.")
    return labels


def _read(text: str, inputs: Sequence[str], needed: Needed) -> Iterator[RawFeed]:
    script, _, function = text.rpartition(":")
    if script.endswith(".py"):
        return _run(Path(script), function)
    path = Path(text)
    if not path.exists():
        raise DataError(f"There is no file {path}: check the path of the samples.")
    return _read_folder(path, inputs, needed) if path.is_dir() else _read_file(path, inputs, needed)


def _read_folder(path: Path, inputs: Sequence[str], needed: Needed) -> Iterator[RawFeed]:
    """One feed per file, by name; but files called like the inputs are the arrays of one feed."""
    files = sorted(file for file in path.iterdir() if file.suffix in (".npy", ".npz", ".json"))
    if not files:
        raise DataError(f"The folder {path} holds no .npy, .npz or .json file: put the samples there.")
    named = {file.stem: file for file in files if file.suffix == ".npy"}
    if inputs and named.keys() >= set(inputs):
        wanted = sorted({*inputs, *({LABELS} & set(named))})
        return iter([{name: _read_npy(named[name]) for name in wanted}])
    return (feed for file in files for feed in _read_file(file, inputs, needed))


def _read_file(path: Path, inputs: Sequence[str], needed: Needed) -> Iterator[RawFeed]:
    if path.suffix == ".npy":
        return iter([{UNNAMED: _read_npy(path)}])
    if path.suffix == ".npz":
        return _read_npz(path, inputs, needed)
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


def _read_npz(path: Path, inputs: Sequence[str], needed: Needed) -> Iterator[RawFeed]:
    """The arrays of an archive as one feed, or sample by sample where it holds them so.

    It does where their names are numbered (``ids/0``, ``ids/1``), or where numpy.savez was given the samples
    of a model's only input one after the other.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {
                info.filename.removesuffix(".npy"): info
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
            parts = _parted(members, inputs)
            labels = members.pop(LABELS, None) if len(parts) > 1 else None
            each = None if labels is None else _label_each(_member(path, archive, labels, None), len(parts))
            for index, part in enumerate(parts):
                most = needed({name: _shape(archive, info) for name, info in part.items()})
                feed = {name: _member(path, archive, i, most.get(name)) for name, i in part.items()}
                yield feed if each is None else feed | {LABELS: each[index]}
    except DAMAGE as error:
        _refuse(path, error)


def _parted(
    members: Mapping[str, zipfile.ZipInfo], inputs: Sequence[str]
) -> list[Mapping[str, zipfile.ZipInfo]]:
    """The members of an archive that make up each feed, by name of the input."""
    samples: dict[int, dict[str, zipfile.ZipInfo]] = {}
    whole: dict[str, zipfile.ZipInfo] = {}
    lone = len(inputs) == 1 and len(members) > 1
    for name, info in members.items():
        numbered, positional = NUMBERED.fullmatch(name), POSITIONAL.fullmatch(name)
        if numbered and name not in inputs and numbered["name"] in {*inputs, LABELS}:
            samples.setdefault(int(numbered["index"]), {})[numbered["name"]] = info
        elif positional and lone and name not in inputs:
            samples.setdefault(int(positional["index"]), {})[inputs[0]] = info
        else:
            whole[name] = info
    if len(samples) > 1:
        whole.pop(LABELS, None)  # one array that holds the labels of all of them
    return [whole | samples[index] for index in sorted(samples)] or [whole]


def _shape(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[int, ...]:
    with archive.open(info) as stream:
        return _header(stream)[0]


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int | None) -> Values:
    """One array of an archive, or the first ``most`` entries of its first axis.

    A large one is mapped where it lies in the file as it is; of a compressed one only what is asked for is
    unpacked.
    """
    with archive.open(info) as stream:
        shape, fortran, dtype = _header(stream)
        begin = stream.tell()
        if dtype.hasobject:
            raise ValueError("pickled objects")
        if begin + math.prod(shape) * dtype.itemsize != info.file_size:  # before anything is allocated
            raise ValueError("the size of an array is not what its header says")
        large, packed = info.file_size >= MAPPED_BYTES, info.compress_type != zipfile.ZIP_STORED
        if large and packed and most is not None and most < shape[0] and not fortran:
            return _unpacked(stream, (most, *shape[1:]), dtype)
        if packed or not large:
            stream.seek(0)
            array: Values = npy.read_array(stream, allow_pickle=False)
            return array[:most] if most is not None else array
        while stream.read(_PIECE):  # to its end, where zipfile compares the checksum
            pass
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
    offset = info.header_offset + 30 + int(lengths.sum()) + begin
    mapped: Values = np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
    return mapped[:most] if most is not None else mapped


def _unpacked(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Values:
    """An array of this ``shape`` from the bytes that come next."""
    array: Values = np.empty(shape, dtype)
    room = array.reshape(-1).view(np.uint8)
    filled = 0
    while filled < len(room):
        piece = stream.read(min(_PIECE, len(room) - filled))
        if not piece:
            raise EOFError("the array ends early")
        room[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
        filled += len(piece)
    return array


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
        found = _one_by_one(found) if isinstance(found, Mapping) else iter(found)
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
