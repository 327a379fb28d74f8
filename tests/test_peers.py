"""What the comparison with other tools counts and keeps of their results."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import onnx
import pytest

from benchmarks import other_tools
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.graph.model import Model, load, model_bytes
from onnx_lrsd.storage import FP16, INT4, UINT8, Storage

N, M = 6, 40
DENSE = np.random.default_rng(0).standard_normal((M, N)).astype(np.float32)


def network(weight: np.ndarray, name: str = "w") -> Model:
    """x W for a weight (m, n), as a MatMul stores it."""
    graph = onnx.parser.parse_graph(f"g (float[b, {M}] x) => (float[b, {N}] y) {{ y = MatMul (x, {name}) }}")
    graph.initializer.extend([onnx.numpy_helper.from_array(weight, name)])
    return load(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8))


def halved() -> np.ndarray:
    """Every second input of each output is gone."""
    weight = DENSE.copy()
    weight[::2] = 0
    return weight


@pytest.mark.parametrize("storage", other_tools.VALUES)
def test_a_pruned_weight_is_counted_sparse_and_keeps_its_zeros_and_nearly_its_values(
    storage: Storage,
) -> None:
    source = network(DENSE)
    found, taken = other_tools.stored(source, network(halved(), "pruned_w").proto, storage)
    expected = other_tools.sparse_bytes(N * M // 2, N, M, storage)
    assert taken == model_bytes(source) - DENSE.nbytes + expected
    values = onnx.numpy_helper.to_array(found.proto.graph.initializer[0])
    assert np.array_equal(values == 0, halved() == 0)
    assert np.sum((values - halved()) ** 2) < 1.5 * storage.noise * np.sum(halved() ** 2) + 1e-4


def test_entries_take_the_cheapest_of_distances_a_bitmap_and_none_left_out() -> None:
    assert other_tools.sparse_bytes(100, 100, 100, FP16) < 100 * 4
    assert other_tools.sparse_bytes(5000, 100, 100, FP16) == 5000 * 2 + 10_000 // 8
    assert other_tools.sparse_bytes(9990, 100, 100, UINT8) == 10_000 + 100 * other_tools.STEP_BYTES


def test_what_needs_no_zeros_for_its_size_is_no_row_of_pruning() -> None:
    source, tool = network(DENSE), ModuleType("tool")
    seen = Samples(groups=({},))

    def smallest_out(proto: onnx.ModelProto, sparsity: float, global_sparsity: bool) -> onnx.ModelProto:
        kept = np.abs(DENSE) > np.quantile(np.abs(DENSE), sparsity)
        return network(DENSE * kept).proto

    tool.apply_magnitude_pruning = smallest_out  # type: ignore[attr-defined]
    wanted = model_bytes(source) - DENSE.nbytes + other_tools.sparse_bytes(N * M, N, M, INT4)
    assert other_tools.at_bytes(tool, "magnitude", source, wanted, INT4, seen) is None
    found = other_tools.at_bytes(tool, "magnitude", source, wanted, FP16, seen)
    assert found is not None and abs(found[1] / wanted - 1) < 0.02


def test_the_least_sparsity_that_is_enough_is_found() -> None:
    assert other_tools.bisect(lambda sparsity: sparsity < 0.37) == pytest.approx(0.37, abs=1e-5)
    assert other_tools.bisect(lambda sparsity: True) == 1.0
