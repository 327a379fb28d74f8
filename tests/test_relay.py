"""The network is run from where rewritten layers have settled, and the fit does not notice."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.fit.calibrate import calibrate
from onnx_lrsd.fit.reconstruct import reconstruct
from onnx_lrsd.fit.resume import resumed
from onnx_lrsd.fit.sensitivity import Reference
from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.graph.subgraph import frontier, inputs_of
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.split import split
from onnx_lrsd.runtime.activation_cache import Relay
from onnx_lrsd.runtime.session import open_model, open_session
from onnx_lrsd.types import Factors, Form

CHANNELS, LAYERS = 24, 4


def residual() -> Model:
    """x -> conv 0 -> relu -> conv 1 -> + skip -> conv 2 -> relu -> conv 3 -> + skip, each 24 wide."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((CHANNELS, CHANNELS, 3, 3)) / 15 for _ in range(LAYERS)]
    text = ["c0 = Conv <pads = [1, 1, 1, 1]> (x, w0)", "r0 = Relu (c0)"]
    text += ["c1 = Conv <pads = [1, 1, 1, 1]> (r0, w1)", "s1 = Add (c1, x)"]
    text += ["c2 = Conv <pads = [1, 1, 1, 1]> (s1, w2)", "r2 = Relu (c2)"]
    text += ["c3 = Conv <pads = [1, 1, 1, 1]> (r2, w3)", "y = Add (c3, s1)"]
    ends = "(float[n, 24, 8, 8] x) => (float[n, 24, 8, 8] y)"
    graph = onnx.parser.parse_graph(f"g {ends} {{ {' '.join(text)} }}")
    for index, weight in enumerate(weights):
        graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), f"w{index}"))
    opset = [onnx.helper.make_opsetid("", 17)]
    return load(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8))


def test_the_frontier_is_all_that_what_may_change_reads() -> None:
    proto = residual().proto
    assert frontier(proto, {"c0"}) == []  # the model's own input
    assert frontier(proto, {"c1", "w1"}) == ["r0"]
    assert frontier(proto, {"c2"}) == ["s1"]
    assert sorted(frontier(proto, {"c3"})) == ["r2", "s1"]
    assert frontier(proto, {"y"}) == ["c3", "s1"]


def test_a_network_runs_from_tensors_it_is_given() -> None:
    proto = residual().proto
    x = np.random.default_rng(1).standard_normal((3, CHANNELS, 8, 8)).astype(np.float32)
    whole = open_session(proto, outputs=["s1", "y"]).run({"x": x})
    rest = open_session(proto, given={"s1": np.float32})
    np.testing.assert_array_equal(rest.run({"x": 0 * x, "s1": whole["s1"]})["y"], whole["y"])


def test_the_fit_is_the_same_and_the_network_runs_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = residual()
    x = np.random.default_rng(2).standard_normal((60, CHANNELS, 8, 8)).astype(np.float32)
    graph = model.graph()
    weight_of = partial(read_weight, graph)
    samples = read_samples({"x": x}, inputs_of(model.proto))
    known = calibrate(model, find_layers(graph)[0], samples, weight_of)
    forms = {layer.output: Form("channel", 12) for layer in known.layers}
    convolutions: list[int] = []

    def counting(model: Model, *, given: Any = None, **options: Any) -> Any:
        session, proto = open_model(model, given=given, **options), model.proto
        at = [node.output[0] for node in proto.graph.node]
        last = max(at.index(name) for name in options["outputs"])
        first = 1 + max((at.index(name) for name in given or ()), default=-1)
        convolutions.append(sum(n.op_type == "Conv" for n in proto.graph.node[first : last + 1]))
        return session

    def fit(most: int) -> tuple[dict[str, Factors], int]:
        convolutions.clear()
        monkeypatch.setattr(sys.modules["onnx_lrsd.fit.reconstruct"], "Relay", lambda *given: Relay(most))
        return reconstruct(model, known.layers, forms, weight_of, known)[1], sum(convolutions)

    monkeypatch.setattr(sys.modules["onnx_lrsd.fit.sampling"], "open_model", counting)
    (one, often), (other, once) = fit(0), fit(1 << 30)
    assert often == 2 * (1 + 2 + 3) and once == 2 * 3  # each convolution became two
    for name, factors in one.items():
        assert factors.error == other[name].error
        for kernel, same in zip(factors.kernels, other[name].kernels, strict=True):
            np.testing.assert_array_equal(kernel, same)


def test_what_is_too_much_is_not_held_and_the_point_before_is_kept() -> None:
    relay, small, large = Relay(most=100), np.zeros(10, np.float32), np.zeros(100, np.float32)
    for index in range(2):
        relay.offer(index, 2, {"a": small + index}, ["a"])
    assert relay.types == {"a": np.float32} and relay.feed(1)["a"][0] == 1
    for index in range(2):
        relay.offer(index, 2, {"a": small, "b": large}, ["b"])
    assert relay.types == {"a": np.float32} and relay.feed(1)["a"][0] == 1


@pytest.mark.parametrize("most", [0, 1 << 30])
def test_a_change_moves_the_outputs_as_much_from_where_it_begins_as_in_the_whole_network(most: int) -> None:
    model = residual()
    model.proto.graph.output.append(onnx.ValueInfoProto(name="s1"))  # which later layers do not reach
    x = np.random.default_rng(3).standard_normal((12, CHANNELS, 8, 8)).astype(np.float32)
    samples = read_samples({"x": x}, inputs_of(model.proto))
    layers, _ = find_layers(model.graph())
    reference = Reference(model, samples)
    units = [*((layer,) for layer in layers), (layers[1], layers[3])]
    units.sort(key=lambda unit: layers.index(unit[0]))
    changing = [{name for layer in unit for name in (layer.output, layer.weight)} for unit in units]
    opened: list[int] = []
    for unit, rest in zip(units, resumed(model, samples, changing, most), strict=True):
        moved = []
        for source in (model, rest.model):
            working = source.graph()
            for layer in unit:
                weight = np.random.default_rng(4).standard_normal((CHANNELS, CHANNELS, 3, 3)) / 15
                channels = tuple(range(CHANNELS))
                factors = Factors(
                    form=Form(), kernels=(), bias=np.zeros(CHANNELS), sparse=weight, channels=channels
                )
                split(working, layer, factors)
            moved.append(source.splice(working))
        opened.append(len(rest.model.proto.graph.node))
        assert reference.moved(rest.outputs(moved[1])) == pytest.approx(
            reference.movement(moved[0]), rel=1e-4
        )
    assert (min(opened) < len(model.proto.graph.node)) == (most > 0)
