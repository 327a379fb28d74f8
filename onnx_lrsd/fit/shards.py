"""A calibration in shards: each runs its share of the samples and writes the rows it took to one file.

Rows, not their moments: there are some thousands of a layer in all, whatever the samples, and a shard's part
of them takes less room than a matrix of moments. Put together in their order they are those of one run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from onnx_lrsd.data.readers import DAMAGE
from onnx_lrsd.data.samples import run_on
from onnx_lrsd.errors import DataError, OptionError
from onnx_lrsd.fit.sampling import GatheredRows, Sampling
from onnx_lrsd.graph.external_data import content_hash
from onnx_lrsd.graph.model import Model
from onnx_lrsd.types import Layer, Values
from onnx_lrsd.whole_files import written_whole
from onnx_lrsd.work_dir import hash_of

SHARD_FORMAT = 1
ABOUT, INPUTS, OUTPUTS = "about", "inputs", "outputs"
OTHER = {
    "format": "by another version of onnx-lrsd",
    "model": "of another model",
    "samples": "with other samples",
    "seed": "with another seed",
}
"""What a part may differ in, in the order in which it is told."""


class Shard(NamedTuple):
    """The ``number``-th of so many, from 1 on."""

    number: int
    of: int


def shard_of(text: str) -> Shard:
    """The shard that ``3/16`` names. Raises OptionError for what names none."""
    found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", str(text))
    shard = Shard(int(found[1]), int(found[2])) if found else Shard(0, 0)
    if not 1 <= shard.number <= shard.of:
        raise OptionError("{shard} is no part of a whole: write 3/16 for the third of sixteen.", shard=text)
    return shard


def facts_of(model: Model, sampling: Sampling) -> dict[str, Any]:
    """What the rows of all shards have in common, beside their layers."""
    return {
        "format": SHARD_FORMAT,
        "model": content_hash(model.proto, model.folder),
        "samples": hash_of(run_on(sampling.samples)),
        "seed": sampling.seed,
    }


def write_part(
    path: Path, shard: Shard, facts: Mapping[str, Any], sampling: Sampling, rows: Sequence[GatheredRows]
) -> None:
    """Write the rows of a shard, all or nothing. Raises DataError where that fails."""
    about = {
        **facts,
        "shard": shard,
        "quotas": {layer.output: _quota(sampling, layer) for layer, _, _ in rows},
    }
    arrays: dict[str, Values] = {ABOUT: np.frombuffer(json.dumps(about).encode(), np.uint8)}
    for index, (_, inputs, outputs) in enumerate(rows):
        arrays[f"{INPUTS}/{index}"] = inputs
        if outputs is not None:
            arrays[f"{OUTPUTS}/{index}"] = outputs
    try:
        with written_whole(path) as (file,):
            np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy's types know one option by name
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): choose another place.") from None


def _quota(sampling: Sampling, layer: Layer) -> str:
    """A hash of which rows of a layer are taken from which batches of samples."""
    return hash_of((sampling.quotas[layer.output], sampling.batch))


def part_files(given: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that a pattern, a path or a list of these names. Raises DataError where there is none."""
    patterns = [given] if isinstance(given, str | Path) else list(given)
    found = [Path(path) for pattern in patterns for path in sorted(glob(str(pattern)))]
    if not found:
        raise DataError(f"There is no file {', '.join(map(str, patterns))}: check the path of the parts.")
    return found


def gathered_rows(
    paths: Sequence[Path], facts: Mapping[str, Any], sampling: Sampling
) -> Iterator[GatheredRows]:
    """The rows of all shards, in the order of the samples.

    Raises DataError, before it gives any, for files that are damaged, of another model, samples or seed, or
    not all parts of one whole.
    """
    abouts = {path: _about(path) for path in paths}
    for path, about in abouts.items():
        for key, other in OTHER.items():
            if about.get(key) != facts[key]:
                raise DataError(f"{path} was made {other}: make all parts as optimize is run.")
        for layer in sampling.watched:
            if about["quotas"].get(layer.output) != _quota(sampling, layer):
                raise DataError(
                    f"{path} has no rows of {layer.name}: make the parts with the target, forms, layers and "
                    "plan that are asked for now."
                )
    by_number = {Shard(*about["shard"]): path for path, about in abouts.items()}
    whole = next(iter(by_number)).of
    if len(by_number) < len(paths) or {shard.of for shard in by_number} != {whole} or len(paths) != whole:
        held = ", ".join(f"{shard.number}/{shard.of}" for shard in sorted(by_number))
        raise DataError(f"The parts are not the {whole} of one whole but {held}: give each of them once.")
    for shard in sorted(by_number):
        yield from _rows(by_number[shard], abouts[by_number[shard]], sampling)


def _about(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as part:
            found = json.loads(part[ABOUT].tobytes())
        Shard(*found["shard"]), found["quotas"].get("")
    except (*DAMAGE, TypeError, AttributeError):
        raise _damaged(path) from None
    return dict(found)


def _rows(path: Path, about: Mapping[str, Any], sampling: Sampling) -> Iterator[GatheredRows]:
    places = {name: index for index, name in enumerate(about["quotas"])}
    fetched = sampling.fetched
    try:
        with np.load(path, allow_pickle=False) as part:
            for layer in sampling.watched:
                place = places[layer.output]
                outputs = part[f"{OUTPUTS}/{place}"] if layer.output in fetched else None
                yield GatheredRows(layer, part[f"{INPUTS}/{place}"], outputs)
    except (*DAMAGE, TypeError):
        raise _damaged(path) from None


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is no whole part that onnx-lrsd calibrate wrote: make it again.")
