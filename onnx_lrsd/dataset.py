"""Samples: read from what users have, checked against what the model wants."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_lrsd.errors import DataError
from onnx_lrsd.types import InputSpec

Values: TypeAlias = npt.NDArray[Any]

LABELS = "labels"
MOST_IN_BATCH = 32
GUESSES = (32, 64, 128, 224, 256)
"""Sizes tried for a symbolic dimension when data has to be made up."""


@dataclass(frozen=True)
class Samples:
    """Samples for a model: input name -> array whose first axis counts samples.

    An input without a batch axis (a scalar, say) is in ``constants`` and goes into every feed.
    ``fixed`` is the model's fixed batch size, or None. ``notes`` say what was converted or dropped.
    """

    arrays: Mapping[str, Values]
    constants: Mapping[str, Values]
    labels: Values | None
    source: str
    fixed: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of samples; 1 for a model whose inputs have no batch axis."""
        return min((len(array) for array in self.arrays.values()), default=1)

    @property
    def smallest_batch(self) -> int:
        """Samples in the smallest feed the model takes."""
        return self.fixed or 1

    def batch_size(self, bytes_each: int, most_bytes: int) -> int:
        """Samples to run at once when each takes ``bytes_each``."""
        return self.fixed or max(1, min(MOST_IN_BATCH, most_bytes // max(bytes_each, 1)))

    def batches(self, size: int) -> Iterator[dict[str, Values]]:
        """Feeds of ``size`` samples (the fixed size, if there is one); the last may be smaller."""
        size = self.fixed or size
        for start in range(0, self.count, size):
            yield {name: array[start : start + size] for name, array in self.arrays.items()} | dict(self.constants)

    def size_of(self, feed: Mapping[str, Values]) -> int:
        """How many samples a feed holds."""
        return min((len(feed[name]) for name in self.arrays), default=1)

    def take(self, index: npt.NDArray[np.int64]) -> Samples:
        """The samples at these positions."""
        labels = None if self.labels is None else self.labels[index]
        arrays = {name: array[index] for name, array in self.arrays.items()}
        return Samples(arrays, self.constants, labels, self.source, self.fixed, self.notes)

    def split(self, share: float, seed: int) -> tuple[Samples, Samples]:
        """Two disjoint parts at random, the second with ``share`` of the samples, each at least one batch."""
        each = self.smallest_batch
        groups = self.count // each
        if groups < 2:
            raise DataError(
                f"{self.source} holds {self.count} sample{'s' * (self.count != 1)}; at least {2 * each} are needed, "
                "to calibrate on some and verify on others: give more samples."
            )
        second = min(max(round(groups * share), 1), groups - 1)
        order = np.random.default_rng(seed).permutation(groups)
        parts = np.sort(order[second:]), np.sort(order[:second])
        first, last = ((part[:, None] * each + np.arange(each)).ravel() for part in parts)
        return self.take(first), self.take(last)


def read_samples(source: Any, inputs: Sequence[InputSpec], *, limit: int | None = None) -> Samples:
    """Read samples and check them against the model's ``inputs``.

    ``source``: Samples; a dict of arrays; an iterable of feeds (dicts); anything with ``get_next``,
    as ONNX Runtime's CalibrationDataReader; or a path to .npz, .npy, a folder of such files (each
    one sample or a batch of them), Polygraphy's JSON inputs, or ``file.py:function`` that yields
    feeds. At most ``limit`` samples are taken, the first ones. Raises DataError.
    """
    if isinstance(source, Samples):
        return source if limit is None else source.take(np.arange(min(limit, source.count)))
    name = "the given data"
    if isinstance(source, (str, Path)):
        name = str(source)
        raw = _read_path(str(source), inputs)
    elif isinstance(source, Mapping):
        raw = dict(source)
    else:
        raw = _stack(_feeds(source), inputs, name)
    return _checked(raw, inputs, name, limit)


def _feeds(source: Any) -> Iterator[Mapping[str, Any]]:
    if hasattr(source, "get_next"):
        while (feed := source.get_next()) is not None:
            yield feed
        return
    if not isinstance(source, Iterable):
        raise DataError(f"Samples of type {type(source).__name__} cannot be read: give a dict of arrays or a path.")
    yield from source


def _read_path(text: str, inputs: Sequence[InputSpec]) -> dict[str, Values]:
    script, _, function = text.rpartition(":")
    if script.endswith(".py"):
        return _stack(_run_script(Path(script), function), inputs, text)
    path = Path(text)
    if not path.exists():
        raise DataError(f"There is no file {path}: check the path of the samples.")
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".npy", ".npz"))
        if not files:
            raise DataError(f"The folder {path} holds no .npy or .npz file: put the samples there.")
        return _stack((_read_arrays(file, inputs) for file in files), inputs, text)
    if path.suffix == ".json":
        return _stack(_read_polygraphy(path), inputs, text)
    if path.suffix not in (".npy", ".npz"):
        raise DataError(f"{path} is not a kind of data that can be read: give .npz, .npy, .json, a folder or file.py:function.")
    return _read_arrays(path, inputs)


def _read_arrays(path: Path, inputs: Sequence[InputSpec]) -> dict[str, Values]:
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix == ".npy" else None)
        if isinstance(loaded, np.ndarray):
            if len(inputs) != 1:
                raise DataError(f"{path} holds one array but the model wants {_wants(inputs)}: give a .npz with these names.")
            return {inputs[0].name: loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        reason = "it holds Python objects" if "pickle" in str(error) else "it is damaged or not a NumPy file"
        raise DataError(f"{path} cannot be read ({reason}): write it again with numpy.savez.") from None


def _read_polygraphy(path: Path) -> list[Mapping[str, Values]]:
    """Feeds of ``polygraphy run --save-inputs``: JSON in which arrays are base64 of .npy."""

    def decode(item: dict[str, Any]) -> Any:
        if "array" in item and str(item.get("polygraphy_class", "")) == "ndarray" or set(item) == {"array"}:
            return np.load(io.BytesIO(base64.b64decode(item["array"])), allow_pickle=False)
        return item

    try:
        feeds = json.loads(path.read_text(), object_hook=decode)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not Polygraphy's JSON of inputs ({error}): save it again with --save-inputs.") from None
    if isinstance(feeds, dict):
        feeds = feeds.get("lst", [feeds])
    if not isinstance(feeds, list) or not all(isinstance(feed, dict) for feed in feeds):
        raise DataError(f"{path} does not hold a list of feeds: save it with polygraphy's --save-inputs.")
    names = {"polygraphy_class"}
    return [{k: v for k, v in feed.items() if k not in names} for feed in feeds]


def _run_script(path: Path, function: str) -> Iterable[Mapping[str, Values]]:
    """Feeds from ``function`` of a Python file; the file's code is run."""
    if not path.is_file():
        raise DataError(f"There is no file {path}: check the path of the script.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        feeds: Iterable[Mapping[str, Values]] = getattr(module, function)()
        return list(feeds)
    except Exception as error:  # the user's own code may raise anything
        raise DataError(f"{path}:{function} failed ({type(error).__name__}: {error}): mend the script.") from error


def _stack(feeds: Iterable[Mapping[str, Any]], inputs: Sequence[InputSpec], name: str) -> dict[str, Values]:
    """One array for each input out of feeds that are batches, or single samples without a batch axis."""
    ranks = {spec.name: len(spec.shape) for spec in inputs}
    parts: dict[str, list[Values]] = {}
    for feed in feeds:
        if not isinstance(feed, Mapping):
            raise DataError(f"{name} yields {type(feed).__name__} where a dict of input name to array is wanted.")
        for key, value in feed.items():
            array = np.asarray(value)
            single = array.ndim == ranks.get(key, array.ndim) - 1 or array.ndim == 0
            parts.setdefault(key, []).append(array[None] if single else array)
    if not parts:
        raise DataError(f"{name} holds no samples: give at least two.")
    try:
        return {key: np.concatenate(arrays) for key, arrays in parts.items()}
    except ValueError:
        raise DataError(f"The samples in {name} differ in shape: bring them to one shape, by padding for example.") from None


def _checked(raw: dict[str, Values], inputs: Sequence[InputSpec], name: str, limit: int | None) -> Samples:
    wanted = {spec.name: spec for spec in inputs}
    labels = raw.pop(LABELS, None) if LABELS not in wanted else None
    if len(raw) == 1 and len(wanted) == 1 and not set(raw) & set(wanted):
        raw = {inputs[0].name: next(iter(raw.values()))}
    missing = [key for key in wanted if key not in raw]
    unknown = [key for key in raw if key not in wanted]
    if missing or unknown:
        said = "has no " + ", ".join(missing) if missing else "has " + ", ".join(unknown) + ", which is no input"
        raise DataError(f"{name} {said}; the model wants {_wants(inputs)}: name the arrays so.")
    notes: list[str] = []
    arrays: dict[str, Values] = {}
    constants: dict[str, Values] = {}
    for key, spec in wanted.items():
        value = _cast(np.asarray(raw[key]), spec, name, notes)
        if not spec.shape:
            constants[key] = value.reshape(-1)[:1].reshape(()) if value.size else value
        elif value.ndim == len(spec.shape) and _batchless(spec, value):
            constants[key] = value
        else:
            arrays[key] = _shaped(value, spec, inputs, name)
    counts = {key: len(value) for key, value in arrays.items()}
    if counts and min(counts.values()) == 0:
        raise DataError(f"{name} holds no samples: give at least two.")
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{key} {count}" for key, count in counts.items())
        raise DataError(f"{name} holds different numbers of samples ({listed}): give as many for each input.")
    fixed = {spec.shape[0] for spec in inputs if spec.name in arrays and isinstance(spec.shape[0], int)}
    batch = int(max((int(f) for f in fixed if f is not None), default=0)) or None
    count = min(counts.values(), default=1)
    take = count if limit is None else min(limit, count)
    if batch is not None and take % batch:
        take -= take % batch
        notes.append(f"The model takes batches of {batch}: {count - take} samples were left out.")
        if not take:
            raise DataError(f"{name} holds {count} samples but the model takes batches of {batch}: give more samples.")
    if labels is not None:
        labels = np.asarray(labels)
        labels = labels[:take] if len(labels) == count else labels
    return Samples({k: v[:take] for k, v in arrays.items()}, constants, labels, name, batch, tuple(notes))


def _batchless(spec: InputSpec, value: Values) -> bool:
    """Whether an input's first axis is no batch axis: one sample's worth, as the model states it, in full."""
    return len(spec.shape) > 1 and spec.shape[0] == value.shape[0] and isinstance(spec.shape[0], int) and spec.shape[0] > 1


def _shaped(value: Values, spec: InputSpec, inputs: Sequence[InputSpec], name: str) -> Values:
    fits = value.ndim == len(spec.shape) and all(
        not isinstance(want, int) or want == have for want, have in zip(spec.shape[1:], value.shape[1:], strict=True)
    )
    if not fits:
        raise DataError(
            f"{spec.name} in {name} has shape {list(value.shape)}; the model wants {_wants(inputs)} "
            "(first axis: samples): bring the samples to that shape."
        )
    return value


def _cast(value: Values, spec: InputSpec, name: str, notes: list[str]) -> Values:
    if value.dtype.kind in "OUSV" and value.dtype.name != spec.dtype and spec.dtype != "object":
        raise DataError(f"{spec.name} in {name} holds {value.dtype.name}, not numbers: give {spec.dtype}.")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise DataError(f"{spec.name} in {name} has NaN or infinite values: clean the samples first.")
    if value.dtype.name != spec.dtype and spec.dtype != "object":
        if value.dtype.kind == "f" and np.dtype(spec.dtype).kind in "iub" and not np.array_equal(value, np.round(value)):
            raise DataError(f"{spec.name} in {name} holds fractions but the model wants {spec.dtype}: check the order of inputs.")
        notes.append(f"{spec.name} was converted from {value.dtype.name} to {spec.dtype}.")
        value = value.astype(spec.dtype)
    return value


def _wants(inputs: Sequence[InputSpec]) -> str:
    listed = (f"{s.name} {s.dtype}[{', '.join('?' if d is None else str(d) for d in s.shape)}]" for s in inputs)
    return ", ".join(listed) or "no inputs"


def made_up(inputs: Sequence[InputSpec], size: int, count: int = 1, seed: int = 0) -> Samples:
    """Random samples, for shapes and timing only: ``size`` stands for every symbolic dimension but the first."""
    rng = np.random.default_rng(seed)
    arrays, constants = {}, {}
    fixed = next((s.shape[0] for s in inputs if s.shape and isinstance(s.shape[0], int)), None)
    for spec in inputs:
        first = (fixed or 1) * count
        shape = tuple(d if isinstance(d, int) else (first if i == 0 else size) for i, d in enumerate(spec.shape))
        if shape and isinstance(spec.shape[0], int):
            shape = (spec.shape[0] * count, *shape[1:])
        kind = np.dtype(spec.dtype).kind if spec.dtype != "object" else "O"
        value: Values
        if kind in "fV":
            value = rng.standard_normal(shape).astype(spec.dtype)
        elif kind == "O":
            value = np.full(shape, "a", dtype=object)
        else:
            value = np.ones(shape, dtype=spec.dtype)
        (arrays if shape else constants)[spec.name] = value
    return Samples(arrays, constants, None, "made-up data", int(fixed) if isinstance(fixed, int) else None)
