"""Channels between two layers: whatever lies between is followed, and cut without a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_lrsd.graph.model import Model, check, load
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.pairs import Pair, cut, find_pairs
from onnx_lrsd.passes.split import split
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.types import Declined, Factors, Form

Values = npt.NDArray[Any]
Shapes = dict[str, Sequence[int | str | None]]


class Draft:
    """A model in the making: ``tensor`` is what the next node reads, ``shape`` its shape."""

    def __init__(self, shape: Sequence[int], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Values] = {}
        self.tensor, self.shape, self.input = "x", list(shape), list(shape)

    def constant(self, values: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(values)
        return name

    def random(self, *shape: int, least: float = -1.0) -> str:
        return self.constant(self.rng.uniform(least, 1, shape).astype(np.float32))

    def node(self, op: str, *inputs: str, count: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add a node; the first output becomes the tensor."""
        outputs = [f"t{len(self.nodes)}" + (f"_{i}" if i else "") for i in range(count)]
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        self.tensor = outputs[0]
        return outputs if count > 1 else outputs[0]

    @property
    def channels(self) -> int:
        return self.shape[1] if len(self.shape) == 4 else self.shape[-1]

    def each(self, least: float = -1.0) -> str:
        """A constant of one value a channel."""
        return self.random(
            self.channels, *[1] * (len(self.shape) - 2 if len(self.shape) == 4 else 0), least=least
        )

    def conv(self, source: str, n: int, kernel: int = 3, bias: bool = True, group: int = 1) -> str:
        channels = self.shape[1]
        inputs = [source, self.random(n, channels // group, kernel, kernel)] + (
            [self.random(n)] if bias else []
        )
        self.shape = [self.shape[0], n, *self.shape[2:]]
        return str(self.node("Conv", *inputs, pads=[kernel // 2] * 4, group=group))

    def matmul(self, source: str, n: int) -> str:
        weight = self.random(self.shape[-1], n)
        self.shape = [*self.shape[:-1], n]
        return str(self.node("MatMul", source, weight))

    def model(self, opset: int = 20, *outputs: str) -> Model:
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.input)],
            [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs or (self.tensor,)],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        opsets = [helper.make_opsetid("", opset)]
        opsets += [helper.make_opsetid(domain, 1) for domain in ("com.microsoft", "my.own")]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        return load(onnx.shape_inference.infer_shapes(proto, data_prop=True))

    def feed(self) -> dict[str, Values]:
        return {"x": self.rng.standard_normal(self.input).astype(np.float32)}


def shapes_of(model: Model, draft: Draft) -> Shapes:
    """The shapes of all tensors in a run."""
    names = [name for node in model.proto.graph.node for name in node.output]
    session = open_session(model.proto, outputs=names)
    return {"x": draft.input, **{name: value.shape for name, value in session.run(draft.feed()).items()}}


def found(draft: Draft, model: Model) -> tuple[tuple[Pair, ...], tuple[Declined, ...]]:
    working = model.graph()
    return find_pairs(working, find_layers(working)[0], shapes_of(model, draft))


def narrowed(draft: Draft, model: Model, *cuts: tuple[int, Sequence[int]]) -> Model:
    """The model with the kept channels of some of its pairs, by their number."""
    working = model.graph()
    pairs, _ = find_pairs(working, find_layers(working)[0], shapes_of(model, draft))
    cut(working, [(pairs[index], kept) for index, kept in cuts])
    result = model.splice(working)
    check(result, model)
    onnx.shape_inference.infer_shapes(result.proto, check_type=True, strict_mode=True)  # raises
    stated = {v.name: v.type for v in result.proto.graph.value_info}
    anew = onnx.ModelProto()
    anew.CopyFrom(result.proto)
    del anew.graph.value_info[:]
    for value in onnx.shape_inference.infer_shapes(anew, data_prop=True).graph.value_info:
        assert value.name not in stated or stated[value.name] == value.type  # sizes are as they became
    return result


def without(model: Model, pair: Pair, kept: Sequence[int]) -> Model:
    """The whole model, with nothing read of the other channels."""
    working = model.graph()
    gone = np.setdiff1d(np.arange(pair.channels), np.asarray(kept))
    layers = {layer.output: layer for layer in find_layers(working)[0]}
    for consumer in pair.consumers:
        at = consumer.positions[gone].ravel()
        if consumer.output not in layers:
            changed = onnx.ModelProto()
            changed.CopyFrom(model.splice(working).proto)
            node = next(n for n in changed.graph.node if n.output[0] == consumer.output)
            tensor = next(t for t in changed.graph.initializer if t.name == node.input[1])
            assert node.op_type == "ConvTranspose"
            weight = numpy_helper.to_array(tensor).copy()
            weight[at] = 0
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
            return load(changed)
        layer = layers[consumer.output]
        weight, bias = read_weight(working, layer)
        wide = weight.reshape(layer.n, layer.channels, -1)
        wide[:, at] = 0
        sparse = wide.reshape(layer.n, layer.channels, *layer.kernel)
        factors = Factors(
            form=Form(), kernels=(), bias=bias, sparse=sparse, channels=tuple(range(layer.channels))
        )
        split(working, layer, factors)
    return model.splice(working)


def run(model: Model, feed: dict[str, Values]) -> list[Values]:
    return list(open_session(model.proto).run(feed).values())


def assert_cuts_well(draft: Draft, model: Model, channels: int | None = None, pair: int = 0) -> Model:
    """All channels kept changes nothing; some kept is what the model gives without reading the others."""
    pairs, declined = found(draft, model)
    assert pairs, declined
    if channels is not None:
        assert pairs[pair].channels == channels
    feed = draft.feed()
    every = range(pairs[pair].channels)
    kept = sorted(draft.rng.choice(len(every), size=max(1, len(every) // 2), replace=False).tolist())
    for some, reference in ((every, model), (kept, without(model, pairs[pair], kept))):
        smaller = narrowed(draft, model, (pair, some))
        for new, old in zip(run(smaller, feed), run(reference, feed), strict=True):
            np.testing.assert_allclose(new, old, atol=2e-4 * max(float(np.abs(old).max()), 1e-3))
    assert [n.op_type for n in smaller.proto.graph.node] == [n.op_type for n in model.proto.graph.node]
    return smaller


Step = Callable[[Draft], Any]


def gelu_erf(d: Draft) -> None:
    x = d.tensor
    half = d.node("Div", x, d.constant(np.float32(2**0.5)))
    one = d.node("Add", d.node("Erf", half), d.constant(np.float32(1)))
    d.node("Mul", d.node("Mul", x, one), d.constant(np.float32(0.5)))


def gelu_tanh(d: Draft) -> None:
    x = d.tensor
    cube = d.node("Mul", d.node("Pow", x, d.constant(np.float32(3))), d.constant(np.float32(0.044715)))
    inner = d.node("Mul", d.node("Add", x, cube), d.constant(np.float32(0.7978845)))
    one = d.node("Add", d.constant(np.float32(1)), d.node("Tanh", inner))
    d.node("Mul", d.node("Mul", x, one), d.constant(np.float32(0.5)))


def silu(d: Draft) -> None:
    x = d.tensor
    d.node("Mul", x, d.node("Sigmoid", x))


def hard_swish(d: Draft) -> None:
    x = d.tensor
    clipped = d.node(
        "Clip",
        d.node("Add", x, d.constant(np.float32(3))),
        d.constant(np.float32(0)),
        d.constant(np.float32(6)),
    )
    d.node("Div", d.node("Mul", x, clipped), d.constant(np.float32(6)))


def mish(d: Draft) -> None:
    x = d.tensor
    d.node("Mul", d.node("Tanh", d.node("Softplus", x)), x)


def centred(d: Draft) -> None:
    """A shift that differs by position, alike for all channels."""
    if len(d.shape) == 4:
        d.node("Add", d.tensor, d.random(1, 1, d.shape[2], d.shape[3]))
    else:
        d.node("Add", d.tensor, d.random(d.shape[1], 1))


def chosen(d: Draft) -> None:
    x = d.tensor
    d.node("Where", d.node("Greater", x, d.each()), x, d.each())


ACTIVATIONS: dict[str, Step] = {
    "erf": gelu_erf,
    "tanh": gelu_tanh,
    "gelu": lambda d: d.node("Gelu", d.tensor, approximate="tanh"),
    "microsoft gelu": lambda d: d.node("Gelu", d.tensor, domain="com.microsoft"),
    "microsoft fast gelu": lambda d: d.node("FastGelu", d.tensor, domain="com.microsoft"),
    "microsoft quick gelu": lambda d: d.node("QuickGelu", d.tensor, domain="com.microsoft", alpha=1.702),
    "silu": silu,
    "hard swish": hard_swish,
    "HardSwish": lambda d: d.node("HardSwish", d.tensor),
    "mish": mish,
    "relu": lambda d: d.node("Relu", d.tensor),
    "leaky": lambda d: d.node("LeakyRelu", d.tensor, alpha=0.2),
    "prelu": lambda d: d.node("PRelu", d.tensor, d.each()),
    "clip": lambda d: d.node("Clip", d.tensor, d.constant(np.float32(-0.3)), d.constant(np.float32(0.9))),
    "bias": lambda d: d.node("Add", d.each(), d.tensor),
    "scale": lambda d: d.node("Mul", d.tensor, d.each()),
    "dropout": lambda d: d.node("Dropout", d.tensor, d.constant(np.float32(0.5))),
    "centred": centred,
    "where": chosen,
}


def batch_norm(d: Draft) -> None:
    d.node("BatchNormalization", d.tensor, *(d.random(d.channels, least=0.5) for _ in range(4)))


def pooled(d: Draft, op: str) -> None:
    d.node(op, d.tensor, kernel_shape=[2, 2])
    d.shape = [*d.shape[:2], d.shape[2] - 1, d.shape[3] - 1]


def padded(d: Draft) -> None:
    d.node("Pad", d.tensor, d.constant(np.array([0, 0, 1, 0, 0, 0, 0, 2])), mode="reflect")
    d.shape = [*d.shape[:2], d.shape[2] + 1, d.shape[3] + 2]


def resized(d: Draft) -> None:
    d.shape = [*d.shape[:2], d.shape[2] * 2, d.shape[3] * 2]
    d.node("Resize", d.tensor, "", "", d.constant(np.array(d.shape)), mode="nearest")


def transposed_depthwise(d: Draft) -> None:
    weight, bias = d.random(d.channels, 1, 2, 2), d.random(d.channels)
    d.node("ConvTranspose", d.tensor, weight, bias, strides=[2, 2], group=d.channels)
    d.shape = [*d.shape[:2], d.shape[2] * 2, d.shape[3] * 2]


def one_axis_more_and_back(d: Draft) -> None:
    axis = d.constant(np.array([2]))
    d.node("Squeeze", d.node("Unsqueeze", d.tensor, axis), axis)


def halves_one_above_the_other(d: Draft) -> None:
    """Cut and joined along another axis than that of the channels."""
    sizes = d.constant(np.array([1, d.shape[2] - 1]))
    top, bottom = d.node("Split", d.tensor, sizes, count=2, axis=2)
    d.node("Concat", bottom, d.node("Neg", top), axis=2)


def by_its_own_mean(d: Draft) -> None:
    d.node("Mul", d.tensor, d.node("Sigmoid", d.node("GlobalAveragePool", d.tensor)))


def by_its_own_largest(d: Draft) -> None:
    d.node("Sub", d.tensor, d.node("ReduceMax", d.tensor, d.constant(np.array([2, 3]))))


def upside_down(d: Draft) -> None:
    d.node("Slice", d.tensor, *(d.constant(np.array([number])) for number in (-1, -(2**62), 2, -1)))


def scaled(d: Draft) -> None:
    d.shape = [*d.shape[:2], d.shape[2] * 2, d.shape[3]]
    d.node("Resize", d.tensor, "", d.constant(np.array([1, 1, 2, 1], np.float32)), mode="nearest")


def squeezed_and_excited(d: Draft) -> None:
    """A gate of a squeeze-and-excitation block: two layers between, whose channels are the same again."""
    x, shape = d.tensor, list(d.shape)
    d.node("GlobalAveragePool", x)
    d.shape = [*shape[:2], 1, 1]
    inner = d.node("Relu", d.conv(d.tensor, 9, kernel=1))
    gate = d.node("Sigmoid", d.conv(inner, shape[1], kernel=1))
    d.shape = shape
    d.node("Mul", x, gate)


def normed(d: Draft) -> None:
    d.node("InstanceNormalization", d.tensor, d.random(d.channels), d.random(d.channels))


IMAGE: dict[str, Step] = {
    **ACTIVATIONS,
    "batch norm": batch_norm,
    "instance norm": normed,
    "depthwise": lambda d: d.conv(d.tensor, d.channels, group=d.channels),
    "depthwise without bias": lambda d: d.conv(d.tensor, d.channels, bias=False, group=d.channels),
    "transposed depthwise": transposed_depthwise,
    "one axis more and back": one_axis_more_and_back,
    "halves one above the other": halves_one_above_the_other,
    "by its own mean": by_its_own_mean,
    "by its own largest": by_its_own_largest,
    "upside down": upside_down,
    "lp pool": lambda d: pooled(d, "LpPool"),
    "max pool": lambda d: pooled(d, "MaxPool"),
    "average pool": lambda d: pooled(d, "AveragePool"),
    "pad": padded,
    "resize": resized,
    "scales": scaled,
}


def flat(d: Draft) -> str:
    d.shape = [d.shape[0], int(np.prod(d.shape[1:]))]
    return str(d.node("Flatten", d.tensor))


def channels_last(d: Draft) -> str:
    moved = d.node("Transpose", d.tensor, perm=[0, 2, 3, 1])
    d.shape = [d.shape[0], int(np.prod(d.shape[1:]))]
    return str(d.node("Reshape", moved, d.constant(np.array([d.shape[0], -1]))))


def counted(d: Draft) -> str:
    d.shape = [d.shape[0], int(np.prod(d.shape[1:]))]
    return str(d.node("Reshape", d.tensor, d.constant(np.array(d.shape))))


def averaged(d: Draft) -> str:
    d.shape = d.shape[:2]
    return str(d.node("ReduceMean", d.tensor, d.constant(np.array([2, 3])), keepdims=0))


def global_pool(d: Draft) -> str:
    d.shape = d.shape[:2]
    return str(d.node("Squeeze", d.node("GlobalMaxPool", d.tensor), d.constant(np.array([2, 3]))))


def one_position(d: Draft) -> str:
    """A single place of either axis, which goes with it."""
    d.shape = d.shape[:2]
    first = d.node("Gather", d.tensor, d.constant(np.array(1)), axis=3)
    return str(d.node("Gather", first, d.constant(np.array(0)), axis=2))


def gemm(d: Draft, source: str) -> None:
    d.node("Gemm", source, d.random(8, d.shape[-1]), d.random(8), transB=1)


def read_transposed(d: Draft) -> None:
    d.node("ConvTranspose", d.tensor, d.random(d.channels, 8, 2, 2), d.random(8), strides=[2, 2])


READERS: dict[str, Step] = {
    "conv": lambda d: d.conv(d.tensor, 8),
    "conv transpose": read_transposed,
    "flatten": lambda d: gemm(d, flat(d)),
    "channels last": lambda d: d.matmul(channels_last(d), 8),
    "reshape": lambda d: gemm(d, counted(d)),
    "mean": lambda d: gemm(d, averaged(d)),
    "global pool": lambda d: d.matmul(global_pool(d), 8),
    "one position": lambda d: gemm(d, one_position(d)),
    "matmul over channels": lambda d: d.node(
        "MatMul", d.random(8, d.channels), d.node("Reshape", d.tensor, d.constant(np.array([0, 0, -1])))
    ),
}


@settings(max_examples=60)
@given(
    steps=st.lists(st.sampled_from(sorted(IMAGE)), max_size=4),
    reader=st.sampled_from(sorted(READERS)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_lies_between_convolutions_is_cut_with_them(
    steps: list[str], reader: str, bias: bool, seed: int
) -> None:
    draft = Draft([2, 8, 5, 6], seed)
    draft.conv("x", 12, bias=bias)
    for step in steps:
        IMAGE[step](draft)
    READERS[reader](draft)
    assert_cuts_well(draft, draft.model(), 12)


@pytest.mark.parametrize("step", sorted(IMAGE))
def test_every_kind_of_node_between_convolutions_is_followed(step: str) -> None:
    draft = Draft([1, 8, 6, 5])
    draft.conv("x", 10)
    IMAGE[step](draft)
    draft.conv(draft.tensor, 9)
    smaller = assert_cuts_well(draft, draft.model(), 10)
    assert all(10 not in tensor.dims for tensor in smaller.proto.graph.initializer)


@settings(max_examples=30)
@given(
    steps=st.lists(st.sampled_from(sorted(ACTIVATIONS)), max_size=4),
    left=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_lies_between_products_is_cut_with_them(steps: list[str], left: bool, seed: int) -> None:
    draft = Draft([2, 7, 8], seed)
    draft.matmul("x", 16)
    for step in steps:
        ACTIVATIONS[step](draft)
    draft.matmul(draft.tensor, 9)
    if left:
        draft.node("Add", draft.tensor, draft.random(9))
    assert_cuts_well(draft, draft.model(), 16)


def test_a_gelu_that_adds_the_bias_is_cut_with_it() -> None:
    draft = Draft([2, 7, 8])
    draft.matmul("x", 16)
    draft.node("BiasGelu", draft.tensor, draft.random(16), domain="com.microsoft")
    draft.matmul(draft.tensor, 9)
    assert_cuts_well(draft, draft.model(), 16)


def conv_1d(d: Draft, source: str, n: int, channels: int) -> None:
    d.node("Conv", source, d.random(n, channels, 3), d.random(n), strides=[2], dilations=[2])


def conv_3d(d: Draft, source: str, n: int, channels: int) -> None:
    d.node("Conv", source, d.random(n, channels, 2, 1, 2))


def conv_transpose_1d(d: Draft, source: str, n: int, channels: int) -> None:
    d.node("ConvTranspose", source, d.random(channels, n, 3), strides=[2])


def gemm_scaled(d: Draft, source: str, n: int, channels: int) -> None:
    d.node("Gemm", source, d.random(channels, n), d.random(1, n), alpha=0.5, beta=2.0)


def gemm_transposed(d: Draft, source: str, n: int, channels: int) -> None:
    d.node("Gemm", source, d.random(n, channels), transB=1)


def gemm_one_bias(d: Draft, source: str, n: int, channels: int) -> None:
    d.node("Gemm", source, d.random(channels, n), d.random(1))


def weight_first(d: Draft, source: str, n: int, channels: int) -> None:
    d.node("MatMul", d.random(n, channels), source)


Layered = Callable[[Draft, str, int, int], None]
LAYERS: dict[str, tuple[Layered, list[int]]] = {
    "conv of one axis": (conv_1d, [2, 8, 20]),
    "conv of three axes": (conv_3d, [1, 8, 4, 3, 4]),
    "conv transpose of one axis": (conv_transpose_1d, [2, 8, 5]),
    "gemm": (gemm_scaled, [3, 8]),
    "gemm transposed": (gemm_transposed, [3, 8]),
    "gemm with one bias": (gemm_one_bias, [3, 8]),
    "matmul with the weight first": (weight_first, [2, 8, 5]),
}


@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_every_kind_of_layer_gives_channels_and_reads_them(layer: str) -> None:
    made, shape = LAYERS[layer]
    draft = Draft(shape)
    made(draft, "x", 16, 8)
    draft.node("Relu", draft.tensor)
    made(draft, draft.tensor, 9, 16)
    smaller = assert_cuts_well(draft, draft.model(), 16)
    assert all(16 not in tensor.dims for tensor in smaller.proto.graph.initializer)


OLD: dict[str, tuple[int, Step]] = {
    "clip": (10, lambda d: d.node("Clip", d.tensor, min=-0.3, max=0.9)),
    "dropout": (10, lambda d: d.node("Dropout", d.tensor, ratio=0.3)),
    "pad": (10, lambda d: d.node("Pad", d.tensor, pads=[0, 0, 1, 0, 0, 0, 0, 2])),
    "upsample": (9, lambda d: d.node("Upsample", d.tensor, d.constant(np.array([1, 1, 2, 2], np.float32)))),
    "resize": (10, lambda d: d.node("Resize", d.tensor, d.constant(np.array([1, 1, 2, 1], np.float32)))),
    "squeeze": (11, lambda d: d.node("Squeeze", d.node("Unsqueeze", d.tensor, axes=[2]), axes=[2])),
    "mean": (11, lambda d: d.node("ReduceMean", d.tensor, axes=[2])),
    "slice": (9, lambda d: d.node("Slice", d.tensor, axes=[2], starts=[1], ends=[5])),
    "split": (11, lambda d: d.node("Add", *d.node("Split", d.tensor, count=2, axis=2, split=[3, 3]))),
    "norm": (9, batch_norm),
}


@pytest.mark.parametrize("step", sorted(OLD))
def test_operators_are_followed_as_older_operator_sets_write_them(step: str) -> None:
    opset, add = OLD[step]
    draft = Draft([1, 8, 6, 6])
    draft.conv("x", 10)
    add(draft)
    draft.conv(draft.tensor, 9)
    assert_cuts_well(draft, draft.model(opset), 10)


def test_groups_of_a_transposed_convolution_stay_whole() -> None:
    draft = Draft([1, 8, 6, 6])
    draft.conv("x", 12)
    draft.node("ConvTranspose", draft.tensor, draft.random(12, 5, 2, 2), draft.random(20), group=4)
    draft.shape = [1, 20, 7, 7]
    draft.conv(draft.tensor, 9)
    model = draft.model()
    assert_cuts_well(draft, model, 4)
    (pair,), _ = found(draft, model)
    assert pair.producers[0].positions.shape == (4, 3) and pair.consumers[0].positions.shape == (4, 5)


def test_a_gate_takes_two_layers() -> None:
    draft = Draft([2, 5, 8])
    gate = draft.matmul("x", 24)
    silu(draft)
    gate, draft.shape = draft.tensor, [2, 5, 8]
    draft.node("Mul", gate, draft.matmul("x", 24))
    draft.matmul(draft.tensor, 9)
    model = draft.model()
    assert_cuts_well(draft, model, 24)
    assert len(found(draft, model)[0][0].producers) == 2


@pytest.mark.parametrize("sizes", [True, False])
def test_a_gate_of_one_layer_is_split(sizes: bool) -> None:
    draft = Draft([2, 5, 8])
    both = draft.matmul("x", 32)
    if sizes:
        one, two = draft.node("Split", both, draft.constant(np.array([16, 16])), count=2, axis=-1)
    else:
        one, two = draft.node("Split", both, count=2, axis=2, num_outputs=2)
    draft.node("Mul", one, draft.node("Sigmoid", two))
    draft.shape = [2, 5, 16]
    draft.matmul(draft.tensor, 9)
    model = draft.model()
    assert_cuts_well(draft, model, 16)
    assert found(draft, model)[0][0].producers[0].positions.tolist() == [[i, i + 16] for i in range(16)]


def test_a_gate_of_one_layer_is_sliced() -> None:
    draft = Draft([2, 5, 8])
    both = draft.matmul("x", 32)
    pieces = [
        draft.node("Slice", both, *(draft.constant(np.array([v])) for v in (start, end, -1)))
        for start, end in ((0, 16), (16, 2**62))
    ]
    draft.node("Mul", pieces[0], draft.node("Tanh", pieces[1]))
    draft.shape = [2, 5, 16]
    draft.matmul(draft.tensor, 9)
    assert_cuts_well(draft, draft.model(), 16)


def test_parts_that_are_read_apart_are_pairs_of_their_own() -> None:
    draft = Draft([1, 8, 6, 6])
    whole = draft.conv("x", 20)
    one, two = draft.node("Split", whole, draft.constant(np.array([8, 12])), count=2, axis=1)
    draft.shape = [1, 12, 6, 6]
    inner = draft.conv(two, 12)
    draft.node("Concat", one, two, inner, axis=1)
    draft.shape = [1, 32, 6, 6]
    draft.conv(draft.tensor, 9)
    model = draft.model()
    pairs, _ = found(draft, model)
    assert [pair.channels for pair in pairs] == [8, 12, 12]
    for index in range(3):
        assert_cuts_well(draft, model, pair=index)
    feed = draft.feed()
    kept = [(0, [1, 4, 5]), (1, [0, 2, 7, 9]), (2, range(6))]
    all_at_once = run(narrowed(draft, model, *kept), feed)
    reference = model
    for index, channels in kept:
        reference = without(reference, found(draft, model)[0][index], channels)
    np.testing.assert_allclose(all_at_once[0], run(reference, feed)[0], rtol=1e-3, atol=1e-3)


def test_whole_layers_are_joined_along_their_channels() -> None:
    draft = Draft([1, 8, 6, 6])
    one = draft.node("Relu", draft.conv("x", 10))
    draft.shape = [1, 8, 6, 6]
    two = draft.node("Sigmoid", draft.conv("x", 12))
    draft.node("Concat", one, "x", two, axis=1)
    draft.shape = [1, 30, 6, 6]
    draft.conv(draft.tensor, 9)
    model = draft.model()
    assert [pair.channels for pair in found(draft, model)[0]] == [10, 12]
    for index in range(2):
        assert_cuts_well(draft, model, pair=index)


def test_groups_of_channels_stay_whole() -> None:
    draft = Draft([1, 8, 6, 6])
    draft.conv("x", 12)
    draft.node("Relu", draft.tensor)
    draft.conv(draft.tensor, 20, group=4)
    draft.conv(draft.tensor, 9)
    model = draft.model()
    assert_cuts_well(draft, model, 4)
    (pair,), _ = found(draft, model)
    assert pair.producers[0].positions.shape == (4, 3) and pair.consumers[0].positions.shape == (4, 5)


def test_depthwise_convolutions_may_multiply_channels() -> None:
    draft = Draft([1, 8, 6, 6])
    draft.conv("x", 10)
    draft.conv(draft.tensor, 30, group=10)
    draft.conv(draft.tensor, 9)
    assert_cuts_well(draft, draft.model(), 10)


def test_channels_that_are_added_are_cut_together() -> None:
    """A residual stream: all that write to it and all that read it."""
    draft = Draft([1, 8, 6, 6])
    stem = draft.node("Relu", draft.conv("x", 12))
    inner = draft.node("Relu", draft.conv(stem, 16))
    outer = draft.node("Add", draft.conv(inner, 12), stem)
    draft.node("Relu", outer)
    draft.conv(draft.tensor, 9)
    model = draft.model()
    pairs, _ = found(draft, model)
    assert [(p.channels, len(p.producers), len(p.consumers)) for p in pairs] == [(12, 2, 2), (16, 1, 1)]
    for index in range(2):
        assert_cuts_well(draft, model, pair=index)


def test_a_gate_made_of_the_channels_themselves_goes_with_them() -> None:
    draft = Draft([1, 8, 6, 6])
    draft.conv("x", 12)
    squeezed_and_excited(draft)
    draft.conv(draft.tensor, 11)
    model = draft.model()
    pairs, _ = found(draft, model)
    assert [(p.channels, len(p.producers), len(p.consumers)) for p in pairs] == [(12, 2, 2), (9, 1, 1)]
    for index in range(2):
        assert_cuts_well(draft, model, pair=index)


def test_transposed_convolutions_give_channels() -> None:
    draft = Draft([1, 8, 5, 5])
    draft.node("ConvTranspose", "x", draft.random(8, 14, 2, 2), draft.random(14), strides=[2, 2])
    draft.shape = [1, 14, 10, 10]
    draft.node("Relu", draft.tensor)
    draft.conv(draft.tensor, 9)
    assert_cuts_well(draft, draft.model(), 14)


def test_shapes_that_count_channels_are_adapted() -> None:
    """Sequences as (batch, channels, positions), with the batch read from the tensor itself."""
    draft = Draft([2, 8, 4, 4])
    image = draft.conv("x", 12)
    batch = draft.node("Gather", draft.node("Shape", image), draft.constant(np.array([0])))
    shape = draft.node("Concat", batch, draft.constant(np.array([12, 16])), axis=0)
    rows = draft.node("Reshape", image, shape)
    draft.node("Transpose", rows, perm=[0, 2, 1])
    draft.shape = [2, 16, 12]
    draft.matmul(draft.tensor, 9)
    assert_cuts_well(draft, draft.model(), 12)


def test_a_constant_that_others_read_is_copied() -> None:
    draft = Draft([2, 8])
    shared = draft.random(8, 8)
    first = draft.node("Relu", draft.node("MatMul", "x", shared))
    second = draft.node("MatMul", first, shared)
    draft.node("Add", second, draft.node("Softmax", second))
    model = draft.model()
    smaller = assert_cuts_well(draft, model, 8)
    sizes = sorted(tuple(t.dims) for t in smaller.proto.graph.initializer)
    assert sizes == [(4, 8), (8, 4)]
    draft.node("Add", draft.tensor, draft.node("MatMul", "x", shared))
    smaller = assert_cuts_well(draft, draft.model(), 8)
    assert (8, 8) in [tuple(t.dims) for t in smaller.proto.graph.initializer]


REFUSED: dict[str, tuple[Step, str]] = {
    "a second reader": (lambda d: d.node("Softmax", d.tensor), "Softmax"),
    "a norm over channels": (
        lambda d: d.node("LayerNormalization", d.tensor, d.random(16), axis=-1),
        "LayerNormalization",
    ),
    "a sum over channels": (
        lambda d: d.node("ReduceSum", d.tensor, d.constant(np.array([-1]))),
        "ReduceSum",
    ),
    "a skip past it": (lambda d: d.node("Add", d.tensor, "x"), "joins them with others"),
    "a product with itself": (
        lambda d: d.node("MatMul", d.tensor, d.node("Transpose", d.tensor, perm=[0, 2, 1])),
        "MatMul",
    ),
    "their number": (lambda d: d.node("Cast", d.node("Shape", d.tensor), to=TensorProto.FLOAT), "how many"),
    "heads": (
        lambda d: d.node("Softmax", d.node("Reshape", d.tensor, d.constant(np.array([2, 16, 4, 4])))),
        "Softmax",
    ),
}


@pytest.mark.parametrize("reader", sorted(REFUSED))
def test_a_second_reader_keeps_all_channels(reader: str) -> None:
    draft = Draft([2, 16, 16])
    hidden = draft.node("Relu", draft.matmul("x", 16))
    out = draft.matmul(hidden, 9)
    draft.tensor = hidden
    step, reason = REFUSED[reader]
    step(draft)
    pairs, declined = found(draft, draft.model(20, out, draft.tensor))
    assert not pairs
    assert reason in declined[0].reason, declined


def test_an_output_of_the_model_keeps_all_channels() -> None:
    draft = Draft([2, 5, 8])
    hidden = draft.node("Relu", draft.matmul("x", 16))
    draft.matmul(hidden, 9)
    pairs, declined = found(draft, draft.model(20, draft.tensor, hidden))
    assert not pairs and "output of the model" in declined[0].reason


def test_a_branch_that_reads_them_keeps_all_channels() -> None:
    draft = Draft([2, 5, 8])
    hidden = draft.matmul("x", 16)
    draft.matmul(hidden, 9)
    body = helper.make_graph(
        [helper.make_node("Identity", [hidden], ["inner"])],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    draft.nodes.append(
        helper.make_node("If", [draft.constant(np.array(True))], ["z"], then_branch=body, else_branch=body)
    )
    pairs, declined = found(draft, draft.model(20, draft.tensor, "z"))
    assert not pairs and "a branch or a loop" in declined[0].reason


def test_a_constant_that_a_caller_may_override_keeps_all_channels() -> None:
    draft = Draft([2, 5, 8])
    draft.matmul("x", 16)
    scale = draft.random(16)
    draft.node("Mul", draft.tensor, scale)
    draft.matmul(draft.tensor, 9)
    proto = draft.model().proto
    proto.graph.input.append(helper.make_tensor_value_info(scale, TensorProto.FLOAT, [16]))
    pairs, declined = found(draft, load(proto))
    assert not pairs and "override" in declined[0].reason


def test_a_layer_of_another_library_keeps_all_channels() -> None:
    draft = Draft([2, 5, 8])
    draft.matmul("x", 16)
    draft.node("Relu", draft.tensor, domain="my.own")
    draft.matmul(draft.tensor, 9)
    shapes: Shapes = {"x": [2, 5, 8]}
    working = draft.model().graph()
    pairs, declined = find_pairs(working, find_layers(working)[0], shapes)
    assert not pairs and "Relu" in declined[0].reason
