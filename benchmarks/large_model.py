"""A model of some gigabytes, written layer by layer: a table, and blocks with spectra as trained ones have.

    python -m benchmarks large_model FOLDER --layers N [--size 1024] [--wide 4] [--table ROWS] [--samples N]

Writes model.onnx, whose weights lie in model.onnx.data, and calib.npz. A token is looked up in the table.
Each layer (size -> wide x size) reads the normalised stream; behind it come a Relu and the mean over ``wide``
parts, which is added to the stream. Singular values fall as those of trained layers (results/published.md).
Singular vectors are columns of Hadamard matrices with random signs, so that no factorisation is needed and
sizes are powers of two. Never more than one weight is in memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from benchmarks.resources import FALL

OPTIONS = ()
POSITIONS = 16
"""Tokens of a sample."""
ALIGNMENT = 4096

Matrix = npt.NDArray[np.float32]


def hadamard(values: Matrix) -> Matrix:
    """The orthonormal Hadamard matrix of its size times ``values``, whose rows are a power of two."""
    rows, half = len(values), 1
    while half < rows:
        pairs = values.reshape(rows // (2 * half), 2, half, -1)
        values = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).reshape(rows, -1)
        half *= 2
    return values / np.float32(rows**0.5)


def trained_like(inputs: int, outputs: int, rng: np.random.Generator) -> Matrix:
    """A weight (inputs, outputs) with the spectrum of a trained one, which keeps variances behind a Relu."""
    count = min(inputs, outputs)
    i = np.arange(1, count + 1)
    values = i ** -FALL[0] * np.exp(-FALL[1] * i / count)
    values *= np.sqrt(2 * outputs / np.sum(values**2))
    weight = np.zeros((inputs, outputs), np.float32)
    weight[np.arange(count), rng.permutation(outputs)[:count]] = values
    signs = [rng.choice([-1, 1], size).astype(np.float32) for size in (inputs, outputs)]
    weight = hadamard(weight) * signs[0][:, None]
    return np.ascontiguousarray(hadamard((weight * signs[1]).T).T)


def placed(name: str, values: npt.NDArray[np.float32], file: BinaryIO) -> onnx.TensorProto:
    """A tensor whose values are written to ``file``, which is the model's data file."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=values.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "model.onnx.data", "offset": file.tell(), "length": values.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    file.write(values.data)
    return tensor


def write(folder: Path, layers: int, size: int, wide: int, table: int) -> None:
    """The model in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    weights = [
        helper.make_tensor("parts", onnx.TensorProto.INT64, [4], [0, 0, wide, size]),
        helper.make_tensor("one", onnx.TensorProto.FLOAT, [size], np.ones(size, np.float32)),
    ]
    nodes = [helper.make_node("Gather", ["table", "ids"], ["s0"], name="table")]
    with (folder / "model.onnx.data").open("wb") as file:
        weights.append(placed("table", rng.standard_normal((table, size), np.float32), file))
        for k in range(layers):
            weights.append(placed(f"w{k}", trained_like(size, wide * size, rng), file))
            nodes += [
                helper.make_node("LayerNormalization", [f"s{k}", "one"], [f"n{k}"], axis=-1),
                helper.make_node("MatMul", [f"n{k}", f"w{k}"], [f"h{k}"], name=f"layer{k}"),
                helper.make_node("Relu", [f"h{k}"], [f"r{k}"]),
                helper.make_node("Reshape", [f"r{k}", "parts"], [f"p{k}"]),
                helper.make_node("ReduceMean", [f"p{k}"], [f"m{k}"], axes=[2], keepdims=0),
                helper.make_node("Add", [f"s{k}", f"m{k}"], [f"s{k + 1}"]),
            ]
    nodes.append(helper.make_node("LayerNormalization", [f"s{layers}", "one"], ["y"], axis=-1))
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n", POSITIONS])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", POSITIONS, size])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=96)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--wide", type=int, default=4)
    parser.add_argument("--table", type=int, default=4096, metavar="ROWS")
    parser.add_argument("--samples", type=int, default=128)


def run(given: argparse.Namespace) -> None:
    """Write the files and say how large they are."""
    write(given.folder, given.layers, given.size, given.wide, given.table)
    ids = np.random.default_rng(1).integers(0, given.table, (given.samples, POSITIONS))
    np.savez(given.folder / "calib.npz", ids=ids)
    total = sum(path.stat().st_size for path in given.folder.glob("model.onnx*"))
    print(f"{given.folder / 'model.onnx'}: {given.layers} layers, {total / 1e9:.2f} GB with its data file")
