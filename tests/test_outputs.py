"""An error of a layer's outputs counts by what the layers that read them make of it."""

from __future__ import annotations

from math import inf

import numpy as np
import onnx
import pytest
from plain_layers import conv

from onnx_lrsd.graph.model import load
from onnx_lrsd.passes.consumers import consumers
from onnx_lrsd.passes.find_layers import find_layers
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.layout import expand
from onnx_lrsd.solver.problem import Problem, output_metric, pose
from onnx_lrsd.solver.rectified import Rectified
from onnx_lrsd.types import CHANNEL, CHANNEL_IN, SPATIAL, TUCKER, Factors, Form, Moments

LAYER = conv(16, 8)
FORMS = (Form(CHANNEL, 6), Form(CHANNEL_IN, 2), Form(SPATIAL, 9), Form(TUCKER, 4, outer=8))
RNG = np.random.default_rng(0)
ROWS = (RNG.standard_normal((3000, 72)) @ (RNG.standard_normal((72, 72)) * 0.9 ** np.arange(72)).T).astype(
    np.float32
)
WEIGHT, BIAS = RNG.standard_normal((16, 72)) / 20, RNG.standard_normal(16)
READ = RNG.standard_normal((10, 9, 16)) * 0.6 ** np.arange(16)


def posed(metric: np.ndarray | None) -> Problem:
    mean = ROWS.mean(axis=0, dtype=np.float64)
    second = ((ROWS - mean).T @ (ROWS - mean) / len(ROWS)).astype(np.float32)
    return pose(
        LAYER, WEIGHT, BIAS, Moments(name="y", count=len(ROWS), mean=mean, second=second), outputs=metric
    )


def counted(factors: Factors, metric: np.ndarray, limits: tuple[float, float] = (-inf, inf)) -> float:
    """e^T G e of what passes the limits, summed over all rows."""
    found = ROWS @ expand(LAYER, factors).T + factors.bias
    missed = (ROWS @ WEIGHT.T + BIAS).clip(*limits) - found.clip(*limits)
    return float(np.sum((missed @ metric) * missed))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rectifier", [False, True])
def test_what_readers_see_is_nearer_and_the_error_is_still_that_of_the_layer(
    form: Form, rectifier: bool
) -> None:
    metric, limits = output_metric([READ]), (0.0, inf) if rectifier else (-inf, inf)
    outputs = (ROWS @ WEIGHT.T + BIAS).astype(np.float32)
    seen = Rectified(ROWS, outputs, *limits) if rectifier else None
    alike = decompose(posed(None), form, rectified=seen)
    weighed = decompose(posed(metric), form, rectified=seen)
    assert counted(weighed, metric, limits) < counted(alike, metric, limits)
    if not rectifier:
        energy = float(np.square((ROWS - ROWS.mean(0)) @ WEIGHT.T).sum())
        assert weighed.error == pytest.approx(counted(weighed, np.eye(16)) / energy, rel=1e-3)


def test_nothing_is_lost_at_full_rank() -> None:
    factors = decompose(posed(output_metric([READ])), Form(CHANNEL, 16))
    assert factors.error < 1e-9


def test_equal_readers_change_nothing() -> None:
    assert output_metric([np.eye(16)[:, None]]) == pytest.approx(np.eye(16))
    for form in FORMS:
        alike, same = (decompose(posed(metric), form) for metric in (None, np.eye(16)))
        assert same.error == pytest.approx(alike.error, rel=1e-4)


def found(body: str, sizes: dict[str, tuple[int, ...]]) -> dict[str, list[tuple[str, bool]]]:
    graph = onnx.parser.parse_graph(f"g (float[1, 8, 6, 6] x) => (float[a, b] y) {{ {body} }}")
    for name, size in sizes.items():
        weight = RNG.standard_normal(size).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    opset = onnx.helper.make_opsetid("", 17)
    working = load(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)).graph()
    layers, _ = find_layers(working)
    by_name = consumers(working, layers, layers)
    return {name: [(r.layer.output, r.channels_last) for r in readings] for name, readings in by_name.items()}


def test_readers_are_found_behind_what_keeps_channels_apart() -> None:
    body = (
        "a = Conv (x, w) r = Relu (a) b = Conv (r, v) s = Add (b, r) t = Relu (s) c = Conv (t, u) "
        "p = MaxPool <kernel_shape = [2, 2]> (t) f = Flatten (p) y = Gemm <transB = 1> (f, d)"
    )
    sizes = {"w": (16, 8, 1, 1), "v": (16, 16, 1, 1), "u": (8, 16, 1, 1), "d": (10, 16 * 25)}
    reading = found(body, sizes)
    assert set(reading) == {"a", "b"}
    assert sorted(reading["a"]) == [("b", False), ("c", False), ("y", False)]
    assert sorted(reading["b"]) == [("c", False), ("y", False)]


def test_a_reader_behind_channels_last_knows_their_order() -> None:
    body = "a = Conv (x, w) t = Transpose <perm = [0, 2, 3, 1]> (a) f = Flatten (t) y = MatMul (f, d)"
    assert found(body, {"w": (16, 8, 1, 1), "d": (16 * 36, 10)}) == {"a": [("y", True)]}


@pytest.mark.parametrize("mixing", ["Softmax <axis = 1> (a)", "Transpose <perm = [0, 1, 3, 2]> (a)"])
def test_no_reader_is_seen_through_what_mixes_or_moves_channels(mixing: str) -> None:
    body = f"a = Conv (x, w) t = {mixing} f = Flatten (t) y = MatMul (f, d)"
    assert found(body, {"w": (16, 8, 1, 1), "d": (16 * 36, 10)}) == {}
