"""Prepared models: a folder with a model and its samples, and how the model is scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lrsd.data.padding import without_padding
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.types import Score

Values = npt.NDArray[Any]
TOP1, SPEARMAN = "top1", "spearman"


@dataclass(frozen=True)
class Prepared:
    """What a folder holds. ``labels`` belong to ``evaluation``, which has them itself where top-1 counts.

    ``output`` is the one that is scored.
    """

    folder: Path
    scored_by: str
    source: Model = field(repr=False)
    calibration: Samples = field(repr=False)
    evaluation: Samples = field(repr=False)
    labels: Values = field(repr=False)
    output: str = ""

    @property
    def name(self) -> str:
        """What tables call the model."""
        return self.folder.name

    @property
    def model(self) -> Path:
        """The file of the model."""
        return self.folder / "model.onnx"

    @cached_property
    def score_before(self) -> float:
        """Score of the original."""
        return self.score(self.source)

    def score(self, model: Model) -> float:
        """Score of ``model`` on the evaluation samples."""
        return score(self.scored_by, outputs(model, self.evaluation, self.output), self.labels)


def read(folder: Path, limit: int | None = None) -> Prepared:
    """The model of a folder with its samples, ``limit`` for calibration at most."""
    source = load(folder / "model.onnx")
    inputs, (scored_by, output) = inputs_of(source.proto), score_of(folder, source)
    with np.load(folder / "eval.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    labels = arrays["labels"] if scored_by == TOP1 else arrays.pop("labels")
    return Prepared(
        folder=folder,
        scored_by=scored_by,
        source=source,
        calibration=read_samples(folder / "calib.npz", inputs, limit=limit),
        evaluation=without_padding(source, read_samples(arrays, inputs)),
        labels=labels,
        output=output,
    )


def score_of(folder: Path, source: Model) -> tuple[str, str]:
    """How a folder's model is scored, 'top1' or what its about.json says, and by which of its outputs."""
    about = folder / "about.json"
    said = json.loads(about.read_text()) if about.exists() else {}
    names = [output.name for output in source.proto.graph.output]
    return str(said.get("score", TOP1)), said["output"] if said.get("output") in names else names[0]


def outputs(model: Model, samples: Samples, name: str = "") -> Values:
    """The output ``name``, or the first, over all samples (N, n); embeddings of tokens are averaged."""
    session = open_session(model.proto, folder=model.folder)
    parts = []
    for feed in samples.batches(samples.batch_size(1 << 22, 1 << 25)):
        value = pooled(session.run(feed)[name or session.outputs[0]], feed)
        parts.append(value.reshape(len(value), -1))
    return np.concatenate(parts)


def pooled(value: Values, inputs: Mapping[str, Values]) -> Values:
    """Embeddings of tokens (samples, tokens, n) averaged over the attention mask; anything else as it is."""
    if value.ndim != 3 or "attention_mask" not in inputs:
        return value
    mask = inputs["attention_mask"][..., None].astype(np.float32)
    return np.asarray((value * mask).sum(axis=1) / np.maximum(mask.sum(axis=1), 1e-9))


def score(scored_by: str, values: Values, labels: Values) -> float:
    """Top-1, or Spearman's rank correlation of the cosine of pairs with their labels."""
    if scored_by == TOP1:
        return float(np.mean(values.argmax(axis=1) == labels))
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    cosine = np.sum(unit[0::2] * unit[1::2], axis=1)
    return float(np.corrcoef(ranks(cosine), ranks(labels))[0, 1])


def spearman_of(output: str) -> Score:
    """Spearman's correlation of sentences, by this output, as a metric of the tool."""

    def spearman(values: dict[str, Values], labels: Values, inputs: dict[str, Values]) -> float:
        return score(SPEARMAN, pooled(values[output], inputs), labels)

    return spearman


def ranks(values: Values) -> Values:
    """Ranks of ``values``, ties at their mean."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    end = np.cumsum(count)
    return np.asarray(((end - count + end - 1) / 2)[inverse])
