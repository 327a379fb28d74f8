"""The target size: weights in codes that decode to what was fitted, in one dense layer, in fewer bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from plain_layers import linear

import onnx_lrsd
from onnx_lrsd.cli import main
from onnx_lrsd.errors import DataError, ModelError, UnsupportedModelError
from onnx_lrsd.fit.calibrate import calibrate
from onnx_lrsd.graph.model import model_bytes, raised
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.load_cost import opening_cost
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.split import split
from onnx_lrsd.runtime.session import open_session, simplified
from onnx_lrsd.solver.codes.curve import coded_errors
from onnx_lrsd.solver.codes.fit import bridged, decode
from onnx_lrsd.solver.codes.rounding import Feedback, nearest, round_columns, settle, steps_of
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.effort import BRIEF, FAST
from onnx_lrsd.solver.layout import expand
from onnx_lrsd.solver.problem import Problem, pose
from onnx_lrsd.storage import STORAGES, pack_codes
from onnx_lrsd.targets import TARGETS, price
from onnx_lrsd.types import KINDS, Form, Layer, Moments, Pattern

EXAMPLE = Path(__file__).parent.parent / "models"
N, C = 24, 16
MIX = (("uint8", 2), ("int6", 3), ("int3", 5))
ENTRIES = Pattern("unstructured", 301)
FORMS = [
    *(Form("dense", weights=((name, N),)) for name in STORAGES),
    Form("channel", 10, weights=MIX),
    Form("channel", 10, ENTRIES, weights=MIX, entries="int4"),
    Form("channel", 10, weights=(("fp16", 10),)),
    Form("channel", 0, ENTRIES, entries="int4"),
    Form("channel", 0, Pattern("unstructured", 11), entries="uint8"),
    Form("channel", 3, ENTRIES, weights=(("fp16", 3),), entries="fp16"),
]
SPATIAL = [
    Form("spatial", 10, weights=MIX),
    Form("spatial", 10, ENTRIES, weights=MIX, entries="int2"),
    Form("spatial", 7, weights=(("fp16", 7),)),
]


def model_of(op: str, opset: int = 17, dtype: Any = np.float32) -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    shape = (N, C, 3, 3) if op == "Conv" else (N, C) if op == "Gemm" else (C, N)
    weight = (rng.standard_normal(shape)).astype(dtype)
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    pixels = [6, 6] if op == "Conv" else []
    of_op: dict[str, dict[str, Any]] = {"Conv": {"pads": [1] * 4}, "Gemm": {"transB": 1}, "MatMul": {}}
    attributes = of_op[op]
    inputs = ["x", "w"] if op == "MatMul" else ["x", "w", "b"]
    nodes = [
        onnx.helper.make_node(op, inputs, ["h"], **attributes),
        onnx.helper.make_node("Relu", ["h"], ["y"]),
    ]
    constants = {"w": weight, "b": rng.standard_normal(N).astype(dtype)}
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, ["n", C, *pixels])],
        [onnx.helper.make_tensor_value_info("y", kind, ["n", N, *pixels])],
        [onnx.numpy_helper.from_array(constants[name], name) for name in inputs[1:]],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


def correlated(width: int) -> Moments:
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((4 * width, width)) @ (
        np.eye(width) + rng.standard_normal((width, width)) / width**0.5
    )
    return Moments(name="y", count=len(rows), mean=rows.mean(axis=0), second=np.cov(rows.T, bias=True))


def rewritten(proto: onnx.ModelProto, form: Form) -> tuple[onnx_lrsd.Model, Layer, onnx_lrsd.Factors, Any]:
    model = onnx_lrsd.load(proto)
    graph = model.graph()
    (layer,), _ = find_layers(graph)
    problem = onnx_lrsd.pose(layer, *read_weight(graph, layer), correlated(layer.m))
    factors = onnx_lrsd.decompose(problem, form, effort=FAST)
    split(graph, layer, factors)
    return model.splice(graph), layer, factors, problem


CASES = [
    *((op, form) for op in ("Conv", "Gemm", "MatMul") for form in FORMS),
    *(("Conv", f) for f in SPATIAL),
]


@pytest.mark.parametrize(("op", "form"), CASES, ids=lambda value: str(value))
def test_a_runtime_folds_codes_to_the_weight_that_was_fitted(op: str, form: Form) -> None:
    packed, layer, factors, problem = rewritten(model_of(op), form)
    onnx.checker.check_model(packed.proto, full_check=True)
    assert factors.packed is not None
    weight = decode(layer, form, factors.packed)
    assert factors.error == pytest.approx(problem.error(weight), rel=1e-3, abs=1e-9)
    folded = simplified(packed.proto)
    kinds = [node.op_type for node in folded.graph.node]
    assert kinds in ([op, "Relu"], ["MatMul", "Add", "Relu"], ["Gemm", "Relu"])
    found = next(t for t in folded.graph.initializer if tuple(t.dims) == tuple(layer.shape))
    stored = onnx.numpy_helper.to_array(found)
    plain = weight.T if op == "MatMul" else weight
    np.testing.assert_allclose(
        stored, plain.reshape(layer.shape), rtol=1e-5, atol=1e-5 * np.abs(weight).max()
    )


@pytest.mark.parametrize("form", [FORMS[3], FORMS[8], SPATIAL[0], SPATIAL[1]], ids=str)
def test_what_a_plan_pays_is_what_the_file_takes(form: Form) -> None:  # and constants that layers share
    plain = model_of("Conv")
    packed, layer, _, _ = rewritten(plain, form)
    rest = plain.ByteSize() - price(layer, Form()).bytes
    assert model_bytes(packed) - rest == pytest.approx(price(layer, form).bytes, abs=1500)


def test_more_levels_lose_less() -> None:
    errors = [rewritten(model_of("Conv"), Form("dense", weights=((n, N),)))[2].error for n in STORAGES]
    assert errors == sorted(errors)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 4, 16]))
def test_rounding_looks_at_the_output(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    # Of a few rows one may lose by it, of two hundred together none was seen to.
    weight, metric = rng.standard_normal((200, 40)), np.asarray(correlated(40).second)
    counts = np.full((200, 1), float(levels))
    steps = steps_of(weight, np.diag(metric), counts)

    def missed(codes: np.ndarray) -> float:
        error = weight - codes * steps
        return float(np.sum((error @ metric) * error))

    plain = nearest(weight, steps, counts)
    rounded = round_columns(weight, Feedback.of(metric), steps, counts)
    settled = settle(weight, metric, rounded, steps, counts)
    assert missed(rounded) < missed(plain)
    assert missed(settled) <= missed(rounded) * (1 + 1e-5)
    mask = rng.random(weight.shape) < 0.5
    masked = np.where(mask, plain, 0)
    beside = settle(weight, metric, masked.astype(np.float32), steps, counts, mask)
    assert np.all(beside[~mask] == 0)
    assert missed(beside) <= missed(masked) * (1 + 1e-5)


@given(st.sampled_from([s for s in STORAGES.values() if s.levels]), st.integers(1, 100), st.integers(0, 99))
def test_words_hold_every_code(storage: Any, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, storage.levels, count).astype(np.uint8)
    planes = pack_codes(codes, storage)
    assert planes.size == storage.bytes(count)
    word = (256 ** np.arange(storage.planes)) @ planes.astype(np.int64)
    digits = [word // storage.levels**d % storage.levels for d in range(storage.digits)]
    assert np.array_equal(np.concatenate(digits)[:count], codes)


@given(st.sets(st.integers(0, 4000), min_size=1, max_size=50), st.sampled_from([16, 256]))
def test_no_gap_is_longer_than_its_code(chosen: set[int], reach: int) -> None:
    positions = bridged(np.array(sorted(chosen)), reach)
    assert chosen <= set(positions.tolist())
    assert np.all(np.diff(positions, prepend=-1) >= 1)
    assert np.all(np.diff(positions, prepend=-1) <= reach)
    assert positions[-1] == max(chosen)


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
def test_a_model_in_codes_is_named_as_one(op: str) -> None:
    packed, *_ = rewritten(model_of(op), FORMS[3])
    layers, declined = find_layers(packed.graph())
    assert not layers and any("unpack" in entry.reason for entry in declined)


def test_a_half_precision_model_stays_one() -> None:
    packed, *_ = rewritten(model_of("Conv", dtype=np.float16), SPATIAL[0])
    onnx.checker.check_model(packed.proto, full_check=True)
    x = np.random.default_rng(0).standard_normal((2, C, 6, 6)).astype(np.float16)
    assert open_session(packed.proto).run({"x": x})["y"].dtype == np.float16


def optimised(tmp_path: Path, *arguments: Any) -> tuple[Any, Path]:
    out = tmp_path / "out.onnx"
    common = [
        "optimize",
        EXAMPLE / "digits.onnx",
        "--calib",
        EXAMPLE / "digits_calib.npz",
        "--target",
        "size",
    ]
    result = CliRunner().invoke(main, [str(a) for a in (*common, "-o", out, *arguments)])
    return result, out


@pytest.mark.slow
def test_the_example_takes_an_eighth_and_unpacks_to_the_same_answers(tmp_path: Path) -> None:
    report_path, plan = tmp_path / "report.json", tmp_path / "plan.json"
    written = ("--json", report_path, "--save-plan", plan)
    codes = ("--forms", "dense,channel,channel-in,spatial,tucker")  # a width takes MACs away as well
    result, out = optimised(tmp_path, "--ratio", 8, "--eval", EXAMPLE / "digits_eval.npz", *codes, *written)
    assert result.exit_code == 0, result.stderr
    report = json.loads(report_path.read_text())
    assert report["ratio"]["bytes"] >= 8 * 0.995
    assert report["cost"] == "bytes" and report["after"]["macs"] == report["before"]["macs"]
    assert report["metric"]["after"] >= report["metric"]["before"] - 0.02
    assert report["loading"]["after"]["seconds"] > 0
    calibration = EXAMPLE / "digits_calib.npz"
    kept = onnx_lrsd.plan_from_json(plan.read_text())
    replayed = onnx_lrsd.optimize(EXAMPLE / "digits.onnx", calibration, plan=kept, evaluation=calibration)
    assert replayed.model.proto == onnx.load(out)
    plain = tmp_path / "plain.onnx"
    assert CliRunner().invoke(main, ["unpack", str(out), "-o", str(plain)]).exit_code == 0
    names = [node.op_type for node in onnx.load(plain).graph.node]
    assert names == [node.op_type for node in onnx.load(EXAMPLE / "digits.onnx").graph.node]
    with np.load(EXAMPLE / "digits_eval.npz") as data:
        name = next(key for key in data if key != "labels")
        feed = {name: data[name][:16].astype(np.float32)}
    (one,), (two,) = (open_session(onnx.load(p)).run(feed).values() for p in (out, plain))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_channels_are_cut_where_bytes_count_and_what_is_left_is_stored_in_codes(tmp_path: Path) -> None:
    report_path, plan = tmp_path / "report.json", tmp_path / "plan.json"
    written = ("--json", report_path, "--save-plan", plan, "--samples", 40, "--forms", "dense,width")
    result, out = optimised(tmp_path, "--ratio", 12, "--eval", EXAMPLE / "digits_eval.npz", *written)
    assert result.exit_code == 0, result.stderr
    report = json.loads(report_path.read_text())
    assert report["ratio"]["bytes"] >= 12 * 0.995 and report["ratio"]["macs"] > 1.2
    assert report["metric"]["after"] >= report["metric"]["before"] - 0.02
    cut = [layer for layer in report["layers"] if layer["gives"] or layer["reads"]]
    assert len(cut) >= 4 and any(layer["weights"] for layer in cut)
    after = sum(layer["parameters_after"] - layer["parameters_before"] for layer in report["layers"])
    assert report["after"]["parameters"] == report["before"]["parameters"] + after
    assert after < 0
    kept, calibration = onnx_lrsd.plan_from_json(plan.read_text()), EXAMPLE / "digits_calib.npz"
    assert kept.widths
    again = onnx_lrsd.optimize(
        EXAMPLE / "digits.onnx", calibration, plan=kept, evaluation=calibration, samples=40
    )
    assert again.model.proto == onnx.load(out)


@pytest.mark.slow
def test_one_storage_for_all_weights(tmp_path: Path) -> None:
    result, _ = optimised(tmp_path, "--weights", "int4", "--ratio", 6, "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.stderr
    layers = [layer for layer in json.loads((tmp_path / "r.json").read_text())["layers"] if layer["weights"]]
    assert layers and all(set(layer["weights"]) == {"int4"} for layer in layers)


@pytest.mark.slow
def test_parameters_count_numbers_not_bytes(tmp_path: Path) -> None:
    asked = ("--cost", "params", "--ratio", 3, "--forms", "dense,channel")  # a spatial one beside S is slow
    result, _ = optimised(tmp_path, *asked, "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "r.json").read_text())["ratio"]["parameters"] >= 3 * 0.995


@pytest.fixture(scope="module")
def convolution() -> Problem:
    """An inner convolution of the example, 64 x (64 x 9), on its calibration samples."""
    model = onnx_lrsd.load(EXAMPLE / "digits.onnx")
    graph = model.graph()
    samples = onnx_lrsd.read_samples(EXAMPLE / "digits_calib.npz", inputs_of(model.proto), limit=100)
    layers = [layer for layer in find_layers(graph)[0] if layer.name == "conv4"]
    known = calibrate(model, layers, samples, partial(read_weight, graph))
    (layer,) = known.layers
    return pose(layer, *read_weight(graph, layer), known.moments[layer.output])


def numbers(form: Form, layer: Layer) -> int:
    return price(layer, form).parameters


@pytest.mark.slow
def test_where_numbers_count_a_curve_tells_what_s_loses_between_the_shares_it_tries(
    convolution: Problem,
) -> None:
    layer, curve = convolution.layer, coded_errors(convolution, KINDS, "fp16")
    for kind in ("channel", "spatial"):
        with_s = sorted((numbers(f, layer), e) for f, e in curve.items() if f.entries and f.kind == kind)
        errors = [error for _, error in with_s]
        assert len(errors) > 8 and errors == sorted(errors, reverse=True)
    damped = convolution.for_entries()
    for form in [form for form in curve if form.entries][2::5]:
        fitted = decompose(damped, replace(form, weights=(), entries=""), effort=BRIEF)
        assert curve[form] == pytest.approx(damped.expected(expand(layer, fitted)), rel=0.25)


def test_some_rows_of_a_large_weight_tell_what_s_loses(
    convolution: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = coded_errors(convolution, KINDS, "fp16")
    for name, value in {"FEWEST_OUTPUTS": 32, "WORK": 1.0, "WORK_BESIDE": 1.0}.items():
        monkeypatch.setattr(f"onnx_lrsd.solver.codes.curve.{name}", value)
    some = coded_errors(convolution, KINDS, "fp16")
    tried = [form for form in some if form.entries]
    assert tried and all(form in whole for form in tried)
    for form in tried:
        assert some[form] == pytest.approx(whole[form], rel=0.25)


def test_rows_kept_apart_tell_what_s_loses_where_there_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an (m, m) matrix of a layer with few rows")

    monkeypatch.setattr("onnx_lrsd.solver.problem.Metric.matrix", refuse)
    n, m, count, rank = 12, 800, 60, 20
    layer = linear(n, m)
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2 * count, rank)) @ rng.standard_normal((rank, m))
    inputs += 0.3 * rng.standard_normal(inputs.shape)
    weight = rng.standard_normal((n, m)) / m**0.5
    posed, others = (
        pose(
            layer,
            weight,
            np.zeros(n),
            Moments(name="y", count=count, mean=np.zeros(m), rows=rows.astype(np.float32)),
        )
        for rows in (inputs[:count], inputs[count:])
    )
    curve = coded_errors(posed, KINDS, "fp16")
    tried = [form for form in curve if form.entries and not form.rank]
    assert tried
    for form in tried[:: len(tried) // 3]:
        fitted = decompose(posed.for_entries(), replace(form, weights=(), entries=""), effort=BRIEF)
        found = others.error(expand(layer, fitted))
        assert fitted.error < found < curve[form] < 3 * found  # half of the rows fit what all will
    shares = [half.energy * len(np.asarray(half.metric.rows)) for half in posed.halves()]
    assert sum(shares) == pytest.approx(posed.energy * count)


def test_an_old_opset_is_raised_or_the_remedy_named() -> None:
    old = onnx_lrsd.load(model_of("Gemm", opset=11))
    assert raised(old, 13, "It").proto.opset_import[0].version == 13
    assert raised(old, 11, "It") is old
    strange = model_of("Gemm", opset=11)
    strange.graph.node[1].op_type = "Nothing"
    with pytest.raises(ModelError, match="needs opset 13 and the model, of opset 11"):
        raised(onnx_lrsd.load(strange), 13, "It")


@pytest.mark.parametrize(("op", "opset"), [("Upsample", 9), ("Resize", 10)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scale", [0.5, 1.5, 2, 3])
def test_what_an_old_model_resizes_it_resizes_alike_in_a_new_opset(
    op: str, opset: int, mode: str, scale: float
) -> None:
    if op == "Upsample" and scale < 1:
        return
    x = np.random.default_rng(0).standard_normal((1, 2, 6, 6)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "s"], ["y"], mode=mode)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([1, 1, scale, scale], np.float32), "s")],
    )
    old = onnx_lrsd.load(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=4)
    )
    before, after = (open_session(m.proto).run({"x": x})["y"] for m in (old, raised(old, 13, "It")))
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-6)


def test_an_operator_that_would_mean_another_thing_is_not_raised() -> None:
    old = model_of("Gemm", opset=11)
    old.graph.node[1].op_type = "Hardmax"
    with pytest.raises(ModelError, match="needs opset 13 and the model, of opset 11"):
        raised(onnx_lrsd.load(old), 13, "It")


def test_a_plain_model_has_nothing_to_unpack() -> None:
    with pytest.raises(UnsupportedModelError, match="no weights in codes"):
        onnx_lrsd.unpack(EXAMPLE / "digits.onnx")


@pytest.mark.parametrize(
    "arguments",
    [("--weights", "int5"), ("--weights", "int4", "--target", "onnxruntime"), ("--int8",)],
    ids=" ".join,
)
def test_what_does_not_go_together_is_a_usage_error(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result, out = optimised(tmp_path, *arguments)
    assert result.exit_code == 2 and not out.exists()


def test_a_plan_in_codes_needs_a_target_that_writes_them() -> None:
    text = (
        '{"schema": 1, "target": "onnxruntime", "cost": "macs", "layers": '
        '{"y": {"kind": "dense", "weights": {"int4": 24}}}}'
    )
    plan = onnx_lrsd.plan_from_json(text.replace('"y"', '"h"'))
    with pytest.raises(DataError, match="stores h in codes"):
        onnx_lrsd.optimize(model_of("Gemm"), {"x": np.eye(8, C, dtype=np.float32)}, plan=plan)
    assert TARGETS["size"].stores_codes


def test_memory_that_opening_takes_is_not_that_of_the_process_which_asks() -> None:
    mine = np.ones(50_000_000)
    assert opening_cost(onnx_lrsd.load(EXAMPLE / "digits.onnx")).peak_bytes < mine.nbytes


def test_a_weight_that_a_runtime_would_not_fold_is_left() -> None:
    forms = TARGETS["size"].forms
    assert forms(linear(16_384, 16_384), ("dense",)) and not forms(linear(16_385, 16_384), ("dense",))


def test_what_cannot_be_smaller_comes_back_to_the_byte_whatever_its_opset() -> None:
    plain = model_of("Gemm", opset=11)
    x = np.random.default_rng(0).standard_normal((40, C)).astype(np.float32)
    found = onnx_lrsd.optimize(plain, {"x": x}, target="size", ratio=50)
    assert found.model.proto == plain
    assert found.report.promise is not None and not found.report.promise.kept


def test_an_s_alone_is_tried_further_only_where_it_may_win() -> None:
    rng = np.random.default_rng(0)
    layer = linear(96, 96)
    smooth = rng.standard_normal((96, 3)) @ rng.standard_normal((3, 96))
    spiky = np.where(rng.random((96, 96)) < 0.05, rng.standard_normal((96, 96)), 0.0)

    def densities(weight: np.ndarray) -> int:
        found = coded_errors(onnx_lrsd.pose(layer, weight, np.zeros(96), None), KINDS, None)
        return sum(bool(form.entries and not form.rank) for form in found)

    assert densities(smooth) == 1 and densities(spiky) == 3
