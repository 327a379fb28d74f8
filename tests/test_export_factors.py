"""Exported factors: the tensors of the written model under their names, and what each is to its layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from onnx_lrsd import cli
from onnx_lrsd.commands import export_factors as module
from onnx_lrsd.errors import DeviceError, LrsdError

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")


def a_model() -> onnx.ModelProto:
    """A convolution and a MatMul whose weights are of rank 8, and a Relu between."""
    rng = np.random.default_rng(0)
    conv = (rng.standard_normal((64, 8)) @ rng.standard_normal((8, 576)) / 50).reshape(64, 64, 3, 3)
    dense = rng.standard_normal((64, 8)) @ rng.standard_normal((8, 96)) / 8
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1, 0, 1, 0], strides=[1, 2]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("Transpose", ["r"], ["t"], "turn", perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["t", "v"], ["y"], "product"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64, 12, 13])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    tensors = [
        numpy_helper.from_array(conv.astype(np.float32), "w"),
        numpy_helper.from_array(dense.astype(np.float32), "v"),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, ["optimize", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, samples, its written model out.onnx by a plan, and its factors in 'factors'."""
    found = tmp_path_factory.mktemp("factors")
    onnx.save(a_model(), found / "net.onnx")
    x = np.random.default_rng(1).standard_normal((40, 64, 12, 13)).astype(np.float32)
    np.savez(found / "x.npz", x=x)
    forms = {"c": {"kind": "spatial", "rank": 20, "channels": 4}, "y": {"kind": "channel", "rank": 8}}
    plan = {"schema": 1, "target": "onnxruntime", "cost": "macs", "layers": forms}
    (found / "plan.json").write_text(json.dumps(plan))
    result = run(
        *(found / "net.onnx", "--calib", found / "x.npz", "--plan", found / "plan.json"),
        *("-o", found / "out.onnx", "--export-factors", found / "factors"),
    )
    assert result.exit_code == 0, result.stderr
    assert "Factors of 2 layers" in result.stderr
    return found


def index(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "factors" / "index.json").read_text())
    return {layer["name"]: layer for layer in facts["layers"]}


def test_the_tensors_are_those_of_the_written_model_under_their_names(folder: Path) -> None:
    written = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(folder / "out.onnx").graph.initializer
    }
    tensors = safetensors.load_file(folder / "factors" / "factors.safetensors")
    assert tensors
    for name, values in tensors.items():
        np.testing.assert_array_equal(values, written[name])
    named = {name for layer in index(folder).values() for name in layer["factors"].values()}
    assert named == set(tensors)


def test_the_index_says_what_each_tensor_is_to_its_layer(folder: Path) -> None:
    layers = index(folder)
    assert layers["conv"]["factors"].keys() == {"V", "U", "S", "channels", "bias"}
    assert layers["conv"]["form"].startswith("spatial 20 + S")
    assert layers["product"]["factors"].keys() >= {"V", "U"}


def test_the_factors_applied_as_the_index_says_give_the_weight_back(folder: Path) -> None:
    tensors = safetensors.load_file(folder / "factors" / "factors.safetensors")
    layer = index(folder)["product"]
    weight = numpy_helper.to_array(a_model().graph.initializer[1])
    found = tensors[layer["factors"]["V"]] @ tensors[layer["factors"]["U"]]
    assert np.linalg.norm(found - weight) < 0.1 * np.linalg.norm(weight)
    conv = index(folder)["conv"]
    v, u, s = (tensors[conv["factors"][role]] for role in "VUS")
    whole = np.einsum("nrij,rmkl->nmikjl", u, v).reshape(64, 64, 3, 3)
    whole[:, tensors[conv["factors"]["channels"]]] += s
    weight = numpy_helper.to_array(a_model().graph.initializer[0])
    assert np.linalg.norm(whole - weight) < 0.9 * np.linalg.norm(weight), "it has a higher rank than 20"
    attributes = {node["name"]: node["attributes"] for node in conv["nodes"]}
    assert attributes["conv/lrsd/V"]["strides"] == [1, 1] and attributes["conv/lrsd/U"]["strides"] == [1, 2]


@pytest.mark.parametrize("option", ["--dry-run", "--int8", "--target size"])
def test_codes_and_plans_have_no_factors_to_export(folder: Path, option: str) -> None:
    result = run(
        *(folder / "net.onnx", "--calib", folder / "x.npz", "--ratio", 2, "--export-factors", folder / "no"),
        *option.split(),
    )
    assert result.exit_code == 2 and "leave out" in result.stderr
    assert not (folder / "no").exists()


def test_without_safetensors_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(DeviceError, match=r"pip install onnx-lrsd\[factors\]"):
        module._safetensors()
    assert issubclass(DeviceError, LrsdError)
