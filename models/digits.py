"""Train the example network and write it with its samples: digits.onnx, digits_calib.npz, digits_eval.npz.

A convolutional network of 0.7 million parameters learns the 1797 handwritten digits that
scikit-learn ships, in plain NumPy, in two or three minutes. The 8 x 8 images are enlarged to 32 x 32
inside the model, so that the samples stay small and the convolutions have work to do.

    python models/digits.py

The same seed gives the same network on the same machine and libraries; elsewhere sums may round
differently.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

Values: TypeAlias = npt.NDArray[Any]

TEST, CALIBRATION = 400, 300
CLASSES, LARGEST = 10, 16
ENLARGED = 4
EPOCHS, BATCH, RATE, DECAY = 5, 32, 1e-3, 1e-2


class Op(ABC):
    """One operator: images are (N, H, W, C), features (N, F)."""

    parameters: tuple[Values, ...] = ()
    gradients: tuple[Values, ...] = ()

    @abstractmethod
    def forward(self, x: Values) -> Values:
        """The operator's output for ``x``; what ``backward`` needs is kept."""

    @abstractmethod
    def backward(self, dy: Values) -> Values:
        """The gradient for the input from that for the output; ``gradients`` are set."""


def _he(rng: np.random.Generator, fan_in: int, *shape: int) -> Values:
    drawn: Values = rng.standard_normal(shape) * np.sqrt(2 / fan_in)
    return drawn.astype(np.float32)


class Dense(Op):
    """y = x W + b with W (inputs, outputs)."""

    def __init__(self, rng: np.random.Generator, inputs: int, outputs: int) -> None:
        self.parameters = _he(rng, inputs, inputs, outputs), np.zeros(outputs, np.float32)

    def forward(self, x: Values) -> Values:
        self.x = x
        weight, bias = self.parameters
        y: Values = x @ weight + bias
        return y

    def backward(self, dy: Values) -> Values:
        self.gradients = self.x.T @ dy, dy.sum(axis=0)
        dx: Values = dy @ self.parameters[0].T
        return dx


class Conv(Dense):
    """A 3 x 3 convolution with zero padding, as a Dense over patches (kernel row, kernel column, channel)."""

    def __init__(self, rng: np.random.Generator, inputs: int, outputs: int) -> None:
        super().__init__(rng, 9 * inputs, outputs)

    def forward(self, x: Values) -> Values:
        self.shape = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        rows = patches.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[3])
        return super().forward(rows).reshape(*x.shape[:3], -1)

    def backward(self, dy: Values) -> Values:
        n, height, width, channels = self.shape
        rows = super().backward(dy.reshape(-1, dy.shape[3])).reshape(n, height, width, 3, 3, channels)
        padded = np.zeros((n, height + 2, width + 2, channels), np.float32)
        for i in range(3):
            for j in range(3):
                padded[:, i : i + height, j : j + width] += rows[:, :, :, i, j]
        return padded[:, 1:-1, 1:-1]


class Relu(Op):
    """max(x, 0)."""

    def forward(self, x: Values) -> Values:
        self.on = x > 0
        return np.maximum(x, 0)

    def backward(self, dy: Values) -> Values:
        dx: Values = dy * self.on
        return dx


class MaxPool(Op):
    """The largest of every 2 x 2 block; ties share the gradient."""

    def forward(self, x: Values) -> Values:
        n, height, width, channels = x.shape
        blocks = x.reshape(n, height // 2, 2, width // 2, 2, channels)
        y: Values = blocks.max(axis=(2, 4), keepdims=True)
        self.share = (blocks == y).astype(np.float32)
        self.share /= self.share.sum(axis=(2, 4), keepdims=True)
        return y[:, :, 0, :, 0]

    def backward(self, dy: Values) -> Values:
        spread: Values = self.share * dy[:, :, None, :, None]
        n, height, _, width, _, channels = spread.shape
        return spread.reshape(n, 2 * height, 2 * width, channels)


class Flatten(Op):
    """(N, H, W, C) to (N, C H W), in the order of ONNX."""

    def forward(self, x: Values) -> Values:
        self.shape = x.shape
        return x.transpose(0, 3, 1, 2).reshape(len(x), -1)

    def backward(self, dy: Values) -> Values:
        n, height, width, channels = self.shape
        return dy.reshape(n, channels, height, width).transpose(0, 2, 3, 1)


def network(rng: np.random.Generator) -> list[Op]:
    """Six convolutions and two dense layers, not trained."""
    stages: list[list[Op]] = [
        [Conv(rng, 1, 32), Relu(), Conv(rng, 32, 64), Relu(), MaxPool()],
        [Conv(rng, 64, 64), Relu(), Conv(rng, 64, 128), Relu(), MaxPool()],
        [Conv(rng, 128, 128), Relu(), Conv(rng, 128, 128), Relu(), MaxPool()],
        [Flatten(), Dense(rng, 2048, 128), Relu(), Dense(rng, 128, CLASSES)],
    ]
    return [op for stage in stages for op in stage]


def enlarge(images: Values) -> Values:
    """(N, 1, 8, 8) of 0..16 to (N, 32, 32, 1) of 0..1, as Mul and Resize (linear) do it in the model."""
    size = images.shape[2]
    at = np.clip((np.arange(size * ENLARGED) + 0.5) / ENLARGED - 0.5, 0, size - 1)
    matrix = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size)))
    large: Values = np.einsum("ij,ncjk,lk->nilc", matrix, images / LARGEST, matrix)
    return large.astype(np.float32)


def forward(ops: list[Op], x: Values) -> Values:
    """Class scores (N, 10) of enlarged images."""
    for op in ops:
        x = op.forward(x)
    return x


def train(ops: list[Op], x: Values, labels: Values, rng: np.random.Generator) -> Iterator[float]:
    """Train in place with AdamW on softmax cross-entropy; yields the mean loss of every epoch.

    Images are shifted by up to two pixels at random, the rate falls as a cosine to nothing.
    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019.
    """
    moments = [[np.zeros_like(p), np.zeros_like(p)] for op in ops for p in op.parameters]
    steps, step = EPOCHS * (len(x) // BATCH), 0
    for _ in range(EPOCHS):
        losses = []
        order = rng.permutation(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            shift = tuple(rng.integers(-2, 3, 2))
            scores = forward(ops, np.roll(x[chosen], shift, axis=(1, 2)))
            scores -= scores.max(axis=1, keepdims=True)
            odds = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            rows = np.arange(len(chosen))
            losses.append(-np.log(odds[rows, labels[chosen]] + 1e-9).mean())
            odds[rows, labels[chosen]] -= 1
            gradient = (odds / len(chosen)).astype(np.float32)
            for op in reversed(ops):
                gradient = op.backward(gradient)
            step += 1
            rate = RATE * (1 + np.cos(np.pi * step / steps)) / 2
            pairs = [pair for op in ops for pair in zip(op.parameters, op.gradients, strict=True)]
            for (parameter, slope), (first, second) in zip(pairs, moments, strict=True):
                first += 0.1 * (slope - first)
                second += 0.001 * (slope**2 - second)
                move = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
                parameter -= (rate * (move + DECAY * parameter)).astype(np.float32)
        yield float(np.mean(losses))


def accuracy(ops: list[Op], x: Values, labels: Values) -> float:
    """Share of enlarged images whose largest score is that of their label."""
    found = np.concatenate([forward(ops, part).argmax(axis=1) for part in np.array_split(x, 8)])
    return float(np.mean(found == labels))


def to_onnx(ops: list[Op], facts: dict[str, str]) -> onnx.ModelProto:
    """The trained network as a model from ``image`` (batch, 1, 8, 8) of 0..16 to ``scores`` (batch, 10)."""
    weights = {"scale": np.float32(1 / LARGEST), "enlarge": np.array([1, 1, ENLARGED, ENLARGED], np.float32)}
    nodes = [
        helper.make_node("Mul", ["image", "scale"], ["grey"], "normalise"),
        helper.make_node(
            *("Resize", ["grey", "", "enlarge"], ["enlarged"], "resize"),
            mode="linear",
            coordinate_transformation_mode="half_pixel",
        ),
    ]
    name = "enlarged"
    for op in ops:
        kind = type(op).__name__.lower()
        label = f"{kind}{1 + sum(node.name.startswith(kind) for node in nodes)}"
        source, name = name, "scores" if op is ops[-1] else label
        inputs = [source]
        if op.parameters:
            weight, bias = op.parameters
            if isinstance(op, Conv):
                weight = weight.reshape(3, 3, -1, len(bias)).transpose(3, 2, 0, 1)
            else:
                weight = weight.T
            weights[f"{label}.weight"], weights[f"{label}.bias"] = np.ascontiguousarray(weight), bias
            inputs += [f"{label}.weight", f"{label}.bias"]
        node: dict[str, tuple[str, dict[str, Any]]] = {
            "conv": ("Conv", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
            "relu": ("Relu", {}),
            "maxpool": ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
            "flatten": ("Flatten", {"axis": 1}),
            "dense": ("Gemm", {"transB": 1}),
        }
        op_type, attributes = node[kind]
        nodes.append(helper.make_node(op_type, inputs, [name], label, **attributes))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, producer_name="onnx-lrsd models/digits.py", opset_imports=opsets)
    model.ir_version = 8
    model.doc_string = "Handwritten digits: the example of onnx-lrsd."
    helper.set_model_props(model, facts)
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    """Train, print the accuracy on the test images, and write the three files."""
    parser = argparse.ArgumentParser(description="Train the example network and write it with its samples.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    digits = load_digits()
    images, labels = digits.images[:, None].astype(np.float32), digits.target.astype(np.int64)
    order = rng.permutation(len(images))
    test, rest = order[:TEST], order[TEST:]
    x = enlarge(images)
    ops = network(rng)
    for epoch, loss in enumerate(train(ops, x[rest], labels[rest], rng), 1):
        print(f"epoch {epoch:2} of {EPOCHS}  loss {loss:.4f}", flush=True)
    score = accuracy(ops, x[test], labels[test])
    print(f"accuracy on {TEST} test images: {score:.2%}")
    facts = {
        "data": "scikit-learn load_digits",
        "seed": str(options.seed),
        "test_accuracy": f"{score:.4f}",
    }
    onnx.save(to_onnx(ops, facts), options.output / "digits.onnx")
    np.savez_compressed(options.output / "digits_calib.npz", image=images[rest[:CALIBRATION]])
    np.savez_compressed(options.output / "digits_eval.npz", image=images[test], labels=labels[test])


if __name__ == "__main__":
    main()
