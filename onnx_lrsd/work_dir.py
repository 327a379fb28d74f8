"""A folder that keeps what a run has worked out, for the next run or for one that goes on.

An entry is one file. It is found by a key: the hash of all that its content depends on (model, data, options,
versions, machine), so a changed input simply finds nothing. It holds plain values and arrays, is never
unpickled, and is believed only if its checksum is right; the folder is bounded, what was used least recently
goes first.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from onnx_lrsd.errors import LrsdError
from onnx_lrsd.whole_files import PROTOBUF_LIMIT, written_whole

FORMAT = 1
MARK = "onnx-lrsd-work-dir.json"
"""The file that says that a folder is a work dir, and of which format."""
ENTRY_SUFFIX = ".lrsd"
MAGIC = b"onnx-lrsd entry\n"
MOST_BYTES = 20 << 30
"""What a work dir may take, if nothing else is asked for."""
_DIGEST = 32
_ALIGNMENT = 64
_LENGTH = 8
"""Bytes that hold the length of the part of an entry that is text."""

Bytes = npt.NDArray[np.uint8]
_Value = TypeVar("_Value")


class Keep(Protocol):
    """Looks for what was worked out before, and makes it where there is nothing."""

    def __call__(
        self, kind: str, facts: object, make: Callable[[], _Value], classes: Collection[type] = ()
    ) -> _Value:
        """What ``make`` gives, or gave in an earlier run for the same ``facts``.

        Values are plain ones, arrays, and instances of ``classes``: dataclasses, named tuples and protobuf's
        messages.
        """
        ...

    def look(self, kind: str, facts: object, classes: Collection[type] = ()) -> tuple[Any] | None:
        """What an earlier run made for ``facts``, in a tuple of one; None where there is nothing."""
        ...


class KeepNothing:
    """Makes everything anew."""

    def __call__(
        self, kind: str, facts: object, make: Callable[[], _Value], classes: Collection[type] = ()
    ) -> _Value:
        """What ``make`` gives."""
        return make()

    def look(self, kind: str, facts: object, classes: Collection[type] = ()) -> tuple[Any] | None:
        """Nothing."""
        return None


KEEP_NOTHING = KeepNothing()


class Entry(NamedTuple):
    """A file of a work dir: what it holds, of which model, its bytes and when it was used last."""

    path: Path
    kind: str
    model: str
    bytes: int
    used: float


@dataclass(frozen=True)
class WorkDir:
    """A folder of entries, of ``most_bytes`` at most."""

    folder: Path
    most_bytes: int = MOST_BYTES

    def read(self, key: str, classes: Collection[type]) -> tuple[Any] | None:
        """The value kept for ``key``, in a tuple of one; None where there is none that can be believed."""
        path = self._path(key)
        try:
            content = np.fromfile(path, np.uint8)
        except OSError:
            return None
        found = None
        with contextlib.suppress(KeyError, TypeError, ValueError):  # of what another program wrote
            found = _unpacked(content, key, classes)
        if found is None:
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):  # a folder that is only read does as well
            os.utime(path)
        return found

    def write(self, key: str, value: object, said: Mapping[str, str]) -> None:
        """Keep ``value``; ``said`` is for who lists entries. Raises OSError."""
        parts = _packed(value, {"key": key, **said})
        size = sum(part.nbytes for part in parts)
        if size > self.most_bytes:
            return
        self.shrink(self.most_bytes - size)
        with written_whole(self._path(key)) as (file,):
            file.write(MAGIC)
            file.write(_digest(parts))
            for part in parts:
                file.write(part.data)

    def entries(self) -> list[Entry]:
        """All entries, what was used least recently first."""
        found = []
        for path in self.folder.glob(f"*{ENTRY_SUFFIX}"):
            with contextlib.suppress(OSError):
                state, said = path.stat(), _said(path)
                if said is not None:
                    kind, model = str(said.get("kind", "")), str(said.get("model", ""))
                    found.append(Entry(path, kind, model, state.st_size, state.st_mtime))
        return sorted(found, key=lambda entry: entry.used)

    def shrink(self, most_bytes: int) -> int:
        """Remove entries, what was used least recently first, until no more is left; the bytes removed."""
        entries = self.entries()
        held, removed = sum(entry.bytes for entry in entries), 0
        for entry in entries:
            if held - removed <= most_bytes:
                break
            entry.path.unlink(missing_ok=True)
            removed += entry.bytes
        return removed

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{ENTRY_SUFFIX}"


def open_work_dir(folder: Path, *, make: bool = True, most_bytes: int = MOST_BYTES) -> WorkDir:
    """The work dir in ``folder``; an empty or missing folder becomes one if ``make``.

    Raises LrsdError where it cannot be one, or is one of another version.
    """
    mark = folder / MARK
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            if not folder.is_dir() or not make:
                raise LrsdError(f"{folder} is no work dir: name one that --work-dir made.")
            if any(folder.iterdir()):
                raise LrsdError(f"{folder} is no work dir and not empty: name an empty or a new folder.")
            with written_whole(mark) as (file,):
                file.write(json.dumps({"format": FORMAT}).encode())
        made_by = json.loads(mark.read_text(encoding="utf-8"))["format"]
    except (ValueError, KeyError, TypeError):
        raise LrsdError(f"{mark} is damaged: remove the work dir, or name another one.") from None
    except OSError as error:
        raise LrsdError(
            f"{folder} cannot be used as a work dir ({error.strerror}): name another folder."
        ) from None
    if made_by != FORMAT:
        raise LrsdError(
            f"{folder} is the work dir of another version of onnx-lrsd (format {made_by}, not {FORMAT}): "
            "name another one, or remove it."
        )
    return WorkDir(folder, most_bytes)


@dataclass
class Kept:
    """What a work dir keeps for one model, its data and options, which ``base`` stands for; a ``Keep``.

    ``said`` is what is listed of its entries. ``warn`` is told once where nothing more can be written.
    """

    work_dir: WorkDir
    base: str
    said: Mapping[str, str]
    warn: Callable[[str], None]
    full: bool = field(default=False, init=False)

    def __call__(
        self, kind: str, facts: object, make: Callable[[], _Value], classes: Collection[type] = ()
    ) -> _Value:
        """What ``make`` gives, or gave in an earlier run for the same ``facts``."""
        key, found = self._key(kind, facts), self.look(kind, facts, classes)
        if found is not None:
            value: _Value = found[0]
            return value
        made = make()
        if not self.full:
            try:
                with contextlib.suppress(ValueError):  # of what is too large for an entry
                    self.work_dir.write(key, made, {**self.said, "kind": kind})
            except OSError as error:
                self.full = True
                self.warn(
                    f"{self.work_dir.folder} cannot be written to ({error.strerror}): this run keeps nothing "
                    "more there; make room with `onnx-lrsd cache`."
                )
        return made

    def look(self, kind: str, facts: object, classes: Collection[type] = ()) -> tuple[Any] | None:
        """What an earlier run made for ``facts``, in a tuple of one; None where there is nothing."""
        return self.work_dir.read(self._key(kind, facts), classes)

    def _key(self, kind: str, facts: object) -> str:
        return hash_of({"base": self.base, "kind": kind, "facts": facts})


def hash_of(facts: object) -> str:
    """What stands for ``facts``, of plain values, arrays, dataclasses and named tuples: 32 hex digits."""
    hashed = blake2b(digest_size=16)
    arrays: list[Bytes] = []
    hashed.update(json.dumps(_plain(facts, arrays), sort_keys=True).encode())
    for array in arrays:
        hashed.update(array.data)
    return hashed.hexdigest()


def _digest(parts: Collection[Bytes]) -> bytes:
    hashed = blake2b(digest_size=_DIGEST)
    for part in parts:
        hashed.update(part.data)
    return hashed.digest()


def _packed(value: object, said: Mapping[str, str]) -> list[Bytes]:
    """The parts of an entry behind its checksum: length of the text, the text, and arrays, each aligned."""
    arrays: list[Bytes] = []
    tree = _plain(value, arrays)
    text = json.dumps({**said, "value": tree, "arrays": [array.nbytes for array in arrays]}).encode()
    ahead = len(MAGIC) + _DIGEST + _LENGTH
    text += b" " * (-(ahead + len(text)) % _ALIGNMENT)
    parts = [np.frombuffer(len(text).to_bytes(_LENGTH, "little") + text, np.uint8)]
    for array in arrays:
        parts += [array, np.zeros(-array.nbytes % _ALIGNMENT, np.uint8)]
    return parts


def _unpacked(content: Bytes, key: str, classes: Collection[type]) -> tuple[Any] | None:
    """The value in the bytes of an entry, in a tuple of one; None where it was not written for ``key``."""
    ahead = len(MAGIC) + _DIGEST
    body = content[ahead:]
    if content[: len(MAGIC)].tobytes() != MAGIC or content[len(MAGIC) : ahead].tobytes() != _digest([body]):
        return None
    end = _LENGTH + int.from_bytes(body[:_LENGTH].tobytes(), "little")
    said = json.loads(body[_LENGTH:end].tobytes())
    if said["key"] != key:
        return None
    arrays = []
    for size in said["arrays"]:
        arrays.append(body[end : end + size])
        end += size + -size % _ALIGNMENT
    return (_value(said["value"], arrays, {made.__name__: made for made in classes}),)


def _said(path: Path) -> dict[str, Any] | None:
    """What an entry says of itself, from its first bytes; None for a file that is no entry."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return None
        file.seek(_DIGEST, os.SEEK_CUR)
        length = int.from_bytes(file.read(_LENGTH), "little")
        try:
            said = json.loads(file.read(min(length, path.stat().st_size)))
        except ValueError:
            return {}
    return said if isinstance(said, dict) else {}


def _plain(value: Any, arrays: list[Bytes]) -> Any:
    """``value`` as JSON has it; the bytes of arrays go to ``arrays``."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value)
    if isinstance(value, bytes):
        arrays.append(np.frombuffer(value, np.uint8))
        return {"bytes": len(arrays) - 1}
    if hasattr(value, "SerializeToString"):
        if value.ByteSize() > PROTOBUF_LIMIT:
            raise ValueError("the message is too large to be written")
        arrays.append(np.frombuffer(value.SerializeToString(), np.uint8))
        return {"message": type(value).__name__, "bytes": len(arrays) - 1}
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufcUS":
            raise TypeError(f"no plain array: {value.dtype}")
        whole = np.ascontiguousarray(value).reshape(-1)
        arrays.append(whole.view(np.uint8))
        return {"array": len(arrays) - 1, "dtype": value.dtype.str, "shape": list(value.shape)}
    if is_dataclass(value) and not isinstance(value, type):
        inside = {one.name: _plain(getattr(value, one.name), arrays) for one in fields(value) if one.init}
        return {"of": type(value).__name__, "fields": inside}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        inside = {name: _plain(getattr(value, name), arrays) for name in value._fields}
        return {"of": type(value).__name__, "fields": inside}
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [_plain(one, arrays) for one in value]}
    if isinstance(value, set | frozenset):
        return {"frozenset": [_plain(one, arrays) for one in sorted(value)]}
    if isinstance(value, Mapping):
        return {"dict": [[_plain(key, arrays), _plain(one, arrays)] for key, one in value.items()]}
    raise TypeError(f"no plain value: {type(value).__name__}")


def _value(tree: Any, arrays: list[Bytes], classes: Mapping[str, Any]) -> Any:
    """The value that ``_plain`` made ``tree`` of."""
    if not isinstance(tree, dict):
        return tree
    if "message" in tree:
        return classes[tree["message"]].FromString(arrays[tree["bytes"]].tobytes())
    if "bytes" in tree:
        return arrays[tree["bytes"]].tobytes()
    if "array" in tree:
        return arrays[tree["array"]].view(np.dtype(tree["dtype"])).reshape(tree["shape"])
    if "of" in tree:
        inside = {name: _value(one, arrays, classes) for name, one in tree["fields"].items()}
        return classes[tree["of"]](**inside)
    if "dict" in tree:
        return {_value(key, arrays, classes): _value(one, arrays, classes) for key, one in tree["dict"]}
    kinds: dict[str, Callable[[Iterator[Any]], Any]] = {"tuple": tuple, "list": list, "frozenset": frozenset}
    (kind, inside), *_ = tree.items()
    return kinds[kind](_value(one, arrays, classes) for one in inside)
