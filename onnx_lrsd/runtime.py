"""ONNX Runtime: open a model, watch its tensors, time it. The only file that imports it."""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lrsd.errors import DeviceError, ModelError
from onnx_lrsd.types import InputSpec

Feed = Mapping[str, npt.NDArray[Any]]

LIMIT = 2**31 - 2**20
"""Bytes of a model that protobuf can hold in one message, less some room for what we add."""


def onnxruntime() -> ModuleType:
    """The onnxruntime module. Raises DeviceError where it is missing."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise DeviceError("ONNX Runtime is not installed: pip install onnx-lrsd[cpu] (or [gpu]).") from error


class Session:
    """A model that is open in ONNX Runtime, with the tensors it gives."""

    def __init__(self, session: Any, outputs: Sequence[str], fed: Sequence[str]) -> None:
        self._session = session
        self._outputs = list(outputs)
        self._fed = set(fed)

    def run(self, feed: Feed) -> dict[str, Any]:
        """Tensor name -> value. Raises ModelError when the model fails on this feed."""
        given = {name: value for name, value in feed.items() if name in self._fed}
        try:
            values = self._session.run(self._outputs, given)
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            raise ModelError(
                f"ONNX Runtime could not run the model on these samples ({first_line(error)}): "
                "check that they are what the model expects."
            ) from error
        return dict(zip(self._outputs, values, strict=True))


def open_session(
    proto: onnx.ModelProto,
    *,
    folder: Path | None = None,
    outputs: Sequence[str] | None = None,
    threads: int | None = None,
    spinning: bool = True,
) -> Session:
    """Open ``proto``, whose external data lies in ``folder``, to give ``outputs``.

    ``outputs`` may name any tensor of the main graph, inputs included; nodes that none of them needs
    are left out. Raises ModelError when ONNX Runtime refuses the model.
    """
    ort = onnxruntime()
    names = [output.name for output in proto.graph.output] if outputs is None else list(outputs)
    watched = proto if outputs is None else _watch(proto, names)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        session = _open(ort, watched, options)
    except Exception as error:  # ONNX Runtime has no public base class for its errors
        raise ModelError(
            f"ONNX Runtime does not open the model ({first_line(error)}): it must run there before it can be optimised."
        ) from error
    return Session(session, names, [value.name for value in session.get_inputs()])


def _open(ort: ModuleType, proto: onnx.ModelProto, options: Any) -> Any:
    providers = ["CPUExecutionProvider"]
    if proto.ByteSize() < LIMIT:
        return ort.InferenceSession(proto.SerializeToString(), options, providers=providers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(proto, path, save_as_external_data=True, location="model.data")
        return ort.InferenceSession(str(path), options, providers=providers)


def _watch(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """``proto`` cut down to what gives ``names``; tensors are typed by ONNX Runtime itself."""
    producers = {name: index for index, node in enumerate(proto.graph.node) for name in node.output if name}
    kept: set[int] = set()
    waiting = list(names)
    while waiting:
        index = producers.get(waiting.pop())
        if index is None or index in kept:
            continue
        kept.add(index)
        waiting.extend(uses(proto.graph.node[index]))
    nodes = [node for index, node in enumerate(proto.graph.node) if index in kept]
    needed = {name for node in nodes for name in uses(node)} | set(names)
    graph = onnx.GraphProto(name=proto.graph.name)
    graph.node.extend(nodes)
    graph.input.extend(proto.graph.input)
    graph.initializer.extend(t for t in proto.graph.initializer if t.name in needed)
    graph.sparse_initializer.extend(t for t in proto.graph.sparse_initializer if t.values.name in needed)
    typed = {value.name: value for value in proto.graph.output}
    produced = [name for name in names if name in producers]
    graph.output.extend(typed.get(name, onnx.ValueInfoProto(name=name)) for name in produced)
    for name in names:
        if name not in producers:  # an input is given back through an Identity of another name
            raise ValueError(f"{name} is not computed by any node")
    watched = onnx.ModelProto(ir_version=proto.ir_version, graph=graph)
    watched.opset_import.extend(proto.opset_import)
    watched.functions.extend(proto.functions)
    return watched


def uses(node: onnx.NodeProto) -> list[str]:
    """Names that ``node`` reads, those of its subgraphs included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *((attribute.g,) if attribute.HasField("g") else ())):
            names.extend(name for inner in graph.node for name in uses(inner))
            names.extend(output.name for output in graph.output)
    return names


def inputs_of(proto: onnx.ModelProto) -> list[InputSpec]:
    """What a caller must feed; initializers that are listed among the inputs have a default."""
    defaults = {tensor.name for tensor in proto.graph.initializer}
    return [_spec(value) for value in proto.graph.input if value.name not in defaults]


def _spec(value: onnx.ValueInfoProto) -> InputSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.elem_type:
        raise ModelError(f"Input {value.name} is not a tensor: models with sequence or map inputs are not supported.")
    dims = tensor.shape.dim if tensor.HasField("shape") else ()
    shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or None for d in dims)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return InputSpec(value.name, np.dtype(dtype).name, shape)


def shapes(
    proto: onnx.ModelProto, feed: Feed, tensors: Sequence[str], folder: Path | None = None
) -> dict[str, tuple[int, ...]]:
    """Concrete shapes of ``tensors`` for one feed; initializers and inputs are read off directly."""
    known = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    known |= {name: tuple(value.shape) for name, value in feed.items()}
    found = {name: known[name] for name in tensors if name in known}
    rest = [name for name in dict.fromkeys(tensors) if name not in known]
    if rest:
        values = open_session(proto, folder=folder, outputs=rest).run(feed)
        found |= {name: tuple(np.shape(value)) for name, value in values.items()}
    return found


def pair_latency(
    before: Callable[[], object], after: Callable[[], object], *, seconds: float = 2.0, most: int = 400
) -> tuple[float, float, float, tuple[float, float]]:
    """Median milliseconds of both, the median of before / after, and its 95 % interval.

    Runs are interleaved (before, after, after, before), so that a slow spell of the machine falls on
    both. The interval is distribution-free, from order statistics of the paired ratios.
    Source: Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2.
    """
    for run in (before, after, before, after):
        run()
    firsts: list[float] = []
    seconds_taken: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(firsts) < 7 or (time.perf_counter() < deadline and len(firsts) < most):
        one, two, three, four = (_clock(run) for run in (before, after, after, before))
        firsts.append(one + four)
        seconds_taken.append(two + three)
    a, b = np.array(firsts) / 2, np.array(seconds_taken) / 2
    ratios = np.sort(a / b)
    half = 0.98 * np.sqrt(len(ratios))  # 1.96 standard deviations of a Binomial(n, 1/2), halved
    low = max(int(np.floor(len(ratios) / 2 - half)), 0)
    high = min(int(np.ceil(len(ratios) / 2 + half)), len(ratios) - 1)
    interval = float(ratios[low]), float(ratios[high])
    return float(np.median(a)) * 1e3, float(np.median(b)) * 1e3, float(np.median(ratios)), interval


def _clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def first_line(error: Exception) -> str:
    """The gist of an error of another library: its first line, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0].split("Status Message: ")[-1].strip().rstrip(".")
    return text if len(text) <= 200 else text[:197] + "..."
