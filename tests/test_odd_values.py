"""Values that are not finite, huge, tiny or zero throughout spoil nothing but themselves."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner

import onnx_lrsd
from onnx_lrsd.cli import main
from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.fit.calibrate import Calibration, calibrate, what_was_left_out
from onnx_lrsd.fit.reconstruct import biases_added, reconstruct
from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.runtime.divergence import Divergence, change
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.types import Factors, Form, Values

WIDTH = 64


def a_model(text: str, **constants: Any) -> Model:
    graph = onnx.parser.parse_graph(text)
    graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    opset = onnx.helper.make_opsetid("", 17)
    return load(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8))


def weight(seed: int) -> Values:
    """A matrix whose singular values fall."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0] for _ in range(2))
    made: Values = ((left * 0.9 ** np.arange(WIDTH)) @ right).astype(np.float32)
    return made


def numbers(count: int = 300) -> Values:
    return np.random.default_rng(0).standard_normal((count, WIDTH)).astype(np.float32)


def calibrated(model: Model, x: Values) -> Calibration:
    graph = model.graph()
    samples = read_samples({"x": x}, inputs_of(model.proto))
    return calibrate(model, find_layers(graph)[0], samples, partial(read_weight, graph))


def fitted(model: Model, x: Values, form: Form) -> tuple[Model, dict[str, Factors]]:
    """Every layer in this form."""
    known, graph = calibrated(model, x), model.graph()
    forms = {layer.output: form for layer in known.layers}
    return reconstruct(model, known.layers, forms, partial(read_weight, graph), known)


def scaled_model(factor: float) -> Model:
    """Two layers; between them values are ``factor`` times as large, and their rectifier cuts off there."""
    return a_model(
        f"""g (float[n, {WIDTH}] x) => (float[n, {WIDTH}] y)
        {{ a = MatMul (x, w0) h = Add (a, b) g = Mul (h, big) k = MatMul (g, w1) l = Add (k, c) r = Relu (l)
           y = Mul (r, small) }}""",
        w0=weight(1),
        w1=weight(2),
        b=np.ones(WIDTH, np.float32),
        c=np.full(WIDTH, 0.1 * factor, np.float32),
        big=np.float32(factor),
        small=np.float32(1 / factor),
    )


def roots_model() -> Model:
    """The layer reads square roots: NaN where an input is negative."""
    return a_model(
        f"g (float[n, {WIDTH}] x) => (float[n, {WIDTH}] y) {{ s = Sqrt (x) y = MatMul (s, w) }}", w=weight(1)
    )


@pytest.mark.parametrize("factor", [2.0**100, 2.0**-90])
def test_huge_and_tiny_activations_are_fitted_as_any_others(factor: float) -> None:
    """By a power of two, which changes no digit."""
    x = numbers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odd, factors = fitted(scaled_model(factor), x, Form("channel", 32))
    plain, others = fitted(scaled_model(1.0), x, Form("channel", 32))
    assert calibrated(scaled_model(factor), x).quotas["l"].scale != 1
    assert calibrated(scaled_model(1.0), x).quotas["l"].scale == 1
    one, two = (open_session(model.proto).run({"x": x})["y"] for model in (odd, plain))
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-3)
    assert factors["l"].error == pytest.approx(others["l"].error, rel=1e-3)
    np.testing.assert_allclose(factors["l"].bias / factor, others["l"].bias, rtol=1e-3, atol=1e-3)


def test_rows_that_are_not_finite_are_left_out_and_counted() -> None:
    x = np.abs(numbers())
    good = calibrated(roots_model(), x)
    spoiled = np.concatenate([x, -x[:7]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = calibrated(roots_model(), spoiled)
        rewritten, factors = fitted(roots_model(), spoiled, Form("channel", 32))
    one, other = known.moments["y"], good.moments["y"]
    assert one.second is not None and other.second is not None
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-5)
    np.testing.assert_allclose(one.second, other.second, atol=1e-5)
    assert known.left_out == {"y": (7, 307)}
    assert what_was_left_out(known).startswith("7 of 307 sampled rows of the inputs of ")
    assert what_was_left_out(good) == ""
    assert factors["y"].error < 0.05
    assert np.isfinite(open_session(rewritten.proto).run({"x": x})["y"]).all()


def test_a_layer_without_one_finite_row_is_left_alone_and_says_why() -> None:
    x = -np.abs(numbers(60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = onnx_lrsd.optimize(roots_model().proto, {"x": x}, target="size", ratio=1.2, dry_run=True)
    assert result.report.layers[0].reason == "its input is not finite on the calibration data"
    assert any("were left out" in warning for warning in result.report.warnings)


def silent_model() -> Model:
    return a_model(
        f"""g (float[n, {WIDTH}] x) => (float[n, {WIDTH}] y)
        {{ h = MatMul (x, w0) r = Relu (h) y = MatMul (r, w1) }}""",
        w0=weight(1),
        w1=weight(2),
    )


@pytest.mark.parametrize("form", [Form("channel", 32), Form("dense", weights=(("uint8", WIDTH),))])
def test_a_layer_without_bias_keeps_silence(form: Form) -> None:
    x = np.abs(numbers()) + 0.5
    x[::10] = 0
    model, silence = silent_model(), np.zeros((1, WIDTH), np.float32)
    rewritten, factors = fitted(model, x, form)
    assert not any(factors[name].bias.any() for name in factors)
    assert not open_session(rewritten.proto).run({"x": silence})["y"].any()
    before, after = (open_session(each.proto).run({"x": x})["y"] for each in (model, rewritten))
    assert np.sum((before - after) ** 2) < 0.05 * np.sum(before**2)


def test_a_bias_takes_up_the_mean_where_no_silence_was_seen() -> None:
    """And it is said."""
    model = silent_model()
    working = model.graph()
    layers, _ = find_layers(working)
    weight_of = partial(read_weight, working)
    factors = fitted(model, np.abs(numbers()) + 0.5, Form("channel", 32))[1]
    assert all(factors[name].bias.any() for name in factors)
    said = biases_added(model, {"x": np.ones((2, WIDTH), np.float32)}, layers, factors, weight_of)
    assert said.startswith(f"A bias was added where there was none ({layers[0].name} and 1 more)")
    without = {name: replace(each, bias=np.zeros(WIDTH)) for name, each in factors.items()}
    assert biases_added(model, {"x": np.ones((2, WIDTH), np.float32)}, layers, without, weight_of) == ""


def test_a_bias_where_silence_was_never_silence_needs_no_word() -> None:
    """A layer without a bias whose input has one: the attention of a transformer, say."""
    model = a_model(
        f"""g (float[n, {WIDTH}] x) => (float[n, {WIDTH}] y)
        {{ h = MatMul (x, w0) a = Add (h, b) r = Relu (a) y = MatMul (r, w1) }}""",
        w0=weight(1),
        w1=weight(2),
        b=np.ones(WIDTH, np.float32),
    )
    working = model.graph()
    layers, _ = find_layers(working)
    factors = fitted(model, np.abs(numbers()) + 0.5, Form("channel", 32))[1]
    assert factors[layers[-1].output].bias.any()
    feed = {"x": np.ones((2, WIDTH), np.float32)}
    assert biases_added(model, feed, layers, factors, partial(read_weight, working)) == ""


def test_a_layer_with_a_bias_keeps_none_of_it_fixed() -> None:
    x = numbers()
    x[::10] = 0
    assert fitted(scaled_model(1.0), x, Form("channel", 32))[1]["l"].bias.any()


@pytest.mark.slow
def test_huge_values_of_another_shape_have_a_finite_error() -> None:
    rows = np.full((4, 8), 1e30, np.float32)
    found = Divergence()
    found.add(rows, rows[:, :4])
    assert found.relative() == 1.0
    assert change(rows, rows[:, :4]) == pytest.approx(32e60)


def test_no_warning_of_numpy_reaches_the_terminal(tmp_path: Path) -> None:
    onnx.save(scaled_model(2.0**100).proto, tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=numbers())
    arguments = ["optimize", tmp_path / "model.onnx", "--calib", tmp_path / "calib.npz", "--ratio", 1.2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = CliRunner().invoke(main, [*map(str, arguments), "-o", str(tmp_path / "out.onnx")])
    assert done.exit_code in (0, 3), done.output
    assert "Warning: overflow" not in done.output and "RuntimeWarning" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)


@pytest.mark.parametrize(("name", "dtype"), [("float", np.float32), ("float16", np.float16)])
def test_no_weight_is_subnormal_since_products_with_those_are_slow(name: str, dtype: type) -> None:
    text = f"g ({name}[n, 64] x) => ({name}[n, 64] y) {{ y = MatMul (x, w) }}"
    model = a_model(text, w=np.ones((64, 64), dtype))
    working = model.graph()
    (layer,), _ = find_layers(working)
    u = np.ones((64, 1))
    u[3], u[5] = 1e-40, 1e-6  # of a dead channel, and of one that is small in half precision
    factors = Factors(form=Form("channel", 1), kernels=(np.ones((1, 64)), u), bias=np.full(64, 1e-41))
    onnx_lrsd.split(working, layer, factors)
    weights = [onnx.numpy_helper.to_array(t) for t in model.splice(working).proto.graph.initializer]
    tiny = np.finfo(np.float32).tiny
    assert not any(((w != 0) & (abs(w.astype(np.float32)) < tiny)).any() for w in weights)
    assert any(np.count_nonzero(w) == 63 for w in weights), "the small one is still there"
