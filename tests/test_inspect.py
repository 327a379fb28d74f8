"""inspect says which shapes it counted with, and takes those of the user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import parser

import onnx_lrsd
from onnx_lrsd import cli
from onnx_lrsd.errors import OptionError

TOKENS = "agraph (float[batch, length, 64] ids, float[batch, length, 1] mask) => (float[batch, length, 64] y)"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a fully convolutional model, image.onnx, one of two inputs, tokens.onnx, and samples."""
    image = parser.parse_graph(
        "agraph (float[N, 3, H, W] image) => (float[N, 64, H2, W2] y) {"
        " h = Conv<pads=[1, 1, 1, 1]>(image, first)  y = Conv<pads=[1, 1, 1, 1]>(h, second) }"
    )
    tokens = parser.parse_graph(TOKENS + "{ h = MatMul(ids, weight)  y = Mul(h, mask) }")
    rng = np.random.default_rng(0)
    weights = {"first": (64, 3, 3, 3), "second": (64, 64, 3, 3), "weight": (64, 64)}
    for graph, names, path in (
        (image, ("first", "second"), "image.onnx"),
        (tokens, ("weight",), "tokens.onnx"),
    ):
        for name in names:
            values = rng.standard_normal(weights[name]).astype(np.float32)
            graph.initializer.append(onnx.numpy_helper.from_array(values, name))
        opset = onnx.helper.make_opsetid("", 17)
        onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / path)
    np.savez(tmp_path / "calib.npz", image=np.zeros((4, 3, 20, 10), np.float32))
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, ["inspect", *(str(argument) for argument in arguments)])


def run_compare(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, ["compare", *map(str, arguments)])


def facts(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json", "-", "-q")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def macs(height: int, width: int) -> int:
    return 9 * 64 * (3 + 64) * height * width


def test_what_was_assumed_of_open_axes_is_said_with_the_remedy(folder: Path) -> None:
    found = facts(folder / "image.onnx")
    (shape,) = found["inputs"]["shapes"].values()
    assert found["inputs"]["assumed"] == ["image"] and found["inputs"]["source"] is None
    assert found["total"]["macs"] == macs(*shape[2:])
    said = " ".join(run(folder / "image.onnx").stderr.split())
    typed = "x".join(map(str, shape))
    assert f"image {typed}" in said and f"--shape image:{typed}" in said and "--calib" in said


def test_macs_are_those_of_the_shape_that_was_given(folder: Path) -> None:
    found = facts(folder / "image.onnx", "--shape", "image:1x3x40x30")
    assert found["inputs"] == {"source": None, "shapes": {"image": [1, 3, 40, 30]}, "assumed": []}
    assert found["total"]["macs"] == macs(40, 30)
    assert facts(folder / "image.onnx", "--shape", "image:5x3x40x30")["total"]["macs"] == macs(40, 30)
    assert "image 1x3x40x30" in run(folder / "image.onnx", "--shape", "image:1x3x40x30").stderr


def test_macs_are_those_of_the_first_sample(folder: Path) -> None:
    found = facts(folder / "image.onnx", "--calib", folder / "calib.npz")
    assert found["inputs"]["shapes"] == {"image": [1, 3, 20, 10]} and found["inputs"]["assumed"] == []
    assert found["inputs"]["source"].endswith("calib.npz")
    assert found["total"]["macs"] == macs(20, 10)
    said = run(folder / "image.onnx", "--calib", folder / "calib.npz").stderr
    assert "image 1x3x20x10" in said and "calib.npz" in said and "assumed" not in said


def test_axes_of_one_name_take_one_size(folder: Path) -> None:
    found = facts(folder / "tokens.onnx", "--shape", "ids:1x7x64")
    assert found["inputs"]["shapes"] == {"ids": [1, 7, 64], "mask": [1, 7, 1]}
    assert found["inputs"]["assumed"] == []


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (["picture:1x3x8x8"], "picture:1x3x8x8 names no input of the model, which has image (N, 3, H, W)"),
        (["image:3x8x8"], "image:3x8x8 does not fit the input image (N, 3, H, W)"),
        (["image:1x4x8x8"], "image:1x4x8x8 does not fit"),
        (["image:0x3x8x8"], "image:0x3x8x8 does not fit"),
        (["1x3x8x8"], "NAME:1x3x224x224"),
        (["image:1x3x8x-8"], "NAME:1x3x224x224"),
        (["image:1x3x8x8", "image:1x3x9x9"], "given twice"),
    ],
)
def test_a_wrong_shape_is_one_sentence_with_the_remedy(folder: Path, shapes: list[str], said: str) -> None:
    options = [part for shape in shapes for part in ("--shape", shape)]
    result = run(folder / "image.onnx", *options)
    assert result.exit_code == 2
    error = result.stderr.strip().splitlines()[-1]
    assert said in error and error.endswith(".") and ": " in error
    if "names no" in said or "does not fit" in said:
        assert "write image:1x3x" in error


def test_shapes_agree_in_their_number_of_samples(folder: Path) -> None:
    result = run(folder / "tokens.onnx", "--shape", "ids:2x7x64", "--shape", "mask:3x7x1")
    assert result.exit_code == 2 and "different numbers of samples" in result.stderr


def test_one_sample_is_enough_to_count_and_to_compare(folder: Path) -> None:
    found = onnx_lrsd.inspect(folder / "image.onnx", {"image": np.zeros((1, 3, 6, 8), np.float32)})
    assert found.shapes == {"image": (1, 3, 6, 8)}
    np.savez(folder / "one.npz", image=np.ones((1, 3, 8, 8), np.float32))
    same = run_compare(folder / "image.onnx", folder / "image.onnx", "--data", folder / "one.npz")
    assert same.exit_code == 0 and "over 1 sample" in same.stderr


def test_samples_and_shapes_exclude_each_other(folder: Path) -> None:
    options = ("--shape", "image:1x3x8x8", "--calib", folder / "calib.npz")
    result = run(folder / "image.onnx", *options)
    assert result.exit_code == 2 and "--calib and --shape exclude each other" in result.stderr


def test_a_size_that_the_model_refuses_is_named(folder: Path) -> None:
    result = run(folder / "tokens.onnx", "--shape", "ids:1x7x64", "--shape", "mask:1x6x1")
    assert result.exit_code == 1
    assert "does not run with ids:1x7x64, mask:1x6x1" in result.stderr
    assert result.stderr.count("\n") == 1 and "give others" in result.stderr


def test_the_api_names_its_own_argument(folder: Path) -> None:
    with pytest.raises(OptionError, match=r"^shapes=.* names no input"):
        onnx_lrsd.inspect(folder / "image.onnx", shapes={"picture": (1, 3, 8, 8)})
    found = onnx_lrsd.inspect(folder / "image.onnx", {"image": np.zeros((2, 3, 6, 8), np.float32)})
    assert found.shapes == {"image": (1, 3, 6, 8)} and found.total.macs == macs(6, 8)


def test_channels_that_may_be_cut_are_named_and_others_with_the_reason(folder: Path) -> None:
    found = facts(folder / "image.onnx")
    assert len(found["layers"]) == 2 and not found["declined"]  # cut channels are work on both
    ((names, channels),) = found["widths"].items()
    first, second = names.split(" -> ")
    assert channels == 64
    assert [(entry["name"], entry["reason"]) for entry in found["whole"]] == [
        (second, "they are an output of the model")
    ]
    table = run(folder / "image.onnx").stderr
    assert f"64 channels: {first} -> {second}" in table and "they are an output of the model" in table


def test_too_few_channels_and_shared_weights_are_reasons(tmp_path: Path) -> None:
    graph = parser.parse_graph(
        "agraph (float[N, 64] x) => (float[N, 64] z) {"
        " a = MatMul(x, thin)  b = Relu(a)  c = MatMul(b, wide)  d = Relu(c)"
        " e = MatMul(d, twice)  f = Relu(e)  y = MatMul(f, twice)  z = Softmax(y) }"
    )
    rng = np.random.default_rng(0)
    for name, shape in (("thin", (64, 16)), ("wide", (16, 64)), ("twice", (64, 64))):
        values = rng.standard_normal(shape).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / "m.onnx")
    found = facts(tmp_path / "m.onnx")
    assert not found["widths"]
    reasons = [entry["reason"] for entry in found["whole"]]
    assert "they are fewer than 32" in reasons
    assert any("shares its weight" in reason for reason in reasons)
