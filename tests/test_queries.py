"""Queries and keys of fewer channels: only their products count, head by head."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from plain_layers import linear

import onnx_lrsd
from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.fit.calibrate import calibrate
from onnx_lrsd.fit.narrow import Inner, Narrower, drop_order, key_of, order_task, planned_pairs
from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.graph.shapes import inferred_shapes
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.pairs import Pair, cut, find_pairs, inverses, turn
from onnx_lrsd.passes.split import split
from onnx_lrsd.report.table import report_table
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.solver.heads import product_bases
from onnx_lrsd.solver.problem import Problem, pose
from onnx_lrsd.types import WIDTH, Declined, Form, Moments

Values = npt.NDArray[Any]
HEADS, SIZE, WIDE = 4, 8, 24
QUERIES = {
    "bare": "qb = Identity (q) qh = Reshape (qb, split) qt = Transpose <perm = [0, 2, 1, 3]> (qh)",
    "bias": "qb = Add (q, bq) qh = Reshape (qb, split) qt = Transpose <perm = [0, 2, 1, 3]> (qh)",
    "scaled": "qb = Add (bq, q) qs = Mul (qb, half) qh = Reshape (qs, split) "
    "qt = Transpose <perm = [0, 2, 1, 3]> (qh)",
    "scaled heads": "qb = Add (q, bq) qh = Reshape (qb, split) qn = Transpose <perm = [0, 2, 1, 3]> (qh) "
    "qt = Div (qn, each)",
}
KEYS = {
    "at once": "kb = Add (k, bk) kh = Reshape (kb, split) kt = Transpose <perm = [0, 2, 3, 1]> (kh)",
    "twice": "kb = Add (k, bk) kh = Reshape (kb, split) kn = Transpose <perm = [0, 2, 1, 3]> (kh) "
    "kt = Transpose <perm = [0, 1, 3, 2]> (kn)",
    "scaled": "kb = Add (k, bk) kh = Reshape (kb, split) kn = Transpose <perm = [0, 2, 3, 1]> (kh) "
    "kt = Mul (half, kn)",
}
SIZED = (
    "sh = Shape <start = -1> (qt) f = Cast <to = 1> (sh)",
    "al = Shape (qt) ls = Constant <value = int64 {-1}> () sh = Gather (al, ls) f = Cast <to = 1> (sh)",
    "al = Shape (kh) th = Constant <value = int64[1] {3}> () fo = Constant <value = int64[1] {99}> () "
    "sh = Slice (al, th, fo) f = Cast <to = 1> (sh)",
)
"""The size of a head as scales of attention read it."""
BEHIND = {
    "size": f"{SIZED[0]} r = Sqrt (f) s = Div (a, r) p = Softmax <axis = -1> (s)",
    "gathered size": f"{SIZED[1]} r = Sqrt (f) s = Div (a, r) p = Softmax <axis = -1> (s)",
    "sliced size": f"{SIZED[2]} r = Sqrt (f) s = Div (a, r) p = Softmax <axis = -1> (s)",
    "softmax": "p = Softmax <axis = -1> (a)",
    "scaled": "s = Div (a, half) p = Softmax <axis = 3> (s)",
    "masked": "s = Add (a, mask) p = Softmax (s)",
    "no softmax": "p = Tanh (a)",
}


def attention(
    queries: str = QUERIES["bias"],
    keys: str = KEYS["at once"],
    behind: str = BEHIND["scaled"],
    *,
    heads: int = HEADS,
    size: int = SIZE,
    width: int = WIDE,
    target: Sequence[int] | str | None = None,
    other: str = "x",
    back: str = "",
    more: str = "",
    seed: int = 0,
) -> onnx.ModelProto:
    """Attention of (n, s, width) over ``other`` positions, as exporters write it; ``more`` outputs if any."""
    rng, inner = np.random.default_rng(seed), heads * size
    tokens = f", float[n, t, {width}] {other}" if other != "x" else ""
    text = f"""
    g (float[n, s, {width}] x{tokens}) => (float[n, s, 12] y{more}) {{
        q = MatMul (x, wq) {queries} k = MatMul ({other}, wk) {keys}
        v = MatMul ({other}, wv) vh = Reshape (v, split) vt = Transpose <perm = [0, 2, 1, 3]> (vh)
        a = MatMul (qt, kt) {behind} c = MatMul (p, vt) ct = Transpose <perm = [0, 2, 1, 3]> (c)
        cf = Reshape (ct, flat) y = MatMul (cf, wo) {back}
    }}"""
    graph = onnx.parser.parse_graph(text)
    constants = {
        "wq": rng.standard_normal((width, inner)) / width**0.5,
        "wk": rng.standard_normal((width, inner)) / width**0.5,
        "wv": rng.standard_normal((width, inner)) / width**0.5,
        "wo": rng.standard_normal((inner, 12)) / inner**0.5,
        "bq": rng.standard_normal(inner),
        "bk": 3 * rng.standard_normal(inner),
        "half": np.array(0.5),
        "one": np.array(1.0),
        "each": 1 + rng.random((heads, 1, 1)),
        "scales": 1 + rng.random(inner),
        "angles": rng.random((1, 1, size)),
        "mask": np.where(np.arange(6) == 5, -1e4, 0.0)[None, None, None, :],
    }
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    shapes = {"split": target or (0, 0, heads, size), "flat": (0, 0, inner)}
    if target == "asked":
        graph.input.append(helper.make_tensor_value_info("split", onnx.TensorProto.INT64, [4]))
        del shapes["split"]
    tensors += [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in shapes.items()]
    read = {name for node in graph.node for name in node.input}
    graph.initializer.extend(tensor for tensor in tensors if tensor.name in read)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def rows(count: int = 60, width: int = WIDE, seed: int = 1, *names: str) -> dict[str, Values]:
    """Sequences of 6 tokens that lie in a few directions, but for noise."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).standard_normal((8, width)) / 3

    def tokens() -> Values:
        x = rng.standard_normal((count, 6, 8)) @ mixing
        return np.asarray(x + 0.03 * rng.standard_normal(x.shape), dtype=np.float32)

    return {name: tokens() for name in names or ("x",)}


def found_in(model: Model) -> tuple[list[Pair], tuple[Declined, ...]]:
    """The pairs of queries and keys, and the layers whose channels stay."""
    working = model.graph()
    found, declined = find_pairs(working, find_layers(working)[0], inferred_shapes(model.proto))
    return [pair for pair in found if pair.product], declined


def outputs(model: Model, feed: dict[str, Values]) -> Values:
    return np.asarray(next(iter(open_session(model.proto).run(feed).values())))


def stored(model: Model) -> dict[str, Values]:
    """The constants by the first part of their names."""
    return {t.name.partition("/")[0]: numpy_helper.to_array(t) for t in model.proto.graph.initializer}


def invertible(heads: int, size: int, seed: int) -> npt.NDArray[np.float64]:
    noise = np.random.default_rng(seed).standard_normal((heads, size, size))
    return np.asarray(np.eye(size) + 0.3 * noise / size**0.5)


@settings(max_examples=25, deadline=None)
@given(
    queries=st.sampled_from(sorted(QUERIES)),
    keys=st.sampled_from(sorted(KEYS)),
    behind=st.sampled_from(sorted(BEHIND)),
    cross=st.booleans(),
    counted=st.booleans(),
    heads=st.integers(1, 4),
    size=st.integers(2, 7),
    seed=st.integers(0, 99),
)
def test_all_channels_give_the_same_and_fewer_give_their_part_of_the_products(
    queries: str, keys: str, behind: str, cross: bool, counted: bool, heads: int, size: int, seed: int
) -> None:
    text = attention(
        QUERIES[queries],
        KEYS[keys],
        BEHIND[behind],
        heads=heads,
        size=size,
        target=None if counted else (0, 0, heads, -1),
        other="z" if cross else "x",
        seed=seed,
    )
    model, feed = load(text), rows(3, WIDE, seed, *(("x", "z") if cross else ("x",)))
    (pair,), _ = found_in(model)
    assert (pair.heads, pair.channels, pair.softmax) == (heads, size, behind != "no softmax")
    bases, working = invertible(heads, size, seed), model.graph()
    turn(working, pair, bases)
    np.testing.assert_allclose(outputs(model.splice(working), feed), outputs(model, feed), atol=1e-4)
    kept = max(1, size // 2)
    cut(working, [(pair, range(kept))])
    smaller = model.splice(working)
    onnx.checker.check_model(smaller.proto, full_check=True)
    nodes = [[node.op_type for node in each.proto.graph.node] for each in (model, smaller)]
    assert nodes[1] == [op for op in nodes[0] if op not in ("Shape", "Gather", "Slice")]
    # What is left reads as if the queries had nothing of the other channels.
    reference, weights = onnx.ModelProto(), stored(model)
    reference.CopyFrom(model.proto)
    for tensor in reference.graph.initializer:
        if tensor.name in ("wq", "bq"):
            values = weights[tensor.name].reshape(-1, heads, size).astype(np.float64)
            for head, basis in enumerate(bases):
                part = np.linalg.inv(basis)[:, :kept] @ basis[:kept]
                values[:, head] = values[:, head] @ part.T
            shape = weights[tensor.name].shape
            tensor.CopyFrom(numpy_helper.from_array(values.reshape(shape).astype(np.float32), tensor.name))
    np.testing.assert_allclose(outputs(smaller, feed), outputs(load(reference), feed), atol=1e-4)
    sizes = {name: list(values.shape) for name, values in stored(smaller).items()}
    assert sizes["wq"] == sizes["wk"] == [WIDE, heads * kept] and sizes["bk"] == [heads * kept]
    assert sizes["wv"] == [WIDE, heads * size]


@pytest.mark.parametrize("written", ["copied", "at run time", "left open"])
def test_heads_are_found_where_only_their_number_and_size_are_known(written: str) -> None:
    """Exporters put sizes of the batch together with those of the heads, so that no shape is known."""
    text = attention(QUERIES["scaled heads"], KEYS["twice"])
    del text.graph.input[0].type.tensor_type.shape.dim[:]
    text.graph.input[0].type.tensor_type.ClearField("shape")
    if written != "copied":
        sizes = onnx.parser.parse_graph("""
        g (float[n, s, 24] x) => (int64[4] split) {
            sizes = Shape (x)
            zero = Constant <value = int64[1] {0}> () next = Constant <value = int64[1] {1}> ()
            first = Gather (sizes, zero) second = Gather (sizes, next)
            rest = Constant <value = int64[1] {-1}> ()
            ends = Constant <value = int64[2] {4, 8}> () all = Constant <value = int64[1] {32}> ()
        }""")
        leading = ["first", "second" if written == "at run time" else "rest"]
        made = [(leading, "ends", "split"), (leading, "all", "flat")]
        joined = [helper.make_node("Concat", [*lead, end], [name], axis=0) for lead, end, name in made]
        nodes = [*sizes.node, *joined, *text.graph.node]
        stay = [tensor for tensor in text.graph.initializer if tensor.name not in ("split", "flat")]
        del text.graph.node[:], text.graph.initializer[:]
        text.graph.node.extend(nodes)
        text.graph.initializer.extend(stay)
    working, feed = load(text).graph(), rows(3)
    pairs, _ = find_pairs(working, find_layers(working)[0], inferred_shapes(text))
    assert sorted((pair.channels, pair.heads, bool(pair.product)) for pair in pairs) == [
        (SIZE, HEADS, False),
        (SIZE, HEADS, True),
    ]
    whole = outputs(load(text), feed)
    for pair in pairs:
        turn(working, pair, np.linalg.qr(invertible(HEADS, SIZE, 3))[0])
    np.testing.assert_allclose(outputs(load(text).splice(working), feed), whole, atol=1e-4)
    cut(working, [(pair, range(5)) for pair in pairs])
    smaller = load(text).splice(working)
    sizes_of = {name: list(values.shape) for name, values in stored(smaller).items() if values.ndim == 2}
    assert sizes_of["wq"] == sizes_of["wk"] == sizes_of["wv"] == [WIDE, 20] and sizes_of["wo"] == [20, 12]
    assert outputs(smaller, feed).shape == whole.shape


def test_a_scale_of_the_size_of_heads_stays_what_it_was() -> None:
    """As PyTorch exports scaled_dot_product_attention: both operands times the root of 1 / sqrt(size)."""
    queries = (
        "qb = Add (q, bq) qh = Reshape (qb, split) qn = Transpose <perm = [0, 2, 1, 3]> (qh) al = Shape (qn) "
        "lo = Constant <value = int64[1] {-1}> () hi = Constant <value = int64[1] {9223372036854775807}> () "
        "sh = Slice (al, lo, hi) f = Cast <to = 1> (sh) r = Sqrt (f) d = Div (one, r) w = Sqrt (d) "
        "qt = Mul (qn, w)"
    )
    keys = "kh = Reshape (k, split) kn = Transpose <perm = [0, 2, 3, 1]> (kh) kt = Mul (kn, w)"
    model, feed = load(attention(queries, keys, "p = Softmax (a)")), rows(3)
    (pair,), _ = found_in(model)
    assert pair.softmax and [size.output for size in pair.sizes] == ["sh"]
    working = model.graph()
    cut(working, [(pair, range(SIZE))])  # nothing: all that changes is where the size comes from
    np.testing.assert_allclose(outputs(model.splice(working), feed), outputs(model, feed), atol=1e-5)
    working = model.graph()
    turn(working, pair, np.linalg.qr(invertible(HEADS, SIZE, 1))[0])
    cut(working, [(pair, range(4))])
    smaller = model.splice(working)
    assert not {"Shape", "Slice"} & {node.op_type for node in smaller.proto.graph.node}
    assert stored(smaller)["sh"].tolist() == [SIZE] and stored(smaller)["wq"].shape == (WIDE, HEADS * 4)
    assert outputs(smaller, feed).shape == (3, 6, 12)


def test_one_head_needs_no_reshape() -> None:
    whole = "qb = Add (q, bq) qt = Identity (qb)", "kb = Add (k, bk) kt = Transpose <perm = [0, 2, 1]> (kb)"
    text = attention(*whole, "p = Softmax (a)", heads=1, size=32)
    for node in text.graph.node:
        if node.output[0] == "vt":
            node.input[0] = "v"
            node.attribute[0].ints[:] = [0, 1, 2]
        if node.output[0] == "ct":
            node.attribute[0].ints[:] = [0, 1, 2]
    (pair,), _ = found_in(load(text))
    assert (pair.heads, pair.channels) == (1, 32)


ROTATED = (
    "qb = Add (q, bq) qh = Reshape (qb, split) qn = Transpose <perm = [0, 2, 1, 3]> (qh) "
    "q1, q2 = Split <axis = -1, num_outputs = 2> (qn) qm = Neg (q2) qr = Concat <axis = -1> (qm, q1) "
    "qc = Mul (qn, angles) qd = Mul (qr, angles) qt = Add (qc, qd)"
)
SPLIT = "qh = Reshape (qe, split) qt = Transpose <perm = [0, 2, 1, 3]> (qh)"
FROM_QUERIES = "kb = Add (q, bk) kh = Reshape (kb, split) kt = Transpose <perm = [0, 2, 3, 1]> (kh)"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rotary embeddings": ({"queries": ROTATED}, "channels that are mixed, or read by others, in between"),
    "a scale for each channel": ({"queries": f"qe = Mul (q, scales) {SPLIT}"}, "is not linear in them"),
    "an activation": ({"queries": f"qe = Tanh (q) {SPLIT}"}, "is not linear in them"),
    "a number divided by them": ({"queries": f"qe = Div (one, q) {SPLIT}"}, "is not linear in them"),
    "keys that are an output": ({"more": ", float[n, s, 32] kb"}, "they are an output of the model"),
    "another reader": ({"back": "z = MatMul (qb, wo) yz = Add (y, z)"}, "is not all that reads them"),
    "another product": (
        {"back": "kk = Transpose <perm = [0, 2, 1, 3]> (kh) a2 = MatMul (kk, kt)"},
        "channels that are mixed, or read by others, in between",
    ),
    "one layer for both": ({"keys": FROM_QUERIES}, "multiplies some of them twice, or with each other"),
    "a size that shapes something": (
        {"back": "sh = Shape <start = -1> (qh) xr = Expand (one, sh)"},
        "reads how many they are",
    ),
    "a shape that is an output": (
        {"back": "sh = Shape (qt)", "more": ", int64[4] sh"},
        "they are an output of the model",
    ),
    "a size that is an output": (
        {"back": f"{SIZED[0]}", "more": ", int64[1] sh"},
        "they are an output of the model",
    ),
    "a size that is not known": ({"target": "asked"}, "its shapes are not known"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_channels_that_cannot_go_stay_and_the_reason_is_given(case: str) -> None:
    change, said = REFUSED[case]
    pairs, declined = found_in(load(attention(**change)))
    assert not pairs
    reasons = {entry.name: entry.reason for entry in declined}
    assert any(said in reason for reason in reasons.values()), reasons


def test_as_many_keys_as_one_head_has_are_left_alone() -> None:
    """Multi-query attention: every head reads the keys of one."""
    text = attention(keys="kh = Reshape (k, one_head) kt = Transpose <perm = [0, 2, 3, 1]> (kh)")
    for tensor in text.graph.initializer:
        if tensor.name == "wk":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:, :SIZE].copy(), "wk"))
    text.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 1, SIZE]), "one_head"))
    pairs, declined = found_in(load(text))
    assert not pairs and any("other numbers of heads" in entry.reason for entry in declined)


def test_queries_and_keys_of_one_layer_are_cut_at_both_places() -> None:
    text = attention("qb = Identity (q)", "")
    nodes = [node for node in text.graph.node if node.output[0] not in ("q", "qb", "v", "vh", "vt")]
    fused = onnx.parser.parse_graph("""
    g (float[n, s, 24] x) => (float[n, s, 8] qt) {
        f = MatMul (x, wf) fb = Add (f, bf) q, k, v = Split <axis = -1> (fb, sizes)
        qh = Reshape (q, split) qt = Transpose <perm = [0, 2, 1, 3]> (qh)
        kh = Reshape (k, split) kt = Transpose <perm = [0, 2, 3, 1]> (kh)
        vh = Reshape (v, split) vt = Transpose <perm = [0, 2, 1, 3]> (vh)
    }""")
    nodes = [*fused.node, *(node for node in nodes if node.output[0] not in ("k", "kb", "kh", "kt"))]
    del text.graph.node[:]
    text.graph.node.extend(nodes)
    weights, rng = stored(load(attention())), np.random.default_rng(3)
    together = np.concatenate([weights["wq"], weights["wk"], weights["wv"]], axis=1)
    made = {"wf": together, "bf": rng.standard_normal(96).astype(np.float32), "sizes": np.array([32, 32, 32])}
    text.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in made.items())
    model, feed = load(text), rows(3)
    (pair,), _ = found_in(model)
    assert [end.output for end in pair.producers] == [pair.producers[0].output] * 2 and pair.heads == HEADS
    working = model.graph()
    turn(working, pair, invertible(HEADS, SIZE, 1))
    np.testing.assert_allclose(outputs(model.splice(working), feed), outputs(model, feed), atol=1e-4)
    cut(working, [(pair, range(6))])
    smaller = model.splice(working)
    assert stored(smaller)["sizes"].tolist() == [24, 24, 32] and stored(smaller)["wf"].shape == (24, 80)
    outputs(smaller, feed)


def posed(n: int, width: int = 10, *, samples: int = 80, seed: int = 0) -> Problem:
    """A layer of ``n`` outputs over correlated inputs, whose means are not zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, width)) @ rng.standard_normal((width, width)) + 2 * rng.random(width)
    mean = x.mean(axis=0)
    centred = (x - mean).astype(np.float32)
    moments = Moments(name="y", count=samples, mean=mean, second=centred.T @ centred / samples)
    weight = rng.standard_normal((n, width))
    return pose(linear(n, width), weight, rng.standard_normal(n), moments)


def second(problem: Problem, centred: bool) -> Values:
    covariance = problem.weight @ problem.metric.matrix(problem.weight) @ problem.weight.T
    return np.asarray(
        covariance if centred else covariance + np.outer(problem.output_mean, problem.output_mean)
    )


@settings(max_examples=20, deadline=None)
@given(heads=st.integers(1, 3), size=st.integers(2, 6), shifted=st.booleans(), seed=st.integers(0, 99))
def test_every_width_is_the_best_part_of_the_products_and_loses_what_is_said(
    heads: int, size: int, shifted: bool, seed: int
) -> None:
    queries, keys = posed(heads * size, seed=seed), posed(heads * size, seed=seed + 1)
    at = np.arange(heads * size).reshape(heads, size).T
    bases, found = product_bases(queries, keys, (at, at), shifted=shifted)
    errors = found.errors[0]
    assert errors[0] == pytest.approx(1) and errors[-1] == 0 and (np.diff(errors) <= 0).all()
    energy, lost, least = 0.0, np.zeros(size + 1), np.zeros(size + 1)
    for head, (basis, back) in enumerate(zip(bases, inverses(bases), strict=True)):
        own = np.ix_(at[:, head], at[:, head])
        one, two = second(queries, False)[own], second(keys, shifted)[own]
        np.testing.assert_allclose(basis @ one @ basis.T, back @ two @ back.T, rtol=1e-3, atol=1e-3)
        energy += np.trace(one @ two)
        values = np.linalg.svd(np.linalg.cholesky(one).T @ np.linalg.cholesky(two), compute_uv=False)
        for kept in range(size + 1):
            missed = np.eye(size) - basis[:kept].T @ back[:kept]
            lost[kept] += np.trace(missed.T @ one @ missed @ two)
            least[kept] += np.square(values[kept:]).sum()
    np.testing.assert_allclose(errors, lost / energy, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(errors, least / energy, rtol=1e-3, atol=1e-4)


def test_the_mean_of_the_keys_counts_only_where_no_softmax_takes_it_away() -> None:
    queries, keys = posed(6), posed(6, seed=1)
    far = replace(keys, output_mean=keys.output_mean + 100)
    at = np.arange(6).reshape(1, 6).T

    def errors(of_keys: Problem, shifted: bool) -> Values:
        return product_bases(queries, of_keys, (at, at), shifted=shifted)[1].errors

    np.testing.assert_array_equal(errors(far, True), errors(keys, True))
    assert not np.allclose(errors(far, False), errors(keys, False))


def test_heads_that_give_nothing_are_no_harm() -> None:
    queries, keys = posed(8), posed(8, seed=1)
    silent = replace(queries, weight=queries.weight * (np.arange(8) < 4)[:, None], output_mean=np.zeros(8))
    at = np.arange(8).reshape(2, 4).T
    bases, found = product_bases(silent, keys, (at, at), shifted=True)
    assert np.isfinite(bases).all() and np.isfinite(inverses(bases)).all() and np.isfinite(found.errors).all()


def narrower(model: Model, samples: dict[str, Values]) -> Narrower:
    """What cuts queries and keys of ``model``, and what ``samples`` teach."""
    weight_of = partial(read_weight, model.graph())
    layers = find_layers(model.graph())[0]
    known = calibrate(model, layers, read_samples(samples, inputs_of(model.proto)), weight_of)
    plain = Narrower(
        model=model, layers=layers, weight_of=weight_of, moments=known.moments, inner={}, device="cpu"
    )
    chosen, _ = planned_pairs(found_in(model)[0], {layer.output for layer in layers}, set())
    return replace(
        plain, inner={key: Inner(p, *drop_order(order_task(p, plain, known))) for key, p in chosen.items()}
    )


def test_a_cut_is_seen_as_it_is_made_and_loses_more_the_fewer_channels_are_left() -> None:
    model, feed = load(attention(behind=BEHIND["softmax"])), rows()
    cutter = narrower(model, feed)
    ((key, inner),) = cutter.inner.items()
    layers = {layer.output: layer for layer in cutter.layers}
    whole, lost = outputs(model, feed), []
    for width in (2, 4, 6, 7):
        working = model.graph()
        ((output, factors),) = cutter.masked(key, width).items()
        assert factors.error == inner.widths.errors[0, width]
        split(working, layers[output], factors)
        made = outputs(cutter.narrow({key: Form(WIDTH, width)}, None).model, feed)
        np.testing.assert_allclose(made, outputs(model.splice(working), feed), atol=1e-4)
        lost.append(float(np.square(made - whole).sum()))
    assert lost == sorted(lost, reverse=True) and lost[-1] < 0.05 * lost[0]


@cache
def optimized() -> Any:
    return onnx_lrsd.optimize(
        attention(heads=4, size=16, width=64), rows(160, 64), ratio=1.15, target="tensorrt", forms=("width",)
    )


def test_queries_and_keys_of_fewer_channels_are_planned_reported_and_replayed_to_the_byte() -> None:
    text = attention(heads=4, size=16, width=64)
    result = optimized()
    (pair,), _ = found_in(load(text))
    key = key_of(pair)
    width = result.plan.widths[key]
    assert key == "qb x kb" and width.of == 16 and width.kept % 4 == 0 and 0 < width.error < 0.5
    sizes = [values.shape for name, values in stored(result.model).items() if name in ("wq", "wk")]
    assert sizes == [(64, 4 * width.kept)] * 2
    assert f"width {4 * width.kept} of 64" in report_table(result.report)
    plan = onnx_lrsd.plan_from_json(onnx_lrsd.plan_to_json(result.plan))
    assert json.loads(onnx_lrsd.plan_to_json(plan))["widths"][key]["kept"] == width.kept
    again = onnx_lrsd.optimize(text, rows(160, 64), plan=plan)
    bytes_of = [each.model.proto.SerializeToString(deterministic=True) for each in (result, again)]
    assert bytes_of[0] == bytes_of[1]
