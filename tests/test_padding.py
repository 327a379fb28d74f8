"""What is at padding, which nobody reads, counts neither in the fit nor in what is said of it.

Samples of their own shapes tell the same as padded ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner

import onnx_lrsd
from onnx_lrsd.cli import main
from onnx_lrsd.data.padding import without_padding
from onnx_lrsd.data.samples import Samples, position_axes, read_samples
from onnx_lrsd.errors import ModelError
from onnx_lrsd.fit.calibrate import Calibration, calibrate
from onnx_lrsd.fit.reconstruct import reconstruct
from onnx_lrsd.fit.sensitivity import Reference, final_outputs
from onnx_lrsd.graph.model import Model, load, save
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.compare import compare
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.runtime.divergence import Divergence, positions_first, unpadded
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.types import Form, Moments

WORDS, LENGTH = 50, 12
MASK = "attention_mask"
LENGTHS = np.random.default_rng(3).integers(3, 13, 60)


def token_model(*, leaks: bool = False, flat: bool = False, mask: str = MASK) -> Model:
    """Embedding, two dense layers with a Relu between them, attention to all tokens that are real.

    Where it ``leaks`` it attends to padding as well; ``flat`` has its dense layers see (tokens, features).
    """
    text = ["e = Gather (table, ids)"]
    if flat:
        text += ["f = Reshape (e, all)", "g = Gemm (f, w0, b0)", "h0 = Reshape (g, back)"]
    else:
        text += ["m = MatMul (e, w0)", "h0 = Add (m, b0)"]
    text += [f"c = Cast <to = 1> ({mask})", "d = Mul (c, big)", "s = Sub (d, big)", "a = Unsqueeze (s, one)"]
    text += ["k = Transpose <perm = [0, 2, 1]> (h0)", "p = MatMul (h0, k)", "z = Mul (p, small)"]
    text += ["q = Softmax <axis = -1> (z)" if leaks else "y = Add (z, a) q = Softmax <axis = -1> (y)"]
    text += ["v = MatMul (q, h0)", "r = Relu (v)", "o = MatMul (r, w1)", "hidden = Add (o, b1)"]
    ends = f"(int64[n, {LENGTH}] ids, int64[n, {LENGTH}] {mask}) => (float[n, {LENGTH}, 32] hidden)"
    graph = onnx.parser.parse_graph(f"g {ends} {{ {' '.join(text)} }}")
    rng = np.random.default_rng(0)
    constants: dict[str, Any] = {
        "table": rng.standard_normal((WORDS, 32)).astype(np.float32),
        "big": np.float32(1e9),
        "small": np.float32(0.05),
        "one": np.array([1]),
        "all": np.array([-1, 32]),
        "back": np.array([-1, LENGTH, 32]),
    }
    for index in range(2):
        constants[f"w{index}"] = (rng.standard_normal((32, 32)) / 6).astype(np.float32)
        constants[f"b{index}"] = rng.standard_normal(32).astype(np.float32)
    used = {name for node in graph.node for name in node.input}
    for name, value in constants.items():
        if name in used:
            graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    opset = [onnx.helper.make_opsetid("", 17)]
    return load(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8))


def texts(count: int, seed: int, fill: int = 0, mask: str = MASK) -> dict[str, np.ndarray]:
    """Texts of 2 to 12 tokens, each with ``fill`` behind its end."""
    rng = np.random.default_rng(seed)
    real = np.arange(LENGTH) < rng.integers(2, LENGTH + 1, count)[:, None]
    ids = np.where(real, rng.integers(1, WORDS, (count, LENGTH)), fill)
    return {"ids": ids, mask: real.astype(np.int64)}


def padded(model: Model, arrays: dict[str, np.ndarray]) -> Samples:
    return without_padding(model, read_samples(arrays, inputs_of(model.proto)))


def calibrated(model: Model, samples: Samples) -> Calibration:
    graph = model.graph()
    return calibrate(model, find_layers(graph)[0], samples, partial(read_weight, graph))


@pytest.mark.parametrize("flat", [False, True])
def test_moments_are_those_of_real_tokens_alone(flat: bool) -> None:
    model, arrays = token_model(flat=flat), texts(100, 1)
    known = calibrated(model, padded(model, arrays))
    first = next(layer for layer in known.layers if layer.weight == "w0")
    table = onnx.numpy_helper.to_array(next(t for t in model.proto.graph.initializer if t.name == "table"))
    tokens = table[arrays["ids"][arrays[MASK] == 1]].astype(np.float64)
    moments = known.moments[first.output]
    assert moments.count == len(tokens) == len(known.kept[first.output])
    np.testing.assert_allclose(moments.mean, tokens.mean(axis=0), atol=1e-6)
    assert moments.second is not None
    np.testing.assert_allclose(moments.second, np.cov(tokens.T, bias=True), atol=1e-5)


def fitted(model: Model, arrays: dict[str, np.ndarray], rank: int = 12) -> Model:
    known = calibrated(model, padded(model, arrays))
    forms = {layer.output: Form("channel", rank) for layer in known.layers}
    return reconstruct(model, known.layers, forms, partial(read_weight, model.graph()), known)[0]


def test_what_is_at_padding_changes_no_factor() -> None:
    model = token_model()
    one, other = (fitted(model, texts(200, 1, fill)).proto for fill in (0, 7))
    assert one == other != model.proto


def test_errors_of_outputs_are_those_at_real_tokens() -> None:
    model, held = token_model(), texts(60, 2)
    other, samples = fitted(model, texts(200, 1)), padded(model, held)
    before, after = (open_session(each.proto).run(held)["hidden"] for each in (model, other))
    real = held[MASK] == 1
    old, new = before[real].astype(np.float64), after[real].astype(np.float64)
    error = np.sum((new - old) ** 2) / np.sum((old - old.mean(axis=0)) ** 2)
    assert compare(model, other, samples, latency=False).error == pytest.approx(error, rel=1e-6)
    assert error > 0.01
    assert sum(len(batch) for batch in final_outputs(model, samples)["hidden"].batches) == real.sum()


def test_the_fit_is_better_where_it_counts() -> None:
    """Padding is one word, which is otherwise half of what the factors are fitted to."""
    model = token_model()
    judge, arrays = padded(model, texts(60, 2)), texts(200, 1)
    blind = {**arrays, MASK: np.ones_like(arrays[MASK])}
    known, unknown = (compare(model, fitted(model, a), judge, latency=False).error for a in (arrays, blind))
    assert known < 0.95 * unknown


def test_the_report_says_what_was_left_out() -> None:
    result = onnx_lrsd.optimize(token_model().proto, texts(80, 1), target="size", ratio=1.2, dry_run=True)
    assert any("attention_mask marks" in said and "counts neither" in said for said in result.report.warnings)


def test_compare_leaves_the_same_out_and_says_so(tmp_path: Path) -> None:
    save(token_model(), tmp_path / "model.onnx")
    held = texts(20, 2)
    np.savez(tmp_path / "held.npz", ids=held["ids"], attention_mask=held[MASK])
    model = str(tmp_path / "model.onnx")
    done = CliRunner().invoke(main, ["compare", model, model, "--data", str(tmp_path / "held.npz")])
    assert done.exit_code == 0 and "attention_mask marks" in " ".join(done.output.split())


def test_a_mask_that_the_model_does_not_follow_is_not_believed() -> None:
    model = token_model(leaks=True)
    samples = padded(model, texts(20, 1))
    assert samples.mask is None and samples.filled == 1
    assert any("it counts as well" in note for note in samples.notes)


def test_a_mask_that_means_the_opposite_is_not_believed() -> None:
    model, arrays = token_model(), texts(20, 1)
    ids = np.where(arrays[MASK] == 1, arrays["ids"], 3)
    assert padded(model, {"ids": ids, MASK: arrays[MASK]}).mask == MASK
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    node = next(node for node in proto.graph.node if node.op_type == "Sub")
    node.input[:] = ["zero", "d"]  # what is 1 is hidden
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((), np.float32), "zero"))
    assert padded(load(proto), {"ids": ids, MASK: arrays[MASK]}).mask is None


def test_only_what_is_named_as_a_mask_and_finds_padding_is_one() -> None:
    assert padded(token_model(mask="input_mask"), texts(20, 1, mask="input_mask")).mask == "input_mask"
    assert padded(token_model(mask="segments"), texts(20, 1, mask="segments")).mask is None
    decoder = token_model()
    decoder.proto.graph.input[0].name = decoder.proto.graph.node[0].input[1] = "decoder_ids"
    arrays = texts(20, 1)
    assert padded(decoder, {"decoder_ids": arrays["ids"], MASK: arrays[MASK]}).mask is None
    full = {**texts(20, 1), MASK: np.ones((20, LENGTH), np.int64)}
    samples = padded(token_model(), full)
    assert samples.mask is None and not samples.notes


def test_features_of_a_whole_text_are_no_positions() -> None:
    """Pooled embeddings may have as many features as texts have tokens."""
    real = texts(20, 1)[MASK] == 1
    pooled = np.ones((20, LENGTH))
    assert unpadded(pooled, real) is pooled
    assert unpadded(np.ones((20, LENGTH, 3)), real).shape == (real.sum(), 3)


def test_positions_may_stand_behind_the_heads_of_attention() -> None:
    """As they do in the outputs of a language model that are its cache."""
    real = texts(20, 1)[MASK] == 1
    cache = np.random.default_rng(0).standard_normal((20, 4, LENGTH, 3))
    np.testing.assert_array_equal(unpadded(cache, real), cache.transpose(0, 2, 1, 3)[real])
    weights = np.ones((20, 4, LENGTH, LENGTH))
    assert unpadded(weights, real).shape == (real.sum(), 4, LENGTH)


def test_padding_may_come_first() -> None:
    model = token_model()
    arrays = {name: values[:, ::-1].copy() for name, values in texts(20, 1).items()}
    assert padded(model, arrays).mask == MASK


def test_a_metric_may_ask_for_the_inputs() -> None:
    """As embeddings of sentences need them, whose tokens are averaged over the mask."""
    model, arrays = token_model(), texts(40, 1)
    seen = []

    def sentence(outputs: dict[str, np.ndarray], labels: np.ndarray, inputs: dict[str, np.ndarray]) -> float:
        seen.append((len(outputs["hidden"]), len(labels), len(inputs["ids"])))
        lengths = inputs[MASK].sum(axis=1)
        return float(np.mean(lengths == labels))

    labels = arrays[MASK].sum(axis=1)
    samples = read_samples({**arrays, "labels": labels}, inputs_of(model.proto))
    found = onnx_lrsd.compare(model, model, samples, metric=sentence, latency=False)
    assert found.metric is not None and found.metric.before == found.metric.after == 1
    assert (40, 40, 40) in seen and all(len(set(sizes)) == 1 for sizes in seen)


def open_token_model() -> Model:
    """The transformer of the padding tests, for texts of any length."""
    model = token_model()
    for value in (*model.proto.graph.input, *model.proto.graph.output):
        value.type.tensor_type.shape.dim[1].dim_param = "s"
    return model


def pictures_model() -> Model:
    """Two convolutions with a Relu between them, for pictures of any size."""
    text = """g (float[n, 3, h, w] x) => (float[n, 8, i, j] y)
    { a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0) r = Relu (a) y = Conv <strides = [2, 2]> (r, w1) }"""
    graph = onnx.parser.parse_graph(text)
    rng = np.random.default_rng(0)
    shapes = {"w0": (16, 3, 3, 3), "b0": (16,), "w1": (8, 16, 3, 3)}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32) / 4
        graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    opset = onnx.helper.make_opsetid("", 17)
    return load(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8))


def moved(model: Model) -> Model:
    """The model with other weights."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    rng = np.random.default_rng(1)
    for tensor in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.ndim > 1 and tensor.name != "table":
            noisy = values + 0.1 * rng.standard_normal(values.shape) * values.std()
            tensor.CopyFrom(onnx.numpy_helper.from_array(noisy.astype(values.dtype), tensor.name))
    return load(proto)


def words() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, WORDS, length) for length in LENGTHS]


def ragged_texts(model: Model) -> Samples:
    feeds = [{"ids": text, MASK: np.ones_like(text), "labels": len(text)} for text in words()]
    return without_padding(model, read_samples(feeds, inputs_of(model.proto)))


def padded_texts(model: Model) -> Samples:
    ids = np.zeros((len(LENGTHS), LENGTHS.max()), np.int64)
    for row, text in zip(ids, words(), strict=True):
        row[: len(text)] = text
    return without_padding(model, read_samples({"ids": ids, MASK: (ids > 0) * 1}, inputs_of(model.proto)))


def pictures(model: Model, count: int = 40) -> Samples:
    rng = np.random.default_rng(0)
    shown = [rng.standard_normal((3, *rng.integers(6, 14, 2))).astype(np.float32) for _ in range(count)]
    return read_samples({"x": shown}, inputs_of(model.proto))


def test_errors_of_outputs_are_those_of_padded_texts_with_a_mask() -> None:
    model = open_token_model()
    ragged, padded = ragged_texts(model), padded_texts(model)
    assert ragged.ragged and ragged.mask is None and padded.mask == MASK
    one, other = (compare(model, moved(model), samples, latency=False).error for samples in (ragged, padded))
    assert one == pytest.approx(other, rel=1e-4)
    assert one > 1e-4


def test_what_sensitivities_are_measured_by_is_that_of_padded_texts_with_a_mask() -> None:
    model = open_token_model()
    one, other = (
        Reference(model, samples).movement(moved(model))
        for samples in (ragged_texts(model), padded_texts(model))
    )
    assert one == pytest.approx(other, rel=1e-4)


def test_texts_padded_batch_by_batch_are_both_ragged_and_masked() -> None:
    model = open_token_model()
    feeds = []
    for start in range(0, len(LENGTHS), 10):
        part = words()[start : start + 10]
        ids = np.zeros((len(part), max(map(len, part))), np.int64)
        for row, text in zip(ids, part, strict=True):
            row[: len(text)] = text
        feeds.append({"ids": ids, MASK: (ids > 0) * 1})
    samples = without_padding(model, read_samples(feeds, inputs_of(model.proto)))
    assert samples.mask == MASK
    assert samples.filled == pytest.approx(LENGTHS.sum() / sum(feed["ids"].size for feed in feeds))
    error = compare(model, moved(model), samples, latency=False).error
    assert error == pytest.approx(
        compare(model, moved(model), padded_texts(model), latency=False).error, 1e-4
    )


def test_errors_of_pictures_are_relative_to_the_variance_of_each_channel() -> None:
    model = pictures_model()
    samples = pictures(model)
    one, two = (
        np.concatenate(
            [
                np.moveaxis(session.run(feed)["y"], 1, -1).reshape(-1, 8).astype(np.float64)
                for feed in samples.batches(1)
            ]
        )
        for session in (open_session(model.proto), open_session(moved(model).proto))
    )
    error = np.sum((one - two) ** 2) / np.sum((one - one.mean(axis=0)) ** 2)
    assert compare(model, moved(model), samples, latency=False).error == pytest.approx(error, rel=1e-4)


def same_moments(one: Moments, other: Moments) -> None:
    assert one.count == other.count and one.second is not None and other.second is not None
    scale = np.abs(other.second).max()
    np.testing.assert_allclose(one.mean, other.mean, atol=1e-5 * np.sqrt(scale))
    np.testing.assert_allclose(one.second, other.second, atol=1e-5 * scale)


def test_moments_are_those_of_padded_texts_with_a_mask() -> None:
    model = open_token_model()
    ragged, padded = (calibrated(model, samples(model)) for samples in (ragged_texts, padded_texts))
    assert ragged.moments.keys() == padded.moments.keys()
    for name, moments in ragged.moments.items():
        same_moments(moments, padded.moments[name])
        assert moments.count == LENGTHS.sum()


def test_moments_of_pictures_are_those_of_all_of_their_patches() -> None:
    model = pictures_model()
    samples = pictures(model)
    known = calibrated(model, samples)
    taken = open_session(model.proto, outputs=["r"])
    patches: dict[str, list[np.ndarray]] = {"a": [], "y": []}
    for feed in samples.batches(1):
        bordered = np.pad(feed["x"][0], [(0, 0), (1, 1), (1, 1)])
        for name, values, stride in (("a", bordered, 1), ("y", taken.run(feed)["r"][0], 2)):
            windows = np.lib.stride_tricks.sliding_window_view(values, (3, 3), (1, 2))[:, ::stride, ::stride]
            patches[name].append(windows.transpose(1, 2, 0, 3, 4).reshape(-1, values.shape[0] * 9))
    for name, parts in patches.items():
        rows = np.concatenate(parts)
        every = min(max(len(rows) // 4096, 1), 4)
        assert every == 1
        mean, second = rows.mean(axis=0), np.cov(rows.T, bias=True)
        same_moments(known.moments[name], Moments(name=name, count=len(rows), mean=mean, second=second))


def test_inputs_are_kept_of_rows_that_came_and_of_no_others() -> None:
    model = pictures_model()
    known = calibrated(model, pictures(model))
    came, wanted = len(known.kept["y"]), known.quotas["y"].wanted
    assert "y" not in known.by_inputs and came < wanted
    assert len(known.inputs["y"]) == ceil(came / known.every)


def test_large_samples_give_more_of_the_rows() -> None:
    model = pictures_model()
    samples = pictures(model, 400)
    known = calibrated(model, samples)
    quota = known.quotas["a"]
    assert len(known.kept["a"]) == quota.wanted == 4096
    each = np.diff(quota.ends) / quota.ends[-1]
    np.testing.assert_allclose(each, samples.sizes / samples.sizes.sum(), rtol=0.05)


def test_ragged_samples_are_optimised_like_any_others() -> None:
    model = open_token_model()
    known = calibrated(model, ragged_texts(model))
    working = model.graph()
    forms = {layer.output: Form("channel", 8) for layer in known.layers}
    rewritten, factors = reconstruct(model, known.layers, forms, partial(read_weight, working), known)
    again = calibrated(model, padded_texts(model))
    other, _ = reconstruct(model, again.layers, forms, partial(read_weight, working), again)
    assert factors
    one, two = (compare(model, each, ragged_texts(model), latency=False).error for each in (rewritten, other))
    assert one == pytest.approx(two, rel=0.02)


def test_axes_of_positions_are_those_that_go_with_the_samples() -> None:
    model = pictures_model()
    assert position_axes(pictures(model), open_session(model.proto).run) == {"y": (2, 3)}
    tokens = open_token_model()
    assert position_axes(ragged_texts(tokens), open_session(tokens.proto).run) == {"hidden": (1,)}
    assert position_axes(padded_texts(tokens), open_session(tokens.proto).run) == {}


def test_positions_count_as_samples() -> None:
    values = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    rows = positions_first(values, None, (2, 3))
    assert np.array_equal(rows, values.transpose(0, 2, 3, 1).reshape(-1, 3))
    assert positions_first(values[0, 0], None, (2,)).shape == (4, 5)
    error = Divergence((1,))
    for length in (3, 5):
        error.add(np.ones((2, length, 4)) * np.arange(length)[:, None], np.zeros((2, length, 4)))
    assert error.relative() > 1  # relative to the variance, not to the squares


def test_costs_and_times_are_those_of_a_sample_of_middle_size() -> None:
    model = pictures_model()
    samples = pictures(model)
    middle = samples.example()["x"].shape
    found = compare(model, model, samples, latency=False).before.macs
    height, width = middle[2:]
    assert found == 16 * 27 * height * width + 8 * 144 * ((height - 1) // 2) * ((width - 1) // 2)


def test_a_metric_gets_what_differs_in_shape_as_lists() -> None:
    model = open_token_model()
    seen = []

    def length(outputs: Mapping[str, Any], labels: np.ndarray, inputs: Mapping[str, Any]) -> float:
        assert isinstance(outputs["hidden"], list) and isinstance(inputs["ids"], list)
        seen.append(len(labels))
        agree = [
            len(hidden) == len(ids) == label
            for hidden, ids, label in zip(outputs["hidden"], inputs["ids"], labels, strict=True)
        ]
        return float(np.mean(agree))

    found = compare(model, moved(model), ragged_texts(model), metric=length, latency=False)
    assert found.metric is not None and found.metric.before == found.metric.after == 1
    assert max(seen) == len(LENGTHS) > min(seen)


def test_padding_that_turns_outputs_to_nan_is_named_with_the_remedy() -> None:
    text = """g (int64[1, s] ids) => (float[1, s, 4] y)
    { e = Gather (w, ids) m = Equal (ids, nought) p = Where (m, low, high) u = Unsqueeze (p, two)
      k = Add (e, u) y = Softmax <axis = -1> (k) }"""
    graph = onnx.parser.parse_graph(text)
    constants: dict[str, Any] = {
        "w": np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32),
        "nought": np.array(0),
        "low": np.float32(-np.inf),
        "high": np.float32(0),
        "two": np.array([2]),
    }
    graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    opset = onnx.helper.make_opsetid("", 17)
    model = load(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8))
    padded, own = (
        [np.array([[3, 4, 0, 0]]), np.array([[3, 4, 5, 6]])],
        [np.array([[3, 4]]), np.array([[3, 4, 5, 6]])],
    )
    said, nothing = (
        without_padding(model, read_samples({"ids": ids}, inputs_of(model.proto))).notes
        for ids in (padded, own)
    )
    assert said == (
        "Padding in the given data turns the output y to NaN, and such values are left out: give each sample "
        "at its own length, as files of a folder or a list of arrays.",
    )
    assert not any("NaN" in note for note in nothing)


def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    model = pictures_model()
    stages: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        stages.append(stage)

    for path, says in (
        (Path("/proc/x.onnx"), "cannot be written"),
        (tmp_path / "absent" / "x.onnx", "There is no folder"),
        (tmp_path, "no ordinary file"),
    ):
        if path.parent.exists() or path.parts[1] != "proc":
            with pytest.raises(ModelError, match=says):
                onnx_lrsd.optimize(model.proto, pictures(model), output=path, progress=progress)
    assert not stages
