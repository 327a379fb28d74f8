"""Values of attention in fewer channels: each head in a basis of its own, which alone changes nothing."""

from __future__ import annotations

import json
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
from onnx_lrsd.passes.pairs import Pair, cut, find_pairs, turn
from onnx_lrsd.passes.split import split
from onnx_lrsd.report.table import report_table
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.solver.heads import head_bases, turned, turned_inputs, turned_outputs
from onnx_lrsd.solver.problem import pose
from onnx_lrsd.solver.width import fit_width, widths
from onnx_lrsd.types import WIDTH, Form, Moments

Values = npt.NDArray[Any]
BETWEEN = {
    "nothing": "c = Identity (v)",
    "bias": "c = Add (v, b)",
    "bias first": "c = Add (b, v)",
    "relu": "c = Relu (v)",
    "scale": "c = Mul (v, b)",
    "shift": "c = Add (v, one)",
}
STRAIGHT = ("nothing", "bias", "bias first")


def attention(
    heads: int = 4,
    size: int = 8,
    between: str = "bias",
    *,
    target: tuple[int, ...] | None = None,
    back: tuple[int, ...] = (0, 2, 1, 3),
    flat: int | None = None,
    transposed: bool = False,
    width: int = 24,
    tokens: str = "s",
    hidden: int = 0,
    seed: int = 0,
) -> onnx.ModelProto:
    """Self-attention as exporters write it, of (n, s, width) to (n, s, 12).

    With ``hidden`` a layer of so many channels and a Relu stand in front of the values. Queries are bounded,
    so that they and the keys keep all of their channels.
    """
    rng, inner = np.random.default_rng(seed), heads * size
    values = "vt = Transpose <perm = [0, 2, 1, 3]> (vh) cx = MatMul (p, vt)"
    if transposed:
        values = (
            "vt = Transpose <perm = [0, 2, 3, 1]> (vh) pt = Transpose <perm = [0, 1, 3, 2]> (p) "
            "ct = MatMul (vt, pt) cx = Transpose <perm = [0, 1, 3, 2]> (ct)"
        )
    first = "i = MatMul (x, wi) r = Relu (i) v = MatMul (r, wv)" if hidden else "v = MatMul (x, wv)"
    text = f"""
    g (float[n, {tokens}, {width}] x) => (float[n, {tokens}, 12] y) {{
        q = MatMul (x, wq) qa = Tanh (q) qh = Reshape (qa, split) qt = Transpose <perm = [0, 2, 1, 3]> (qh)
        k = MatMul (x, wk) kh = Reshape (k, split) kt = Transpose <perm = [0, 2, 3, 1]> (kh)
        {first} {BETWEEN[between]} vh = Reshape (c, split)
        a = MatMul (qt, kt) p = Softmax (a) {values}
        cb = Transpose <perm = {list(back)}> (cx) cf = Reshape (cb, flat) y = MatMul (cf, wo)
    }}"""
    graph = onnx.parser.parse_graph(text)
    constants = {
        "wq": rng.standard_normal((width, inner)) / width,
        "wk": rng.standard_normal((width, inner)) / width,
        "wi": rng.standard_normal((width, max(hidden, 1))),
        "wv": rng.standard_normal((hidden or width, inner)) / width**0.5,
        "wo": rng.standard_normal((inner, 12)) / inner**0.5,
        "b": rng.standard_normal(inner),
        "one": np.ones(()),
    }
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    shapes = {"split": target or (0, 0, heads, size), "flat": (0, 0, flat or inner)}
    tensors += [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in shapes.items()]
    read = {name for node in graph.node for name in node.input}
    graph.initializer.extend(tensor for tensor in tensors if tensor.name in read)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def rows(count: int = 60, width: int = 24, seed: int = 1) -> dict[str, Values]:
    """Sequences of 6 tokens whose values lie in a few directions, but for noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 6, 8)) @ np.random.default_rng(7).standard_normal((8, width)) / 3
    return {"x": (x + 0.03 * rng.standard_normal(x.shape)).astype(np.float32)}


def value_pairs(model: Model) -> list[Pair]:
    """The pairs that the values give."""
    working = model.graph()
    found, _ = find_pairs(working, find_layers(working)[0], inferred_shapes(model.proto))
    return [pair for pair in found if pair.producers[0].output in ("v", "c")]


def outputs(model: Model, feed: dict[str, Values]) -> Values:
    return np.asarray(next(iter(open_session(model.proto).run(feed).values())))


def orthogonal(heads: int, size: int, seed: int) -> npt.NDArray[np.float64]:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((heads, size, size)))[0]


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(2, 5),
    size=st.integers(2, 7),
    between=st.sampled_from(STRAIGHT),
    counted=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_turned_heads_give_the_same_and_are_cut_like_other_channels(
    heads: int, size: int, between: str, counted: bool, transposed: bool, seed: int
) -> None:
    flat, split = (None, None) if counted else (-1, (0, 0, heads, -1))
    model = load(attention(heads, size, between, flat=flat, target=split, transposed=transposed, seed=seed))
    (pair,) = value_pairs(model)
    assert (pair.heads, pair.channels) == (heads, size)
    feed, bases = rows(3), orthogonal(heads, size, seed)
    working = model.graph()
    turn(working, pair, bases)
    whole = model.splice(working)
    np.testing.assert_allclose(outputs(whole, feed), outputs(model, feed), atol=2e-5)
    kept = sorted(np.random.default_rng(seed).choice(size, max(1, size // 2), replace=False).tolist())
    cut(working, [(pair, kept)])
    smaller = model.splice(working)
    onnx.checker.check_model(smaller.proto, full_check=True)
    nodes = [[node.op_type for node in each.proto.graph.node] for each in (model, smaller)]
    assert nodes[0] == nodes[1]
    # What is left reads as if the output projection had no use for the rest.
    weights = {t.name: numpy_helper.to_array(t).copy() for t in model.proto.graph.initializer}
    read = weights["wo"].reshape(heads, size, 12)
    for head, basis in enumerate(bases):
        read[head] = basis[kept].T @ (basis[kept] @ read[head])
    reference = onnx.ModelProto()
    reference.CopyFrom(model.proto)
    place = next(t for t in reference.graph.initializer if t.name == "wo")
    place.CopyFrom(numpy_helper.from_array(read.reshape(-1, 12), "wo"))
    np.testing.assert_allclose(outputs(smaller, feed), outputs(load(reference), feed), atol=2e-5)
    dims = {t.name.partition("/")[0]: list(t.dims) for t in smaller.proto.graph.initializer}
    assert dims["wv"] == [24, heads * len(kept)] and dims["wo"] == [heads * len(kept), 12]
    assert dims["wq"] == dims["wk"] == [24, heads * size]


@pytest.mark.parametrize("between", sorted(set(BETWEEN) - set(STRAIGHT)))
def test_what_is_not_linear_in_between_keeps_the_basis(between: str) -> None:
    (pair,) = value_pairs(load(attention(between=between)))
    assert pair.heads == 0 and pair.channels == 8


def test_heads_that_are_out_of_order_keep_the_basis() -> None:
    """Without the second Transpose positions and heads are read as one another."""
    (pair,) = value_pairs(load(attention(6, 8, back=(0, 1, 2, 3), tokens="6")))
    assert (pair.channels, pair.heads) == (8, 0)


def context(count: int, heads: int, size: int, seed: int) -> Values:
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((heads * size, heads * size)) * np.geomspace(1, 0.05, heads * size)
    return np.asarray(rng.standard_normal((count, heads * size)) @ mixing.T)


def posed(x: Values, n: int = 6, seed: int = 0, bare: bool = False) -> Any:
    m = x.shape[1]
    weight = np.random.default_rng(seed).standard_normal((n, m))
    mean = x.mean(axis=0)
    centred = (x - mean).astype(np.float32)
    known = Moments(name="y", count=len(x), mean=mean, second=centred.T @ centred / len(x))
    return pose(
        linear(n, m), weight, np.ones(n), replace(known, second=None, rows=centred) if bare else known
    )


@settings(max_examples=15, deadline=None)
@given(heads=st.integers(1, 3), size=st.integers(2, 6), seed=st.integers(0, 99), bare=st.booleans())
def test_a_problem_in_other_bases_is_the_same_one(heads: int, size: int, seed: int, bare: bool) -> None:
    x = context(4 if bare else 60, heads, size, seed)
    problem, at = posed(x, bare=bare), np.arange(heads * size).reshape(heads, size).T
    bases = orthogonal(heads, size, seed)
    other = turned_inputs(problem, at, bases)
    assert other.error(turned(problem.weight, at, bases)) == pytest.approx(0, abs=1e-9)
    guess = np.random.default_rng(seed).standard_normal(problem.weight.shape)
    assert other.error(turned(guess, at, bases)) == pytest.approx(problem.error(guess), rel=1e-4)
    np.testing.assert_allclose(turned(turned(guess, at, bases), at, bases, back=True), guess, atol=1e-12)
    rows = np.arange(6).reshape(2, 3).T
    given = turned_outputs(problem, rows, orthogonal(2, 3, seed))
    gave = turned(guess.T, rows, orthogonal(2, 3, seed)).T
    assert given.error(gave) == pytest.approx(problem.error(guess), rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(heads=st.integers(1, 4), size=st.integers(2, 7), seed=st.integers(0, 99))
def test_where_heads_are_independent_every_width_is_the_best_low_rank_reader(
    heads: int, size: int, seed: int
) -> None:
    problem = posed(context(80, heads, size, seed))
    block = np.kron(np.eye(heads), np.ones((size, size)))
    problem = replace(problem, metric=replace(problem.metric, second=problem.metric.second * block))
    at = np.arange(heads * size).reshape(heads, size).T
    found = widths([turned_inputs(problem, at, head_bases([problem], [at]))], [at])
    lost = np.zeros((heads, size))
    for head, own in enumerate(at.T):
        lower = np.linalg.cholesky(problem.metric.matrix(problem.weight)[np.ix_(own, own)])
        values = np.linalg.svd(problem.weight[:, own] @ lower, compute_uv=False)
        lost[head, : len(values)] = values**2
    least = [lost[:, kept:].sum() / problem.energy for kept in range(size + 1)]
    np.testing.assert_allclose(found.errors[0], least, atol=1e-7, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(heads=st.integers(2, 4), size=st.integers(3, 6), seed=st.integers(0, 99))
def test_fewer_channels_of_turned_heads_lose_more_each_time_and_what_is_said(
    heads: int, size: int, seed: int
) -> None:
    problem = posed(context(200, heads, size, seed))
    at = np.arange(heads * size).reshape(heads, size).T
    other = turned_inputs(problem, at, head_bases([problem], [at]))
    found = widths([other], [at])
    assert (np.diff(found.errors[0]) <= 1e-12).all()
    for kept in range(1, size):
        fitted = fit_width(other, at, found.kept(kept))
        missed = other.weight.copy()
        missed[:, list(fitted.channels)] -= fitted.sparse
        lost = np.sum(other.metric.apply(missed) * missed) / other.energy
        assert lost == pytest.approx(found.errors[0, kept], rel=1e-6, abs=1e-9)


def narrower(model: Model, samples: dict[str, Values]) -> Narrower:
    """What cuts the pairs of ``model``, and what ``samples`` teach."""
    weight_of = partial(read_weight, model.graph())
    layers = find_layers(model.graph())[0]
    known = calibrate(model, layers, read_samples(samples, inputs_of(model.proto)), weight_of)
    pairs, _ = find_pairs(model.graph(), layers, inferred_shapes(model.proto))
    plain = Narrower(
        model=model, layers=layers, weight_of=weight_of, moments=known.moments, inner={}, device="cpu"
    )
    chosen, _ = planned_pairs(pairs, {layer.output for layer in layers}, set())
    inner = {key: Inner(pair, *drop_order(order_task(pair, plain))) for key, pair in chosen.items()}
    return replace(plain, inner=inner)


@pytest.mark.parametrize("cut_too", [False, True])
def test_a_cut_is_seen_as_it_is_made_beside_another_one(cut_too: bool) -> None:
    """The layer of the values reads the channels of one pair and gives those of the other."""
    model, feed = load(attention(4, 8, hidden=48)), rows()
    cutter = narrower(model, feed)
    (first, values) = cutter.inner
    assert cutter.inner[values].bases is not None and cutter.inner[first].bases is None
    forms = {first: Form(WIDTH, 32), values: Form(WIDTH, 4)}
    chosen = forms if cut_too else {values: forms[values]}
    working = model.graph()
    layers = {layer.output: layer for layer in cutter.layers}
    for key, form in chosen.items():
        for output, factors in cutter.masked(key, form.rank).items():
            split(working, layers[output], factors)
    seen, made = outputs(model.splice(working), feed), outputs(cutter.narrow(chosen, None).model, feed)
    np.testing.assert_allclose(made, seen, atol=1e-4)
    alone = cutter.narrow({first: forms[first]}, None)
    weights = {t.name: numpy_helper.to_array(t) for t in alone.model.proto.graph.initializer}
    np.testing.assert_array_equal(
        weights["wo"], next(numpy_helper.to_array(t) for t in model.proto.graph.initializer if t.name == "wo")
    )


@cache
def optimized() -> Any:
    return onnx_lrsd.optimize(
        attention(heads=4, size=16, width=64), rows(160, 64), ratio=1.3, target="tensorrt", forms=("width",)
    )


def test_values_of_fewer_channels_are_planned_reported_and_replayed_to_the_byte() -> None:
    result = optimized()
    ((key, width),) = result.plan.widths.items()
    model = load(attention(heads=4, size=16, width=64))
    (pair,) = value_pairs(model)
    assert key == key_of(pair) and width.of == 16 and width.kept % 4 == 0 and 0 < width.error < 0.5
    dims = [list(t.dims) for t in result.model.proto.graph.initializer]
    assert [64, 4 * width.kept] in dims and [4 * width.kept, 12] in dims
    assert f"width {4 * width.kept} of 64" in report_table(result.report)
    plan = onnx_lrsd.plan_from_json(onnx_lrsd.plan_to_json(result.plan))
    assert json.loads(onnx_lrsd.plan_to_json(plan))["widths"][key]["kept"] == width.kept
    again = onnx_lrsd.optimize(attention(heads=4, size=16, width=64), rows(160, 64), plan=plan)
    bytes_of = [each.model.proto.SerializeToString(deterministic=True) for each in (result, again)]
    assert bytes_of[0] == bytes_of[1]


def test_the_error_that_is_reported_is_that_of_the_outputs() -> None:
    """The output projection is the last layer, so that its error is that of the model on the same samples."""
    result, feed = optimized(), rows(160, 64)
    was = outputs(load(attention(heads=4, size=16, width=64)), feed).reshape(-1, 12)
    now = outputs(result.model, feed).reshape(-1, 12)
    lost = np.square(now - was).sum() / np.square(was - was.mean(axis=0)).sum()
    ((_, width),) = result.plan.widths.items()
    assert lost == pytest.approx(width.error, rel=0.5)
    (last,) = [layer for layer in result.report.layers if layer.reads is not None]
    assert lost == pytest.approx(last.error, rel=0.2)


def test_a_few_heads_of_few_channels_are_not_planned() -> None:
    for heads, size, planned in ((4, 4, 0), (4, 8, 1)):
        pairs = value_pairs(load(attention(heads, size)))
        assert len(planned_pairs(pairs, {"v", "y", "c"}, set())[0]) == planned
