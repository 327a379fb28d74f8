"""What is said about two models was measured: errors, costs, speed and score."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lrsd.data.made_up import made_up_samples, random_samples
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.errors import DataError, VerificationError
from onnx_lrsd.facts import Verification
from onnx_lrsd.fit.calibrate import calibrate
from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.compare import _top1, compare, cost, time_pair, total_price
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.report import comparison_table
from onnx_lrsd.runtime.divergence import Divergence

value = helper.make_tensor_value_info
OPSET = helper.make_opsetid("", 17)
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((6, 4)).astype(np.float32)
X = RNG.standard_normal((50, 6)).astype(np.float32) + 3
X_MANY = np.random.default_rng(1).standard_normal((1500, 6)).astype(np.float32) + 3


def classifier(weight: np.ndarray, repeats: int = 0, batch: str | int = "N") -> Model:
    """Scores x W and their argmax; ``repeats`` costs time and changes nothing."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m0"])]
    for i in range(repeats):
        nodes.append(helper.make_node("Softsign", [f"m{i}"], [f"s{i}"]))
        nodes.append(helper.make_node("Mul", [f"s{i}", "zero"], [f"z{i}"]))
        nodes.append(helper.make_node("Add", [f"m{i}", f"z{i}"], [f"m{i + 1}"]))
    nodes.append(helper.make_node("Identity", [f"m{repeats}"], ["scores"]))
    nodes.append(helper.make_node("ArgMax", ["scores"], ["class"], axis=1, keepdims=0))
    graph = helper.make_graph(
        nodes,
        "classifier",
        [value("x", TensorProto.FLOAT, [batch, 6])],
        [value("class", TensorProto.INT64, [batch]), value("scores", TensorProto.FLOAT, [batch, 4])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(1, np.float32), "zero")],
    )
    return load(helper.make_model(graph, opset_imports=[OPSET], ir_version=8))


def samples(model: Model, x: np.ndarray = X, labels: Any = None) -> Samples:
    data = {"x": x} if labels is None else {"x": x, "labels": labels}
    return read_samples(data, inputs_of(model.proto))


def quickly(before: Model, after: Model, data: Samples, **options: Any) -> Verification:
    return compare(before, after, data, latency=False, **options)


def relative(old: np.ndarray, new: np.ndarray) -> float:
    return float(np.sum((new - old) ** 2) / np.sum((old - old.mean(axis=0)) ** 2))


def test_a_model_does_not_differ_from_itself() -> None:
    model = classifier(WEIGHT)
    found = compare(model, model, samples(model), seconds=0.1)
    assert [output.relative_error for output in found.outputs] == [0, 0]
    assert found.before.bytes == found.after.bytes == model.proto.ByteSize()
    assert found.samples == 50
    assert found.metric is None
    assert found.latency_interval is not None
    assert found.latency_interval[0] <= 1.3 and found.latency_interval[1] >= 1 / 1.3


def test_the_error_is_that_of_all_samples_however_they_are_batched() -> None:
    before, after = classifier(WEIGHT), classifier(WEIGHT + 0.1)
    found = quickly(before, after, samples(before), bytes_before=10, bytes_after=5)
    old, new = X @ WEIGHT, X @ (WEIGHT + np.float32(0.1))
    by_name = {output.name: output.relative_error for output in found.outputs}
    assert by_name["scores"] == pytest.approx(relative(old, new), rel=1e-4)
    assert by_name["class"] == pytest.approx(np.mean(old.argmax(1) != new.argmax(1)))
    assert (found.before.bytes, found.after.bytes) == (10, 5)


def test_where_samples_are_many_some_are_drawn_until_the_error_is_known() -> None:
    before, after = classifier(WEIGHT), classifier(WEIGHT + 0.1)
    ordered = X_MANY[np.argsort(X_MANY.sum(axis=1))]  # the first ones alone would say nothing of the others
    every = quickly(before, after, samples(before, ordered))
    some = quickly(before, after, samples(before, ordered), as_needed=True)
    assert every.samples == every.given == some.given == 1500
    assert some.samples < 1500
    errors = {output.name: output.relative_error for output in every.outputs}
    for output in some.outputs:
        assert output.error_interval is not None
        low, high = output.error_interval
        assert low <= errors[output.name] <= high
        assert high - low <= 0.2 * output.worst


def test_where_an_error_stays_unknown_or_a_score_is_asked_for_all_samples_count() -> None:
    changed = np.zeros((6, 4), np.float32)
    changed[0] = 0.1
    before = classifier(np.where(changed > 0, 0, WEIGHT))
    after = classifier(np.where(changed > 0, changed, WEIGHT))
    rare = X_MANY.copy()
    rare[:, 0] = np.random.default_rng(2).random(1500) < 0.02  # only these are moved
    given = quickly(before, after, samples(before, rare), as_needed=True)
    assert given.samples == 1500
    every = quickly(before, after, samples(before, rare))
    assert [x.relative_error for x in given.outputs] == pytest.approx(
        [x.relative_error for x in every.outputs]
    )
    labels = np.zeros(1500, np.int64)
    scored = quickly(before, after, samples(before, X_MANY, labels), as_needed=True)
    assert scored.samples == 1500
    assert scored.metric is not None and scored.metric.samples == 1500


@pytest.mark.parametrize("batch", ["N", 1, 5])
def test_macs_are_those_of_one_sample(batch: str | int) -> None:
    model = classifier(WEIGHT, batch=batch)
    data = samples(model)
    assert total_price(model, data).macs == 24
    assert total_price(model, data).parameters == 25
    feed = next(data.batches(1))
    assert cost(model, 7, feed, data.size_of(feed)).macs == 24
    assert quickly(model, model, data).before.macs == 24


def test_a_slower_model_is_found_slower() -> None:
    fast, slow = classifier(WEIGHT), classifier(WEIGHT, repeats=60)
    feed = {"x": np.repeat(X, 40, axis=0)}
    pace = time_pair(slow.proto, fast.proto, feed, seconds=0.2)
    assert pace.ratio > 1.5
    assert pace.interval[0] <= pace.ratio <= pace.interval[1]
    assert pace.before_ms > pace.after_ms > 0
    found = compare(fast, slow, samples(fast), seconds=0.2)
    assert found.latency_ratio is not None and found.latency_interval is not None
    assert found.latency_interval[0] <= found.latency_ratio <= found.latency_interval[1] < 1


def test_an_output_without_axes_counts_batch_by_batch() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[n, 4] x) => (float loss, float[n, 4] y)
        <float factor = {%s}> { y = Mul (x, factor)  loss = ReduceSum <keepdims = 0> (y) }"""
    before, after = (load(onnx.parser.parse_model(text % factor)) for factor in ("1", "1.1"))
    found = quickly(before, after, samples(before, np.abs(X_MANY[:, :4])))
    assert [output.relative_error > 0 for output in found.outputs] == [True, True]
    same = quickly(before, before, samples(before, np.abs(X_MANY[:, :4])))
    assert [output.relative_error for output in same.outputs] == [0, 0]


def test_models_with_other_inputs_or_outputs_are_not_compared() -> None:
    before = classifier(WEIGHT)
    for change, says in (("input", "differ in their inputs"), ("output", "differ in their outputs")):
        after = load(before.proto)
        getattr(after.proto.graph, change)[0].name = "other"
        with pytest.raises(VerificationError, match=says):
            quickly(before, after, samples(before))
    after = load(before.proto)
    after.proto.graph.output[0].type.tensor_type.elem_type = TensorProto.INT32
    with pytest.raises(VerificationError, match=r"class int64.*class int32"):
        quickly(before, after, samples(before))


def test_what_is_no_floating_number_is_said_to_differ_by_its_entries() -> None:
    before, after = classifier(WEIGHT), classifier(WEIGHT + np.float32(0.5) * WEIGHT[::-1])
    found = quickly(before, after, samples(before))
    classes, scores = found.outputs
    assert (classes.of, scores.of) == ("entries", "variance")
    said = comparison_table(found, "a", "b")
    assert "of its entries" in said and "of its variance" in said
    assert found.error_of == (classes if classes.worst > scores.worst else scores).of


def test_an_output_that_is_a_weight_is_an_output() -> None:
    def with_end(nodes: list[onnx.NodeProto], weight: str) -> Model:
        graph = helper.make_graph(
            [helper.make_node("Relu", ["x"], ["y"]), *nodes],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "end")],
            [numpy_helper.from_array(np.ones(3, np.float32), weight)],
        )
        return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))

    computed = with_end([helper.make_node("Identity", ["w"], ["end"])], "w")
    folded = with_end([], "end")
    found = compare(computed, folded, made_up_samples(computed), latency=False)
    assert [output.name for output in found.outputs] == ["y", "end"] and found.error == 0


def test_a_second_model_that_does_not_run_is_to_blame() -> None:
    before, after = classifier(WEIGHT), classifier(WEIGHT)
    after.proto.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(VerificationError, match=r"The second model fails where the first runs.*: do not"):
        quickly(before, after, samples(before))
    with pytest.raises(VerificationError, match="The second model fails"):
        quickly(before, classifier(WEIGHT[:5]), samples(before))


def test_both_models_find_their_own_external_data(tmp_path: Path) -> None:
    models = []
    for scale in (1, 2):
        folder = tmp_path / str(scale)
        folder.mkdir()
        onnx.save(
            classifier(scale * WEIGHT).proto,
            folder / "model.onnx",
            save_as_external_data=True,
            location="model.data",
            size_threshold=0,
        )
        models.append(load(folder / "model.onnx"))
    before, after = models
    found = compare(before, after, samples(before), seconds=0.05)
    assert found.outputs[1].relative_error == pytest.approx(relative(X @ WEIGHT, 2 * X @ WEIGHT), rel=1e-4)


def test_top1_counts_both_models_on_the_same_labels() -> None:
    before, after = classifier(WEIGHT), classifier(WEIGHT[:, ::-1].copy())
    labels = (X @ WEIGHT).argmax(1)
    found = quickly(before, after, samples(before, labels=labels)).metric
    assert found is not None
    assert (found.name, found.before, found.samples) == ("top1", 1.0, 50)
    assert found.after == pytest.approx(np.mean((X @ WEIGHT[:, ::-1]).argmax(1) == labels))
    assert found.interval[0] <= found.after - found.before <= found.interval[1] < 0


def test_top1_reads_scores_with_axes_of_one() -> None:
    graph = helper.make_graph(
        [helper.make_node("Unsqueeze", ["x", "axes"], ["y"])],
        "scores",
        [value("x", TensorProto.FLOAT, ["N", 6])],
        [value("y", TensorProto.FLOAT, ["N", 6, 1, 1])],
        [numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    model = load(helper.make_model(graph, opset_imports=[OPSET], ir_version=8))
    found = quickly(model, model, samples(model, labels=X.argmax(1)), metric="top1").metric
    assert found is not None and found.before == found.after == 1


def test_a_score_that_cannot_be_had_is_refused_only_when_asked_for() -> None:
    model = classifier(WEIGHT)
    for data in (samples(model), samples(model, labels=np.linspace(0, 1, 50))):
        assert quickly(model, model, data).metric is None
        with pytest.raises(DataError, match="no class labels for top1: add an integer array named labels"):
            quickly(model, model, data, metric="top1")
    with pytest.raises(DataError, match="25 labels for 50 samples: top1 wants a class for each"):
        quickly(model, model, samples(model, labels=np.zeros(25, int)), metric="top1")
    with pytest.raises(DataError, match="There is no metric 'top5': choose top1"):
        quickly(model, model, samples(model), metric="top5")
    del model.proto.graph.output[1]
    data = samples(model, labels=np.zeros(50, int))
    assert quickly(model, model, data).metric is None
    with pytest.raises(DataError, match="No output of the model holds the scores of classes"):
        quickly(model, model, data, metric="top1")


@pytest.mark.parametrize(("count", "won", "lost"), [(800, 0.005, 0.015), (200, 0.02, 0.05), (100, 0.0, 0.01)])
def test_the_interval_of_the_score_holds_the_truth_95_times_in_100(
    count: int, won: float, lost: float
) -> None:
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(2000):
        case = rng.choice(4, count, p=[won, lost, 0.8, 0.2 - won - lost])
        old, new = np.isin(case, [1, 2]).astype(int), np.isin(case, [0, 2]).astype(int)
        low, high = _top1(old, new, np.ones(count, int)).interval
        held += low <= won - lost <= high
    assert held / 2000 >= 0.94


def test_models_that_agree_everywhere_still_leave_room_for_doubt() -> None:
    same = np.arange(100)
    low, high = _top1(same, same, same).interval
    assert -0.05 < low < 0 < high < 0.05


def streamed(pairs: Sequence[tuple[Any, Any]]) -> float:
    error = Divergence()
    for old, new in pairs:
        error.add(old, new)
    return error.relative()


def test_the_error_keeps_its_digits_far_from_zero() -> None:
    old = 1e6 + RNG.standard_normal((64, 5))
    new = old + 0.1 * RNG.standard_normal((64, 5))
    got = streamed([(old[:20], new[:20]), (old[20:], new[20:])])
    assert got == pytest.approx(relative(old, new), rel=1e-6)


def test_outputs_that_are_no_numbers_count_where_they_differ() -> None:
    text = np.array(["a", "b", "c", "d"], dtype=object)
    assert streamed([(text, np.array(["a", "b", "c", "x"], dtype=object))]) == 0.25
    assert streamed([(np.array([True, False]), np.array([True, True]))]) == 0.5
    assert streamed([(["a", {}], ["a", {}])]) == 0
    assert streamed([(["a", "b"], ["a", "c"])]) == 0.5


def test_maps_and_sequences_of_numbers_are_compared_as_numbers() -> None:
    old = RNG.random((8, 3))
    new = old + 0.01
    maps = [[dict(enumerate(row)) for row in table] for table in (old, new)]
    assert streamed([(maps[0], maps[1])]) == pytest.approx(relative(old, new))
    assert streamed([(list(old), list(new))]) == pytest.approx(relative(old, new))


def test_nan_and_infinity_are_equal_to_themselves_and_to_nothing_else() -> None:
    old = np.array([[1.0, np.nan], [2.0, np.inf]])
    assert streamed([(old, old.copy())]) == 0
    assert streamed([(old, old + np.array([[0.1, 0], [0, 0]]))]) == pytest.approx(0.01 / 0.5)
    for broken in ([[1, 0], [2, np.inf]], [[1, np.nan], [2, -np.inf]], [[np.nan, np.nan], [2, np.inf]]):
        assert streamed([(old, np.array(broken))]) == np.inf


def test_what_never_varies_is_measured_against_its_size() -> None:
    assert streamed([(np.full((4, 1), 2.0), np.full((4, 1), 3.0))]) == pytest.approx(0.25)
    assert streamed([(np.array(2.0), np.array(3.0))]) == pytest.approx(0.25)
    assert streamed([(np.zeros((3, 2)), np.zeros((3, 2)))]) == 0
    assert streamed([(np.zeros((3, 2)), np.ones((3, 2)))]) == np.inf
    assert streamed([(np.zeros((0, 2)), np.zeros((0, 2)))]) == 0


def test_shapes_that_vary_do_not_break_the_comparison() -> None:
    old = [np.ones((2, n)) for n in (3, 4)]
    assert streamed([(o, o * 1.1) for o in old]) == pytest.approx(0.01)
    assert streamed([(old[0], old[0]), (old[0], old[0][:1])]) == pytest.approx(0.5)


def test_made_up_data_is_found_for_dimensions_that_matter() -> None:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "picky",
        [value("x", TensorProto.FLOAT, ["N", "L"])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([0, -1, 128]), "shape")],
    )
    model = load(helper.make_model(graph, opset_imports=[OPSET], ir_version=8))
    assert made_up_samples(model).by_input()["x"].shape == (1, 128)
    model.proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([0, -1, 1009]), "shape"))
    with pytest.raises(DataError, match="runs on no data that can be made up: give samples"):
        made_up_samples(model)
    assert random_samples(inputs_of(model.proto)).source == "made up"


def test_a_model_that_takes_one_sample_at_a_time_gets_one_whatever_it_declares() -> None:
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["x", "one"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["y"]),
        ],
        "one by one",
        [value("x", TensorProto.FLOAT, ["batch", 4, 6])],
        [value("y", TensorProto.FLOAT, ["batch", 10])],
        [
            numpy_helper.from_array(np.array([1, 24]), "one"),
            numpy_helper.from_array(rng.standard_normal((24, 10)).astype(np.float32), "w"),
        ],
    )
    model = load(helper.make_model(graph, opset_imports=[OPSET], ir_version=8))
    data = samples(model, rng.standard_normal((7, 4, 6)).astype(np.float32))
    assert quickly(model, model, data).outputs[0].relative_error == 0
    working = model.graph()
    layers, _ = find_layers(working)
    known = calibrate(model, layers, data, partial(read_weight, working))
    assert known.moments["y"].count == 7
