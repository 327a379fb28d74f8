"""Where two models drift apart: tensor by tensor, by the names they share."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import onnx_lrsd
from onnx_lrsd import cli
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.errors import VerificationError
from onnx_lrsd.facts import Drift, TensorDrift
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.drift import drift
from onnx_lrsd.report import drift_table
from onnx_lrsd.runtime.likeness import Likeness
from onnx_lrsd.runtime.session import open_session

WIDTH = 32
VALUES = np.random.default_rng(1).standard_normal((40, WIDTH)).astype(np.float32)


def chain(*, changed: int | None = None, by: float = 0.1, prefix: str = "") -> Model:
    """Three products with rectifiers between them; the weight of one may be changed."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for index in range(3):
        weight = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
        noise = rng.standard_normal(weight.shape).astype(np.float32) / WIDTH**0.5
        weights.append(numpy_helper.from_array(weight + by * noise * (index == changed), f"w{index}"))
        product, activation = f"{prefix}product{index}", "y" if index == 2 else f"{prefix}relu{index}"
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [product], f"layer{index}"))
        nodes.append(helper.make_node("Relu", [product], [activation]))
        last = activation
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "chain",
        [value("x", TensorProto.FLOAT, ["n", WIDTH])],
        [value("y", TensorProto.FLOAT, ["n", WIDTH])],
        weights,
    )
    return onnx_lrsd.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def samples_for(model: Model) -> Samples:
    return read_samples({"x": VALUES}, inputs_of(model.proto))


def test_a_model_does_not_drift_from_itself() -> None:
    model = chain()
    found = drift(model, model, samples_for(model))
    assert [tensor.name for tensor in found.tensors] == [
        "product0",
        "relu0",
        "product1",
        "relu1",
        "product2",
        "y",
    ]
    assert found.first is None and found.most is None
    assert all(tensor.error == 0 and tensor.largest == 0 for tensor in found.tensors)
    assert all(tensor.cosine == pytest.approx(1) for tensor in found.tensors)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_the_layer_that_was_changed_is_named_first_and_most(changed: int) -> None:
    model = chain()
    found = drift(model, chain(changed=changed), samples_for(model))
    assert found.first is not None and found.first.node == f"layer{changed}"
    assert found.most is not None and found.most.name == f"product{changed}"
    assert 0.005 < found.most.error < 0.03, "a tenth of noise is a hundredth of the energy"
    assert found.most.inherited == 0


def test_every_tensor_inherits_the_error_of_what_it_is_computed_from() -> None:
    model = chain()
    tensors = drift(model, chain(changed=0), samples_for(model)).tensors
    for one, two in pairwise(tensors):
        assert two.inherited == one.error > 0


def test_the_figures_of_a_tensor_are_those_of_its_values() -> None:
    model, other = chain(), chain(changed=1)
    last = drift(model, other, samples_for(model)).tensors[-1]
    one, two = (open_session(m.proto).run({"x": VALUES})["y"] for m in (model, other))
    one, two = one.astype(np.float64), two.astype(np.float64)
    assert last.error == pytest.approx(np.sum((two - one) ** 2) / np.sum((one - one.mean(axis=0)) ** 2))
    assert last.largest == pytest.approx(np.abs(two - one).max())
    assert last.cosine == pytest.approx(np.sum(one * two) / np.linalg.norm(one) / np.linalg.norm(two))


def test_a_model_that_another_tool_quantised_is_compared_as_well(tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    model = chain()
    onnx.save(model.proto, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "int8.onnx")
    found = drift(model, onnx_lrsd.load(tmp_path / "int8.onnx"), samples_for(model))
    assert [tensor.name for tensor in found.tensors][::2] == ["product0", "product1", "product2"]
    assert all(1e-6 < tensor.error < 1e-2 for tensor in found.tensors)


def test_a_rectifier_left_to_the_range_of_a_quantiser_is_no_difference() -> None:
    model, other = chain(), chain()
    nodes = other.proto.graph.node
    scale = numpy_helper.from_array(np.array(4 / 255, np.float32), "scale")
    zero = numpy_helper.from_array(np.array(0, np.uint8), "zero")
    other.proto.graph.initializer.extend([scale, zero])
    nodes[0].output[0] = "relu0"  # its values below zero are cut off as they are quantised
    nodes[1].CopyFrom(helper.make_node("QuantizeLinear", ["relu0", "scale", "zero"], ["codes"]))
    nodes.insert(2, helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["relu0_back"]))
    nodes[3].input[0] = "relu0_back"
    found = {tensor.name: tensor.error for tensor in drift(model, other, samples_for(model)).tensors}
    assert 1e-6 < found["relu0"] < 1e-3
    assert found["product1"] < 1e-3


@pytest.mark.parametrize("mask", [-10_000.0, np.finfo(np.float32).min, -np.inf])
def test_a_mask_does_not_hide_an_error_of_the_scores(mask: float) -> None:
    def masked(changed: int | None) -> Model:
        model = chain(changed=changed)
        graph = model.proto.graph
        hidden = np.where(np.arange(WIDTH) < WIDTH // 2, mask, 0).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(hidden, "mask"))
        graph.node[-1].CopyFrom(helper.make_node("Softmax", ["scores"], ["y"]))
        graph.node.insert(len(graph.node) - 1, helper.make_node("Add", ["product2", "mask"], ["scores"]))
        return model

    model = masked(None)
    found = {tensor.name: tensor for tensor in drift(model, masked(2), samples_for(model)).tensors}
    assert found["product2"].error / 5 < found["scores"].error < found["product2"].error * 5


def test_names_that_only_one_model_has_are_passed_over() -> None:
    model = chain()
    found = drift(model, chain(changed=0, prefix="other_"), samples_for(model))
    assert [tensor.name for tensor in found.tensors] == ["y"]
    assert found.first is not None and found.first.name == "y"


def test_models_without_a_shared_name_are_refused_with_the_remedy() -> None:
    model, other = chain(), chain(prefix="other_")
    other.proto.graph.node[-1].output[0] = other.proto.graph.output[0].name = "z"
    with pytest.raises(VerificationError, match="--layers"):
        drift(model, other, samples_for(model))


def test_values_that_are_not_finite_in_both_models_are_no_difference() -> None:
    model = chain()
    last = model.proto.graph.node[-1]
    last.CopyFrom(helper.make_node("Log", ["product2"], ["y"]))  # NaN for what is below 0
    found = drift(model, model, samples_for(model)).tensors[-1]
    assert found.name == "y" and found.error == 0 and found.largest == 0


def test_the_command_says_it_in_a_table_in_json_and_on_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, model in (("a.onnx", chain()), ("b.onnx", chain(changed=1))):
        onnx.save(model.proto, tmp_path / name)
    np.savez(tmp_path / "data.npz", x=VALUES)
    written = tmp_path / "c.json"
    arguments = ["compare", "a.onnx", "b.onnx", "--data", "data.npz", "--layers", "--json", "c.json"]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.main, [*arguments, "--html", "c.html"])
    assert result.exit_code == 0, result.output
    assert "rises most    product1 (MatMul)" in result.stderr
    facts = json.loads(written.read_text(encoding="utf-8"))
    assert facts["drift"] == {"first": "product1", "most": "product1"}
    assert [tensor["error"] > 0 for tensor in facts["tensors"]] == [False, False, True, True, True, True]
    again = CliRunner().invoke(cli.main, ["report", "c.json", "-o", "again.html"])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "c.html").read_bytes()


def test_a_long_graph_is_told_by_the_tensors_whose_error_rises_most() -> None:
    rising = [
        TensorDrift(
            name=f"t{i}", node=f"n{i}", op="Add", error=i / 1000, inherited=0.0, cosine=1.0, largest=0.1
        )
        for i in range(200)
    ]
    table = drift_table(Drift(tuple(rising)))
    assert "t199" in table and "t150" in table and "t100 " not in table and "140 more" in table
    assert "t100 " in drift_table(Drift(tuple(rising)), every=True)
    assert "rounding" in drift_table(Drift(tuple(rising[:1])))


def test_likeness_passes_over_what_is_not_finite_and_counts_equal_classes() -> None:
    likeness = Likeness()
    old = np.array([[1.0, 2.0, 0.0], [3.0, 1.0, np.inf], [0.0, 0.0, 1.0], [5.0, 0.0, 0.0]], np.float32)
    new = np.array([[2.0, 1.0, 0.0], [3.0, 1.0, np.inf], [0.0, 0.0, 1.5], [5.0, 0.0, 0.0]], np.float32)
    likeness.add(old, new, size=4)
    assert likeness.agreement == 0.75 and likeness.largest == 1.0
    one, two = (values[np.isfinite(values)] for values in (old, new))
    assert likeness.cosine == pytest.approx(one @ two / np.linalg.norm(one) / np.linalg.norm(two))


def test_likeness_of_nothing_is_not_known() -> None:
    likeness = Likeness()
    likeness.add(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), size=2)
    likeness.add(np.zeros((2, 3), np.int64), np.zeros((2, 3), np.int64), size=2)
    likeness.add(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32), size=2)
    assert likeness.cosine is None and likeness.largest == 0
    positions = Likeness()
    positions.add(np.ones((6, 3), np.float32), np.ones((6, 3), np.float32), size=2)
    assert positions.agreement is None, "rows are positions, not samples"
