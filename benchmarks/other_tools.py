"""What onnxsim's pruning and ONNX Runtime's quantisers make of a model, for the study peers.

onnxsim is no dependency of the package: `pip install onnxsim==0.8.1` brings it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from onnx_lrsd.data.samples import Samples
from onnx_lrsd.graph.model import Model, model_bytes, raised
from onnx_lrsd.runtime.quantiser import quantization
from onnx_lrsd.runtime.session import simplified
from onnx_lrsd.solver.codes.rounding import nearest, steps_of
from onnx_lrsd.storage import FP16, INT4, UINT8, Storage, entry_bytes

Values = npt.NDArray[Any]

PRUNERS = ("SparseGPT", "Wanda", "magnitude", "magnitude everywhere")
STRUCTURED = ("magnitude", "Wanda")
"""Ways to rank the entries of single weights, of all weights together, and whole channels."""
VALUES = (FP16, UINT8, INT4)
"""What the entries that are left may be stored in."""
STEP_BYTES = 4
"""Of the step of one row of codes."""
LEAST_SPARSITY = 0.02
"""With fewer zeros a row is no longer one of pruning."""
NEAR_ENOUGH = 0.005
QUANTISED_OPSET = 13
BLOCK = 32
"""Inputs that share a step in MatMulNBits."""


class Weight(NamedTuple):
    """A pruned weight: ``values`` as its initializer has them, and whether its rows are its last axis."""

    values: Values
    by_column: bool

    @property
    def rows(self) -> Values:
        """(n, m)."""
        values = self.values.T if self.by_column else self.values
        return values.reshape(len(values), -1)

    def like(self, rows: Values) -> Values:
        """``rows`` (n, m) in the layout of the initializer."""
        if self.by_column:
            rows = rows.T
        return np.ascontiguousarray(rows.reshape(self.values.shape), dtype=self.values.dtype)


def onnxsim() -> ModuleType | None:
    """The module, where it is installed."""
    try:
        import onnxsim
    except ImportError:
        return None
    module: ModuleType = onnxsim
    return module


def prune(tool: ModuleType, method: str, proto: onnx.ModelProto, sparsity: float, seen: Samples) -> Any:
    """``proto`` with this share of the entries of its weights set to zero, as onnxsim does it."""
    if method == "SparseGPT":
        return tool.apply_sparsegpt_pruning(proto, list(seen.batches()), sparsity=sparsity)
    if method == "Wanda":
        return tool.apply_wanda_pruning(proto, list(seen.batches()), sparsity=sparsity)
    return tool.apply_magnitude_pruning(proto, sparsity, global_sparsity=method.endswith("everywhere"))


def at_bytes(
    tool: ModuleType, method: str, source: Model, wanted: int, storage: Storage, seen: Samples
) -> tuple[Model, int] | None:
    """``source`` pruned so that it takes about ``wanted`` bytes with its entries in ``storage``.

    None where so many bytes leave no need for zeros.
    """
    prunable = pruned_weights(source.proto, prune(tool, "magnitude", source.proto, 0.5, seen))
    aim = wanted
    for _ in range(4):
        sparsity = _sparsity(source, prunable, aim, storage)
        if not LEAST_SPARSITY < sparsity < 1:
            return None
        model, taken = stored(source, prune(tool, method, source.proto, sparsity, seen), storage)
        if abs(taken / wanted - 1) <= NEAR_ENOUGH or method == "SparseGPT":
            break
        aim = round(aim * wanted / taken)
    return model, taken


def pruned_weights(before: onnx.ModelProto, after: onnx.ModelProto) -> dict[str, Weight]:
    """Weights of Conv, Gemm and MatMul that pruning changed, by their names in ``before``."""
    old, new = ({t.name: t for t in proto.graph.initializer} for proto in (before, after))
    nodes = {node.output[0]: node for node in after.graph.node}
    found = {}
    for node in before.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.output[0] not in nodes:
            continue
        name = node.input[1]
        now = nodes[node.output[0]].input[1]
        if name not in old or now not in new:
            continue
        values = numpy_helper.to_array(new[now])
        if np.array_equal(values, numpy_helper.to_array(old[name])):
            continue
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        found[name] = Weight(values, node.op_type != "Conv" and not transposed)
    return found


def stored(source: Model, pruned: onnx.ModelProto, storage: Storage) -> tuple[Model, int]:
    """``source`` with the pruned weights as they are after storing, and the bytes its file would take.

    No reader of such files exists but ours, so bytes are counted: the entries with their distances in the
    package's coding, or with a bit a place, whichever is smaller; not even nodes to decode them.
    """
    proto, total = onnx.ModelProto(), model_bytes(source)
    proto.CopyFrom(source.proto)
    weights = pruned_weights(source.proto, pruned)
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            weight = weights[tensor.name]
            rows = weight.rows
            n, m = rows.shape
            total += sparse_bytes(int(np.count_nonzero(rows)), n, m, storage) - weight.values.nbytes
            tensor.CopyFrom(numpy_helper.from_array(weight.like(rounded(rows, storage)), tensor.name))
    return Model(proto), total


def sparse_bytes(count: int, n: int, m: int, storage: Storage) -> int:
    """Of ``count`` entries of an (n, m) weight, with the steps of its rows."""
    steps = 0 if storage is FP16 else STEP_BYTES * n
    bitmap = -(-n * m // 8) + storage.bytes(count)
    return steps + min(entry_bytes(count, n * m, storage), bitmap, storage.bytes(n * m))


def rounded(rows: Values, storage: Storage) -> Values:
    """The non-zero entries of (n, m) to the nearest value of ``storage``, with the best step for each row."""
    if storage is FP16:
        return rows.astype(np.float16).astype(np.float64)
    rows, kept = rows.astype(np.float64), rows != 0
    levels = np.full((len(rows), 1), float(storage.levels))
    steps = steps_of(rows, kept.astype(np.float64), levels)
    return np.where(kept, nearest(rows, steps, levels) * steps, 0.0)


def _sparsity(source: Model, weights: Mapping[str, Weight], wanted: int, storage: Storage) -> float:
    """The same for all weights, so that the file takes ``wanted`` bytes; 1 where it cannot."""
    rest = model_bytes(source) - sum(w.values.nbytes for w in weights.values())

    def taken(sparsity: float) -> int:
        def of(weight: Weight) -> int:
            n, m = weight.rows.shape
            return sparse_bytes(round((1 - sparsity) * weight.values.size), n, m, storage)

        return rest + sum(map(of, weights.values()))

    return bisect(lambda sparsity: taken(sparsity) > wanted)


def bisect(too_little: Callable[[float], bool], steps: int = 20) -> float:
    """The least sparsity of 0..1 that is enough."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if too_little(middle) else (low, middle)
    return high


def structured(tool: ModuleType, method: str, source: Model, sparsity: float, seen: Samples) -> Model:
    """``source`` without this share of the channels of every chain that onnxsim can cut."""
    if method == "Wanda":
        return Model(
            tool.apply_structured_wanda_pruning(source.proto, list(seen.batches()), sparsity=sparsity)
        )
    return Model(tool.apply_structured_pruning(source.proto, sparsity))


def folded(source: Model) -> Model:
    """``source`` with BatchNormalization in its convolutions where that can be, as peers want it."""
    plain = simplified(raised(source, QUANTISED_OPSET, "Int8").proto)
    return Model(onnx.shape_inference.infer_shapes(plain))


class _Reader:
    """Feeds as ONNX Runtime's calibrators ask for them."""

    def __init__(self, samples: Samples) -> None:
        self._feeds = samples.batches()

    def get_next(self) -> dict[str, Values] | None:
        return next(self._feeds, None)


def quantisers(source: Model, seen: Samples) -> Iterator[tuple[str, Model | str]]:
    """ONNX Runtime's quantisers with the settings its documentation advises: a model, or what went wrong."""
    newer, ready = raised(source, QUANTISED_OPSET, "Int8").proto, folded(source).proto
    for name, quantise, taken in (
        ("dynamic int8", dynamic_int8, ready),
        ("static int8, QDQ", static_int8, ready),
        ("4 bits of MatMul", four_bits, newer),  # which simplifying makes a Gemm
    ):
        try:
            with quantization() as ort, tempfile.TemporaryDirectory() as folder:
                found = quantise(ort, taken, seen, Path(folder))
            if not any("MatMulNBits" in n.op_type or "Linear" in n.op_type for n in found.graph.node):
                yield name, "no layer that it takes"
            else:
                yield name, Model(found)
        except Exception as error:  # it raises what its parts raise
            yield name, " ".join(f"{type(error).__name__}: {error}".split())[:160]


def dynamic_int8(ort: ModuleType, ready: onnx.ModelProto, seen: Samples, folder: Path) -> onnx.ModelProto:
    """Weights alone are quantised before a run; for operators that it has a dynamic form of."""
    # ConvInteger of ONNX Runtime takes no signed weights on a CPU
    ort.quantize_dynamic(ready, folder / "out.onnx", per_channel=True, weight_type=ort.QuantType.QUInt8)
    return onnx.load(folder / "out.onnx")


def static_int8(ort: ModuleType, ready: onnx.ModelProto, seen: Samples, folder: Path) -> onnx.ModelProto:
    ort.quantize_static(ready, folder / "out.onnx", _Reader(seen), per_channel=True)
    return onnx.load(folder / "out.onnx")


def four_bits(ort: ModuleType, ready: onnx.ModelProto, seen: Samples, folder: Path) -> onnx.ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    copy = onnx.ModelProto()
    copy.CopyFrom(ready)  # it works in place
    quantiser = MatMulNBitsQuantizer(copy, block_size=BLOCK, is_symmetric=True)
    quantiser.process()
    found: onnx.ModelProto = quantiser.model.model
    return found
