"""Node data: time, error and form by the names of nodes, as Model Explorer reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

import onnx_lrsd
from onnx_lrsd import cli
from onnx_lrsd.commands.node_data import node_data
from onnx_lrsd.facts import NodeData
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.report import node_data_files


def a_model(scale: float = 1.0) -> onnx.ModelProto:
    """Conv, Relu, Gemm, and an Identity without a name; ``scale`` is that of the Gemm's weight."""
    rng = np.random.default_rng(0)
    conv = (rng.standard_normal((16, 16, 3, 3)) / 12).astype(np.float32)
    dense = (scale * rng.standard_normal((1024, 10)) / 32).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "body/conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], "body/relu"),
        helper.make_node("Flatten", ["r"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "v"], ["p"], "head"),
        helper.make_node("Identity", ["p"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])
    tensors = [numpy_helper.from_array(conv, "w"), numpy_helper.from_array(dense, "v")]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that differ in the last layer, and what ``compare --node-data`` wrote of them."""
    found = tmp_path_factory.mktemp("nodes")
    onnx.save(a_model(), found / "a.onnx")
    onnx.save(a_model(1.1), found / "b.onnx")
    x = np.random.default_rng(1).standard_normal((40, 16, 8, 8)).astype(np.float32)
    np.savez(found / "x.npz", x=x)
    result = run(
        "compare",
        *(found / "a.onnx", found / "b.onnx", "--data", found / "x.npz", "-q"),
        *("--node-data", found / "out"),
    )
    assert result.exit_code == 0, result.stderr
    return found


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def values(path: Path) -> dict[str, Any]:
    facts = json.loads(path.read_text())
    assert facts.keys() <= {"name", "results", "gradient"}
    for result in facts["results"].values():
        assert result.keys() <= {"value", "bgColor"}
    return {name: result["value"] for name, result in facts["results"].items()}


def test_errors_and_times_stand_at_the_nodes_that_they_are_of(folder: Path) -> None:
    assert {path.name for path in (folder / "out").iterdir()} == {"b.time.json", "b.error.json"}
    errors = values(folder / "out" / "b.error.json")
    assert errors["body/conv"] == errors["body/relu"] == 0
    assert 1 <= errors["head"] < 5, "a tenth more is one per cent of the square, and more of the variance"
    times = values(folder / "out" / "b.time.json")
    assert times["body/conv"] > 0, "a convolution that is fused with its Relu is still the convolution"
    assert "body/relu" not in times and times["head"] > 0
    assert all(value > 0 for value in times.values())


@pytest.mark.slow
def test_forms_stand_at_the_nodes_of_their_layer(folder: Path) -> None:
    result = run(
        *("optimize", folder / "a.onnx", "--calib", folder / "x.npz", "-q", "-o", folder / "c.onnx"),
        *("--cost", "params", "--forms", "channel,spatial", "--ratio", 2, "--node-data", folder / "made"),
    )
    assert result.exit_code in (0, 3), result.stderr
    forms = values(folder / "made" / "c.form.json")
    there = {node.name for node in onnx.load(folder / "c.onnx").graph.node}
    assert forms and forms.keys() <= there
    written = {name: form for name, form in forms.items() if "/lrsd/" in name}
    assert all(form.startswith(("channel", "spatial")) for form in written.values())


def test_a_form_that_is_not_dense_has_a_colour_by_its_kind() -> None:
    forms = {"a": "spatial 8", "b": "spatial 16", "c": "dense", "d": "width 8 of 16"}
    found = NodeData(seconds={}, errors={"a": float("inf"), "b": 0.5}, forms=forms)
    files = {name: json.loads(text)["results"] for name, text in node_data_files(found).items()}
    assert files["error"] == {"b": {"value": 50.0}}
    colours = {name: entry.get("bgColor") for name, entry in files["form"].items()}
    assert colours["a"] == colours["b"] != colours["d"] and colours["c"] is None


def test_a_dry_run_has_no_nodes_to_speak_of(tmp_path: Path) -> None:
    result = run("optimize", tmp_path / "a.onnx", "--dry-run", "--node-data", tmp_path)
    assert result.exit_code == 2 and "leave out --dry-run" in result.stderr


def test_the_names_are_those_of_the_onnx_adapter(folder: Path) -> None:
    adapter = pytest.importorskip("model_explorer_onnx.main", reason="model-explorer-onnx is not installed")
    builder = pytest.importorskip("model_explorer.node_data_builder")
    graphs = adapter.ONNXAdapter().convert(str(folder / "b.onnx"), {})["graphs"]
    there = {node.id for graph in graphs for node in graph.nodes}
    one, two = (onnx_lrsd.load(folder / name) for name in ("a.onnx", "b.onnx"))
    samples = onnx_lrsd.read_samples(folder / "x.npz", inputs_of(one.proto))
    found = node_data(one, two, samples)
    assert {*found.seconds, *found.errors} <= there
    for path in (folder / "out").iterdir():
        facts = json.loads(path.read_text())
        results = {name: builder.NodeDataResult(**entry) for name, entry in facts["results"].items()}
        colours = [builder.GradientItem(**stop) for stop in facts["gradient"]]
        data = builder.GraphNodeData(results=results, name=facts["name"], gradient=colours)
        assert json.loads(data.to_json_string())["results"] == facts["results"]
        assert results.keys() <= there
