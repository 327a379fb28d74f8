"""ONNX Runtime on a CPU: latency is what counts, and zeros buy nothing.

MLAS pads the outputs of a convolution to blocks of 16 and leaves its blocked layout for ranks off
4, so that ranks are multiples of 16 (4 and up in thin layers, where the first factor is small).
Measured with ONNX Runtime 1.32: time follows the padded MACs within 10 % for 64 channels and more;
in thin layers every added node costs a few microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from onnx_lrsd.targets.chains import BLOCK, WIDE, Chains
from onnx_lrsd.targets.target import Target, node_shapes
from onnx_lrsd.types import CHANNEL, DENSE, Form, Layer

NODE = 200_000
"""MACs that run in the time one more node costs, about 4 microseconds."""
VALUE = 32
"""MACs that run in the time it takes to write one value and read it again, out of the cache."""


def cost(layer: Layer, form: Form) -> float:
    """Predicted time of one sample, in MACs: outputs padded to 16, values written, a fixed cost a node."""
    padded = sum(
        ceil(out / BLOCK) * BLOCK * (inner + VALUE) * times + NODE
        for out, inner, times in node_shapes(layer, form)
    )
    return padded + (NODE if form.channels else 0)


def pays(layer: Layer, form: Form) -> bool:
    """Whether the split is predicted to be clearly faster: by a tenth, in thin layers by a quarter."""
    wide = min(layer.n, layer.channels) >= WIDE
    return cost(layer, form) <= (0.9 if wide else 0.75) * cost(layer, Form(DENSE))


def _low_ranks(layer: Layer, kind: str) -> Sequence[int]:
    thin = min(layer.n, layer.channels) < WIDE and (kind != CHANNEL or not layer.kernel)
    return range(4, BLOCK, 4) if thin else ()


ONNXRUNTIME = Target("onnxruntime", Chains(pays, _low_ranks).forms, cost)
