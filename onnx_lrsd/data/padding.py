"""Padding: positions that only fill samples up to one length.

Token models are fed batches padded to the longest text, and the input ``attention_mask`` says what is real.
What such a model computes at padding reaches no other position, and nobody reads it; often it is more
than half of all. A model without a mask may turn padding to NaN: then its samples must not be padded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from onnx_lrsd.data.input_layout import Slot
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.graph.model import Model
from onnx_lrsd.runtime.divergence import Divergence
from onnx_lrsd.runtime.session import Session, open_model
from onnx_lrsd.types import Feed, Values

MASK_NAMES = ("attention_mask", "input_mask")
"""Inputs that are 0 at padding, as exporters of PyTorch and TensorFlow name them."""
UNMOVED = 1e-6
"""Relative error below which outputs count as unchanged."""


def without_padding(model: Model, samples: Samples) -> Samples:
    """``samples`` that know which of their positions are padding; as they were where none is.

    The mask is believed only where the model follows it: other content at padding must leave each output
    as it was, or as it was at the positions that are real. A note says what was found. ``optimize`` asks this
    of what it is given; who calls its stages one by one asks first.

    >>> import numpy as np, onnx, onnx_lrsd
    >>> from onnx_lrsd.graph.subgraph import inputs_of
    >>> text = "(int64[n, 3] ids, int64[n, 3] attention_mask) => (float[n, 3, 2] y) { y = Gather (w, ids) }"
    >>> graph = onnx.parser.parse_graph(f"g {text}")
    >>> graph.initializer.extend([onnx.numpy_helper.from_array(np.eye(9, 2, dtype=np.float32), "w")])
    >>> opset = onnx.helper.make_opsetid("", 17)
    >>> model = onnx_lrsd.load(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8))
    >>> feed = {"ids": np.array([[1, 2, 3], [1, 0, 0]]), "attention_mask": np.array([[1, 1, 1], [1, 0, 0]])}
    >>> samples = onnx_lrsd.read_samples(feed, inputs_of(model.proto))
    >>> onnx_lrsd.without_padding(model, samples).notes[-1][:63]
    'attention_mask marks 33% of the positions in the given data as '
    """
    if samples.mask is not None:
        return samples
    name = _mask(samples)
    if name is None:
        return replace(samples, notes=(*samples.notes, *_turned_to_nan(model, samples)))
    found = replace(samples, mask=name)
    said = f"{name} marks {1 - found.filled:.0%} of the positions in {samples.source} as padding"
    if not _follows(model, samples, name):
        note = f"{said}, but the outputs are not seen to be free of it: it counts as well."
        return replace(samples, notes=(*samples.notes, note))
    note = f"{said}: what is there counts neither in the fit nor in the errors of outputs."
    return replace(found, notes=(*samples.notes, note))


def _mask(samples: Samples) -> str | None:
    """The one input that marks padding and finds some; None beside a decoder, whose positions are others."""
    named = [name for name in samples.inputs if name.split(":")[0].lower() in MASK_NAMES]
    if len(named) != 1 or samples.slots.get(named[0], Slot()).axis != 0:
        return None
    if any("decoder" in name for name in samples.inputs):
        return None
    masks = [group[named[0]] for group in samples.groups]
    if any(
        mask.ndim != 2 or mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all() for mask in masks
    ):
        return None
    padded = any((mask == 0).any() for mask in masks) and any((mask != 0).any() for mask in masks)
    return named[0] if padded else None


def _follows(model: Model, samples: Samples, mask: str) -> bool:
    """Whether the most padded batch gives the same with other content at its padding."""
    feed = min(samples.batches(samples.smallest_batch), key=lambda feed: float(np.mean(feed[mask] != 0)))
    real = feed[mask] != 0
    other = {name: value if name == mask else _refilled(value, real) for name, value in feed.items()}
    if all(np.array_equal(other[name], feed[name]) for name in feed):
        return False
    session = open_model(model)
    return all(
        _distance(before, after, real) < UNMOVED
        for before, after in zip(session.run(feed).values(), session.run(other).values(), strict=True)
    )


def _turned_to_nan(model: Model, samples: Samples) -> list[str]:
    """What to do, where padding makes outputs of the model NaN; empty where it does not.

    Padding is what may be cut off the end of the most padded batch so that its outputs are finite.
    """
    if not any(_ids(value) for value in samples.example().values()):
        return []
    feed = max(samples.batches(samples.smallest_batch), key=_unused)
    unused = _unused(feed)
    if not unused:
        return []
    length = next(value.shape[1] for value in feed.values() if _ids(value))
    cut = {name: _cut(value, length, length - unused) for name, value in feed.items()}
    try:
        session = open_model(model)
        spoiled = _nan_output(session, feed)
        if spoiled is None or _nan_output(session, cut) is not None:
            return []
    except LrsdError:  # it takes one length only, or the run fails, which is reported where samples are used
        return []
    return [
        f"Padding in {samples.source} turns the output {spoiled} to NaN, and such values are left out: give "
        "each sample at its own length, as files of a folder or a list of arrays."
    ]


def _ids(value: Values) -> bool:
    """Whether an input holds (samples, positions) of whole numbers."""
    return value.ndim == 2 and value.dtype.kind in "iu"


def _unused(feed: Feed) -> int:
    """Positions at the end where all inputs of ids are 0 in all samples of the feed; some are always left."""
    ids = [value for value in feed.values() if _ids(value)]
    if len({value.shape for value in ids}) != 1 or not ids[0].size:
        return 0
    used = np.flatnonzero(np.any([(value != 0).any(axis=0) for value in ids], axis=0))
    return ids[0].shape[1] - 1 - int(used[-1]) if len(used) else 0


def _cut(value: Values, length: int, kept: int) -> Values:
    """``value`` with the first ``kept`` entries of every axis but the first that has this ``length``."""
    ends = [slice(kept if size == length and axis else size) for axis, size in enumerate(value.shape)]
    return np.ascontiguousarray(value[tuple(ends)])


def _nan_output(session: Session, feed: Feed) -> str | None:
    """The first output that is not finite everywhere."""
    for name, output in session.run(feed).items():
        if isinstance(output, np.ndarray) and output.dtype.kind == "f" and not np.isfinite(output).all():
            return name
    return None


def _refilled(values: Values, real: Values) -> Values:
    """``values`` (samples, positions, ...) with each sample's first real entry at its padding."""
    if values.shape[: real.ndim] != real.shape:
        return values
    first = values[np.arange(len(values)), real.argmax(axis=1)][:, None]
    return np.where(real.reshape(*real.shape, *[1] * (values.ndim - real.ndim)), values, first)


def _distance(before: Any, after: Any, real: Values) -> float:
    error = Divergence()
    error.add(before, after, real)
    return error.relative()
