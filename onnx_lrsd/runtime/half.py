"""Half precision by ONNX Runtime's converter: what an engine with strong typing takes from the file."""

from __future__ import annotations

import importlib

import onnx

from onnx_lrsd.errors import ModelError
from onnx_lrsd.runtime.session import gist, onnxruntime


def to_float16(proto: onnx.ModelProto) -> onnx.ModelProto:
    """``proto``, which holds all its weights and is changed, with float16 in place of float32 inside.

    Inputs and outputs stay float32, behind a Cast. Operators that ONNX Runtime's converter lists as
    unfit for half precision stay as well. Raises ModelError where it cannot convert the model.
    """
    onnxruntime()
    try:
        half = importlib.import_module("onnxruntime.transformers.float16")
        found: onnx.ModelProto = half.convert_float_to_float16(proto, keep_io_types=True)
        importlib.import_module("onnxruntime.quantization").onnx_model.ONNXModel(found).topological_sort()
    except Exception as error:  # it raises what its parts raise
        raise ModelError(
            f"ONNX Runtime cannot write the model in half precision ({gist(error)}): leave out --precision."
        ) from error
    return found
