"""Open a model in ONNX Runtime and run it. Only this package imports ONNX Runtime."""

from __future__ import annotations

import importlib
import io
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from weakref import finalize

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from onnx_lrsd.errors import DataError, DeviceError, LrsdError, ModelError
from onnx_lrsd.graph.external_data import is_aside, stored_bytes, tensor_values
from onnx_lrsd.graph.model import Model, weight_bytes
from onnx_lrsd.graph.subgraph import extract, inputs_of, reads
from onnx_lrsd.memory_limit import give_back, resident_bytes
from onnx_lrsd.types import Feed, InputSpec

FATAL_ONLY = 4
"""ONNX Runtime's level of logging at which its errors are not printed."""
SHARED_BYTES = 1 << 20
"""Weights from this size on are handed over in memory: protobuf ends at 2 GB, and copies cost."""
SHARED_TYPES = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("FLOAT", "FLOAT16", "DOUBLE", "INT8", "UINT8", "INT16", "UINT16", "INT32", "INT64")
)


def onnxruntime() -> ModuleType:
    """The onnxruntime module. Raises DeviceError where it is missing or cannot be loaded."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            raise DeviceError(
                "ONNX Runtime is not installed: pip install onnx-lrsd[cpu] (or [gpu])."
            ) from error
        raise DeviceError(
            f"ONNX Runtime is installed but does not load ({error}): install it again, or run once more if "
            "this was interrupted."
        ) from error


@contextmanager
def sound(proto: onnx.ModelProto, folder: Path | None) -> Iterator[None]:
    """Blame the model where the block fails unforeseen and ONNX Runtime cannot open the model either.

    Raises ModelError then, as ``open_session`` does. Costs nothing as long as the block does not fail.
    """
    try:
        yield
    except LrsdError:
        raise
    except Exception:
        open_session(proto, folder=folder)
        raise


def simplified(proto: onnx.ModelProto) -> onnx.ModelProto:
    """``proto``, which holds all its weights, after ONNX Runtime's basic graph optimisations.

    Constants are folded, BatchNormalization goes into its Conv, Identity is gone; all operators are ONNX's.
    """
    ort = onnxruntime()
    options = _options(ort)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "model.onnx")
        _start(ort, proto, options, _providers(ort, "cpu"))
        return onnx.load(options.optimized_model_filepath)


def typed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """``proto``, which holds all its weights, with type and shape of every tensor of its main graph.

    Where onnx cannot infer them, behind operators of other domains, ONNX Runtime says what they are.
    """
    found = onnx.shape_inference.infer_shapes(proto)
    graph = found.graph
    known = {value.name for value in (*graph.value_info, *graph.output)}
    missing = {name for node in graph.node for name in node.output if name} - known
    if missing:
        exposed = onnx.ModelProto()
        exposed.CopyFrom(found)
        exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in missing)
        ort = onnxruntime()
        options = _options(ort)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        for value in _start(ort, exposed, options, _providers(ort, "cpu")).get_outputs():
            if value.name in missing and value.type.startswith("tensor("):
                elements = onnx.TensorProto.DataType.Value(value.type[len("tensor(") : -1].upper())
                graph.value_info.append(helper.make_tensor_value_info(value.name, elements, value.shape))
    return found


class RuntimeMemory:
    """What open sessions hold, by how much this process grew as they were opened and first run, in bytes.

    ``most`` is the most at a time so far; 0 where the system does not tell.
    """

    def __init__(self) -> None:
        self._held = self.most = 0

    def add(self, held: int) -> None:
        """Count what a session holds; of one that is closed, less."""
        self._held += held
        self.most = max(self.most, self._held)

    def start_anew(self) -> None:
        """Forget the most so far."""
        self.most = self._held


RUNTIME_MEMORY = RuntimeMemory()


class _Held:
    """What one session holds, until it is closed."""

    def __init__(self) -> None:
        self.bytes = 0

    def count(self, before: int) -> None:
        """Add what the process has grown by since it was ``before``."""
        grown = max(resident_bytes() - before, 0)
        self.bytes += grown
        RUNTIME_MEMORY.add(grown)

    def release(self) -> None:
        """The session is closed."""
        RUNTIME_MEMORY.add(-self.bytes)


class Session:
    """A model that is open in ONNX Runtime. ``inputs`` are what it must be fed, ``outputs`` what it gives.

    ``before`` is what the process held before it was opened, in bytes.
    """

    def __init__(
        self,
        session: Any,
        inputs: Sequence[InputSpec],
        outputs: Sequence[str],
        device: str = "cpu",
        before: int = 0,
    ) -> None:
        self._session = session
        self._held, self._fresh = _Held(), True
        finalize(self, self._held.release)
        if before:
            self._held.count(before)
        self.device = device
        self._takes = {value.name for value in session.get_inputs()}
        self._takes |= {value.name for value in session.get_overridable_initializers()}
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)

    def run(self, feed: Feed) -> dict[str, Any]:
        """Tensor name -> value; what the feed has beyond the model's inputs is ignored.

        Raises DataError when the feed does not fit the inputs, ModelError when a node fails on it.
        """
        given = {name: value for name, value in feed.items() if name in self._takes}
        before = resident_bytes() if self._fresh else 0
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
        if self._fresh:
            self._held.count(before)
            self._fresh = False
        return dict(zip(self.outputs, values, strict=True))

    def timed(self, feed: Feed) -> Callable[[], object]:
        """A run on ``feed`` to be timed; on a GPU inputs lie there and outputs stay, as nothing is copied.

        Source: ONNX Runtime, I/O Binding.
        """
        return partial(self.run, feed) if self.device == "cpu" else self._bound(feed)

    def _bound(self, feed: Feed) -> Callable[[], None]:
        ort, binding = onnxruntime(), self._session.io_binding()
        for name, value in feed.items():
            if name in self._takes:
                placed = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), self.device, 0)
                binding.bind_ortvalue_input(name, placed)
        for name in self.outputs:
            binding.bind_output(name, self.device)

        def run() -> None:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run

    def end_record(self) -> Path:
        """The file with the kernel times of all runs, of a session that records them; it runs no more."""
        return Path(self._session.end_profiling())


class PartedSession(Session):
    """A model that is run part by part, each opened when its turn comes and closed behind it.

    A part has consecutive nodes with weights of at most ``most_bytes`` together, or one node that has more.
    Values at which a part ends are held. All else is as ``open_session`` has it.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        names: Sequence[str],
        most_bytes: int,
        *,
        folder: Path | None,
        device: str = "cpu",
        given: Mapping[str, npt.DTypeLike] | None = None,
    ) -> None:
        self._proto, self._folder = proto, folder
        self._own = {value.name for value in proto.graph.input}
        self.device, self.outputs = device, tuple(names)
        whole = extract(proto, names, _fed(given or {}), stored=_described)
        self.inputs = tuple(inputs_of(whole))
        self._parts = _parts(whole.graph, names, most_bytes)

    @property
    def count(self) -> int:
        """How many parts there are."""
        return len(self._parts)

    def run(self, feed: Feed) -> dict[str, Any]:
        """As ``Session.run``."""
        values: dict[str, Any] = dict(feed)
        for part in self._parts:
            given = {name: values[name] for name in part.reads if name not in self._own}
            if not all(isinstance(value, np.ndarray) for value in given.values()):
                return self._opened(self.outputs, {}).run(feed)  # a sequence ends no part
            types = {name: value.dtype for name, value in given.items()}
            values |= self._opened(part.gives, types).run(values)
            values = {name: value for name, value in values.items() if name in part.held or name in feed}
            give_back()
        return {name: values[name] for name in self.outputs}

    def _opened(self, outputs: Sequence[str], given: Mapping[str, npt.DTypeLike]) -> Session:
        device = self.device
        return open_session(self._proto, folder=self._folder, outputs=outputs, device=device, given=given)


class _Part(NamedTuple):
    """Tensors that a part ``reads``, made before it, those it ``gives``, and what is ``held`` behind it."""

    reads: tuple[str, ...]
    gives: tuple[str, ...]
    held: frozenset[str]


def _parts(graph: onnx.GraphProto, names: Sequence[str], most_bytes: int) -> list[_Part]:
    """The parts of a graph that gives ``names``; weights may lack their values."""
    sizes = {
        t.name: 0 if t.data_type == onnx.TensorProto.STRING else stored_bytes(t) for t in graph.initializer
    }
    nodes, taken, size = list[list[onnx.NodeProto]](), set[str](), 0
    for node in graph.node:
        new = {name for name in reads(node) if name in sizes} - taken
        more = sum(sizes[name] for name in new)
        if not nodes or (size + more > most_bytes and more):
            nodes.append([])
            new, size = {name for name in reads(node) if name in sizes}, 0
            taken, more = set(), sum(sizes[name] for name in new)
        nodes[-1].append(node)
        taken, size = taken | new, size + more
    made = [{name for node in part for name in node.output if name} for part in nodes]
    needs = [{name for node in part for name in reads(node)} for part in nodes]
    computed, found = set[str]().union(*made), list[_Part]()
    known = computed | {value.name for value in graph.input}
    for index, (gives, read) in enumerate(zip(made, needs, strict=True)):
        later = set(names).union(*needs[index + 1 :])
        others = [] if index else [name for name in names if name not in computed]
        found.append(
            _Part(tuple(sorted((read - gives) & known)), (*sorted(gives & later), *others), frozenset(later))
        )
    return found


def _described(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """``tensor`` without its values."""
    return onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)


def _fed(given: Mapping[str, npt.DTypeLike]) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), None)
        for name, kind in given.items()
    ]


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
    record: Path | None = None,
) -> Session:
    """Open ``proto``, whose external data lies in ``folder``, to give ``outputs``.

    ``outputs`` may name any tensor of the main graph, inputs and initializers included; nodes that none
    of them needs are left out. ``given`` are tensors, with their types, that are fed instead of computed.
    ``threads`` None leaves the number to ONNX Runtime. ``spinning`` True, its own default, lets idle threads
    wait in a busy loop, which slows down NumPy or a second session. With ``record`` kernel times are recorded
    in a file whose path begins so. ``proto`` is not changed, nor are its large weights copied into a message.
    Raises ModelError when ONNX Runtime refuses the model, DeviceError when ``device`` 'cuda' is not there,
    ValueError for an output that is no tensor of the main graph.
    """
    ort = onnxruntime()
    providers = _providers(ort, device)
    names = [output.name for output in proto.graph.output] if outputs is None else list(outputs)
    options = _options(ort, folder, threads, spinning, optimise)
    if record is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(record)
    weights, before = _Weights(), resident_bytes()
    part = extract(proto, names, _fed(given or {}), stored=weights.share)
    session = _start(ort, part, options, providers, weights.shared)
    if providers[0] not in session.get_providers():  # ONNX Runtime falls back to the CPU without an error
        raise DeviceError("ONNX Runtime cannot use the GPU here: run `onnx-lrsd doctor`, or choose the CPU.")
    return Session(session, inputs_of(part), names, device, before)


def open_model(
    model: Model,
    *,
    outputs: Sequence[str] | None = None,
    threads: int | None = None,
    given: Mapping[str, npt.DTypeLike] | None = None,
) -> Session:
    """``open_session`` of ``model`` with its external data, on its device; in parts where it has to be."""
    if model.parted and model.most_bytes is not None:
        names = [output.name for output in model.proto.graph.output] if outputs is None else list(outputs)
        parted = PartedSession(
            model.proto, names, model.most_bytes, folder=model.folder, device=model.device, given=given
        )
        if parted.count > 1:
            return parted
    return open_session(
        model.proto,
        folder=model.folder,
        outputs=outputs,
        threads=threads,
        device=model.device,
        given=given,
    )


def inference_device(asked: str) -> str:
    """Where ONNX Runtime runs models, 'cpu' or 'cuda', if the user asked for ``asked``.

    'auto' takes the GPU where a session really runs there. Raises DeviceError where 'cuda' does not.
    """
    if asked == "cpu":
        return "cpu"
    try:
        open_session(tiny_model(), device="cuda")
    except DeviceError:
        if asked == "cuda":
            raise
        return "cpu"
    return "cuda"


def tiny_model() -> onnx.ModelProto:
    """One Relu of one number: what shows whether ONNX Runtime starts at all."""
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "tiny", ends[:1], ends[1:])
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)


class _Weights:
    """Large weights that are handed over in memory: ``shared`` by name, with a stub in their place."""

    def __init__(self) -> None:
        self.shared: dict[str, npt.NDArray[Any]] = {}

    def share(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """A stub without values for a large ``tensor``; any other is returned as it is."""
        if is_aside(tensor):
            return self._stub(tensor, tensor_values(tensor, None))
        if tensor.data_type not in SHARED_TYPES or uses_external_data(tensor):
            return tensor
        item = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if math.prod(tensor.dims) * item < SHARED_BYTES:
            return tensor
        return self._stub(tensor, numpy_helper.to_array(tensor))

    def _stub(self, tensor: onnx.TensorProto, values: npt.NDArray[Any]) -> onnx.TensorProto:
        self.shared[tensor.name] = values
        stub = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        stub.data_location = onnx.TensorProto.EXTERNAL
        stub.external_data.add(key="location", value="in memory")
        return stub


def open_file(path: str | Path) -> Any:
    """ONNX Runtime's own session of a model file, with one thread."""
    ort = onnxruntime()
    return ort.InferenceSession(str(path), _options(ort, threads=1), providers=_providers(ort, "cpu"))


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
    options: Any,
    providers: Sequence[str],
    weights: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Any:
    if weights:
        values = [ort.OrtValue.ortvalue_from_numpy(value) for value in weights.values()]
        options.add_external_initializers(list(weights), values)
    try:
        return ort.InferenceSession(
            proto.SerializeToString(), options, providers=list(providers), enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime has no public base class for its errors
        if "CUDAExecutionProvider" in providers and re.search("cuda|cudnn|cublas", str(error), re.IGNORECASE):
            raise DeviceError(
                f"ONNX Runtime cannot use the GPU ({gist(error)}): run `onnx-lrsd doctor`, or choose the CPU."
            ) from error
        raise ModelError(
            f"ONNX Runtime does not open the model ({gist(error)}): "
            "it must run there before it can be optimised."
        ) from error


def _providers(ort: ModuleType, device: str) -> list[str]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise DeviceError("This ONNX Runtime has no CUDA: pip install onnx-lrsd[gpu], or choose the CPU.")
    _preload(ort)
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


@cache
def _preload(ort: ModuleType) -> None:
    """Load CUDA and cuDNN from the wheels beside ONNX Runtime; by itself it finds those of the system only.

    What is missing shows in the session's providers; ONNX Runtime would print it, into a report on stdout.
    """
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def shapes(
    proto: onnx.ModelProto,
    feed: Feed,
    tensors: Iterable[str],
    folder: Path | None = None,
    most_bytes: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Concrete shapes of ``tensors`` for one feed, from one run.

    Only the shapes leave ONNX Runtime, so memory is that of plain inference. Initializers and inputs are
    read off directly. With more weights than ``most_bytes`` the model is run part by part, and what a part
    gives is held. Raises as ``Session.run`` does.
    """
    known = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    known |= {name: tuple(np.shape(value)) for name, value in feed.items()}
    wanted = list(dict.fromkeys(tensors))
    rest = [name for name in wanted if name not in known]
    if rest and most_bytes is not None and weight_bytes(proto) > most_bytes:
        parted = PartedSession(proto, rest, most_bytes, folder=folder)
        known |= {name: tuple(map(int, np.shape(value))) for name, value in parted.run(feed).items()}
    elif rest:
        names = [f"onnx-lrsd shape of {name}" for name in rest]
        part = extract(proto, rest)
        part.graph.node.extend(helper.make_node("Shape", [t], [n]) for t, n in zip(rest, names, strict=True))
        del part.graph.output[:]
        part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        if not any(opset.domain in ("", "ai.onnx") for opset in part.opset_import):
            part.opset_import.add(domain="", version=13)
        measured = open_session(part, folder=folder).run(feed)
        known |= {old: tuple(map(int, measured[new])) for old, new in zip(rest, names, strict=True)}
    return {name: known[name] for name in wanted}


def gist(error: Exception) -> str:
    """What an error of another library says, in one line: no status codes, no places in its source."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.split("Status Message: ")[-1].split(" Please fix")[0]
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"/\S+:\d+ .*?\)\S*( const)? (?=\S)", "", text).rstrip(" .")
    return text if len(text) <= 200 else text[:197] + "..."
