"""What the order of sums in a residual block is worth where a layer has a sparse branch.

    python benchmarks/sums.py

Four residual blocks, each a 1 x 1 convolution, the skip and a Relu, are rewritten as channel + S. How many
times faster they run as (L + skip) + S than as (L + S) + skip: median and span of six sessions, one thread.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.measure.compare import STARTS, time_pair
from onnx_lrsd.measure.speedup import placeholder
from onnx_lrsd.passes.find_layers import find_layers
from onnx_lrsd.passes.order_sums import order_sums
from onnx_lrsd.passes.split import split
from onnx_lrsd.types import CHANNEL, Form, whole_channels

BLOCKS = 4
CASES = ((64, 32, 16, 8), (64, 56, 32, 16), (256, 14, 64, 16), (256, 28, 64, 16), (512, 7, 128, 16))
"""Channels, side of the map, rank, channels of S."""


def network(channels: int, side: int) -> onnx.ModelProto:
    """Relu(Conv(h) + h), BLOCKS times, after a convolution that widens three channels."""
    rng = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(
            (rng.standard_normal((channels, 3 if i == 0 else channels, 1, 1)) / channels).astype(np.float32),
            f"w{i}",
        )
        for i in range(BLOCKS + 1)
    ]
    nodes = [helper.make_node("Conv", ["x", "w0"], ["h0"], "first")]
    for i in range(1, BLOCKS + 1):
        nodes += [
            helper.make_node("Conv", [f"h{i - 1}", f"w{i}"], [f"c{i}"], f"layer {i}"),
            helper.make_node("Add", [f"c{i}", f"h{i - 1}"], [f"s{i}"], f"skip {i}"),
            helper.make_node("Relu", [f"s{i}"], [f"h{i}"], f"relu {i}"),
        ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width, side, side])
        for name, width in (("x", 3), (f"h{BLOCKS}", channels))
    ]
    graph = helper.make_graph(nodes, "blocks", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def rewritten(model: Model, form: Form, ordered: bool) -> Model:
    """The blocks as ``form``, their sums ``ordered`` or as they come."""
    graph = model.graph()
    layers = [layer for layer in find_layers(graph)[0] if layer.name.startswith("layer")]
    for layer in layers:
        split(graph, layer, placeholder(layer, form))
    if ordered:
        order_sums(graph, [layer.output for layer in layers])
    return model.splice(graph)


def main() -> None:
    """Print a row for each case."""
    print("| channels | map | rank | S | times faster in the fused order |\n|---|---|---|---|---|")
    for channels, side, rank, kept in CASES:
        model, form = load(network(channels, side)), Form(CHANNEL, rank, whole_channels(kept))
        plain, fused = (rewritten(model, form, ordered).proto for ordered in (False, True))
        feed = {"x": np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)}
        pace = time_pair(plain, fused, feed, seconds=3.0, restarts=STARTS)
        low, high = pace.interval
        print(
            f"| {channels} | {side} x {side} | {rank} | {kept} | {pace.ratio:.2f} ({low:.2f} to {high:.2f}) |"
        )


if __name__ == "__main__":
    main()
