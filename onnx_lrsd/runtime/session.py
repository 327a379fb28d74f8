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
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from onnx_lrsd.errors import DataError, DeviceError, LrsdError, ModelError
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.subgraph import extract, inputs_of
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


class Session:
    """A model that is open in ONNX Runtime. ``inputs`` are what it must be fed, ``outputs`` what it gives."""

    def __init__(
        self, session: Any, inputs: Sequence[InputSpec], outputs: Sequence[str], device: str = "cpu"
    ) -> None:
        self._session = session
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
    fed = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), None)
        for name, kind in (given or {}).items()
    ]
    weights = _Weights()
    part = extract(proto, names, fed, stored=weights.share)
    session = _start(ort, part, options, providers, weights.shared)
    if providers[0] not in session.get_providers():  # ONNX Runtime falls back to the CPU without an error
        raise DeviceError("ONNX Runtime cannot use the GPU here: run `onnx-lrsd doctor`, or choose the CPU.")
    return Session(session, inputs_of(part), names, device)


def open_model(
    model: Model,
    *,
    outputs: Sequence[str] | None = None,
    threads: int | None = None,
    given: Mapping[str, npt.DTypeLike] | None = None,
) -> Session:
    """``open_session`` of ``model`` with its external data, on its device."""
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
        if tensor.data_type not in SHARED_TYPES or uses_external_data(tensor):
            return tensor
        item = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if math.prod(tensor.dims) * item < SHARED_BYTES:
            return tensor
        self.shared[tensor.name] = numpy_helper.to_array(tensor)
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
    proto: onnx.ModelProto, feed: Feed, tensors: Iterable[str], folder: Path | None = None
) -> dict[str, tuple[int, ...]]:
    """Concrete shapes of ``tensors`` for one feed, from one run.

    Only the shapes leave ONNX Runtime, so memory is that of plain inference. Initializers and inputs are
    read off directly. Raises as ``Session.run`` does.
    """
    known = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    known |= {name: tuple(np.shape(value)) for name, value in feed.items()}
    wanted = list(dict.fromkeys(tensors))
    rest = [name for name in wanted if name not in known]
    if rest:
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
