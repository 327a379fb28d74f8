"""An ONNX file: load, edit through graphsurgeon, splice the edit back, save.

The ModelProto is the truth and graphsurgeon's graph a working copy: a round trip through
graphsurgeon loses metadata, annotations and more. ``splice`` therefore writes back only the nodes
that changed; every other byte of the model stays as it was.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError, EncodeError
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from onnx_lrsd.errors import ModelError, VerificationError
from onnx_lrsd.graph.external_data import (
    ASIDE_BYTES,
    PLAIN_KINDS,
    content_blocks,
    dense_values,
    embed,
    is_aside,
    is_whole,
    located,
    put_aside,
    stored_bytes,
    stored_tensors,
    subgraphs,
    tensor_values,
)
from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.scratch import Scratch
from onnx_lrsd.whole_files import PROTOBUF_LIMIT, try_folder, written_whole
from onnx_lrsd.wording import counted

G_LOGGER.severity = G_LOGGER.CRITICAL + 1  # it logs to stdout, which belongs to the user

EXTERNAL_THRESHOLD = 1024
ALIGNMENT, SMALL_ALIGNMENT, ALIGNED_FROM = 4096, 16, 1 << 20
"""Where tensors start in a data file: those from this many bytes on can be mapped by themselves."""
REFERENCE_BYTES = 46
"""What a file holds of where the data of a tensor lie, at least, but for the digits of two numbers."""
DEFAULTS_FROM = 4
"""IR version from which an initializer among the inputs is a default; before every one had to be there."""
HALF_PIXELS_FROM, LAST_AXIS_FROM = 11, 13
"""Opsets from which Resize has other defaults, and from which the axis of Hardmax stands for itself alone."""
EDITED = ("node", "initializer", "sparse_initializer", "input", "value_info", "quantization_annotation")
"""Fields of a graph that a splice writes anew."""
ATTRIBUTE_FIELDS = {
    onnx.AttributeProto.FLOAT: "f",
    onnx.AttributeProto.INT: "i",
    onnx.AttributeProto.STRING: "s",
    onnx.AttributeProto.TENSOR: "t",
    onnx.AttributeProto.GRAPH: "g",
    onnx.AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    onnx.AttributeProto.TYPE_PROTO: "tp",
    onnx.AttributeProto.FLOATS: "floats",
    onnx.AttributeProto.INTS: "ints",
    onnx.AttributeProto.STRINGS: "strings",
    onnx.AttributeProto.TENSORS: "tensors",
    onnx.AttributeProto.GRAPHS: "graphs",
    onnx.AttributeProto.SPARSE_TENSORS: "sparse_tensors",
    onnx.AttributeProto.TYPE_PROTOS: "type_protos",
}
"""Where an attribute of each type has its values."""
DESCRIPTION = ("name", "data_type", "dims", "doc_string", "metadata_props")
"""What a tensor says of its values."""


@dataclass(frozen=True)
class Model:
    """A loaded model. ``path`` is where it came from (None: memory); ``external``: it has data files.

    ``device`` is where ONNX Runtime runs it: 'cpu' or 'cuda'. A session of it holds weights of at most
    ``most_bytes``, and as many bytes of activations are kept between two runs; None is no bound. Large
    weights that an edit adds are put ``aside``, where there is a place, as long as this model is there.
    """

    proto: onnx.ModelProto
    path: Path | None = None
    external: bool = False
    device: str = "cpu"
    most_bytes: int | None = None
    aside: Scratch | None = None

    @property
    def parted(self) -> bool:
        """Whether its weights are more than one session may hold."""
        return self.most_bytes is not None and weight_bytes(self.proto) > self.most_bytes

    @property
    def folder(self) -> Path | None:
        """Where the model's external data lies."""
        return self.path.parent if self.path is not None and self.external else None

    def graph(self) -> WorkingGraph:
        """A working copy for passes. Weights are read when they are asked for, from disk if external.

        Raises ModelError for a graph that graphsurgeon cannot read.
        """
        try:
            graph = gs.import_onnx(_importable(self.proto))
        except Exception as error:  # it raises KeyError and more for what a damaged file says
            raise ModelError(
                f"The graph of the model is damaged ({type(error).__name__}: {error}): export it again."
            ) from error
        for tensor in graph.tensors().values():
            values = getattr(tensor, "_values", None)
            if isinstance(values, SparseValues):
                tensor._values = _Sparse(values.tensor, self.folder)
            elif isinstance(values, LazyValues):
                tensor._values = _Mapped(values.tensor, self.folder)
        pairs = zip(graph.nodes, self.proto.graph.node, strict=True)
        listed = frozenset(value.name for value in self.proto.graph.input)
        overridable = listed if self.proto.ir_version >= DEFAULTS_FROM else frozenset[str]()
        return WorkingGraph(graph, overridable, {id(node): (node, proto) for node, proto in pairs})

    def splice(self, working: WorkingGraph) -> Model:
        """This model with the edits made to ``working``; a node that did not change keeps its bytes."""
        self.put_aside(working)
        nodes: list[onnx.NodeProto] = []
        replaced: dict[str, onnx.NodeProto] = {}
        for node in self.proto.graph.node:
            replaced.update((name, node) for name in node.output if name)
        for node in working.nodes:
            _, origin = working.origins.get(id(node), (node, None))
            if origin is not None and _same_ends(node, origin):
                nodes.append(origin)
                continue
            nodes.append(gs.exporters.onnx_exporter.OnnxExporter.export_node(node))
            for name in nodes[-1].output:
                if name in replaced and replaced[name].op_type == node.op:
                    nodes[-1].doc_string = replaced[name].doc_string
                    nodes[-1].metadata_props.extend(replaced[name].metadata_props)
        proto = onnx.ModelProto()
        for descriptor, value in self.proto.ListFields():
            if descriptor.name != "graph":
                _assign(proto, descriptor, value)
        for descriptor, value in self.proto.graph.ListFields():
            if descriptor.name not in EDITED:
                _assign(proto.graph, descriptor, value)
        proto.graph.node.extend(nodes)
        self._splice_tensors(working, proto)
        proto.graph.SetInParent()
        return replace(self, proto=proto, external=self.external or self.aside is not None)

    def put_aside(self, working: WorkingGraph) -> None:
        """Put large constants that were added to ``working`` aside, where there is a place for them."""
        if self.aside is None or self.proto.ir_version < DEFAULTS_FROM:  # such a file lists all as inputs
            return
        known = {tensor.name for tensor in self.proto.graph.initializer}
        for name, tensor in working.tensors().items():
            values = getattr(tensor, "_values", None)
            if name in known or not isinstance(values, np.ndarray) or values.dtype.kind not in PLAIN_KINDS:
                continue
            if values.nbytes >= ASIDE_BYTES:
                tensor._values = _Mapped(put_aside(name, values, self.aside), self.folder)

    def _splice_tensors(self, working: WorkingGraph, proto: onnx.ModelProto) -> None:
        """Initializers, value_info and annotations: add what is new, drop what this edit orphaned."""
        before, after = self.proto.graph, proto.graph
        # A constant that nodes compute from now on keeps its name, and is no longer stored.
        computed = {name for node in after.node for name in node.output}
        used_before, used = _used(before), _used(after) - computed
        known = {tensor.name for tensor in before.initializer}
        known |= {tensor.values.name for tensor in before.sparse_initializer}
        # A default is part of the interface even when nothing reads it any more.
        listing = self.proto.ir_version < DEFAULTS_FROM
        kept = used if listing else used | {value.name for value in before.input}
        after.initializer.extend(
            tensor for tensor in before.initializer if tensor.name in kept or tensor.name not in used_before
        )
        after.sparse_initializer.extend(
            sparse
            for sparse in before.sparse_initializer
            if sparse.values.name in kept or sparse.values.name not in used_before
        )
        dropped = {t.name for t in before.initializer} - {t.name for t in after.initializer}
        after.input.extend(value for value in before.input if value.name not in dropped)
        for name, tensor in working.tensors().items():
            if isinstance(tensor, gs.Constant) and name not in known and name in used:
                values = _stored(name, tensor)
                after.initializer.append(values)
                if listing:
                    after.input.append(
                        onnx.helper.make_tensor_value_info(name, values.data_type, values.dims)
                    )
        gone = _named(before) - _named(after)
        tensors = working.tensors()
        after.value_info.extend(
            _resized(value, tensors.get(value.name)) for value in before.value_info if value.name not in gone
        )
        after.quantization_annotation.extend(
            note for note in before.quantization_annotation if note.tensor_name not in gone
        )


class _Mapped(LazyValues):  # type: ignore[misc]  # graphsurgeon has no types
    """Values of a tensor, from memory or mapped from the model's own data file."""

    def __init__(self, tensor: onnx.TensorProto, folder: Path | None) -> None:
        self.tensor, self.folder = tensor, folder
        self.shape = list(tensor.dims)
        self.dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        self.nbytes = math.prod(tensor.dims) * self.dtype.itemsize

    def load(self) -> npt.NDArray[Any]:
        return tensor_values(self.tensor, self.folder)


class _Sparse(_Mapped):
    """Values of a sparse tensor as a dense array; graphsurgeon's own does not read raw data."""

    def __init__(self, tensor: onnx.SparseTensorProto, folder: Path | None) -> None:
        super().__init__(tensor.values, folder)
        self._sparse, self.shape = tensor, list(tensor.dims)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> npt.NDArray[Any]:
        return dense_values(self._sparse, self.folder)


def _stored(name: str, tensor: gs.Constant) -> onnx.TensorProto:
    """A constant that an edit has added, as a model stores it."""
    lazy = tensor._values
    if isinstance(lazy, _Mapped) and is_aside(lazy.tensor):
        return lazy.tensor
    return numpy_helper.from_array(np.asarray(tensor.values), name)


def _importable(proto: onnx.ModelProto) -> onnx.ModelProto:
    """``proto`` itself, or a copy with plain types where graphsurgeon cannot read the output's type."""
    odd = [i for i, o in enumerate(proto.graph.output) if not o.type.HasField("tensor_type")]
    if not odd:
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for index in odd:
        copy.graph.output[index].type.CopyFrom(
            onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
        )
    return copy


def _same_ends(node: gs.Node, origin: onnx.NodeProto) -> bool:
    """Whether ``node`` reads and gives what it did before."""
    inputs, outputs = ([tensor.name for tensor in side] for side in (node.inputs, node.outputs))
    return inputs == list(origin.input) and outputs == list(origin.output)


def _resized(value: onnx.ValueInfoProto, tensor: gs.Tensor | None) -> onnx.ValueInfoProto:
    """``value`` itself, or with the sizes that the edit gave ``tensor``."""
    dims = value.type.tensor_type.shape.dim
    if tensor is None or isinstance(tensor, gs.Constant) or tensor.shape is None:
        return value
    shape = list(tensor.shape)
    if all(not dim.HasField("dim_value") or dim.dim_value == n for dim, n in zip(dims, shape, strict=True)):
        return value
    changed = onnx.ValueInfoProto()
    changed.CopyFrom(value)
    for dim, size in zip(changed.type.tensor_type.shape.dim, shape, strict=True):
        if dim.HasField("dim_value"):
            dim.dim_value = size
    return changed


def _assign(message: Any, descriptor: Any, value: Any) -> None:
    if descriptor.is_repeated:
        getattr(message, descriptor.name).extend(value)
    elif descriptor.message_type is not None:
        getattr(message, descriptor.name).CopyFrom(value)
    else:
        setattr(message, descriptor.name, value)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from _nodes(inner)


def _used(graph: onnx.GraphProto) -> set[str]:
    """Names that some node or output reads, subgraphs included."""
    names = {output.name for output in graph.output}
    for node in _nodes(graph):
        names.update(node.input)
        for inner in subgraphs(node):
            names.update(output.name for output in inner.output)
    return names


def _named(graph: onnx.GraphProto) -> set[str]:
    names = _used(graph) | {value.name for value in graph.input} | {t.name for t in graph.initializer}
    for node in graph.node:
        names.update(node.output)
    return names


def load(source: str | Path | onnx.ModelProto) -> Model:
    """Load a model; its external data stays on disk. A ModelProto is copied.

    Raises ModelError when there is no such file, or it is not a whole ONNX model.

    >>> import onnx, onnx_lrsd
    >>> graph = onnx.parser.parse_graph("g (float[n, 8] x) => (float[n, 8] y) { y = Relu (x) }")
    >>> model = onnx_lrsd.load(onnx.helper.make_model(graph))
    >>> model.proto.graph.node[0].op_type, model.path, model.external
    ('Relu', None, False)
    >>> onnx_lrsd.load("nowhere.onnx")
    Traceback (most recent call last):
    onnx_lrsd.errors.ModelError: There is no file nowhere.onnx: check the path.
    """
    if isinstance(source, onnx.ModelProto):
        proto, path = onnx.ModelProto(), None
        proto.CopyFrom(source)
        name = "The model"
    else:
        path = Path(source)
        name = str(path)
        proto = _read(path)
    if not proto.ir_version or not proto.graph.node or not (proto.opset_import or proto.ir_version < 3):
        raise ModelError(f"{name} holds no ONNX graph: give a model as an exporter wrote it.")
    _must_be_sound(proto, name)
    stored = list(stored_tensors(proto))
    external = any(uses_external_data(tensor) for tensor in stored)
    for tensor in stored:
        if uses_external_data(tensor):
            located(tensor, path.parent if path is not None else None)
    return Model(proto, path, external)


def _must_be_sound(proto: onnx.ModelProto, name: str) -> None:
    """Raise ModelError for what no exporter writes and no later stage should have to reckon with."""
    given = {value.name for value in proto.graph.input} | {t.name for t in proto.graph.initializer}
    given |= {sparse.values.name for sparse in proto.graph.sparse_initializer}
    given |= {output for node in proto.graph.node for output in node.output}
    for output in proto.graph.output:
        if output.name not in given:
            raise ModelError(f"Output {output.name} of {name} is given by no node: export the model again.")
    for tensor in stored_tensors(proto):
        if not is_whole(tensor):
            raise ModelError(f"Tensor {tensor.name} of {name} is damaged: export or copy the model again.")
    opset = _opset(proto)
    for node in proto.graph.node:
        if len(node.input) < (fewest := _fewest_inputs(node, opset)):
            raise ModelError(
                f"Node {node.name or node.op_type} of {name} reads {len(node.input)} of the "
                f"{counted(fewest, 'input')} that {node.op_type} has: export the model again."
            )
        if node.domain in ("", "ai.onnx") and not any(node.output):
            raise ModelError(
                f"Node {node.name or node.op_type} of {name} gives nothing: export the model again."
            )
        # ONNX Runtime opens the model where no output depends on such a node, and drops the node.
        missing = [read for read in node.input if read and read not in given]
        if missing:
            raise ModelError(
                f"Node {node.name or node.op_type} of {name} reads {missing[0]}, which nothing gives: "
                "export the model again."
            )
        for attribute in node.attribute:
            if not _of_its_type(attribute):
                raise ModelError(
                    f"Attribute {attribute.name} of {node.name or node.op_type} in {name} is damaged: "
                    "export or copy the model again."
                )


def _opset(proto: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a model imports."""
    return max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=1)


def _fewest_inputs(node: onnx.NodeProto, opset: int) -> int:
    """How many inputs a node of ONNX's own operators must have; 0 for others."""
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
        return 0
    try:
        known = min(max(opset, 1), onnx.defs.onnx_opset_version())  # a damaged file may say anything
        return int(onnx.defs.get_schema(node.op_type, known, "").min_input)
    except onnx.defs.SchemaError:  # of another opset
        return 0


def _of_its_type(attribute: onnx.AttributeProto) -> bool:
    """Whether the attribute has values of the type that it names, and of no other; old files name none."""
    if not attribute.type:
        return True
    held = {field.name for field, _ in attribute.ListFields() if field.name in ATTRIBUTE_FIELDS.values()}
    return held <= {ATTRIBUTE_FIELDS.get(attribute.type, "")}


def _read(path: Path) -> onnx.ModelProto:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"There is no file {path}: check the path.") from None
    except IsADirectoryError:
        raise ModelError(f"{path} is a folder: give the .onnx file in it.") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError:
        raise ModelError(f"{path} is not a whole ONNX file: export or copy it again.") from None
    return proto


def ensure_writable(path: str | Path, source: Path | None) -> None:
    """Find out before the work whether a model made from ``source`` can be written to ``path``.

    Raises ModelError where it cannot, or where ``path`` is ``source`` itself.
    """
    path = Path(path)
    if source is not None and path.exists() and path.samefile(source):
        raise ModelError(f"{path} is the model itself: choose another output.")
    if not path.parent.is_dir():
        raise ModelError(f"There is no folder {path.parent} to write to: create it first.")
    if path.exists() and not path.is_file():
        raise ModelError(f"{path} is no ordinary file: name the output file.")
    try:
        try_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> ModelError:
    return ModelError(f"{path} cannot be written ({error.strerror}): choose another output.")


def save(model: Model, path: str | Path) -> None:
    """Write ``model``, all of it or nothing. External data in, external data out (``NAME.data``).

    Raises ModelError when ``path`` is the model's own file or cannot be written.
    """
    path = Path(path)
    ensure_writable(path, model.path)
    external = model.external or model.proto.ByteSize() > PROTOBUF_LIMIT
    data = path.with_name(f"{path.name}.data")
    try:
        with written_whole(*([data, path] if external else [path])) as files:
            proto = _externalise(model, files[0], data.name) if external else model.proto
            files[-1].write(proto.SerializeToString(deterministic=True))
    except OSError as error:
        raise _unwritable(path, error) from None
    except EncodeError:
        raise ModelError(
            f"{path} would exceed what one ONNX file can hold: save the input with external data."
        ) from None


def _externalise(model: Model, file: BinaryIO, location: str, *, hollow: bool = False) -> onnx.ModelProto:
    """A copy of the model whose large initializers are written to ``file``, one by one.

    Everything else that lay in the data file of the original is taken into the copy. A ``hollow`` file has
    only the room for them, which takes no place on most disks.
    """
    proto = onnx.ModelProto()
    for descriptor, value in model.proto.ListFields():
        if descriptor.name != "graph":
            _assign(proto, descriptor, value)
    for descriptor, value in model.proto.graph.ListFields():
        if descriptor.name != "initializer":
            _assign(proto.graph, descriptor, value)
    for tensor in stored_tensors(proto):
        embed(tensor, model.folder)
    for tensor in model.proto.graph.initializer:
        kept = proto.graph.initializer.add()
        if not _goes_outside(tensor):
            kept.CopyFrom(tensor)
            embed(kept, model.folder)
            continue
        for descriptor, value in tensor.ListFields():
            if descriptor.name in DESCRIPTION:
                _assign(kept, descriptor, value)
        file.write(b"\0" * (_start(file.tell(), stored_bytes(tensor)) - file.tell()))
        kept.data_location = onnx.TensorProto.EXTERNAL
        entries = {"location": location, "offset": file.tell(), "length": stored_bytes(tensor)}
        for key, entry in entries.items():
            kept.external_data.add(key=key, value=str(entry))
        if hollow:
            file.truncate(file.seek(stored_bytes(tensor), os.SEEK_CUR))
        else:
            for block in content_blocks(tensor, model.folder):
                file.write(block)
    return proto


def in_memory(model: Model) -> onnx.ModelProto:
    """A copy of the model with all of its data."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in stored_tensors(proto):
        embed(tensor, model.folder)
    return proto


def raised(model: Model, opset: int, why: str) -> Model:
    """``model`` in ``opset`` at least, all of it in memory if it had to be converted.

    The IR version rises with the opset. From version 4 on an initializer among the inputs is a default that a
    caller may override; before it had to be there, so that it leaves the inputs.
    Raises ModelError, which says ``why`` the opset is needed, where onnx cannot convert it.
    """
    present = _opset(model.proto)
    if present >= opset:
        return model
    refusal = ModelError(
        f"{why} needs opset {opset} and the model, of opset {present}, cannot be converted: "
        "export it anew, or leave that out."
    )
    if present < LAST_AXIS_FROM <= opset and any(n.op_type == "Hardmax" for n in _nodes(model.proto.graph)):
        raise refusal  # the converter keeps its axis, which means another thing
    try:
        converted = onnx.version_converter.convert_version(in_memory(model), opset)
    except Exception as error:  # the converter raises RuntimeError and more for what it does not know
        raise refusal from error
    if present < HALF_PIXELS_FROM <= opset:
        _resize_as_before(converted.graph)
    newest = max(onnx.helper.find_min_ir_version_for(converted.opset_import), converted.ir_version)
    if converted.ir_version < DEFAULTS_FROM <= newest:
        stored = {tensor.name for tensor in converted.graph.initializer}
        fed = [value for value in converted.graph.input if value.name not in stored]
        del converted.graph.input[:]
        converted.graph.input.extend(fed)
    converted.ir_version = newest
    return replace(model, proto=converted, external=False)


def _resize_as_before(graph: onnx.GraphProto) -> None:
    """Give every Resize, converted without these attributes, what Upsample and the first Resize meant."""
    meant = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    for node in _nodes(graph):
        if node.op_type == "Resize":
            given = {attribute.name for attribute in node.attribute}
            missing = {name: value for name, value in meant.items() if name not in given}
            node.attribute.extend(onnx.helper.make_attribute(*each) for each in missing.items())


def size_on_disk(path: str | Path) -> int:
    """Bytes of a model file and of the data files it names."""
    path = Path(path)
    proto = onnx.ModelProto()
    proto.ParseFromString(path.read_bytes())
    files = {path}
    for tensor in stored_tensors(proto):
        if uses_external_data(tensor):
            files.add(located(tensor, path.parent)[0])
    return sum(file.stat().st_size for file in files)


def model_bytes(model: Model) -> int:
    """Bytes the model takes when it is written: the file and its data file."""
    total, end = int(model.proto.ByteSize()), 0
    for index, tensor in enumerate(stored_tensors(model.proto)):
        size, outside = stored_bytes(tensor), uses_external_data(tensor)
        goes = index < len(model.proto.graph.initializer) and _goes_outside(tensor)
        start = _start(end, size)
        reference = REFERENCE_BYTES + len(f"{start}{size}")
        if goes and (outside or model.external):
            end = start + size
        if outside and not goes:
            total += size - reference
        elif goes and model.external and not outside:
            total += reference - size
    return total + end


def _goes_outside(tensor: onnx.TensorProto) -> bool:
    """Whether an initializer is written to the data file, where there is one."""
    return tensor.data_type != onnx.TensorProto.STRING and stored_bytes(tensor) >= EXTERNAL_THRESHOLD


def _start(position: int, size: int) -> int:
    """Where a tensor of ``size`` bytes starts in a data file that is filled up to ``position``."""
    step = ALIGNMENT if size >= ALIGNED_FROM else SMALL_ALIGNMENT
    return position + -position % step


def weight_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of all stored tensors."""
    return sum(stored_bytes(t) for t in stored_tensors(proto) if t.data_type != onnx.TensorProto.STRING)


def check(model: Model, like: Model) -> None:
    """onnx.checker, as strictly as the original model ``like`` passes it.

    Raises VerificationError when the model fails where the original did not.
    """
    for full in (True, False):
        if _complaint(like, full, like.path) is not None:
            continue
        complaint = _complaint(model, full)
        if complaint is not None:
            raise VerificationError(
                f"The rewritten model does not pass onnx.checker ({complaint}): please report this."
            )
        return


def _complaint(model: Model, full: bool, written: Path | None = None) -> str | None:
    """What onnx.checker says against the model, or None, of the file that holds it if it is ``written``.

    Large and external models are checked by path: of their weights it asks no more than that they are there.
    """
    with contextlib.ExitStack() as stack:
        target: onnx.ModelProto | str = model.proto if written is None else str(written)
        if written is None and (model.external or model.proto.ByteSize() > PROTOBUF_LIMIT):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            target = str(Path(folder) / "model.onnx")
            with (Path(folder) / "model.onnx.data").open("wb") as data:
                proto = _externalise(model, data, "model.onnx.data", hollow=True)
            Path(target).write_bytes(proto.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(target, full_check=full)
        except Exception as error:  # ValidationError, InferenceError, and plain ones from C++
            lines = str(error).strip().splitlines()
            return lines[0][:200] if lines else type(error).__name__
    return None
