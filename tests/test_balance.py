"""Channels between two factors are scaled alike for int8, and the outputs stay what they are."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.int8.balance import balanced
from onnx_lrsd.int8.quantise import quantise
from onnx_lrsd.runtime.session import open_session

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
DENSE = "g (float[n, 32] x) => (float[n, 32] y) {{ z = {first} y = {second} {more} }}"
PRODUCTS = "MatMul (x, v)", "MatMul (z, u)"
CONVOLUTIONS = (
    "g (float[n, 8, 6, 6] x) => (float[n, 8, 6, 6] y) {"
    " z = Conv <pads = [1, 0, 1, 0]> (x, v, b) y = Conv <pads = [0, 1, 0, 1]> (z, u, c) }"
)


def model(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f"{HEAD} {text}")
    proto.graph.initializer.extend(
        numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()
    )
    return proto


def factors(rows: int = 32, rank: int = 24) -> dict[str, np.ndarray]:
    """V and U for x V U, whose channels in between fall by two orders of magnitude."""
    rng = np.random.default_rng(0)
    v = rng.standard_normal((rows, rank)) * np.logspace(0, -2, rank)
    return {"v": v, "u": rng.standard_normal((rank, rows))}


def samples(proto: onnx.ModelProto, *shape: int) -> Samples:
    x = np.random.default_rng(1).standard_normal((120, *shape)).astype(np.float32)
    return read_samples({"x": x}, inputs_of(proto))


def output(proto: onnx.ModelProto, data: Samples) -> np.ndarray:
    return np.asarray(open_session(proto).run(next(data.batches(8)))["y"])


def spread(proto: onnx.ModelProto, data: Samples) -> float:
    """How many times more the channel between that moves most moves than the one that moves least."""
    proto.graph.output.append(onnx.ValueInfoProto(name="z"))
    z = np.moveaxis(open_session(proto).run(next(data.batches(8)))["z"], 1, 0)
    deviations = z.reshape(len(z), -1).std(axis=1)
    del proto.graph.output[-1]
    return float(deviations.max() / deviations.min())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        PRODUCTS,
        ("Gemm (x, v, b)", "Gemm (z, u, c)"),
        ("Gemm <transB = 1> (x, vt, b)", "Gemm <transB = 1, alpha = 0.5> (z, ut)"),
    ],
)
def test_channels_between_factors_become_more_alike_and_outputs_stay(first: str, second: str) -> None:
    found = factors()
    weights = found | {"vt": found["v"].T, "ut": found["u"].T, "b": np.logspace(0, -2, 24), "c": np.ones(32)}
    names = re.findall(r"\w+", f"{first} {second}")
    used = {name: value for name, value in weights.items() if name in names}
    before = model(DENSE.format(first=first, second=second, more=""), **used)
    data = samples(before, 32)
    after = balanced(before, data)
    assert np.allclose(output(after, data), output(before, data), rtol=1e-4, atol=1e-5)
    assert spread(after, data) < spread(before, data) ** 0.6


def test_convolutions_take_part() -> None:
    rng = np.random.default_rng(0)
    v = rng.standard_normal((6, 8, 3, 1)) * np.logspace(0, -2, 6)[:, None, None, None]
    u = rng.standard_normal((8, 6, 1, 3))
    before = model(CONVOLUTIONS, v=v, u=u, b=np.logspace(0, -2, 6), c=np.ones(8))
    data = samples(before, 8, 6, 6)
    after = balanced(before, data)
    assert np.allclose(output(after, data), output(before, data), rtol=1e-4, atol=1e-4)
    assert spread(after, data) < spread(before, data) ** 0.6


@pytest.mark.parametrize(
    ("first", "second", "more"),
    [
        ("MatMul (x, v)", "MatMul (r, u) r = Relu (z)", ""),
        ("MatMul (x, v)", "MatMul (z, u)", "w = Relu (z)"),
        ("MatMul (x, v)", "MatMul (z, u)", "w = Relu (v)"),
        ("Gemm (x, v, one)", "MatMul (z, u)", ""),
    ],
)
def test_what_else_reads_them_or_a_node_between_leaves_them_as_they_are(
    first: str, second: str, more: str
) -> None:
    text = DENSE.format(first=first, second=second, more=more)
    if "r = Relu" in second:
        text = DENSE.format(first=f"{first} r = Relu (z)", second="MatMul (r, u)", more="")
    weights = factors() | ({"one": np.ones(1)} if "one" in first else {})
    before = model(text, **weights)
    assert balanced(before, samples(before, 32)) == before


def test_int8_loses_less_of_factors_that_fall_steeply(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.standard_normal((64, 48)))
    right, _ = np.linalg.qr(rng.standard_normal((64, 48)))
    weights = {"v": left * np.logspace(0, -1.5, 48), "u": right.T}
    text = DENSE.format(first=PRODUCTS[0], second=PRODUCTS[1], more="").replace("32", "64")
    whole = Model(model(text, **weights))
    data = samples(whole.proto, 64)
    with_balance = quantise(whole, data, 1.0).error
    monkeypatch.setattr("onnx_lrsd.int8.quantise.balanced", lambda proto, samples: proto)
    assert with_balance < 0.8 * quantise(whole, data, 1.0).error
