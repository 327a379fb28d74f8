"""Tensors as a model stores them: in the file itself, or in a data file beside it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from onnx_lrsd.errors import ModelError
from onnx_lrsd.scratch import Scratch, scratch_of

PACKED = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
"""Bits of the types whose values share bytes in a file."""
ASIDE_BYTES = 1 << 20
"""New weights from this size on are put aside, where there is a place for them."""
COPIED_AT_ONCE = 16 << 20
"""What is read of a data file at once to be written to another."""
PLAIN_KINDS = "fiu"
"""Kinds of NumPy's types that lie in a file as they do in memory."""


def tensor_values(tensor: onnx.TensorProto, folder: Path | None) -> npt.NDArray[Any]:
    """The values of ``tensor``, memory-mapped when they lie in a data file in ``folder``."""
    if not uses_external_data(tensor):
        return numpy_helper.to_array(tensor)
    values = content(tensor, folder)
    if _bits(tensor) % 8:
        packed = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=values.tobytes())
        return numpy_helper.to_array(packed)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return values.view(dtype).reshape(tuple(tensor.dims))


def dense_values(tensor: onnx.SparseTensorProto, folder: Path | None) -> npt.NDArray[Any]:
    """The values of a sparse ``tensor`` as a dense array."""
    values, places = tensor_values(tensor.values, folder), tensor_values(tensor.indices, folder)
    dense = np.zeros(list(tensor.dims), values.dtype)
    if places.ndim == 1:
        dense.reshape(-1)[places] = values
    else:
        dense[tuple(places.T)] = values
    return dense


def content(tensor: onnx.TensorProto, folder: Path | None) -> npt.NDArray[np.uint8]:
    """The values of ``tensor`` as a file holds them, mapped when they lie in one."""
    if uses_external_data(tensor):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        scratch = scratch_of(entries.get("location", ""))
        if scratch is not None:
            return scratch.mapped(int(entries["offset"]), (stored_bytes(tensor),), np.uint8)
        path, offset = located(tensor, folder)
        size = stored_bytes(tensor)
        return np.memmap(path, np.uint8, "r", offset, (size,)) if size else np.zeros(0, np.uint8)
    if not tensor.HasField("raw_data"):
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor))
    return np.frombuffer(tensor.raw_data, np.uint8)


def _bits(tensor: onnx.TensorProto) -> int:
    """Bits that one value takes in a file."""
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    return PACKED.get(name) or 8 * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes that the values take in a file."""
    return -(-math.prod(map(int, tensor.dims)) * _bits(tensor) // 8)


def is_whole(tensor: onnx.TensorProto) -> bool:
    """Whether ``tensor`` is of a known type and has the bytes of its shape, or says where they are."""
    if tensor.data_type not in onnx.TensorProto.DataType.values()[1:] or min(tensor.dims, default=0) < 0:
        return False
    if uses_external_data(tensor):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        return all(entries.get(key, "0").isdigit() for key in ("offset", "length"))
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data) == stored_bytes(tensor)
    if _bits(tensor) % 8:
        return True  # several values in one number
    numbers = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type)))
    parts = 2 if tensor.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128) else 1
    return bool(numbers == parts * math.prod(tensor.dims))


def located(tensor: onnx.TensorProto, folder: Path | None) -> tuple[Path, int]:
    """File and offset of external data, checked: inside the model's folder, there, and long enough."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if folder is None:
        raise ModelError("The model keeps weights in a data file: give its path instead of the loaded model.")
    path = folder / entries.get("location", "")
    inside = path.resolve().is_relative_to(folder.resolve())
    if not inside or os.path.isabs(entries.get("location", "")):
        raise ModelError(
            f"Tensor {tensor.name} points to a file outside the model's folder: refuse models like this."
        )
    if not path.is_file():
        raise ModelError(f"The data file {path} of the model is missing: put it beside the model.")
    offset = int(entries.get("offset", 0))
    if offset + stored_bytes(tensor) > path.stat().st_size:
        raise ModelError(f"The data file {path} is too short for tensor {tensor.name}: copy it again, whole.")
    return path, offset


def content_blocks(tensor: onnx.TensorProto, folder: Path | None) -> Iterator[bytes | memoryview]:
    """What ``content`` gives, some megabytes at a time; of a data file no more is in memory."""
    if not uses_external_data(tensor) or is_aside(tensor):
        yield content(tensor, folder).data
        return
    path, offset = located(tensor, folder)
    left = stored_bytes(tensor)
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(min(left, COPIED_AT_ONCE)):
            left -= len(block)
            yield block


def put_aside(name: str, values: npt.NDArray[Any], scratch: Scratch) -> onnx.TensorProto:
    """A tensor whose ``values`` lie in ``scratch``; it can be read as long as something refers to that."""
    stored = scratch.put(values)
    tensor = onnx.TensorProto(
        name=name,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(values.dtype),
        dims=values.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, entry in {"location": scratch.key, "offset": stored.offset, "length": stored.nbytes}.items():
        tensor.external_data.add(key=key, value=str(entry))
    return tensor


def is_aside(tensor: onnx.TensorProto) -> bool:
    """Whether the values of ``tensor`` were put aside by this process."""
    locations = (entry.value for entry in tensor.external_data if entry.key == "location")
    return any(scratch_of(location) is not None for location in locations)


def content_hash(proto: onnx.ModelProto, folder: Path | None) -> str:
    """A hash of all that a model holds, its data files in ``folder`` included: 32 hex digits."""
    hashed = blake2b(proto.SerializeToString(deterministic=True), digest_size=16)
    for tensor in stored_tensors(proto):
        if uses_external_data(tensor):
            hashed.update(content(tensor, folder).data)
    return hashed.hexdigest()


def embed(tensor: onnx.TensorProto, folder: Path | None) -> None:
    """Take the values of ``tensor`` out of its data file, if they lie in one."""
    if uses_external_data(tensor):
        tensor.raw_data = content(tensor, folder).tobytes()
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")


def stored_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor of the main graph and of the graphs inside its nodes."""
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        yield from graph.initializer
        for node in graph.node:
            yield from (a.t for a in node.attribute if a.HasField("t"))
            graphs.extend(subgraphs(node))


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs a node carries, such as the bodies of If and Loop."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
