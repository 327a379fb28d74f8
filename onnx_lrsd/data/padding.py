"""Positions that only fill samples up to one length, where they are known not to matter.

Token models are fed batches padded to the longest text, and the input ``attention_mask`` says what is real.
What such a model computes at padding reaches no other position, and nobody reads it; often it is more
than half of all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from onnx_lrsd.data.input_layout import Slot
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.graph.model import Model
from onnx_lrsd.runtime.divergence import Divergence
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.types import Values

NAMES = ("attention_mask", "input_mask")
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
    name = _mask(samples) if samples.mask is None else None
    if name is None:
        return samples
    found = replace(samples, mask=name)
    said = f"{name} marks {1 - found.filled:.0%} of the positions in {samples.source} as padding"
    if not _follows(model, samples, name):
        note = f"{said}, but the outputs are not seen to be free of it: it counts as well."
        return replace(samples, notes=(*samples.notes, note))
    note = f"{said}: what is there counts neither in the fit nor in the errors of outputs."
    return replace(found, notes=(*samples.notes, note))


def _mask(samples: Samples) -> str | None:
    """The one input that marks padding and finds some; None beside a decoder, whose positions are others."""
    named = [name for name in samples.arrays if name.split(":")[0].lower() in NAMES]
    if len(named) != 1 or samples.slots.get(named[0], Slot()).axis != 0:
        return None
    if any("decoder" in name for name in samples.arrays):
        return None
    values = samples.arrays[named[0]]
    if values.ndim != 2 or values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        return None
    return named[0] if 0 < np.mean(values) < 1 else None


def _follows(model: Model, samples: Samples, mask: str) -> bool:
    """Whether the most padded batch gives the same with other content at its padding."""
    size = samples.smallest_batch
    starts = range(0, samples.count - size + 1, size)
    start = min(starts, key=lambda start: float(np.mean(samples.arrays[mask][start : start + size])))
    feed = next(samples.take(slice(start, start + size)).batches(size))
    real = feed[mask] != 0
    other = {name: value if name == mask else _refilled(value, real) for name, value in feed.items()}
    if all(np.array_equal(other[name], feed[name]) for name in feed):
        return False
    session = open_session(model.proto, folder=model.folder)
    return all(
        _distance(before, after, real) < UNMOVED
        for before, after in zip(session.run(feed).values(), session.run(other).values(), strict=True)
    )


def _refilled(values: Values, real: Values) -> Values:
    """``values`` (samples, positions, ...) with what is first real of each sample at its padding."""
    if values.shape[: real.ndim] != real.shape:
        return values
    first = values[np.arange(len(values)), real.argmax(axis=1)][:, None]
    return np.where(real.reshape(*real.shape, *[1] * (values.ndim - real.ndim)), values, first)


def _distance(before: Any, after: Any, real: Values) -> float:
    error = Divergence()
    error.add(before, after, real)
    return error.relative()
