"""An output that joins unlike things is judged part by part."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.facts import OutputError
from onnx_lrsd.fit.sensitivity import Reference
from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.compare import compare, groups_on
from onnx_lrsd.measure.judge import OutputGroup, output_groups

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def model(text: str, **weights: Any) -> Model:
    proto = onnx.parser.parse_model(f"{HEAD} {text}")
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()
    )
    return load(proto)


def detector(
    box: float = 1.0, score: float = 1.0, ending: str = "out = Concat <axis = 1> (boxes, scores)"
) -> Model:
    """Boxes of 0 to 320 in channels 0 to 3, scores of 0 to 1 in 4 to 9, at 20 places."""
    return model(
        f"""g (float[n, 10, 20] x) => (float[n, 10, 20] out) {{
            raw, logits = Split <axis = 1> (x, parts)
            scaled = Mul (raw, box)  boxes = Mul (scaled, hundred)
            sharper = Mul (logits, score)  scores = Sigmoid (sharper)
            {ending}
        }}""",
        parts=np.array([4, 6]),
        box=np.float32(box),
        hundred=np.float32(100),
        score=np.float32(score),
        order=np.array([0, 20, 10]),
    )


def samples(model: Model, count: int = 40) -> Samples:
    x = np.random.default_rng(0).standard_normal((count, 10, 20)).astype(np.float32)
    return read_samples({"x": x}, inputs_of(model.proto))


def errors(before: Model, after: Model) -> OutputError:
    return compare(before, after, samples(before), latency=False).outputs[0]


def found_groups(found: Model, rows: np.ndarray) -> tuple[OutputGroup, ...]:
    feed = next(samples(found).batches(2))
    name = found.proto.graph.output[0].name
    return output_groups(found, feed, {name: [rows]}, {})[name]


@pytest.mark.parametrize(
    ("ending", "slices"),
    [
        ("out = Concat <axis = 1> (boxes, scores)", ["[:, 0:4]", "[:, 4:10]"]),
        ("both = Concat <axis = -2> (boxes, scores)  out = Identity (both)", ["[:, 0:4]", "[:, 4:10]"]),
        (
            "both = Concat <axis = 1> (boxes, scores)  out = Transpose <perm = [0, 2, 1]> (both)",
            ["[:, :, 0:4]", "[:, :, 4:10]"],
        ),
        (
            "t = Transpose <perm = [0, 2, 1]> (scores)  s = Transpose <perm = [0, 2, 1]> (t)"
            "both = Concat <axis = 1> (s, boxes)  out = Mul (both, hundred)",
            ["[:, 0:6]", "[:, 6:10]"],
        ),
    ],
)
def test_scores_beside_boxes_count_for_themselves(ending: str, slices: list[str]) -> None:
    before, after = detector(ending=ending), detector(score=0.1, ending=ending)
    found = errors(before, after)
    assert [group.slice for group in found.groups] == slices
    assert found.relative_error < 1e-3
    worst = max(found.groups, key=lambda group: group.relative_error)
    assert worst.slice == slices["s, boxes" not in ending]
    assert found.worst == worst.relative_error > 0.1


JOINED = {
    "boxes and scores are joined on each level": """
        p = Sigmoid (sharper)  b, scores = Split <axis = 2> (p, parts)  boxes = Mul (b, hundred)
        level = Concat <axis = 2> (boxes, scores)  flat = Reshape (level, shape)""",
    "boxes and scores are joined in front of another Concat": """
        b, logits = Split <axis = 2> (sharper, parts)  boxes = Mul (b, hundred)  scores = Sigmoid (logits)
        level = Concat <axis = 2> (boxes, scores)  flat = Concat <axis = 1> (level, level)""",
    "boxes and scores are of one convolution": "flat = Mul (sharper, scales)",
}


@pytest.mark.parametrize("joined", list(JOINED))
def test_scores_count_for_themselves_where_levels_are_joined_last(joined: str) -> None:
    def detector_of_levels(sharpness: float) -> Model:
        return model(
            f"""g (float[n, 20, 10] x) => (float[n, places, 10] out) {{
                sharper = Mul (x, factor)  {JOINED[joined]}  out = Concat <axis = 1> (flat, flat) }}""",
            factor=np.array([1] * 4 + [sharpness] * 6, np.float32),
            parts=np.array([4, 6]),
            hundred=np.float32(100),
            scales=np.array([100] * 4 + [1] * 6, np.float32),
            shape=np.array([0, -1, 10]),
        )

    x = np.random.default_rng(0).standard_normal((40, 20, 10)).astype(np.float32)
    before, after = detector_of_levels(1.0), detector_of_levels(0.5)
    data = read_samples({"x": x}, inputs_of(before.proto))
    found = compare(before, after, data, latency=False).outputs[0]
    boxes, scores = found.groups
    assert (boxes.slice, scores.slice) == ("[:, :, 0:4]", "[:, :, 4:10]")
    assert boxes.relative_error < 1e-9 and found.relative_error < 1e-3
    assert found.worst == scores.relative_error > 0.1
    assert (scores.logits_error is not None) == ("convolution" not in joined)


def test_an_operand_without_entries_is_no_group() -> None:
    cache = model(
        "g (float[n, 3, 4] x, float[n, past, 4] old) => (float[n, all, 4] out)"
        " { y = Neg (x) out = Concat <axis = 1> (old, y) }"
    )
    feed = {"x": np.ones((2, 3, 4), np.float32), "old": np.ones((2, 0, 4), np.float32)}
    rows = np.random.default_rng(0).standard_normal((20, 3, 4))
    (group,) = output_groups(cache, feed, {"out": [rows]}, {})["out"]
    assert not group.ranges


def test_operands_of_like_role_and_scale_are_one_group() -> None:
    left = "a, b = Split <axis = 1> (scores, halves)  out = Concat <axis = 1> (a, b)"
    text = model(
        f"""g (float[n, 10, 20] x) => (float[n, 10, 20] out) {{
            scores = Sigmoid (x) {left}
        }}""",
        halves=np.array([5, 5]),
    )
    found = found_groups(text, np.random.default_rng(0).random((20, 10, 20)))
    assert [group.ranges for group in found] == [()]
    plain = model(
        "g (float[n, 10, 20] x) => (float[n, 20, 20] out) { y = Neg (x) out = Concat <axis = 1> (x, y) }"
    )
    rows = np.random.default_rng(0).standard_normal((20, 20, 20))
    assert [group.ranges for group in found_groups(plain, rows)] == [()]
    rows[:, 10:] *= 50
    assert [group.ranges for group in found_groups(plain, rows)] == [((0, 10),), ((10, 20),)]


def test_without_a_concat_the_scales_of_channels_tell() -> None:
    same = model(
        "g (float[n, 10, 20] x) => (float[n, 20, 10] out) { out = Transpose <perm = [0, 2, 1]> (x) }"
    )
    rows = np.random.default_rng(0).standard_normal((20, 20, 10)) * np.r_[np.full(4, 200.0), np.full(6, 0.3)]
    assert [group.part for group in found_groups(same, rows)] == ["[:, :, 0:4]", "[:, :, 4:10]"]


@pytest.mark.parametrize(
    "scales",
    [
        np.ones(10),
        np.linspace(1, 9, 10),
        10.0 ** -np.arange(10),  # a spectrum
        np.where(np.arange(10) == 4, 1e-3, 1),  # a nearly dead channel among others
        np.where(np.arange(10) == 9, 0, 1),
    ],
)
def test_ordinary_outputs_are_one_group(scales: np.ndarray) -> None:
    same = model(
        "g (float[n, 10, 20] x) => (float[n, 20, 10] out) { out = Transpose <perm = [0, 2, 1]> (x) }"
    )
    rows = np.random.default_rng(0).standard_normal((20, 20, 10)) * scales
    if scales[1] == 0.1:
        rows = np.random.default_rng(0).standard_normal((20, 20, 10)) * 5.0 ** -np.arange(10)
    assert [group.ranges for group in found_groups(same, rows)] == [()]


def test_groups_do_not_depend_on_how_samples_are_batched() -> None:
    before, after = detector(), detector(box=1.1, score=0.7)
    data = samples(before)
    one = compare(before, after, data, latency=False).outputs[0]
    fixed = load(before.proto)
    fixed.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    singly = load(after.proto)
    singly.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    other = compare(fixed, singly, samples(fixed), latency=False).outputs[0]
    for mine, theirs in zip(one.groups, other.groups, strict=True):
        assert mine.relative_error == pytest.approx(theirs.relative_error, rel=1e-6)
        assert mine.interval == pytest.approx(theirs.interval, rel=0.2)


def classifier(scale: float, final: str = "Softmax") -> Model:
    return model(
        f"g (float[n, 3] x) => (float[n, 3] y) {{ z = Mul (x, scale)  y = {final} (z) }}",
        scale=np.float32(scale),
    )


def clear_cases(before: Model, far: float) -> Samples:
    """Three classes, each certain by ``far``."""
    x = far * np.eye(3, dtype=np.float32)[np.arange(60) % 3]
    return read_samples({"x": x}, inputs_of(before.proto))


@pytest.mark.parametrize("final", ["Softmax", "LogSoftmax"])
def test_logarithms_of_probabilities_are_judged_as_these(final: str) -> None:
    before, after = classifier(40.0, final), classifier(40.0, final)
    shift = np.array([0, 0, 2], np.float32)
    after.proto.graph.initializer.append(onnx.numpy_helper.from_array(shift, "shift"))
    after.proto.graph.node[0].output[0] = "unmoved"
    after.proto.graph.node.insert(1, onnx.helper.make_node("Add", ["unmoved", "shift"], ["z"]))
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (200, 3)).astype(np.float32)
    x[::2, 1:] = x[::2, :1] + rng.uniform(-0.03, 0.03, (100, 2)).astype(np.float32)  # decided by little
    data = read_samples({"x": x}, inputs_of(before.proto))
    found = compare(before, load(after.proto), data, latency=False).outputs[0]
    (group,) = found.groups
    assert group.logits_error is not None and group.logits_error == pytest.approx(0.057, abs=0.02)
    assert found.decided_alike is not None and found.decided_alike < 0.95
    if final == "LogSoftmax":
        assert group.relative_error == group.logits_error > 10 * found.relative_error


@pytest.mark.parametrize("final", ["Softmax", "Sigmoid"])
def test_saturated_probabilities_are_judged_in_front_of_their_activation(final: str) -> None:
    before, after = classifier(1.0, final), classifier(0.5, final)
    found = compare(before, after, clear_cases(before, 7.0), latency=False).outputs[0]
    (group,) = found.groups
    if final == "Softmax":
        assert found.relative_error < 0.01
    assert group.logits_error is not None and group.logits_error > 0.1
    assert group.relative_error == max(group.logits_error, found.relative_error)


def test_logits_far_from_any_decision_do_not_count() -> None:
    before, after = classifier(1.0), classifier(0.5)
    assert compare(before, after, clear_cases(before, 60.0), latency=False).error < 1e-6


def test_a_layer_counts_by_the_group_that_it_moves_most() -> None:
    before = detector()
    reference = Reference(before, samples(before))
    scores = reference.movement(detector(score=0.5))
    assert scores > 0.05
    assert reference.movement(detector(box=1.01)) == pytest.approx(1e-4, rel=0.05)
    assert reference.movement(detector(box=1.01, score=0.5)) == pytest.approx(scores)


def test_parts_of_a_run_are_judged_in_the_groups_of_all_its_samples() -> None:
    before, after = (model(
        """g (float[n, 4] x, float[n, 4] z) => (float[n, 8] out) {
            a = Mul (x, one)  b = Mul (z, share)  out = Concat <axis = 1> (a, b) }""",
        one=np.float32(factor),
        share=np.float32(0.2),
    ) for factor in (1.0, 1.01))  # fmt: skip
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((2, 80, 4)).astype(np.float32)
    z[40:] /= 10  # on the second half alone the parts are of unlike scale
    every = read_samples({"x": x, "z": z}, inputs_of(before.proto))
    last = every.take(slice(40, None))
    groups = groups_on(before, every)
    assert len(groups["out"]) == 1
    assert len(compare(before, after, last, latency=False).outputs[0].groups) == 2
    assert len(compare(before, after, last, latency=False, groups=groups).outputs[0].groups) == 1


def test_samples_whose_classes_change_at_any_step_are_counted() -> None:
    before, after = (
        model(
            "g (float[n, 3, 4] x) => (float[n, 3, 4] out) { z = Add (x, shift)  out = Softmax (z) }",
            shift=np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, add]], np.float32),
        )
        for add in (0.0, 0.5)
    )
    x = np.zeros((20, 3, 4), np.float32)
    x[:, :, 0], x[:4, 2, 0] = 1.0, 0.25  # in four samples the last step is decided by little
    found = compare(before, after, read_samples({"x": x}, inputs_of(before.proto)), latency=False)
    assert found.outputs[0].decided_alike == 0.8 and found.decided_otherwise == pytest.approx(0.2)
