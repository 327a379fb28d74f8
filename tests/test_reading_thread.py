"""What goes wrong while batches are read ahead of their use comes out where it is used."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import numpy as np
import onnx
import pytest

import onnx_lrsd
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.graph.model import load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.workers import one_ahead

ROWS, WIDTH = 10, 32


def looked_up(indices: list[int]) -> tuple[onnx_lrsd.Model, Samples]:
    """y = table[i] W, and the samples i."""
    rng = np.random.default_rng(0)
    graph = onnx.parser.parse_graph(
        f"g (int64[N, 1] i) => (float[N, 1, {WIDTH}] y) {{ x = Gather (table, i)  y = MatMul (x, w) }}"
    )
    for name, rows in (("table", ROWS), ("w", WIDTH)):
        values = rng.standard_normal((rows, WIDTH)).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    opset = onnx.helper.make_opsetid("", 17)
    model = load(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8))
    given = np.array(indices, np.int64)[:, None]
    return model, onnx_lrsd.read_samples({"i": given}, inputs_of(model.proto))


def test_a_batch_that_the_network_refuses_is_one_sentence() -> None:
    model, samples = looked_up([*range(ROWS), *range(ROWS), 99])
    graph = model.graph()
    layers, _ = onnx_lrsd.find_layers(graph)
    before = threading.active_count()
    with pytest.raises(LrsdError) as raised:
        onnx_lrsd.calibrate(model, layers, samples, partial(onnx_lrsd.read_weight, graph))
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)
    assert threading.active_count() == before


def test_all_is_handed_on_in_its_order_up_to_what_fails() -> None:
    def three() -> Iterator[int]:
        yield from (1, 2, 3)
        raise OSError("the disk is gone")

    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        for item in one_ahead(three()):
            seen.append(item)
    assert seen == [1, 2, 3]


def test_who_stops_early_waits_for_nothing() -> None:
    made = []

    def many() -> Iterator[int]:
        for item in range(1000):
            made.append(item)
            yield item

    before = threading.active_count()
    for item in one_ahead(many()):
        if item == 2:
            break
    assert len(made) <= 5
    assert threading.active_count() <= before + 1
