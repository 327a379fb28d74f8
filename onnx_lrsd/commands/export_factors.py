"""The factors of a written model as plain tensors, for those who go on training."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from onnx_lrsd.errors import DeviceError, LrsdError
from onnx_lrsd.facts import Report
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.subgraph import reads
from onnx_lrsd.passes.unpack import coded_weights
from onnx_lrsd.passes.writer import PART
from onnx_lrsd.report.forms import form_of
from onnx_lrsd.whole_files import written_whole

TENSORS, INDEX = "factors.safetensors", "index.json"


def export_factors(model: Model, report: Report, folder: Path) -> int:
    """Write the factors of ``model``, which ``report`` is about, into ``folder``; how many layers have some.

    ``factors.safetensors`` has the tensors under the names they have in the model, so that trained ones can
    be put back; ``index.json`` says layer by layer which one is V, U, S, its channels or the bias, and how
    nodes apply them. A weight that was refitted and stayed dense is there as well. Raises DeviceError where
    safetensors is not installed, LrsdError for a model whose weights are in codes or int8.
    """
    if coded_weights(model.proto) or any(
        node.op_type == "DequantizeLinear" for node in model.proto.graph.node
    ):
        raise LrsdError("The factors are stored in codes or int8: export those of a model in float.")
    initializers = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    tensors = dict[str, npt.NDArray[Any]]()
    layers = []
    for layer in report.layers:
        nodes = [node for node in model.proto.graph.node if node.name.rpartition(PART)[0] == layer.name]
        if not layer.output or not nodes:
            continue
        factors = dict[str, str]()
        for node in nodes:
            for name in reads(node):
                if name in initializers:
                    factors[_role(name)] = name
                    tensors[name] = _array(initializers[name], model.folder)
        layers.append(
            {
                "name": layer.name,
                "output": layer.output,
                "op": layer.op,
                "form": form_of(layer),
                "shape": list(layer.shape),
                "error": layer.error,
                "factors": factors,
                "nodes": [_node(node) for node in nodes],
            }
        )
    index = {
        "schema": 1,
        "model": report.input,
        "written": report.output,
        "tensors": TENSORS,
        "layers": layers,
    }
    said = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    packed = _safetensors().save(tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / TENSORS, folder / INDEX) as (one, other):
            one.write(packed)
            other.write(said.encode())
    except OSError as error:
        raise LrsdError(f"{folder} cannot be written to ({error.strerror}): choose another place.") from None
    return len(layers)


def _role(name: str) -> str:
    """What a tensor is to its layer: V, core, U, S, channels, bias, or the weight that was refitted."""
    part = name.rpartition(PART)[2].split("_")
    role = "channels" if part[:2] == ["S", "channels"] else part[0]
    return "weight" if role == "refitted" else role


def _array(tensor: onnx.TensorProto, folder: Path | None) -> npt.NDArray[Any]:
    return np.ascontiguousarray(numpy_helper.to_array(tensor, base_dir=str(folder or "")))


def _node(node: onnx.NodeProto) -> Mapping[str, Any]:
    said: dict[str, Any] = {}
    for entry in node.attribute:
        value = helper.get_attribute_value(entry)
        said[entry.name] = value.decode() if isinstance(value, bytes) else value
    return {
        "name": node.name,
        "op": node.op_type,
        "inputs": list(node.input),
        "outputs": list(node.output),
        "attributes": said,
    }


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError as error:
        raise DeviceError("safetensors is not installed: pip install onnx-lrsd[factors].") from error
