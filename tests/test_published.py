"""The published networks have their published sizes, and generated weights behave as trained ones do."""

from __future__ import annotations

import sys
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import published
import pytest
from published import INPUT, Network, generated, natural_images, trained_like

from benchmarks.paper import slopes, smoothness

NETWORKS = list(published.NETWORKS)
PUBLISHED = {
    "alexnet": (60_965_224, 724_406_816),
    "vgg16": (138_357_544, 15_470_264_320),
    "googlenet": (6_998_552, 1_582_671_872),
}
"""Parameters, and multiply-accumulates of one image."""
NARROW = {"alexnet": 0.1, "vgg16": 0.125, "googlenet": 0.125}


@cache
def narrow(name: str) -> tuple[Network, dict[str, npt.NDArray[np.float32]]]:
    net = published.NETWORKS[name](width=NARROW[name])
    return net, generated(net)


def shapes(net: Network) -> dict[str, tuple[int, ...]]:
    model = net.model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    return {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_and_macs_are_those_published(name: str) -> None:
    net = published.NETWORKS[name]()
    known = shapes(net)
    macs = 0
    for node in net.model().graph.node:
        if node.op_type in ("Conv", "Gemm"):
            macs += prod(known[node.output[0]]) * prod(known[node.input[1]][1:])
    assert (net.parameters, macs) == PUBLISHED[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_any_number_of_images_gives_as_many_rows_of_scores(name: str) -> None:
    net, weights = narrow(name)
    model = net.model(weights)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    images = natural_images(3, net.size, np.random.default_rng(1))
    scores = session.run(None, {INPUT: images})[0]
    assert scores.shape == (3, 1000) and session.get_inputs()[0].shape[0] == "batch"
    np.testing.assert_allclose(session.run(None, {INPUT: images[:1]})[0], scores[:1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_activations_neither_vanish_nor_explode_on_images_that_scaled_nothing(name: str) -> None:
    net, weights = narrow(name)
    model = net.model(weights)
    outputs = [node.output[0] for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=output) for output in outputs)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    images = natural_images(4, net.size, np.random.default_rng(1))
    for output, values in zip(outputs, session.run(None, {INPUT: images}), strict=True):
        assert 0.1 < np.mean(values**2) < 10, output
        assert values.std(axis=0).mean() > 0.1, f"{output} is the same for every image"


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((64, 32, 3, 3), "spatial"),
        ((64, 24, 5, 5), "spatial"),
        ((96, 64, 1, 1), "pointwise"),
        ((80, 200), "dense"),
    ],
)
def test_singular_values_fall_by_the_law_that_was_measured(shape: tuple[int, ...], kind: str) -> None:
    weight = trained_like(shape, np.random.default_rng(0))
    a, b, missed = slopes(weight.reshape(shape[0], -1))
    assert (a, b) == pytest.approx(published.SPECTRA[kind], abs=0.02) and missed < 0.01


def test_kernels_are_as_smooth_as_those_of_a_trained_network() -> None:
    weight = trained_like((128, 64, 3, 3), np.random.default_rng(0))
    assert smoothness(weight, 3) == pytest.approx([1, 0.61, 0.37], abs=0.06)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    net = published.NETWORKS["alexnet"](width=0.03)
    first, again, other = generated(net), generated(net), generated(net, seed=1)
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
        assert not np.array_equal(values, other[name])


def test_weights_of_a_file_are_written_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = published.googlenet()
    given = {
        name: np.full(shape, index, np.float32) for index, (name, shape) in enumerate(net.shapes.items())
    }
    np.savez(tmp_path / "weights.npz", **given)  # type: ignore[arg-type]  # NumPy's stubs mistake the names
    run(monkeypatch, "googlenet", "-o", tmp_path / "net.onnx", "--weights", tmp_path / "weights.npz")
    assert "6,998,552 parameters" in capsys.readouterr().out
    written = onnx.load(tmp_path / "net.onnx").graph.initializer
    assert len(written) == len(given)
    for tensor in written:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), given[tensor.name])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"conv2/3x3.weight": np.zeros((1, 2, 3, 3))},
            "conv2/3x3.weight has shape [1, 2, 3, 3], not [192, 64, 3, 3]",
        ),
        ({"conv2/3x3.bias": None}, "conv2/3x3.bias [192] is missing"),
        ({"head.bias": np.zeros(3)}, "head.bias is no weight of GoogLeNet"),
    ],
)
def test_weights_of_another_network_are_refused_in_one_sentence(
    change: dict[str, npt.NDArray[np.float64] | None],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {name: np.zeros(shape, np.float32) for name, shape in published.googlenet().shapes.items()}
    kept = {name: value for name, value in {**given, **change}.items() if value is not None}
    np.savez(tmp_path / "weights.npz", **kept)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "googlenet", "-o", tmp_path / "net.onnx", "--weights", tmp_path / "weights.npz")
    assert stopped.value.code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "net.onnx").exists()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["published.py", *map(str, arguments)])
    published.main()
