"""The report says what was measured, in JSON and in a table, and flatters nobody."""

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_layers import conv

from onnx_lrsd.errors import DataError
from onnx_lrsd.facts import (
    Engine,
    GroupError,
    Inspection,
    Int8,
    LayerReport,
    ModelCost,
    OutputError,
    Promise,
    Report,
    ScoreChange,
    Verification,
)
from onnx_lrsd.report import (
    comparison_table,
    comparison_to_json,
    inspection_table,
    inspection_to_json,
    plan_from_json,
    plan_to_json,
    report_table,
    report_to_json,
)
from onnx_lrsd.report.names import LEAST_WIDTH, shortened
from onnx_lrsd.types import (
    CHANNELS,
    KINDS,
    N_OF_M,
    NONE,
    UNSTRUCTURED,
    Choice,
    Declined,
    Form,
    Pattern,
    Plan,
    Price,
)

VERIFIED = Verification(
    before=ModelCost(4_000_000, 1_000_000, 3_999_999, 2.0),
    after=ModelCost(2_000_000, 500_000, 2_000_000, 1.0),
    latency_ratio=1.998,
    latency_interval=(1.9, 2.1),
    outputs=(OutputError("scores", 0.001201),),
    samples=400,
    metric=ScoreChange("top1", 0.985, 0.9825, 400, (-0.0094, 0.0044)),
)
SPLIT = LayerReport(
    name="conv1",
    op="Conv",
    shape=(64, 64, 3, 3),
    form="spatial",
    rank=16,
    nonzeros=0,
    pattern="none",
    macs_before=10**7,
    macs_after=10**6,
    bytes_before=400,
    bytes_after=40,
    parameters_before=100,
    parameters_after=10,
    error=0.00101,
)
LEFT = LayerReport(
    name="head",
    op="Gemm",
    shape=(10, 64),
    form="dense",
    rank=0,
    nonzeros=0,
    pattern="none",
    macs_before=640,
    macs_after=640,
    bytes_before=40,
    bytes_after=40,
    parameters_before=10,
    parameters_after=10,
    error=0.0,
    reason="no smaller form pays",
)
REPORT = Report(
    input="net.onnx",
    output="net.lrsd.onnx",
    target="onnxruntime",
    cost="macs",
    calibration_samples=300,
    calibration_source="calib.npz",
    verification=VERIFIED,
    promise=Promise("ratio", 2.0, 1.9999995, False),
    layers=(SPLIT, LEFT),
    warnings=("Careful.",),
    seconds={"load": 0.5, "verify": 1.0},
    versions={"onnx-lrsd": "0.1.0"},
)


@pytest.mark.parametrize(("error", "text"), [(0.0012, "0.12 %"), (2.5, "250 %"), (1.2e287, "1.2e+289 %")])
def test_an_error_is_short_however_large(error: float, text: str) -> None:
    found = replace(VERIFIED, outputs=(OutputError("scores", error),))
    assert f"scores  {text} of its variance" in report_table(replace(REPORT, verification=found))


prices = st.builds(Price, st.integers(0, 2**50), st.integers(0, 2**40), st.integers(0, 2**42))
forms = st.just(Form()) | st.builds(
    Form,
    st.sampled_from([kind for kind in KINDS if kind != "dense"]),
    st.integers(1, 4096),
    st.builds(Pattern, st.just(CHANNELS), st.integers(1, 64))
    | st.builds(Pattern, st.just(UNSTRUCTURED), st.integers(1, 64))
    | st.builds(Pattern, st.just(N_OF_M), st.integers(0, 4), st.integers(1, 8))
    | st.just(NONE),
    st.integers(0, 64),
)
choices = st.builds(Choice, forms, st.floats(0, 1), prices, prices, st.text(max_size=20))
plans = st.builds(
    Plan,
    st.just("onnxruntime"),
    st.sampled_from(["macs", "parameters", "bytes"]),
    st.dictionaries(st.text(max_size=20), choices, max_size=5),
)


KEYS = (
    *(
        "schema",
        "tool",
        "model",
        "target",
        "cost",
        "calibration",
        "before",
        "after",
        "ratio",
        "outputs",
        "checked_on",
    ),
    *("metric", "promise", "int8", "loading", "tensorrt", "predicted", "layers", "whole", "warnings"),
    *("seconds", "time", "versions"),
)
LAYER_KEYS = (
    *(
        "name",
        "op",
        "shape",
        "form",
        "rank",
        "nonzeros",
        "pattern",
        "macs_before",
        "macs_after",
        "bytes_before",
    ),
    *(
        "bytes_after",
        "parameters_before",
        "parameters_after",
        "error",
        "reason",
        "kept",
        "of",
        "weights",
        "entries",
        "output",
        "gives",
        "reads",
    ),
)
PLAN = '{"schema": 1, "target": "onnxruntime", "cost": "macs", "layers": {"conv7": ENTRY}}'


def test_the_json_has_every_key_of_schema_1() -> None:
    facts = json.loads(report_to_json(REPORT))
    assert tuple(facts) == KEYS
    assert facts["schema"] == 1
    assert facts["tool"] == {"name": "onnx-lrsd", "version": "0.1.0"}
    assert facts["model"] == {"input": "net.onnx", "output": "net.lrsd.onnx"}
    assert facts["calibration"] == {"samples": 300, "source": "calib.npz"}
    assert facts["before"] == {
        "bytes": 4_000_000,
        "parameters": 1_000_000,
        "macs": 3_999_999,
        "latency_ms": 2.0,
    }
    latency = {"median": 1.998, "interval": [1.9, 2.1], "device": "cpu"}
    assert facts["ratio"] == {
        "bytes": 2.0,
        "parameters": 2.0,
        "macs": 3_999_999 / 2_000_000,
        "latency": latency,
    }
    assert facts["outputs"] == [
        {
            "name": "scores",
            "relative_error": 0.001201,
            "groups": [],
            "error_interval": None,
            "largest": None,
            "cosine": None,
            "agreement": None,
            "decided_alike": None,
            "of": "variance",
        }
    ]
    assert facts["metric"]["interval"] == [-0.0094, 0.0044]
    promise = {"kind": "ratio", "asked": 2.0, "got": 1.9999995, "kept": False}
    assert facts["promise"] == promise | {"gained": True, "confidence": None}
    assert tuple(facts["layers"][0]) == LAYER_KEYS
    assert set(facts["seconds"]) >= {"load", "calibrate", "decompose", "plan", "rewrite", "verify"}


def test_a_dry_run_has_nulls_where_nothing_was_measured() -> None:
    facts = json.loads(report_to_json(replace(REPORT, verification=None, promise=None, output="")))
    measured = ("before", "after", "ratio", "metric", "promise")
    assert [facts[key] for key in measured] == [None] * 5
    assert facts["model"]["output"] is None
    assert "nothing was rewritten" in report_table(replace(REPORT, verification=None, promise=None))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(value: float) -> None:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    found = replace(VERIFIED, outputs=(OutputError("y", value),), latency_ratio=value)
    text = report_to_json(replace(REPORT, verification=found))
    assert json.loads(text, parse_constant=refuse)["outputs"][0]["relative_error"] is None
    json.loads(comparison_to_json(found, "a", "b", "c"), parse_constant=refuse)
    assert "not finite" in report_table(replace(REPORT, verification=found))


def test_every_group_of_an_output_has_its_error_and_interval() -> None:
    groups = (
        GroupError(
            name="out[:, 0:4] Mul_5", slice="[:, 0:4]", relative_error=0.0053, interval=(0.005, 0.0061)
        ),
        GroupError(
            name="out[:, 4:22] Sigmoid",
            slice="[:, 4:22]",
            relative_error=0.025,
            interval=(0.0149, 0.041),
            logits_error=0.012,
        ),
    )
    output = OutputError("out", 0.0054, groups, (0.0149, 0.041))
    found = replace(VERIFIED, outputs=(OutputError("box", 0.001), output), warnings=("too few",))
    assert (found.error, found.error_interval, found.error_bound) == (0.025, (0.0149, 0.041), 0.041)
    table = report_table(replace(REPORT, verification=found, warnings=found.warnings))
    assert "out[:, 0:4] Mul_5  0.53 % of its variance (0.50 to 0.61 %)" in table
    assert "out[:, 4:22] Sigmoid  2.5 % of its variance (1.5 to 4.1 %)" in table
    assert "Warning: too few" in table
    assert max(map(len, table.splitlines())) <= 100
    table = comparison_table(found, "a.onnx", "b.onnx")
    assert table.count("out[:, 4:22] Sigmoid") == 1 and "Warning: too few" in table
    facts = json.loads(comparison_to_json(found, "a", "b", "c"))
    assert facts["outputs"][1]["error_interval"] == [0.0149, 0.041]
    assert [group["slice"] for group in facts["outputs"][1]["groups"]] == ["[:, 0:4]", "[:, 4:22]"]
    assert facts["outputs"][1]["groups"][1]["logits_error"] == 0.012
    assert facts["warnings"] == ["too few"]


def test_nothing_is_rounded_in_a_flattering_direction() -> None:
    table = report_table(REPORT)
    assert "1.99 x" in table  # of 3,999,999 MACs to 2,000,000, and of the latency
    assert "0.13 %" in table  # an output error of 0.1201 %
    assert "0.11 %" in table  # a layer error of 0.101 %
    assert "2 x fewer MACs asked, 1.99 x got: NOT KEPT" in table


def test_the_table_fits_a_terminal_and_groups_what_was_left() -> None:
    long = [
        replace(LEFT, name=f"a/very/long/{'and/deep/' * 9}name/{i}/MatMul", reason="too thin")
        for i in range(90)
    ]
    many = [replace(SPLIT, name=f"block{i}/{'x' * 90}/conv", shape=(64, i + 1, 3, 3)) for i in range(90)]
    report = replace(REPORT, layers=(*many, *long), warnings=("word " * 60,))
    for every in (False, True):
        lines = report_table(report, every=every).splitlines()
        assert max(map(len, lines)) <= 100
        assert any("90 x too thin" in line for line in lines)
        assert any("and 30 more" in line for line in lines) is not every
    assert "\033" not in report_table(report)
    assert "\033" in report_table(report, colour=True)


def test_a_report_for_tensorrt_has_its_command_and_the_nodes_that_are_2_4() -> None:
    command = "trtexec --onnx=net.lrsd.onnx --sparsity=enable " + "--minShapes=x:1 " * 9
    sparse = replace(SPLIT, form="channel", rank=0, nonzeros=1152, pattern=N_OF_M, kept=2, of=4)
    both = replace(sparse, name="conv2", rank=16)
    engine = Engine(command, ("conv1/lrsd/S", "conv2/lrsd/S"), ("It was not run.",))
    report = replace(REPORT, target="tensorrt", layers=(sparse, both), engine=engine)
    table = report_table(report)
    assert command in table.splitlines()  # in one line, to be copied
    assert "2:4, for sparse tensor cores: conv1/lrsd/S, conv2/lrsd/S" in table and "It was not run." in table
    rows = {line.split()[0]: line for line in table.splitlines() if line.startswith("conv")}
    assert " 2:4 " in rows["conv1"] and "channel 16 + 2:4" in rows["conv2"]
    facts = json.loads(report_to_json(report))
    assert facts["tensorrt"] == {
        "trtexec": command,
        "sparse": ["conv1/lrsd/S", "conv2/lrsd/S"],
        "notes": ["It was not run."],
    }
    assert (facts["layers"][0]["kept"], facts["layers"][0]["of"]) == (2, 4)
    assert json.loads(report_to_json(REPORT))["tensorrt"] is None
    assert "No weight is 2:4" in report_table(replace(report, engine=replace(engine, sparse=())))


def test_an_inspection_says_what_can_be_worked_on() -> None:
    layer = conv(64, 64, name="conv1")
    found = Inspection(
        ((layer, Price(900, 10, 40)),), (Declined("gate", "MatMul", "inside If"),), Price(1000, 12, 48)
    )
    facts = json.loads(inspection_to_json(found, "net.onnx"))
    assert facts["layers"] == [
        {"name": "conv1", "op": "Conv", "shape": [64, 64, 3, 3], "macs": 900, "parameters": 10, "bytes": 40}
    ]
    assert facts["declined"] == [{"name": "gate", "op": "MatMul", "reason": "inside If"}]
    table = inspection_table(found, "net.onnx")
    assert "90.0 % of the MACs" in table
    assert "1 x inside If: gate" in table


def test_kinds_of_reasons_why_channels_stay_take_one_paragraph() -> None:
    """A table for reading counts them; -v, the JSON and the page name each layer, and the node in its way."""
    stay = [
        Declined(f"query{i}", "MatMul", f"MatMul product{i} may mix them", f"product{i}") for i in range(9)
    ]
    stay.append(Declined("few", "Gemm", "they are fewer than 32"))
    last = Declined("head", "Gemm", "they are an output of the model")
    report = replace(REPORT, whole=(*stay, last))
    (said,) = [part for part in report_table(report).split("\n\n") if "All channels stay" in part]
    assert "10 layers give: 9 x MatMul may mix them; 1 x they are fewer than 32" in said
    assert len(said.splitlines()) <= 2 and "product3" not in said
    assert "1 x MatMul product3 may mix them: query3" in report_table(report, every=True)
    facts = json.loads(report_to_json(report))["whole"]
    assert [entry["name"] for entry in facts] == [*(entry.name for entry in stay), "head"]
    assert facts[3]["node"] == "product3" and facts[3]["kind"] == "MatMul may mix them"
    assert "All channels stay" not in report_table(replace(REPORT, whole=(last,)))
    assert "an output of the model: head" in report_table(replace(REPORT, whole=(last,)), every=True)


NAMES = st.lists(
    st.text("/.0123abconv", min_size=1, max_size=30)
    | st.builds("/encoder/layer.{}/attention/{}/query/MatMul".format, st.integers(0, 30), st.text("ab")),
    max_size=40,
)


@given(NAMES, st.integers(LEAST_WIDTH, 60))
def test_no_two_names_are_shortened_to_one_and_all_fit(names: list[str], width: int) -> None:
    found = shortened(names, width)
    assert found.keys() == {*names}
    assert len({*found.values()}) == len(found)
    assert all(len(text) <= width for text in found.values())
    assert all(found[name] == name for name in names if len(name) <= width)
    assert shortened(reversed(names), width) == found


@pytest.mark.parametrize("width", [22, 27, 60])
def test_shortened_names_keep_what_tells_them_apart(width: int) -> None:
    heads = [
        f"/model.22/cv{part}.{level}/cv{part}.{level}.{k}/conv/Conv"
        for part in (2, 3)
        for level in range(3)
        for k in range(2)
    ]
    found = shortened(heads, width)
    for head in heads:
        assert head.split("/")[3].removeprefix("cv") in found[head]
    deep = [f"{'outer/' * 9}block{index}/{'inner/' * 9}conv" for index in range(3)]
    assert all(name[59] in shortened(deep, width)[name] for name in deep)


def test_the_names_of_one_table_differ() -> None:
    names = [f"/model.22/cv{n}.{k}/cv{n}.{k}.0/{'deep/' * 12}Conv" for n in (2, 3) for k in range(3)]
    rows = [replace(SPLIT, name=name, shape=(64, k + 1, 3, 3)) for k, name in enumerate(names)]
    report = report_table(replace(REPORT, layers=(*rows, LEFT)))
    shown = [line.split()[0] for line in report.splitlines() if line.startswith("/model")]
    assert len(shown) == len({*shown}) == len(names)
    left = [replace(LEFT, name=name) for name in names]
    report = report_table(replace(REPORT, layers=(SPLIT, *left)), every=True)
    shown = re.findall(r"/mode\S*Conv", report)
    assert len(shown) == len({*shown}) == len(names)


def test_many_equal_layers_share_a_row_unless_each_is_asked_for() -> None:
    linear = replace(SPLIT, op="MatMul", shape=(384, 1536), form="channel")
    equal = [
        replace(linear, name=f"/layer.{k}/MatMul", rank=16 + k, macs_after=10**6 * (k + 1), error=0.001 * k)
        for k in range(4)
    ]
    report = replace(REPORT, layers=(SPLIT, *equal, LEFT))
    table = report_table(report)
    (row,) = [line for line in table.splitlines() if "384x1536" in line]
    assert row.startswith("4 x 384x1536  MatMul")
    for said in ("channel 16 to 19", "40.00 M", "10.00 M", "2.50 to 10.00 x", "0 to 0.30 %"):
        assert said in row
    assert "-v lists each" in table and "conv1" in table
    every = report_table(report, every=True)
    assert all(layer.name in every for layer in equal) and "4 x 384x1536" not in every
    few = report_table(replace(report, layers=(SPLIT, *equal[:3])))
    assert all(layer.name in few for layer in equal[:3]) and "-v lists each" not in few


def test_forms_without_a_rank_share_a_row_by_their_storage_or_width() -> None:
    dense = replace(SPLIT, form="dense", rank=0)
    stored = [
        replace(dense, name=f"conv{k}", weights={name: 64}) for k, name in enumerate(["int4", "int6"] * 2)
    ]
    (row,) = [
        line
        for line in report_table(replace(REPORT, layers=tuple(stored))).splitlines()
        if "4 x 64x64" in line
    ]
    assert " int6, int4 " in row and "dense" not in row
    narrow = [replace(dense, name=f"conv{k}", gives=(16 + k, 64)) for k in range(4)]
    assert " width 16 to 19 " in report_table(replace(REPORT, layers=tuple(narrow)))


def test_one_and_many_agree_with_their_words() -> None:
    one = Inspection((), (Declined("gate", "MatMul", "inside If"),), Price(1000, 12, 48))
    assert "\n1 node left as it is:" in inspection_table(one, "net.onnx")
    two = replace(one, declined=2 * one.declined)
    assert "\n2 nodes left as they are:" in inspection_table(two, "net.onnx")
    lone = replace(REPORT, calibration_samples=1, verification=replace(VERIFIED, samples=1))
    assert "calibrated on 1 sample of" in report_table(lone) and "over 1 sample\n" in report_table(lone)


@given(plans)
def test_a_plan_survives_its_json(plan: Plan) -> None:
    assert plan_from_json(plan_to_json(plan)) == plan


def test_a_plan_has_one_line_for_each_layer() -> None:
    price = Price(1, 2, 3)
    plan = Plan("onnxruntime", "macs", {name: Choice(Form(), 0.0, price, price) for name in "abc"})
    assert sum('"kind"' in line for line in plan_to_json(plan).splitlines()) == 3


def test_an_edited_plan_needs_only_kind_and_rank() -> None:
    plan = plan_from_json(PLAN.replace("ENTRY", '{"kind": "channel", "rank": 8}'))
    assert plan.choices["conv7"].form == Form("channel", 8)


@pytest.mark.parametrize(
    "entry",
    [
        '{"kind": "chanel", "rank": 8}',
        '{"kind": "channel"}',
        '{"kind": "channel", "rank": 0}',
        '{"kind": "channel", "rank": -1}',
        '{"kind": "channel", "rank": 8.5}',
        '{"kind": "channel", "rank": true}',
        '{"kind": "channel", "rank": "8"}',
        '{"kind": "channel", "rnk": 8}',
        '{"kind": "dense", "rank": 8}',
        '{"kind": "channel", "rank": 8, "error": "small"}',
        '{"kind": "channel", "rank": 8, "before": 7}',
        '{"kind": "channel", "rank": 8, "before": {"macs": "many"}}',
        '{"kind": ["channel"], "rank": 8}',
        '"channel 8"',
    ],
)
def test_a_wrong_entry_is_named_in_one_sentence(entry: str) -> None:
    with pytest.raises(DataError, match=r"^Layer conv7 of the plan .*\.$"):
        plan_from_json(PLAN.replace("ENTRY", entry))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"layers": {}}',
        '{"schema": 2, "target": "onnxruntime", "cost": "macs", "layers": {}}',
        '{"schema": 1, "cost": "macs", "layers": {}}',
        '{"schema": 1, "target": "onnxruntime", "cost": "money", "layers": {}}',
        '{"schema": 1, "target": "onnxruntime", "cost": "macs", "layers": {"a": {}, "a": {}}}',
    ],
)
def test_what_is_no_plan_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(DataError, match=r"^[^\n]+\.$"):
        plan_from_json(text)


@pytest.mark.parametrize(("count", "said"), [(0, ""), (1, "1 in float"), (9, "9 in float")])
def test_layers_that_do_not_bear_int8_are_named_worst_first(count: int, said: str) -> None:
    left = {f"conv{index}": 0.02 * (index + 1) for index in range(count)}
    step = REPORT.verification
    assert step is not None
    int8 = Int8("both", 7, left, {"low rank": step, "int8": step, "both": step})
    table = " ".join(report_table(replace(REPORT, int8=int8)).split())
    assert "7 nodes in int8" in table and said in table
    assert ("in float" in table) == bool(count)
    if count:
        named = re.findall(r"conv\d \((\d+)", table)
        assert named == sorted(named, key=int, reverse=True)
        assert f"conv{count - 1} ({2 * count}" in table
        assert len(named) == count or f"and {count - len(named)} more" in table


def test_a_comparison_says_how_alike_every_output_is_that_differs() -> None:
    boxes = GroupError(name="out[:, :4]", slice="[:, :4]", relative_error=0.0008, interval=(0.0005, 0.001))
    scores = GroupError(name="out[:, 4:]", slice="[:, 4:]", relative_error=0.378, interval=(0.3, 0.45))
    whole = OutputError("out", 0.0009, (boxes, scores), (0.3, 0.45), largest=2.5, cosine=0.999, agreement=0.5)
    same = OutputError("mask", 0.0)
    table = comparison_table(replace(VERIFIED, outputs=(whole, same)), "a.onnx", "b.onnx")
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert "out 0.999000 2.50e+00 50.00 %" in lines
    assert any("out[:, 4:] 38 % of its variance (30 to 45 %)" in line for line in lines)
    assert not any(line.startswith("mask") for line in lines), "what does not differ needs no row"
