"""Layers that stay dense are refitted for the inputs that rewritten ones give, where the samples tell how."""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
import onnx
import onnx.parser
import pytest

from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.fit.calibrate import Calibration, WeightOf, calibrate
from onnx_lrsd.fit.reconstruct import reconstruct
from onnx_lrsd.graph.model import Model, check, load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.compare import compare
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.types import DENSE, Factors, Form

SECOND = {"c1": Form("channel", 6)}
"""Of the network's layers c0, c1, c2 and y, the one that is rewritten."""


def network() -> Model:
    """x -> c0 -> Relu -> c1 -> + x -> c2 -> Relu -> y, convolutions of 24 channels."""
    text = ["c0 = Conv <pads = [1, 1, 1, 1]> (x, w0)", "r0 = Relu (c0)"]
    text += ["c1 = Conv <pads = [1, 1, 1, 1]> (r0, w1)", "s1 = Add (c1, x)"]
    text += ["c2 = Conv <pads = [1, 1, 1, 1]> (s1, w2)", "r2 = Relu (c2)"]
    text += ["y = Conv <pads = [1, 1, 1, 1]> (r2, w3)"]
    ends = "(float[n, 24, 8, 8] x) => (float[n, 24, 8, 8] y)"
    graph = onnx.parser.parse_graph(f"g {ends} {{ {' '.join(text)} }}")
    rng = np.random.default_rng(0)
    for index in range(4):
        weight = (rng.standard_normal((24, 24, 3, 3)) / 15).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(weight, f"w{index}"))
    opset = [onnx.helper.make_opsetid("", 17)]
    return load(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8))


def correlated(count: int, seed: int) -> np.ndarray:
    """Images whose 24 channels are mixtures of 8, as those of trained networks are."""
    rng = np.random.default_rng(seed)
    mixed = np.random.default_rng(9).standard_normal((24, 8)) @ rng.standard_normal((count, 8, 64))
    return (mixed.reshape(count, 24, 8, 8) + rng.standard_normal((count, 24, 8, 8)) / 5).astype(np.float32)


def calibrated(model: Model, x: np.ndarray) -> tuple[Calibration, WeightOf]:
    graph = model.graph()
    weight_of = partial(read_weight, graph)
    samples = read_samples({"x": x}, inputs_of(model.proto))
    return calibrate(model, find_layers(graph)[0], samples, weight_of), weight_of


def fitted(model: Model, x: np.ndarray, forms: dict[str, Form]) -> tuple[Model, dict[str, Factors]]:
    known, weight_of = calibrated(model, x)
    return reconstruct(model, known.layers, forms, weight_of, known)


def test_what_stays_dense_behind_a_rewritten_layer_makes_errors_smaller_on_other_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network()
    judge = read_samples({"x": correlated(60, 2)}, inputs_of(model.proto))
    refitted, factors = fitted(model, correlated(80, 1), SECOND)
    check(refitted, model)
    assert {name for name, found in factors.items() if found.form.kind == DENSE} == {"c2", "y"}
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["onnx_lrsd.fit.reconstruct"], "ROWS_TO_REFIT", 1e9)
        plain, alone = fitted(model, correlated(80, 1), SECOND)
    assert set(alone) == {"c1"}
    with_refit, without = (compare(model, other, judge, latency=False) for other in (refitted, plain))
    assert with_refit.error < 0.98 * without.error
    assert with_refit.after.parameters == without.after.parameters + 2 * 24  # their biases
    assert with_refit.after.macs == without.after.macs


def test_the_error_of_a_refitted_layer_is_that_of_its_outputs() -> None:
    """Where nothing but the input has changed: the layer behind the last one that was rewritten."""
    model, x = network(), correlated(80, 1)
    refitted, factors = fitted(model, x, {"c0": Form("channel", 6)})
    old, new = (open_session(each.proto, outputs=["c1"]).run({"x": x})["c1"] for each in (model, refitted))
    missed = old - new
    energy = np.square(old - old.mean(axis=(0, 2, 3), keepdims=True)).mean()
    # Its rows are a third the original network's, on which the refitted weight errs as well.
    assert factors["c1"].error == pytest.approx(np.square(missed).mean() / energy, rel=0.5)


def test_layers_that_no_rewritten_one_reaches_keep_their_bytes() -> None:
    model = network()
    refitted, factors = fitted(model, correlated(80, 1), {"y": Form("channel", 6)})
    assert set(factors) == {"y"}
    before, after = ({t.name: t for t in each.proto.graph.initializer} for each in (model, refitted))
    assert all(after[name] == before[name] for name in ("w0", "w1", "w2"))
    same, none = fitted(model, correlated(80, 1), {})
    assert not none and same.proto.graph == model.proto.graph


def test_few_rows_leave_a_dense_layer_as_it_was() -> None:
    model = network()  # 216 inputs and 64 positions: 40 samples hold less than twelve rows for each
    assert set(fitted(model, correlated(40, 1), SECOND)[1]) == {"c1"}


def products(shared: bool, biased: bool) -> Model:
    """y = (x W0) W1 [+ b], with W1 = W0 if ``shared``."""
    second = "w0" if shared else "w1"
    text = f"h = MatMul (x, w0) z = MatMul (h, {second}) " + ("y = Add (z, b)" if biased else "y = Relu (z)")
    graph = onnx.parser.parse_graph(f"g (float[n, 32] x) => (float[n, 32] y) {{ {text} }}")
    rng = np.random.default_rng(3)
    for name, shape in (("w0", (32, 32)), ("w1", (32, 32)), ("b", (32,))):
        values = (rng.standard_normal(shape) / 6).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    opset = [onnx.helper.make_opsetid("", 17)]
    return load(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8))


@pytest.mark.parametrize(
    ("shared", "biased", "refitted"), [(False, True, True), (True, True, False), (False, False, False)]
)
def test_a_product_is_refitted_if_its_weight_is_its_own_and_it_has_a_bias(
    shared: bool, biased: bool, refitted: bool
) -> None:
    model = products(shared, biased)
    x = correlated(40, 4).transpose(0, 2, 3, 1)[..., :8].reshape(-1, 32)
    result, factors = fitted(model, x, {"h": Form("channel", 4)})
    assert (len(factors) == 2) == refitted
    nodes = [node.op_type for node in result.proto.graph.node]
    assert nodes.count("Add") == 1 + biased and nodes.count("MatMul") == 3
