"""Write AlexNet, VGG-16 or GoogLeNet as an ONNX model in its published ImageNet shape.

    python models/published.py vgg16 -o vgg16.onnx [--weights FILE.npz] [--seed N]

With --weights the values are those of the file, under the names that the networks' layers have in Caffe
(``conv1_1.weight`` (n, c, k, k), ``fc6.weight`` (n, m), ``fc6.bias`` (n,)). Without it they are generated
and the network classifies nothing, but as a load for a compressor it is like a trained one: the singular
values of every layer fall as measured on trained layers (``SPECTRA``; `python -m benchmarks paper spectra`
measures them), kernels are as smooth, first filters are Gabor functions, and every layer's outputs
have mean 0 and variance 1 on images of natural statistics, however deep it lies. The same seed gives the
same network on the same machine and libraries.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Values: TypeAlias = npt.NDArray[np.float32]
Weights: TypeAlias = Mapping[str, Values]

INPUT, OUTPUT, CLASSES = "image", "scores", 1000
OPSET, IR_VERSION = 17, 8
NARROWEST = 8

SPECTRA = {"spatial": (0.14, 2.0), "pointwise": (0.15, 0.7), "dense": (0.12, 2.5)}
"""Kind of layer -> (a, b) of σ_i ∝ i^-a exp(-b i / min(n, m)), medians of trained layers; the law meets their
log σ within .03 to .08. *spatial*, k x k, is that of ImageNet's VGG-16 (results/published.md)."""
SMOOTHNESS = 1.0
"""Cosine coefficients of a k x k kernel fall as exp(-SMOOTHNESS f / (k - 1)) along each axis, from frequency
f = 0 to k - 1: 1, .61, .37 for 3 x 3, where VGG-16 has 1, .60, .38."""
PROBES = 32
"""Images on which the outputs of layers are brought to mean 0 and variance 1."""
BIAS = 0.3
"""Standard deviation of the biases, in units of that of the outputs."""


@dataclass
class Network:
    """Nodes from ``image`` (batch, 3, size, size) to ``scores`` (batch, 1000), and shapes of their weights.

    The methods append one layer behind the tensor ``x`` and give the name of what it returns. ``width``
    multiplies the channels of all layers, for tests: 1 is what was published.
    """

    name: str
    size: int
    width: float = 1.0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    features: dict[str, int] = field(default_factory=lambda: {INPUT: 3})

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return sum(prod(shape) for shape in self.shapes.values())

    def conv(
        self, x: str, name: str, outputs: int, kernel: int, *, stride: int = 1, pad: int = 0, groups: int = 1
    ) -> str:
        """A k x k convolution and a Relu."""
        outputs = max(NARROWEST, 2 * round(outputs * self.width / 2))
        self._weighted(name, (outputs, self.features[x] // groups, kernel, kernel))
        y = self._node(
            *("Conv", [x, f"{name}.weight", f"{name}.bias"], name, outputs),
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[pad] * 4,
            group=groups,
        )
        return self._node("Relu", [y], f"{name}/relu", outputs)

    def dense(self, x: str, name: str, outputs: int) -> str:
        """A product with a matrix, and a bias."""
        outputs = outputs if outputs == CLASSES else max(NARROWEST, round(outputs * self.width))
        self._weighted(name, (outputs, self.features[x]))
        return self._node("Gemm", [x, f"{name}.weight", f"{name}.bias"], name, outputs, transB=1)

    def relu(self, x: str) -> str:
        """max(x, 0)."""
        return self._node("Relu", [x], f"{x}/relu", self.features[x])

    def pool(
        self, x: str, name: str, kernel: int, *, stride: int = 2, pad: int = 0, ceil: bool = False
    ) -> str:
        """The largest of every k x k window; with ``ceil`` windows may reach over the border."""
        attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
        return self._node("MaxPool", [x], name, self.features[x], **attributes, ceil_mode=int(ceil))

    def normalise(self, x: str, name: str, alpha: float, bias: float) -> str:
        """Local response normalisation over 5 channels: x / (bias + alpha / 5 Σ x²)^.75."""
        return self._node("LRN", [x], name, self.features[x], size=5, alpha=alpha, beta=0.75, bias=bias)

    def concat(self, parts: list[str], name: str) -> str:
        """The channels of all parts."""
        return self._node("Concat", parts, name, sum(self.features[part] for part in parts), axis=1)

    def average(self, x: str, name: str) -> str:
        """The mean over the image."""
        return self._node("GlobalAveragePool", [x], name, self.features[x])

    def flatten(self, x: str, side: int) -> str:
        """(batch, c, side, side) to (batch, c side²)."""
        return self._node("Flatten", [x], f"{x}/flat", self.features[x] * side**2, axis=1)

    def _weighted(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[f"{name}.weight"], self.shapes[f"{name}.bias"] = shape, shape[:1]

    def _node(self, op: str, inputs: list[str], name: str, features: int, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        self.features[name] = features
        return name

    def model(self, weights: Weights | None = None) -> onnx.ModelProto:
        """The model with ``weights``; without them they are inputs, which is enough to infer shapes."""
        given = {name: weights[name] for name in self.shapes} if weights is not None else {}
        float32 = TensorProto.FLOAT
        inputs: dict[str, list[str | int | None]] = {INPUT: ["batch", 3, self.size, self.size]}
        inputs |= {name: list(shape) for name, shape in self.shapes.items() if name not in given}
        last = onnx.NodeProto()
        last.CopyFrom(self.nodes[-1])
        last.output[0] = OUTPUT
        graph = helper.make_graph(
            [*self.nodes[:-1], last],
            self.name,
            [helper.make_tensor_value_info(name, float32, dims) for name, dims in inputs.items()],
            [helper.make_tensor_value_info(OUTPUT, float32, ["batch", CLASSES])],
            [numpy_helper.from_array(value, name) for name, value in given.items()],
        )
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(
            graph, producer_name="onnx-lrsd models/published.py", opset_imports=opsets, ir_version=IR_VERSION
        )


def alexnet(width: float = 1.0) -> Network:
    """60,965,224 parameters, 227 x 227; convolutions 2, 4 and 5 in two groups.

    Source: Krizhevsky, Sutskever, Hinton, ImageNet Classification with Deep Convolutional Neural
    Networks, NIPS 2012 (227, not 224: with it the published sizes of the maps come out).
    """
    net = Network("AlexNet", 227, width)
    x = net.conv(INPUT, "conv1", 96, 11, stride=4)
    x = net.pool(net.normalise(x, "norm1", 5e-4, 2.0), "pool1", 3)
    x = net.conv(x, "conv2", 256, 5, pad=2, groups=2)
    x = net.pool(net.normalise(x, "norm2", 5e-4, 2.0), "pool2", 3)
    x = net.conv(x, "conv3", 384, 3, pad=1)
    x = net.conv(x, "conv4", 384, 3, pad=1, groups=2)
    x = net.conv(x, "conv5", 256, 3, pad=1, groups=2)
    return _classified(net, net.pool(x, "pool5", 3), side=6)


def vgg16(width: float = 1.0) -> Network:
    """138,357,544 parameters, 224 x 224.

    Source: Simonyan, Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition,
    ICLR 2015, configuration D.
    """
    net = Network("VGG-16", 224, width)
    x = INPUT
    for block, (depth, outputs) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)), 1):
        for layer in range(1, depth + 1):
            x = net.conv(x, f"conv{block}_{layer}", outputs, 3, pad=1)
        x = net.pool(x, f"pool{block}", 2)
    return _classified(net, x, side=7)


INCEPTION = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
"""Outputs of 1 x 1; 3 x 3 reduce and 3 x 3; 5 x 5 reduce and 5 x 5; the projection behind the pooling."""


def googlenet(width: float = 1.0) -> Network:
    """6,998,552 parameters, 224 x 224, without the auxiliary classifiers, which inference does not use.

    Source: Szegedy et al., Going Deeper with Convolutions, CVPR 2015, table 1.
    """
    net = Network("GoogLeNet", 224, width)
    x = net.conv(INPUT, "conv1/7x7_s2", 64, 7, stride=2, pad=3)
    x = net.normalise(net.pool(x, "pool1", 3, ceil=True), "norm1", 1e-4, 1.0)
    x = net.conv(net.conv(x, "conv2/3x3_reduce", 64, 1), "conv2/3x3", 192, 3, pad=1)
    x = net.pool(net.normalise(x, "norm2", 1e-4, 1.0), "pool2", 3, ceil=True)
    for name, outputs in INCEPTION.items():
        x = _inception(net, x, f"inception_{name}", outputs)
        if name in ("3b", "4e"):
            x = net.pool(x, f"pool{name[0]}", 3, ceil=True)
    x = net.flatten(net.average(x, "pool5"), side=1)
    net.dense(x, "loss3/classifier", CLASSES)
    return net


def _classified(net: Network, x: str, side: int) -> Network:
    """The three dense layers that AlexNet and VGG-16 end with."""
    x = net.flatten(x, side)
    for name in ("fc6", "fc7"):
        x = net.relu(net.dense(x, name, 4096))
    net.dense(x, "fc8", CLASSES)
    return net


def _inception(net: Network, x: str, name: str, outputs: tuple[int, ...]) -> str:
    one, reduce3, three, reduce5, five, projection = outputs
    parts = [
        net.conv(x, f"{name}/1x1", one, 1),
        net.conv(net.conv(x, f"{name}/3x3_reduce", reduce3, 1), f"{name}/3x3", three, 3, pad=1),
        net.conv(net.conv(x, f"{name}/5x5_reduce", reduce5, 1), f"{name}/5x5", five, 5, pad=2),
        net.conv(net.pool(x, f"{name}/pool", 3, stride=1, pad=1), f"{name}/pool_proj", projection, 1),
    ]
    return net.concat(parts, f"{name}/output")


NETWORKS: dict[str, Callable[..., Network]] = {"alexnet": alexnet, "vgg16": vgg16, "googlenet": googlenet}


def generated(net: Network, seed: int = 0) -> dict[str, Values]:
    """Weights of the spectrum and scale of trained ones, float32.

    Layer by layer, in order, a weight is drawn and then scaled, and its bias set, so that over the probes
    each output channel has mean 0 before ``BIAS`` is added, and the layer variance 1.
    Source of the scaling: Krähenbühl et al., Data-dependent Initializations of Convolutional Neural
    Networks, ICLR 2016.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, Values] = {}
    seen: dict[str, Values] = {INPUT: natural_images(PROBES, net.size, rng)}
    last_use = {name: index for index, node in enumerate(net.nodes) for name in node.input}
    for index, node in enumerate(net.nodes):
        if node.op_type in ("Conv", "Gemm"):
            weight, bias = node.input[1:]
            first = node.input[0] == INPUT
            drawn = gabors(net.shapes[weight], rng) if first else trained_like(net.shapes[weight], rng)
            given = {**seen, weight: drawn, bias: np.zeros(net.shapes[bias], np.float32)}
            outputs = np.moveaxis(_run(node, given), 1, -1).reshape(-1, len(drawn))
            means = outputs.mean(axis=0, dtype=np.float64)
            scale = 1 / max(float((outputs - means).std()), 1e-12)
            shift = BIAS * rng.standard_normal(len(drawn)) - scale * means
            weights[weight], weights[bias] = np.float32(scale) * drawn, shift.astype(np.float32)
        seen[node.output[0]] = _run(node, {**seen, **weights})
        for name in [name for name in seen if last_use.get(name, index) <= index]:
            del seen[name]
    return weights


def trained_like(shape: tuple[int, ...], rng: np.random.Generator) -> Values:
    """A weight (n, c, k, k) or (n, m) with orthogonal singular vectors and the singular values of its kind.

    The right singular vectors of a k x k convolution are smooth within each kernel.
    """
    n, m, size = shape[0], prod(shape[1:]), shape[-1] if len(shape) == 4 else 1
    kind = "dense" if len(shape) == 2 else "spatial" if size > 1 else "pointwise"
    count = min(n, m)
    rows = rng.standard_normal((count, m), np.float32)
    if size > 1:
        smooth = np.kron(*[_smoothing(size)] * 2).astype(np.float32)
        rows = (rows.reshape(-1, size**2) @ smooth).reshape(count, m)
    right = np.linalg.qr(rows.T)[0]
    left = np.linalg.qr(rng.standard_normal((n, count), np.float32))[0]
    a, b = SPECTRA[kind]
    i = np.arange(1, count + 1)
    values = (i**-a * np.exp(-b * i / count)).astype(np.float32)
    return np.ascontiguousarray((left * values) @ right.T).reshape(shape)


def _smoothing(size: int) -> npt.NDArray[np.float64]:
    """(k, k): white noise times it has the cosine amplitudes of a trained kernel along one axis."""
    at = np.arange(size)
    basis = np.cos(np.pi * at[:, None] * (at + 0.5) / size)
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    amplitudes: npt.NDArray[np.float64] = np.exp(-SMOOTHNESS * at / (size - 1))
    return amplitudes[:, None] * basis


def gabors(shape: tuple[int, ...], rng: np.random.Generator) -> Values:
    """First filters (n, 3, k, k): plane waves under a Gaussian, most of them grey, each of unit norm."""
    n, colours, size, _ = shape
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    angle, phase = rng.uniform(0, np.pi, (2, n, 1, 1)) * [[[[1]]], [[[2]]]]
    frequency = rng.uniform(0, 0.5, (n, 1, 1))
    spread = rng.uniform(0.2, 0.5, (n, 1, 1)) * size
    wave = np.cos(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    envelope = np.exp(-(x**2 + y**2) / (2 * spread**2))
    colour = np.ones((n, colours)) + 0.5 * rng.standard_normal((n, colours))
    filters = colour[:, :, None, None] * (wave * envelope)[:, None]
    filters /= np.linalg.norm(filters.reshape(n, -1), axis=1)[:, None, None, None]
    return np.asarray(filters, np.float32)


def natural_images(count: int, size: int, rng: np.random.Generator) -> Values:
    """(count, 3, size, size) noise with the statistics of photographs: mean 0, variance 1.

    Amplitude falls as 1 / frequency, and colours are nearly alike.
    Source: Field, J. Opt. Soc. Am. A 4 (1987).
    """
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf
    noise = rng.standard_normal((count, 1, size, size)) + 0.3 * rng.standard_normal((count, 3, size, size))
    images = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(size, size))
    return np.asarray(images / images.std(axis=(1, 2, 3), keepdims=True), np.float32)


def _run(node: onnx.NodeProto, given: Weights) -> Values:
    """The output of one node."""
    feed = {name: given[name] for name in node.input}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, v.shape) for name, v in feed.items()]
    output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], "node", inputs, [output]),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Values = session.run(None, feed)[0]
    return result


def misfits(net: Network, weights: Mapping[str, npt.NDArray[Any]]) -> Iterator[str]:
    """What keeps ``weights`` from being those of ``net``, a phrase each."""
    for name, shape in net.shapes.items():
        if name not in weights:
            yield f"{name} {list(shape)} is missing"
        elif weights[name].shape != shape:
            yield f"{name} has shape {list(weights[name].shape)}, not {list(shape)}"
    for name in weights:
        if name not in net.shapes:
            yield f"{name} is no weight of {net.name}"


def main() -> None:
    """Write the network that was asked for and say how large it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.onnx")
    parser.add_argument("--weights", type=Path, metavar="FILE.npz", help="arrays by the names of the weights")
    parser.add_argument("--seed", type=int, default=0, help="of generated weights")
    options = parser.parse_args()
    net = NETWORKS[options.network]()
    if options.weights is None:
        weights, origin = generated(net, options.seed), f"generated, seed {options.seed}"
    else:
        try:
            with np.load(options.weights, allow_pickle=False) as stored:
                weights = {name: np.asarray(stored[name], np.float32) for name in stored.files}
        except (OSError, ValueError) as error:
            parser.error(f"{options.weights} cannot be read ({error}): give a .npz of the weights by name")
        wrong = list(misfits(net, weights))
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            parser.error(
                f"{options.weights}: {wrong[0]}{more}; name and shape the arrays as {net.name} has them"
            )
        origin = options.weights.name
    model = net.model(weights)
    helper.set_model_props(model, {"weights": origin})
    onnx.save(model, options.output)
    print(
        f"{net.name}: {net.parameters:,} parameters, {options.output.stat().st_size / 1e6:.1f} MB, {origin}"
    )


if __name__ == "__main__":
    main()
