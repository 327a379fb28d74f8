"""ONNX Runtime: open a model, run it, watch its tensors. The only file that imports it."""

from __future__ import annotations

import importlib
import json
import logging
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from onnx_lrsd.errors import DataError, DeviceError, ModelError
from onnx_lrsd.runtime.timing import busy_clock
from onnx_lrsd.types import InputSpec

Feed = Mapping[str, npt.NDArray[Any]]

WARNINGS, ERRORS_ONLY, FATAL_ONLY = 2, 3, 4
"""ONNX Runtime's levels of logging; the first is its own default."""
BLOCKED = "_nchwc"
"""What ONNX Runtime appends to the name of a node that it moves to its blocked layout."""
NEAR, RESOLUTION = 1.1, 1e-6
"""Runs of a kernel are among its fastest up to this factor and these seconds; microseconds are recorded."""
SHARED_BYTES = 1 << 20
"""Weights from this size on are handed over in memory: protobuf ends at 2 GB, and copies cost."""
SHARED_TYPES = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("FLOAT", "FLOAT16", "DOUBLE", "INT8", "UINT8", "INT16", "UINT16", "INT32", "INT64")
)


def onnxruntime() -> ModuleType:
    """The onnxruntime module. Raises DeviceError where it is missing."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise DeviceError("ONNX Runtime is not installed: pip install onnx-lrsd[cpu] (or [gpu]).") from error


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


class Kernel(NamedTuple):
    """One node as ONNX Runtime ran it: its name, operator, and the seconds of its kernel in one run.

    ``seconds`` are those of quiet runs, less the share in which other work had the processor; ``fastest``
    those of the fastest runs by the clock on the wall, right for short kernels on a busy machine. Both hold
    what recording takes, about a microsecond.
    """

    name: str
    op: str
    seconds: float
    fastest: float


def kernels(
    proto: onnx.ModelProto, feed: Feed, *, folder: Path | None = None, runs: int = 10
) -> list[Kernel]:
    """Every node of the optimised graph in one thread, in its order.

    A convolution in the blocked layout is named after its output, any other node as in ``proto`` where it
    was not fused.
    """
    ort = onnxruntime()
    with tempfile.TemporaryDirectory() as place:
        options = _options(ort, folder, threads=1)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(place) / "run")
        names = [output.name for output in proto.graph.output]
        cut, weights = _cut(proto, _needed(proto, names), names)
        session = _start(ort, cut, weights, options, _providers(ort, "cpu"))
        opened = Session(session, inputs_of(proto), names)
        shares = [_busy_share(partial(opened.run, feed)) for _ in range(runs + 1)]
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    seen: dict[str, tuple[str, list[float]]] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name != event["name"]:
            seen.setdefault(name, (event["args"]["op_name"], []))[1].append(event["dur"] * 1e-6)
    quiet = 1 + np.argsort(shares[1:])[runs // 2 :]  # the first run is for warming up
    share = np.array(shares)[quiet]
    found = []
    for name, (op, times) in seen.items():
        busy, every = np.array(times)[quiet] * share, np.array(times[1:])
        fastest = every[every <= NEAR * np.quantile(every, 0.1) + RESOLUTION]
        found.append(Kernel(name.removesuffix(BLOCKED), op, float(busy.mean()), float(fastest.mean())))
    return found


def _busy_share(run: Callable[[], object]) -> float:
    """The share of the run's time in which this thread had the processor."""
    busy, start = busy_clock(), time.perf_counter()
    before = busy()
    run()
    return min((busy() - before) / (time.perf_counter() - start), 1.0)


def optimised(proto: onnx.ModelProto) -> onnx.ModelProto:
    """``proto``, all of it in memory, as ONNX Runtime runs it on this machine, in operators of its own."""
    return _optimised(proto, "ORT_ENABLE_ALL")


def simplified(proto: onnx.ModelProto) -> onnx.ModelProto:
    """``proto``, all of it in memory, after ONNX Runtime's basic optimisations.

    Constants are folded, BatchNormalization goes into its Conv, Identity is gone; all operators are ONNX's.
    """
    return _optimised(proto, "ORT_ENABLE_BASIC")


def _optimised(proto: onnx.ModelProto, level: str) -> onnx.ModelProto:
    ort = onnxruntime()
    options = _options(ort)
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "model.onnx")
        _start(ort, proto, {}, options, _providers(ort, "cpu"))
        return onnx.load(options.optimized_model_filepath)


class Session:
    """A model that is open in ONNX Runtime. ``inputs`` is what it must be fed, ``outputs`` what it gives."""

    def __init__(self, session: Any, inputs: Sequence[InputSpec], outputs: Sequence[str]) -> None:
        self._session = session
        self._takes = {value.name for value in session.get_inputs()}
        self._takes |= {value.name for value in session.get_overridable_initializers()}
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)

    def run(self, feed: Feed) -> dict[str, Any]:
        """Tensor name -> value; what the feed has beyond the model's inputs is passed over.

        Raises DataError when the feed does not fit the inputs, ModelError when a node fails on it.
        """
        given = {name: value for name, value in feed.items() if name in self._takes}
        try:
            values = self._session.run(self.outputs, given)
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            if type(error).__name__ in ("InvalidArgument", "ValueError"):
                raise DataError(
                    f"The samples do not fit the model ({gist(error)}): give each input as it wants it."
                ) from error
            raise ModelError(
                f"ONNX Runtime could not run the model on these samples ({gist(error)}): "
                "check that they are what the model expects."
            ) from error
        return dict(zip(self.outputs, values, strict=True))


def open_session(
    proto: onnx.ModelProto,
    *,
    folder: Path | None = None,
    outputs: Sequence[str] | None = None,
    threads: int | None = None,
    spinning: bool = False,
    optimise: bool = True,
    device: str = "cpu",
    given: Mapping[str, npt.DTypeLike] | None = None,
) -> Session:
    """Open ``proto``, whose external data lies in ``folder``, to give ``outputs``.

    ``outputs`` may name any tensor of the main graph, inputs and initializers included; nodes that none
    of them needs are left out. ``given`` are tensors, with their types, that are fed instead of computed.
    ``threads`` None leaves the number to ONNX Runtime; ``spinning`` True, its own default, has idle
    threads burn the time that NumPy or a second model beside this one could use. ``proto`` is not
    changed, nor are its large weights copied into a message. Raises ModelError when ONNX Runtime refuses
    the model, DeviceError when ``device`` 'cuda' is not there, ValueError for an output nobody computes.
    """
    ort = onnxruntime()
    providers = _providers(ort, device)
    names = [output.name for output in proto.graph.output] if outputs is None else list(outputs)
    options = _options(ort, folder, threads, spinning, optimise)
    given = given or {}
    opened, weights = _cut(proto, _needed(proto, names, given), names)
    opened.graph.input.extend(
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), None)
        for name, kind in given.items()
    )
    session = _start(ort, opened, weights, options, providers)
    if providers[0] not in session.get_providers():  # a CUDA that does not load is passed over in silence
        raise DeviceError("ONNX Runtime cannot use the GPU here: run `onnx-lrsd doctor`, or choose the CPU.")
    return Session(session, inputs_of(proto), names)


def open_file(path: str | Path) -> Any:
    """ONNX Runtime's own session of a file, on one thread, for what it takes to be opened."""
    ort = onnxruntime()
    return ort.InferenceSession(str(path), _options(ort, threads=1), providers=_providers(ort, "cpu"))


def peak_memory() -> int:
    """Most bytes of memory that this process has held; 0 where the system does not tell.

    Linux hands getrusage's figure on from a parent to what it starts, so that its own is read instead.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):  # not Linux
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _options(
    ort: ModuleType,
    folder: Path | None = None,
    threads: int | None = None,
    spinning: bool = False,
    optimise: bool = True,
) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY  # its errors reach the user as one sentence, not as log lines
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options


def _start(
    ort: ModuleType,
    proto: onnx.ModelProto,
    weights: Mapping[str, npt.NDArray[Any]],
    options: Any,
    providers: Sequence[str],
) -> Any:
    if weights:
        values = [ort.OrtValue.ortvalue_from_numpy(value) for value in weights.values()]
        options.add_external_initializers(list(weights), values)
    try:
        return ort.InferenceSession(proto.SerializeToString(), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime has no public base class for its errors
        raise ModelError(
            f"ONNX Runtime does not open the model ({gist(error)}): "
            "it must run there before it can be optimised."
        ) from error


def _providers(ort: ModuleType, device: str) -> list[str]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise DeviceError("This ONNX Runtime has no CUDA: pip install onnx-lrsd[gpu], or choose the CPU.")
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def _needed(
    proto: onnx.ModelProto, names: Sequence[str], given: Collection[str] = ()
) -> list[onnx.NodeProto]:
    """The nodes that ``names`` depend on, but for what is ``given``, in the order of the graph."""
    producers = {name: index for index, node in enumerate(proto.graph.node) for name in node.output if name}
    known = {value.name for value in proto.graph.input} | {tensor.name for tensor in proto.graph.initializer}
    known |= {tensor.values.name for tensor in proto.graph.sparse_initializer}
    for name in names:
        if name not in producers and name not in known:
            raise ValueError(f"{name} is no tensor of the main graph")
    kept: set[int] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        index = None if name in given else producers.get(name)
        if index is not None and index not in kept:
            kept.add(index)
            waiting.extend(uses(proto.graph.node[index]))
    return [proto.graph.node[index] for index in sorted(kept)]


def _cut(
    proto: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], names: Sequence[str]
) -> tuple[onnx.ModelProto, dict[str, npt.NDArray[Any]]]:
    """A copy of ``proto`` with these nodes and outputs, and its large weights beside it, by name.

    An output that the model does not declare is left untyped: ONNX Runtime infers its type.
    """
    source = proto.graph
    declared = {value.name: value for value in source.output}
    outputs = [declared.get(name, onnx.ValueInfoProto(name=name)) for name in names]
    used = {name for node in nodes for name in uses(node)} | {value.name for value in outputs}
    listed = {value.name for value in source.input}
    graph = onnx.GraphProto(name=source.name, node=nodes, input=source.input, output=outputs)
    weights: dict[str, npt.NDArray[Any]] = {}
    for tensor in source.initializer:
        if tensor.name not in used and tensor.name not in listed:
            continue
        if _is_shared(tensor) and tensor.name not in listed:
            weights[tensor.name] = numpy_helper.to_array(tensor)
            stub = graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            stub.data_location = onnx.TensorProto.EXTERNAL
            stub.external_data.add(key="location", value="in memory")
        else:
            graph.initializer.append(tensor)
    graph.sparse_initializer.extend(t for t in source.sparse_initializer if t.values.name in used)
    copy = onnx.ModelProto(ir_version=proto.ir_version, graph=graph)
    copy.opset_import.extend(proto.opset_import)
    copy.functions.extend(proto.functions)
    return copy, weights


def _is_shared(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type not in SHARED_TYPES or uses_external_data(tensor):
        return False
    item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return bool(math.prod(tensor.dims) * item >= SHARED_BYTES)


def frontier(proto: onnx.ModelProto, changing: Collection[str]) -> list[str]:
    """Tensors that what depends on ``changing`` reads, but do not depend on it themselves.

    ``changing`` are names of tensors. Inputs of the model and what reads constants alone are left out.
    """
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = {value.name for value in proto.graph.input} - constants
    varying, late, found = set(inputs), set(changing), dict[str, None]()
    for node in proto.graph.node:
        read = uses(node)
        if not late.isdisjoint(read) or not late.isdisjoint(node.output):
            late.update(name for name in node.output if name)
            found |= dict.fromkeys(name for name in read if name in varying)
        elif not varying.isdisjoint(read):
            varying.update(node.output)
    return [name for name in found if name not in inputs]


def uses(node: onnx.NodeProto) -> list[str]:
    """Names that ``node`` reads, those of its subgraphs included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *((attribute.g,) if attribute.HasField("g") else ())):
            names.extend(name for inner in graph.node for name in uses(inner))
            names.extend(output.name for output in graph.output)
    return names


def inputs_of(proto: onnx.ModelProto) -> list[InputSpec]:
    """What a caller must feed; an initializer that is listed among the inputs has a default.

    Raises ModelError for an input that is no tensor.
    """
    defaults = {tensor.name for tensor in proto.graph.initializer}
    defaults |= {tensor.values.name for tensor in proto.graph.sparse_initializer}
    return [_spec(value) for value in proto.graph.input if value.name not in defaults]


def _spec(value: onnx.ValueInfoProto) -> InputSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.elem_type:
        raise ModelError(
            f"Input {value.name} is a sequence, a map or an optional, which cannot be fed from samples: "
            "export the model with tensors as inputs."
        )
    shape = tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or None
        for d in tensor.shape.dim
    )
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return InputSpec(value.name, dtype, shape, tensor.HasField("shape"))


def shapes(
    proto: onnx.ModelProto, feed: Feed, tensors: Iterable[str], folder: Path | None = None
) -> dict[str, tuple[int, ...]]:
    """Concrete shapes of ``tensors`` for one feed, from one run.

    Only the shapes leave the run, so that memory is that of plain inference. Initializers and inputs
    are read off directly. Raises as ``Session.run`` does.
    """
    known = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    known |= {name: tuple(np.shape(value)) for name, value in feed.items()}
    wanted = list(dict.fromkeys(tensors))
    rest = [name for name in wanted if name not in known]
    if rest:
        names = [f"onnx-lrsd shape of {name}" for name in rest]
        counters = [onnx.helper.make_node("Shape", [t], [n]) for t, n in zip(rest, names, strict=True)]
        cut, weights = _cut(proto, [*_needed(proto, rest), *counters], names)
        if not any(opset.domain in ("", "ai.onnx") for opset in cut.opset_import):
            cut.opset_import.add(domain="", version=13)
        ort = onnxruntime()
        session = _start(ort, cut, weights, _options(ort, folder), _providers(ort, "cpu"))
        measured = Session(session, inputs_of(proto), names).run(feed)
        known |= {old: tuple(map(int, measured[new])) for old, new in zip(rest, names, strict=True)}
    return {name: known[name] for name in wanted}


def gist(error: Exception) -> str:
    """What an error of another library says, in one line: no status codes, no places in its source."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.split("Status Message: ")[-1].split(" Please fix")[0]
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"/\S+:\d+ .*?\)\S*( const)? (?=\S)", "", text).rstrip(" .")
    return text if len(text) <= 200 else text[:197] + "..."
