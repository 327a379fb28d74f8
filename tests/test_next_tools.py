"""What people run beside the tool: each before and after ours, and what cannot be is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks import next_tools
from benchmarks.next_tools import OURS, TOOLS, Row
from benchmarks.prepared import read

NEEDS = {
    "onnxslim": "onnxslim",
    "onnxsim": "onnxsim",
    "float16, onnxconverter-common": "onnxconverter_common",
}
"""Packages of tools that ONNX Runtime does not bring."""
QUANTISERS = ("quantize_dynamic", "quantize_static")


def classifier(folder: Path) -> None:
    """Two convolutions, the second of rank 4, and a Gemm."""
    rng = np.random.default_rng(0)
    graph = onnx.parser.parse_graph(
        """net (float[n, 3, 8, 8] x) => (float[n, 4] y) {
            a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1)
            b = Relu (a)
            c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (b, w2)
            d = Relu (c)
            e = GlobalAveragePool (d)
            f = Flatten (e)
            y = Gemm (f, w3)
        }"""
    )
    second = rng.standard_normal((64, 4)) @ rng.standard_normal((4, 64 * 9)) / 50
    weights = {
        "w1": rng.standard_normal((64, 3, 3, 3)) / 5,
        "w2": second.reshape(64, 64, 3, 3),
        "w3": rng.standard_normal((64, 4)),
    }
    for name, weight in weights.items():
        graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), name))
    for number, node in enumerate(graph.node):
        node.name = f"node{number}"
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), folder / "model.onnx")
    images = rng.standard_normal((90, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "calib.npz", x=images[:40])
    np.savez(folder / "eval.npz", x=images[40:], labels=np.zeros(50, np.int64))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Row]]:
    """The rows of all tools, by their steps."""
    folder = tmp_path_factory.mktemp("next")
    classifier(folder)
    with pytest.MonkeyPatch.context() as patch:
        # a machine on which every rewrite pays: no promise here is of time
        patch.setattr("onnx_lrsd.measure.compare.pair_latency", lambda *_, **__: (2.0, 1.0, 2.0, (1.9, 2.1)))
        patch.setattr("onnx_lrsd.measure.layer_times.SECONDS", 0.01)
        rows = next_tools.rows(read(folder), 1.5, None, list(TOOLS))
        yield {row.steps: row for row in rows}


def row_of(found: dict[str, Row], steps: str, tool: str) -> Row:
    if tool in NEEDS:
        pytest.importorskip(NEEDS[tool])
    return found[steps]


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_what_we_wrote_is_taken_by_the_tool_and_gives_what_it_gave(found: dict[str, Row], tool: str) -> None:
    row = row_of(found, f"{OURS}, {tool}", tool)
    alone, ours = found[tool], found[OURS]
    assert row.error is not None and alone.error is not None and ours.error is not None, row.says
    assert row.error <= 3 * (alone.error + ours.error) + 1e-5
    assert row.macs == pytest.approx(ours.macs, rel=0.01)
    assert row.bytes is not None and ours.bytes is not None and row.bytes > 0.9 * ours.bytes


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_what_the_tool_wrote_is_worked_on_or_refused_in_a_sentence(found: dict[str, Row], tool: str) -> None:
    row = row_of(found, f"{tool}, {OURS}", tool)
    if tool in QUANTISERS:
        assert "already quantised" in row.says
    else:
        assert row.error is not None and row.macs is not None, row.says
        assert row.macs >= 1.5 and row.error < 0.01


@pytest.mark.slow
def test_polygraphy_runs_and_reads_what_we_wrote(found: dict[str, Row]) -> None:
    pytest.importorskip("polygraphy", reason="polygraphy is not installed")
    assert found[f"{OURS}, polygraphy run"].says == "runs"
    assert found[f"{OURS}, polygraphy inspect"].says == "runs"
