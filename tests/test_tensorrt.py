"""What --target tensorrt writes is for TensorRT: 2:4 where it pays, plain operators, built by it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from plain_layers import conv, linear

import onnx_lrsd
from benchmarks.corpus import build
from onnx_lrsd.cli import main
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.errors import ModelError, OptionError
from onnx_lrsd.graph.model import Model, check, load, save
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.compare import Pace
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.split import split
from onnx_lrsd.passes.two_of_four import two_of_four
from onnx_lrsd.plan.allocate import spend
from onnx_lrsd.plan.planner import Planner
from onnx_lrsd.plan.units import Curves
from onnx_lrsd.run import Options, start
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.problem import pose
from onnx_lrsd.targets import TARGETS, price
from onnx_lrsd.targets.tensorrt import TENSORRT, TWO_OF_FOUR
from onnx_lrsd.targets.trtexec import engine
from onnx_lrsd.types import (
    CHANNEL,
    CHANNEL_IN,
    CHANNELS,
    COSTS,
    KINDS,
    SPATIAL,
    TUCKER,
    UNSTRUCTURED,
    ErrorCurve,
    Form,
    Layer,
    Pattern,
    Point,
    Price,
)

MODELS = Path(__file__).parents[1] / "models"
MODEL, CALIB = MODELS / "digits.onnx", MODELS / "digits_calib.npz"
NO_ENGINE = "tensorrt-rtx-cu12 is not installed: pip install -e '.[tensorrt]'"
NO_POLYGRAPHY = "polygraphy is not installed: pip install -e '.[tensorrt]'"
PLAIN = {"Conv", "Gemm", "MatMul", "Add", "Gather", "Concat"}
Values = npt.NDArray[Any]


def network(dtype: str = "float32", batch: int | str = "n") -> Model:
    """A Conv, a Gemm and a MatMul, with Relus between them."""
    rng = np.random.default_rng(0)
    element = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[dtype]
    tensors = {
        "v": rng.standard_normal((24, 16, 3, 3)) / 12,
        "c": rng.standard_normal(24),
        "w": rng.standard_normal((24 * 16, 32)) / 20,
        "d": rng.standard_normal(32),
        "u": rng.standard_normal((32, 16)) / 6,
    }
    nodes = [
        helper.make_node("Conv", ["x", "v", "c"], ["h1"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["h1"], ["h2"], "relu"),
        helper.make_node("Flatten", ["h2"], ["h3"], "flatten"),
        helper.make_node("Gemm", ["h3", "w", "d"], ["h4"], "gemm"),
        helper.make_node("MatMul", ["h4", "u"], ["y"], "matmul"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", element, [batch, 16, 4, 4])],
        [helper.make_tensor_value_info("y", element, [batch, 16])],
        [numpy_helper.from_array(value.astype(dtype), name) for name, value in tensors.items()],
    )
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def samples_for(model: Model, count: int = 4) -> Samples:
    x = np.random.default_rng(1).standard_normal((count, 16, 4, 4)).astype(np.float32)
    return read_samples({"x": x}, inputs_of(model.proto))


FORMS = [
    Form(CHANNEL, 8),
    Form(CHANNEL, 8, Pattern(CHANNELS, 4)),
    Form(CHANNEL, 0, TWO_OF_FOUR),
    Form(CHANNEL, 8, TWO_OF_FOUR),
    Form(CHANNEL_IN, 8),
    Form(SPATIAL, 8),
    Form(SPATIAL, 8, TWO_OF_FOUR),
    Form(TUCKER, 8, outer=8),
]


IN_CODES = [
    Form(CHANNEL, 8, weights=(("fp16", 8),)),
    Form(SPATIAL, 8, weights=(("uint8", 8),)),
    Form(SPATIAL, 8, weights=(("int6", 3), ("int4", 3), ("int2", 2))),
    Form(CHANNEL, 0, Pattern(UNSTRUCTURED, 100), entries="uint8"),
    Form(CHANNEL, 8, Pattern(UNSTRUCTURED, 60), weights=(("uint8", 8),), entries="int4"),
]
"""What the target size writes: TensorRT takes it too."""


def rewritten(model: Model, form: Form) -> Model:
    """Every layer in ``form``; Gemm and MatMul, which know no kernel, in the channel form."""
    graph = model.graph()
    for layer in find_layers(graph)[0]:
        fits = form if layer.kernel else replace(form, kind=CHANNEL, outer=0)
        split(graph, layer, decompose(pose(layer, *read_weight(graph, layer), None), fits))
    changed = model.splice(graph)
    check(changed, model)
    return changed


def weights(model: Model) -> dict[str, tuple[onnx.NodeProto, Values]]:
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.proto.graph.initializer}
    return {
        name: (node, stored[name])
        for node in model.proto.graph.node
        for name in node.input
        if name in stored and stored[name].ndim > 1
    }


def inputs_first(node: onnx.NodeProto, weight: Values) -> Values:
    """The weight with its input channels as the first axis."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return np.moveaxis(weight, 1 if node.op_type == "Conv" or transposed else 0, 0)


def sparse_by_hand(node: onnx.NodeProto, weight: Values) -> bool:
    """TensorRT's own definition, entry by entry."""
    columns = inputs_first(node, weight).reshape(weight.shape[1 if node.op_type == "Conv" else 0], -1)
    if node.op_type != "Conv":
        columns = inputs_first(node, weight)
    if len(columns) % 4:
        return False
    return all(
        sum(float(entry) != 0 for entry in column[start : start + 4]) <= 2
        for column in columns.T
        for start in range(0, len(columns), 4)
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_of_four_input_channels_two_are_zero_where_2_4_was_asked_and_nowhere_else(form: Form) -> None:
    changed = rewritten(network(), form)
    by_hand = {name for name, (node, weight) in weights(changed).items() if sparse_by_hand(node, weight)}
    asked = {name for name in weights(changed) if name.endswith("S_weight")}
    if form.pattern == TWO_OF_FOUR:
        if not form.rank:  # S alone is the whole weight: one node where there was one
            assert [node.op_type for node in changed.proto.graph.node if node.op_type != "Constant"] == [
                node.op_type for node in network().proto.graph.node
            ]
        assert by_hand == asked != set()
        named = {node.name for node in two_of_four(changed.graph())}
        assert named == {"conv/lrsd/S", "gemm/lrsd/S"}  # TensorRT takes no MatMul in half precision
    else:
        assert not by_hand and not two_of_four(changed.graph())


def test_polygraphy_reads_the_same_sparsity(capsys: pytest.CaptureFixture[str]) -> None:
    sparse = pytest.importorskip("polygraphy.tools.sparse", reason=NO_POLYGRAPHY)
    for form in FORMS:
        changed = rewritten(network(), form)
        pruner = sparse.SparsityPruner(changed.proto)
        pruner.check()
        found = {name for name, (node, weight) in weights(changed).items() if sparse_by_hand(node, weight)}
        assert pruner.sparse_tensors == found
    capsys.readouterr()


def layer_of(op: str, n: int, channels: int, kernel: int = 3, dtype: str = "float16", rows: int = 1) -> Layer:
    """A layer of images of 28 x 28, or of so many rows."""
    if op != "Conv":
        return linear(n, channels, op=op, shape=(n, channels), dtype=dtype, positions=rows)
    pads = (kernel // 2,) * 4
    return conv(n, channels, (kernel, kernel), pads=pads, dtype=dtype, positions=28 * 28, size=(28, 28))


@pytest.mark.parametrize(
    "layer, offered",
    [
        (layer_of("Conv", 256, 256), True),
        (layer_of("Conv", 512, 256, dtype="float32"), True),
        (layer_of("Gemm", 1024, 4096, rows=196), True),
        (layer_of("Gemm", 1024, 4096), False),  # reading the weight once a batch sets its time
        (layer_of("Conv", 256, 128), False),  # sparse kernels are no faster
        (layer_of("Conv", 128, 256), False),
        (layer_of("Conv", 260, 260), False),  # 16 channels are one step of sparse math
        (layer_of("Conv", 256, 256, kernel=1), False),  # memory, not arithmetic, sets its time
        (layer_of("MatMul", 1024, 4096, rows=196), False),
        (layer_of("Conv", 512, 512, dtype="bfloat16"), False),
    ],
    ids=lambda value: f"{value.op} {value.shape} {value.dtype}" if isinstance(value, Layer) else "",
)
def test_2_4_is_offered_where_sparse_tensor_cores_take_it_and_gain(layer: Layer, offered: bool) -> None:
    forms = TENSORRT.forms(layer, KINDS)
    assert any(form.pattern == TWO_OF_FOUR for form in forms) == offered
    dense = TENSORRT.predicted_time(layer, Form())
    assert all(TENSORRT.predicted_time(layer, form) <= 0.9 * dense for form in forms)
    assert all(form.rank % 16 == 0 and form.outer % 16 == 0 for form in forms)
    assert TWO_OF_FOUR not in {form.pattern for form in TARGETS["onnxruntime"].forms(layer, KINDS)}
    assert not any(form.pattern == TWO_OF_FOUR for form in TENSORRT.forms(layer, (SPATIAL, TUCKER)))


def test_2_4_promises_no_macs_and_no_bytes() -> None:
    layer = layer_of("Conv", 256, 256)
    dense, sparse = price(layer, Form()), price(layer, Form(CHANNEL, 0, TWO_OF_FOUR))
    assert sparse == dense
    assert TENSORRT.predicted_time(layer, Form(CHANNEL, 0, TWO_OF_FOUR)) < TENSORRT.predicted_time(
        layer, Form()
    )


def test_slack_in_macs_does_not_buy_back_time_for_nothing() -> None:
    layer = layer_of("Conv", 256, 256)
    dense = Point(Form(), 0.0, Price(100, 100, 100), 100.0)
    sparse = Point(Form(CHANNEL, 0, TWO_OF_FOUR), 0.1, Price(100, 100, 100), 86.0)
    curves = [ErrorCurve(layer, (dense, sparse))]
    macs = COSTS["macs"]
    assert spend(curves, {"y": sparse}, 10, macs, time=lambda point: point.time) == {"y": sparse}
    assert spend(curves, {"y": sparse}, 10, macs) == {"y": dense}


def test_2_4_takes_the_layers_where_it_saves_time_for_less_error_than_factors_do() -> None:
    """One layer has a low rank, one has none: within a budget of MACs, time is what is saved."""

    def curve(name: str, lost: Mapping[Form, float]) -> ErrorCurve:
        layer = replace(layer_of("Conv", 512, 512), output=name, name=name)
        forms = {Form(): 0.0, **lost}
        return ErrorCurve(
            layer,
            tuple(Point(f, e, price(layer, f), TENSORRT.predicted_time(layer, f)) for f, e in forms.items()),
        )

    def chosen(lost: float) -> Mapping[str, Form]:
        ranks = (64, 128, 256, 512)
        curves = [
            curve("narrow", {Form(SPATIAL, rank): 0.4 / rank for rank in ranks}),
            curve("full", {Form(CHANNEL, 0, TWO_OF_FOUR): lost} | {Form(SPATIAL, r): 100 / r for r in ranks}),
        ]
        joined = Curves(tuple(curves))
        dense = curves[0].points[0].price
        run, model = start(Options(target="tensorrt")), network()
        return Planner(run, model, joined, dense + dense, {}, samples_for(model)).for_ratio(1.5)

    assert chosen(1e-4)["full"] == Form(CHANNEL, 0, TWO_OF_FOUR) and chosen(1e-4)["narrow"].kind == SPATIAL
    assert set(chosen(0.1)) == {"narrow"}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine whatever is rewritten runs at half the speed."""

    def half(*_: Any, **__: Any) -> Pace:
        return Pace(0.5, (0.4, 0.6), 1.0, 2.0)

    monkeypatch.setattr("onnx_lrsd.measure.compare._pace", half)


@pytest.mark.slow
def test_the_latency_of_another_engine_decides_nothing(slow: None, tmp_path: Path) -> None:
    output = tmp_path / "half the MACs.onnx"
    found = onnx_lrsd.optimize(MODEL, CALIB, ratio=2, samples=60, target="tensorrt", output=output)
    report = found.report
    assert report.promise is not None and report.promise.kept and report.engine is not None
    assert not any("handed back" in warning for warning in report.warnings)
    before, after = ({node.op_type for node in m.proto.graph.node} for m in (load(MODEL), found.model))
    assert after <= before | PLAIN  # nothing that has to be folded
    table = onnx_lrsd.report_table(report)
    assert report.engine.command in table and "says nothing of TensorRT" in " ".join(table.split())
    again = onnx_lrsd.optimize(MODEL, CALIB, samples=60, plan=found.plan)  # the plan knows its target
    assert again.model.proto == found.model.proto and again.report.engine is not None
    here = onnx_lrsd.optimize(MODEL, CALIB, ratio=2, samples=60)
    assert here.report.promise is not None and not here.report.promise.kept and here.report.engine is None


def test_the_command_can_be_run_as_it_is_printed() -> None:
    model = rewritten(network("float16"), Form(CHANNEL, 0, TWO_OF_FOUR))
    told = engine(model, samples_for(model), Path("out folder/m.onnx"))
    assert shlex.split(told.command) == [
        "trtexec",
        "--onnx=out folder/m.onnx",
        "--saveEngine=out folder/m.engine",
        "--sparsity=enable",
        "--stronglyTyped",
        "--minShapes=x:1x16x4x4",
        "--optShapes=x:16x16x4x4",
        "--maxShapes=x:16x16x4x4",
    ]
    assert told.sparse == ("conv/lrsd/S", "gemm/lrsd/S") and len(told.notes) == 1
    rounded = rewritten(network(batch=2), Form(CHANNEL, 0, TWO_OF_FOUR))
    told = engine(rounded, samples_for(rounded), None)
    assert shlex.split(told.command)[1:] == [
        *("--onnx=model.onnx", "--saveEngine=model.engine", "--sparsity=enable", "--stronglyTyped")
    ]
    assert "--precision fp16" in told.notes[0]
    dense = engine(network(), samples_for(network()), None)
    assert "--stronglyTyped" in dense.command and not dense.sparse


def wide() -> tuple[onnx.ModelProto, dict[str, Values]]:
    """Two products of 256 channels with a Relu between, and samples for them."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((256, 256)).astype(np.float32) / 16 for name in "ab"}
    text = "g (float[n, 256] x) => (float[n, 256] y) { h = MatMul (x, a) r = Relu (h) y = MatMul (r, b) }"
    graph = onnx.parser.parse_graph(text)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in tensors.items())
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return proto, {"x": rng.standard_normal((60, 256)).astype(np.float32)}


def test_half_precision_is_written_verified_and_sparse_cores_take_it(tmp_path: Path) -> None:
    (model, samples), output = wide(), tmp_path / "half.onnx"
    found = onnx_lrsd.optimize(
        model, samples, target="tensorrt", ratio=1.2, forms=("width",), precision="fp16", output=output
    )
    written = onnx.load(output)
    onnx.checker.check_model(written, full_check=True)
    assert {t.data_type for t in written.graph.initializer if len(t.dims) > 1} == {TensorProto.FLOAT16}
    assert written.graph.input == model.graph.input
    assert [o.type for o in written.graph.output] == [o.type for o in model.graph.output]
    plain = onnx_lrsd.optimize(model, samples, plan=found.plan)
    verified, before = found.report.verification, plain.report.verification
    assert verified is not None and before is not None
    assert verified.after.bytes < 0.6 * before.after.bytes
    assert verified.error == pytest.approx(before.error, rel=0.05, abs=1e-5)
    assert found.report.engine is not None and "--stronglyTyped" in found.report.engine.command


def test_half_precision_is_refused_where_the_target_does_not_compute_in_it() -> None:
    with pytest.raises(OptionError, match="precision goes with target='tensorrt'"):
        onnx_lrsd.optimize(wide()[0], ratio=2, precision="fp16")


def test_a_model_that_cannot_be_converted_keeps_its_low_rank_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(proto: onnx.ModelProto) -> onnx.ModelProto:
        raise ModelError("ONNX Runtime cannot write it: leave out --precision.")

    monkeypatch.setattr("onnx_lrsd.fit.half.to_float16", refuses)
    found = onnx_lrsd.optimize(wide()[0], target="tensorrt", ratio=1.2, forms=("width",), precision="fp16")
    assert "leave out --precision" in " ".join(found.report.warnings)
    assert found.report.verification is not None
    assert found.report.verification.after.macs < found.report.verification.before.macs


def test_names_that_trtexec_would_cut_are_quoted() -> None:
    model = network()
    model.proto.graph.input[0].name = model.proto.graph.node[0].input[0] = "image:0"
    x = np.zeros((3, 16, 4, 4), np.float32)
    told = engine(model, read_samples({"image:0": x}, inputs_of(model.proto)), None)
    assert "--minShapes='image:0':1x16x4x4" in shlex.split(told.command)


def test_int8_of_onnx_runtime_is_not_for_tensorrt(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"int8 .* leave it out"):
        onnx_lrsd.optimize(MODEL, CALIB, ratio=2, target="tensorrt", int8=True)
    given = ["optimize", str(MODEL), "--calib", str(CALIB), "--target", "tensorrt", "--int8"]
    done = CliRunner().invoke(main, [*given, "-o", str(tmp_path / "o.onnx")])
    assert done.exit_code == 2 and "--int8" in done.output and not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", FORMS + IN_CODES, ids=str)
def test_tensorrt_parses_and_builds_every_form(form: Form, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason=NO_ENGINE)
    model = rewritten(network(dtype), form)
    save(model, tmp_path / "m.onnx")
    taken = build(tmp_path / "m.onnx", model, samples_for(model))
    assert taken.parsed and taken.size, taken.why


def test_tensorrt_parses_and_builds_the_example(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason=NO_ENGINE)
    found = onnx_lrsd.optimize(MODEL, CALIB, ratio=2, samples=60, target="tensorrt")
    samples = read_samples(CALIB, inputs_of(found.model.proto))
    assert any(not layer.left for layer in found.report.layers)
    save(found.model, tmp_path / "m.onnx")
    taken = build(tmp_path / "m.onnx", found.model, samples)
    assert taken.parsed and taken.size, taken.why
