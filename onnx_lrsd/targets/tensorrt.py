"""TensorRT on an NVIDIA GPU: chains of the layer's own operators, and 2:4 weights for sparse tensor cores.

No GPU was measured: the figures here are what NVIDIA documents and its users report, taken
conservatively. They order the forms; no time in seconds is derived from them.

- Tensor cores want channels in multiples of 8 in half precision, of 16 for sparse math, of 4 in TF32
  (TensorRT documentation, Optimizing for Tensor Cores). Ranks are multiples of 16, which serves all.
- A weight is eligible for sparse math if two of every four input channels are zero for each output
  channel and kernel position; convolutions and fully connected layers, in half precision or int8
  (TensorRT documentation, Sparsity). A MatMul is not, in half precision (NVIDIA/TensorRT issues 2169, 2271).
- Sparse kernels win from 256 input and 256 output channels on (NVIDIA/TensorRT issues 3849, 4065), and
  whole networks then run at most about 15 % faster (issue 2310). Where they do not win TensorRT takes dense
  ones, so that a 2:4 weight never costs time. Its MACs are counted as dense: what is promised in MACs holds
  on every GPU.
- A Gather is a kernel of its own that fuses with nothing (TensorRT documentation, Optimizing Layer
  Performance), so that channels kept in full beside the factors are paid for.
- A rebuilt weight is not folded, but computed in every inference: there is no form that needs folding.
"""

from __future__ import annotations

from math import ceil, prod

from onnx_lrsd.passes.operators import operator_of
from onnx_lrsd.targets.chains import RANK_MULTIPLE, WIDE, Chains
from onnx_lrsd.targets.target import Target, node_shapes
from onnx_lrsd.targets.trtexec import BATCH, engine
from onnx_lrsd.types import CHANNEL, CHANNELS, DENSE, N_OF_M, Form, Layer, Pattern

ALIGNED = 8
"""Channels in half precision are padded to multiples of it."""
VALUE = 128
"""MACs that run in the time it takes to write one value and read it again: in half precision about 125 at
the 320 GB/s and a third of the 65 TFLOP/s of a T4; large GPUs have more arithmetic for each byte."""
NODE = 20_000_000 / BATCH
"""MACs, for each sample of a batch, that run in the 2 microseconds or so that one more kernel takes."""
WEIGHT = VALUE / 2 / BATCH
"""MACs, for each sample of a batch, that run in the time it takes to read one weight."""
_PAYS = 0.9
"""A form is offered where it is predicted to take at most this share of the dense layer's time."""

TWO_OF_FOUR = Pattern(N_OF_M, 2, 4)
SPARSE_FROM = 256
"""Input and output channels from which sparse tensor cores are faster than dense ones."""
SPARSE_TIME = 0.85
"""Share of the dense arithmetic's time that 2:4 takes: what whole networks gain, as if by this alone."""
SPARSE_DTYPES = ("float16", "float32")
"""float32 runs so once the model is written in half precision, which the report then advises."""
SPARSE_RANKS = (RANK_MULTIPLE, 2 * RANK_MULTIPLE)
"""Ranks tried beside a 2:4 part, whose dense-sized branch leaves them little to win."""


def predicted_time(layer: Layer, form: Form) -> float:
    """Predicted time of one sample in a batch, in dense MACs: arithmetic, memory, a fixed cost a kernel."""
    nodes = node_shapes(layer, form)
    shares = [1.0] * len(nodes)
    if form.pattern == TWO_OF_FOUR and eligible(layer):
        shares[-1] = SPARSE_TIME
    total = 0.0
    for (out, inner, times), share in zip(nodes, shares, strict=True):
        padded = ceil(out / ALIGNED) * ALIGNED
        total += padded * (share * inner + VALUE) * times + WEIGHT * out * inner + NODE
    if form.channels:
        total += form.channels * VALUE * (prod(layer.size) or max(layer.positions, 1)) + NODE
    return total


def pays(layer: Layer, form: Form) -> bool:
    """Whether the form is predicted to be clearly faster than the dense layer."""
    return predicted_time(layer, form) <= _PAYS * predicted_time(layer, Form(DENSE))


def eligible(layer: Layer) -> bool:
    """Whether sparse tensor cores are expected to take a 2:4 weight of this layer, and to gain by it."""
    wide = min(layer.channels, layer.n) >= SPARSE_FROM
    aligned = layer.channels % RANK_MULTIPLE == 0 and layer.n % RANK_MULTIPLE == 0
    return operator_of(layer).SPARSE_MATH and layer.dtype in SPARSE_DTYPES and wide and aligned


def _forms(layer: Layer, kinds: tuple[str, ...]) -> tuple[Form, ...]:
    """Factor chains, 2:4 weights, and both together, where they are predicted to pay."""
    found = CHAINS.forms(layer, kinds)
    if CHANNEL not in kinds or not eligible(layer):
        return found
    top = min(layer.n, layer.m)
    ranks = (0, *(rank for rank in SPARSE_RANKS if rank <= top))
    both = (Form(CHANNEL, rank, TWO_OF_FOUR) for rank in ranks)
    return (*found, *(form for form in both if pays(layer, form)))


def _low_ranks(layer: Layer, kind: str) -> tuple[int, ...]:
    return (ALIGNED,) if min(layer.n, layer.channels) < WIDE else ()


CHAINS = Chains(pays, _low_ranks)
TENSORRT = Target(
    "tensorrt",
    _forms,
    predicted_time,
    patterns=(CHANNELS, N_OF_M),
    timed_here=False,
    half=True,
    engine=engine,
)
