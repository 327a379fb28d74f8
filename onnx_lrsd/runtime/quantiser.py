"""ONNX Runtime's quantiser, and what this processor does to sums of int8 products."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_lrsd.runtime.session import onnxruntime, open_session

WARNINGS, ERRORS_ONLY = 2, 3
"""ONNX Runtime's levels of logging; the first is its default."""


@contextmanager
def quantization() -> Iterator[ModuleType]:
    """ONNX Runtime's quantiser, its warnings to developers kept from the user while it works."""
    ort, level = onnxruntime(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    ort.set_default_logger_severity(ERRORS_ONLY)
    try:
        yield importlib.import_module("onnxruntime.quantization")
    finally:
        ort.set_default_logger_severity(WARNINGS)
        logging.disable(level)


@cache
def saturates() -> bool:
    """Whether sums of two products uint8 x int8 are cut off at 16 bits here, as without VNNI they are."""
    weight = numpy_helper.from_array(np.full((32, 16), 127, np.int8), "w")
    graph = onnx.parser.parse_graph("g (uint8[1, 32] x) => (int32[1, 16] y) { y = MatMulInteger (x, w) }")
    graph.initializer.append(weight)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    found = open_session(proto).run({"x": np.full((1, 32), 255, np.uint8)})["y"]
    return bool(np.any(found != 255 * 127 * 32))
