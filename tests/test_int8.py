"""Int8 goes where the layers bear it, behind a rewrite, and only where it is faster."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import onnx_lrsd
from onnx_lrsd.cli import main
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.errors import ModelError, OptionError
from onnx_lrsd.facts import Verification
from onnx_lrsd.graph.model import Model, check, load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.int8.quantise import quantise
from onnx_lrsd.measure.compare import compare
from onnx_lrsd.report import report_table, report_to_json

MODELS = Path(__file__).parents[1] / "models"
MODEL, CALIB, EVAL = (MODELS / name for name in ("digits.onnx", "digits_calib.npz", "digits_eval.npz"))
WEIGHTED = ("Conv", "Gemm", "MatMul")


def samples_of(model: Model, path: Path) -> Samples:
    return onnx_lrsd.read_samples(path, inputs_of(model.proto))


def quantised_nodes(model: Model) -> int:
    """Counted apart from the tool: weighted nodes whose weight comes out of a DequantizeLinear."""
    made = {output: node.op_type for node in model.proto.graph.node for output in node.output}
    return sum(
        node.op_type in WEIGHTED and made.get(node.input[1]) == "DequantizeLinear"
        for node in model.proto.graph.node
    )


def test_within_a_wide_tolerance_every_layer_is_int8_and_the_file_a_quarter() -> None:
    model = load(MODEL)
    found = quantise(model, samples_of(model, CALIB), tolerance=0.5)
    weighted = sum(node.op_type in WEIGHTED for node in model.proto.graph.node)
    assert not found.left and found.nodes == weighted == quantised_nodes(found.model)
    check(found.model, model)
    measured = compare(model, found.model, samples_of(model, EVAL), latency=False)
    assert measured.before.bytes > 3.5 * measured.after.bytes
    assert measured.after.macs == measured.before.macs
    assert measured.outputs[0].relative_error < 0.01
    for field in ("producer_name", "doc_string", "metadata_props"):
        assert getattr(found.model.proto, field) == getattr(model.proto, field)
    assert found.model.proto.graph.input == model.proto.graph.input


def test_where_products_saturate_weights_take_seven_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, widest = load(MODEL), {}
    for saturating in (False, True):
        monkeypatch.setattr("onnx_lrsd.int8.quantise.saturates", lambda found=saturating: found)
        found = quantise(model, samples_of(model, CALIB), tolerance=0.5)
        weights = [numpy_helper.to_array(t) for t in found.model.proto.graph.initializer]
        widest[saturating] = max(abs(w.astype(int)).max() for w in weights if w.dtype == np.int8)
    assert widest == {False: 127, True: 64}


def test_a_narrow_tolerance_keeps_in_float_what_would_break_it() -> None:
    model = load(MODEL)
    samples = samples_of(model, CALIB)
    whole = quantise(model, samples, tolerance=1.0)
    some = quantise(model, samples, tolerance=whole.error / 4)
    assert some.left and 0 < some.nodes < whole.nodes
    assert some.error <= whole.error / 4
    assert quantised_nodes(some.model) == some.nodes == whole.nodes - len(some.left)
    assert some.left.keys() <= {node.name or node.output[0] for node in model.proto.graph.node}
    none = quantise(model, samples, tolerance=0.0)
    assert none.nodes == 0 and none.model is model


def test_layers_behind_an_operator_of_another_domain_are_int8_as_well() -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((16, 16)).astype(np.float32) / 4 for name in ("v", "w")}
    weights["b"] = rng.standard_normal(16).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "v"], ["h"]),
            helper.make_node("Gelu", ["h"], ["g"], domain="com.microsoft"),
            helper.make_node("ReduceMean", ["g"], ["m"], axes=[1], keepdims=0),
            helper.make_node("Gemm", ["m", "w", "b"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 16])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = load(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    x = rng.standard_normal((64, 4, 16)).astype(np.float32)
    found = quantise(model, onnx_lrsd.read_samples({"x": x}, inputs_of(model.proto)), tolerance=0.5)
    assert found.nodes == quantised_nodes(found.model) == 2 and not found.left


@pytest.mark.parametrize("shape", [(), (1,), (16,), (1, 1), (1, 16), (4, 1), (4, 16)])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_a_gemm_is_int8_with_a_c_of_any_shape(shape: tuple[int, ...], beta: float) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((16, 16)) / 4, "c": rng.standard_normal(shape)}
    batch = 4 if shape[:1] == (4,) else "N"
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "c"], ["y"], beta=beta, alpha=2.0)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 16])],
        [numpy_helper.from_array(np.asarray(v, dtype=np.float32), name) for name, v in weights.items()],
    )
    opset = helper.make_opsetid("", 17)
    model = load(helper.make_model(graph, opset_imports=[opset], ir_version=8))
    x = rng.standard_normal((64, 16)).astype(np.float32)
    samples = onnx_lrsd.read_samples({"x": x}, inputs_of(model.proto))
    found = quantise(model, samples, tolerance=0.5)
    assert found.nodes == quantised_nodes(found.model) == 1
    assert compare(model, found.model, samples, latency=False).error < 0.002


@pytest.mark.parametrize("linear", [True, False])
def test_a_weight_that_is_stored_sparse_is_int8(linear: bool) -> None:
    rng = np.random.default_rng(0)
    weight = np.where(rng.random((16, 16)) < 0.5, rng.standard_normal((16, 16)) / 4, 0).astype(np.float32)
    places = np.argwhere(weight)
    indices = places @ [16, 1] if linear else places
    values = numpy_helper.from_array(weight[tuple(places.T)], "w")
    stored = helper.make_sparse_tensor(values, numpy_helper.from_array(indices, "at"), weight.shape)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 16]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], sparse_initializer=[stored]
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    x = rng.standard_normal((64, 16)).astype(np.float32)
    samples = onnx_lrsd.read_samples({"x": x}, inputs_of(model.proto))
    found = quantise(model, samples, tolerance=0.5)
    assert found.nodes == quantised_nodes(found.model) == 1
    assert compare(model, found.model, samples, latency=False).error < 0.01


def test_weights_among_the_inputs_of_an_old_model_are_none_of_the_result() -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((16, 16)).astype(np.float32) / 4 for name in ("v", "w")}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 16]) for name in "xy"]
    defaults = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [16, 16]) for name in weights]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "v"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])],
        "g",
        [ends[0], *defaults],
        ends[1:],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=3))
    x = rng.standard_normal((64, 16)).astype(np.float32)
    samples = onnx_lrsd.read_samples({"x": x}, inputs_of(model.proto))
    found = quantise(model, samples, tolerance=0.5)
    assert found.nodes == quantised_nodes(found.model) == 2
    assert [value.name for value in found.model.proto.graph.input] == ["x"]
    assert compare(model, found.model, samples, latency=False).error < 0.01


def test_one_odd_sample_does_not_set_the_scale_for_all_others() -> None:
    model = load(MODEL)
    with np.load(CALIB) as stored:
        images = stored["image"][:160].copy()
    images[5] *= 30
    samples = onnx_lrsd.read_samples({"image": images}, inputs_of(model.proto))
    found = quantise(model, samples, tolerance=0.02)
    assert not found.left
    measured = compare(model, found.model, samples_of(model, EVAL), latency=False)
    assert measured.outputs[0].relative_error < 0.02


def test_an_old_opset_is_raised_and_batch_normalisation_folded() -> None:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((8, 4, 3, 3)),
        **{name: rng.random(8) + 0.5 for name in ("scale", "shift", "mean", "var")},
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8, 8, 8])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    opset = [helper.make_opsetid("", 10)]
    model = load(helper.make_model(graph, opset_imports=opset, ir_version=5))
    x = {"x": rng.standard_normal((40, 4, 8, 8)).astype(np.float32)}
    found = quantise(model, onnx_lrsd.read_samples(x, inputs_of(model.proto)), tolerance=0.1)
    assert found.nodes == 1 and found.error < 0.01
    assert not any(node.op_type == "BatchNormalization" for node in found.model.proto.graph.node)
    with pytest.raises(ModelError, match="quantised already"):
        quantise(found.model, onnx_lrsd.read_samples(x, inputs_of(model.proto)), tolerance=0.1)


@pytest.mark.slow
def test_the_report_names_the_share_of_each_step_and_the_fastest_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speeds = iter((2.0, 3.0, 1.5))  # of both, int8 alone, low rank alone

    def timed(before: Model, after: Model, samples: Samples, **options: object) -> Verification:
        speed = next(speeds)
        found = compare(before, after, samples, latency=False)
        return replace(found, latency_ratio=speed, latency_interval=(speed, speed))

    monkeypatch.setattr(sys.modules["onnx_lrsd.commands.optimize"], "compare", timed)
    result = onnx_lrsd.optimize(
        MODEL, CALIB, evaluation=EVAL, ratio=1.5, int8=True, samples=80, forms=("channel",)
    )
    int8 = result.report.int8
    assert int8 is not None and set(int8.steps) == {"both", "int8", "low rank"}
    assert int8.kept == "int8" and "handed back alone" in result.report.warnings[-1]
    assert result.report.promise is not None and not result.report.promise.kept
    assert all(layer.form == "dense" for layer in result.report.layers)
    assert quantised_nodes(result.model) == int8.nodes
    assert (
        json.loads(report_to_json(result.report))["int8"]["steps"]["int8"]["ratio"]["latency"]["median"] == 3
    )
    assert "low rank" in report_table(result.report)


@pytest.mark.slow
def test_low_rank_and_int8_multiply_on_the_command_line(tmp_path: Path) -> None:
    written = tmp_path / "out.onnx"
    options = ["--calib", str(CALIB), "--eval", str(EVAL), "--ratio", "2", "--int8", "-o", str(written)]
    done = CliRunner().invoke(main, ["optimize", str(MODEL), *options, "--json", str(tmp_path / "r.json")])
    assert done.exit_code in (0, 3), done.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["int8"]["kept"] in ("both", "int8") and report["seconds"]["int8"] > 0
    assert report["ratio"]["bytes"] > 3.5
    assert report["metric"]["after"] > report["metric"]["before"] - 0.02
    onnx.checker.check_model(str(written), full_check=True)


def test_a_model_that_the_quantiser_refuses_keeps_its_low_rank_and_the_report_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise ModelError("ONNX Runtime cannot quantise the model (no): leave out --int8.")

    monkeypatch.setattr(sys.modules["onnx_lrsd.int8.fit"], "quantise", refuse)
    result = onnx_lrsd.optimize(MODEL, CALIB, ratio=1.5, int8=True, samples=80, forms=("channel",))
    assert "cannot quantise" in result.report.warnings[0] and quantised_nodes(result.model) == 0
    assert result.report.int8 is not None and result.report.int8.nodes == 0
    assert result.report.promise is not None and result.report.promise.got > 1.5


def test_int8_without_samples_is_refused_with_the_remedy() -> None:
    with pytest.raises(OptionError, match=r"int8 takes .* give them with calibration"):
        onnx_lrsd.optimize(MODEL, int8=True)


def width_of_range(model: Model, tensor: str) -> float:
    """How wide the range is that ``tensor`` is rounded in."""
    scales = {t.name: numpy_helper.to_array(t) for t in model.proto.graph.initializer}
    (node,) = (n for n in model.proto.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == tensor)
    return 255 * float(scales[node.input[1]])


def test_ranges_hold_for_more_samples_than_they_were_taken_of() -> None:
    graph = onnx.parser.parse_graph(
        "g (float[n, 16] x) => (float[n, 16] y)"
        "{ s = Sigmoid (x) a = MatMul (x, w) b = MatMul (s, v) y = Add (a, b) }"
    )
    draw = np.random.default_rng(0).standard_normal
    for name in ("w", "v"):
        graph.initializer.append(numpy_helper.from_array(draw((16, 16)).astype(np.float32), name))
    opset = helper.make_opsetid("", 17)
    model = load(helper.make_model(graph, opset_imports=[opset], ir_version=8))
    few, many = (draw((count, 16)).astype(np.float32) for count in (64, 400))
    found = quantise(model, onnx_lrsd.read_samples({"x": few}, inputs_of(model.proto)), tolerance=0.5)
    width = width_of_range(found.model, "x")
    assert np.ptp(few) < width < 1.5 * np.ptp(few)
    assert np.abs(many).max() > np.abs(few).max() and np.ptp(many) < 1.1 * width
    assert width_of_range(found.model, "s") < 1.1, "what is bounded is given no room that nothing fills"


def test_the_error_of_int8_on_other_samples_is_as_it_was_measured() -> None:
    model = load(MODEL)
    found = quantise(model, samples_of(model, CALIB).some(120), tolerance=0.5)
    error = compare(model, found.model, samples_of(model, EVAL), latency=False).error
    assert error < 1.3 * found.error
