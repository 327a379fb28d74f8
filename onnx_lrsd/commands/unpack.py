"""Back to a plain dense model, for runtimes and tools that do not fold constants."""

from __future__ import annotations

from pathlib import Path

import onnx

from onnx_lrsd.errors import UnsupportedModelError
from onnx_lrsd.graph.model import Model, check, load
from onnx_lrsd.passes.unpack import coded_weights, replace_coded_weights
from onnx_lrsd.runtime.session import open_session


def unpack(model: str | Path | onnx.ModelProto) -> Model:
    """``model``, which the target size wrote, with its weights decoded; all else stays as it is.

    Raises UnsupportedModelError where no weight is in codes.
    """
    source = load(model)
    names = coded_weights(source.proto)
    if not names:
        raise UnsupportedModelError("The model has no weights in codes: it can be used as it is.")
    weights = open_session(source.proto, folder=source.folder, outputs=names).run({})
    graph = source.graph()
    replace_coded_weights(graph, weights)
    plain = source.splice(graph)
    check(plain, source)
    return plain
