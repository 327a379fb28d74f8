"""A calibration in shards gives what one run gives, and parts of anything else are refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

import onnx_lrsd
from onnx_lrsd.cli import main
from onnx_lrsd.commands.calibrate import calibrate_shard
from onnx_lrsd.errors import DataError, OptionError

FLOAT = onnx.TensorProto.FLOAT
OPTIONS: dict[str, Any] = {"ratio": 1.5, "forms": ("channel",)}


def a_model(seed: int = 0) -> onnx.ModelProto:
    """A convolution with more patches than are sampled, one that keeps outputs, and a matrix."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="one", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="two", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("MatMul", ["e", "w3"], ["y"], name="three"),
    ]
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 16, 12, 12])],
        [helper.make_tensor_value_info("y", FLOAT, ["n", 48])],
        [weight("w1", 64, 16, 3, 3), weight("w2", 32, 64, 3, 3), weight("w3", 32, 48)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def data(seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((90, 16, 12, 12)).astype(np.float32)}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parts")
    made = [folder / f"part{number}.npz" for number in (1, 2, 3)]
    options = onnx_lrsd.Options(**OPTIONS)
    for number, path in enumerate(made, 1):
        calibrate_shard(a_model(), data(), path, shard=f"{number}/3", options=options)
    return made


def moments_of(result_of: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> onnx_lrsd.Calibration:
    """What a run of ``optimize`` was taught; the run itself is stopped there."""

    class Taught(Exception):
        pass

    found = []

    def taught(known: onnx_lrsd.Calibration) -> str:
        found.append(known)
        raise Taught

    with monkeypatch.context() as patched:
        patched.setattr("onnx_lrsd.commands.prepare.what_was_left_out", taught)
        with pytest.raises(Taught):
            result_of()
    return found[0]


def test_the_figures_are_those_of_one_run(parts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = str(parts[0].parent / "part*.npz")
    one = moments_of(lambda: onnx_lrsd.optimize(a_model(), data(), **OPTIONS), monkeypatch)
    other = moments_of(lambda: onnx_lrsd.optimize(a_model(), data(), moments=pattern, **OPTIONS), monkeypatch)
    assert one.moments and one.layers == other.layers and one.left_out == other.left_out
    for name, known in one.moments.items():
        assert known.count == other.moments[name].count
        for values in ("mean", "second", "rows"):
            np.testing.assert_array_equal(getattr(known, values), getattr(other.moments[name], values))
        np.testing.assert_array_equal(one.kept[name], other.kept[name])
        np.testing.assert_array_equal(one.inputs[name], other.inputs[name])


def test_the_command_makes_parts_that_optimize_takes(tmp_path: Path) -> None:
    onnx.save(a_model(), tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", **data())  # type: ignore[arg-type]
    model, calib = tmp_path / "model.onnx", ["--calib", tmp_path / "calib.npz"]

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)

    for number in (1, 2):
        part = tmp_path / f"part{number}.npz"
        done = run("calibrate", model, *calib, "--shard", f"{number}/2", "-o", part, "--forms", "channel")
        assert done.exit_code == 0, done.stderr
    options = ["--ratio", 1.5, "--forms", "channel", "--dry-run", "-q"]
    done = run("optimize", model, *calib, "--moments", tmp_path / "part*.npz", *options)
    assert done.exit_code == 0, done.stderr
    for shard, code in (("3/2", 2), ("x", 2), ("0/2", 2)):
        assert run("calibrate", model, *calib, "--shard", shard, "-o", part).exit_code == code


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": a_model(5)}, "of another model"),
        ({"calibration": data(5)}, "with other samples"),
        ({"exclude": "two"}, "no rows of two"),
        ({"which": [0, 1]}, "not the 3 of one whole but 1/3, 2/3"),
        ({"which": [0, 1, 1]}, "not the 3 of one whole"),
        ({"which": []}, "no file"),
        ({"damage": True}, "no whole part"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_that_do_not_belong_here_are_refused_in_a_sentence(
    parts: list[Path], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    paths: list[Path] = [parts[index] for index in change.get("which", [0, 1, 2])]
    if "damage" in change:
        damaged = bytearray(paths[1].read_bytes())
        damaged[len(damaged) // 2] ^= 255
        paths[1] = tmp_path / "damaged.npz"
        paths[1].write_bytes(damaged)
    if "exclude" in change:
        paths = [tmp_path / "part.npz"]
        calibrate_shard(a_model(), data(), paths[0], options=onnx_lrsd.Options(**OPTIONS, exclude="two"))
    model, calibration = change.get("model", a_model()), change.get("calibration", data())
    with pytest.raises(DataError, match=rf"({says}).*: \w.*\.$"):
        onnx_lrsd.optimize(model, calibration, moments=paths or [tmp_path / "none.npz"], **OPTIONS)


def test_another_seed_is_refused(parts: list[Path]) -> None:
    # Samples are kept apart by the seed, so that it is they that differ first.
    with pytest.raises(DataError, match=r"with (other samples|another seed)"):
        onnx_lrsd.optimize(a_model(), data(), moments=parts, seed=3, **OPTIONS)
    with pytest.raises(DataError, match="with another seed"):
        onnx_lrsd.optimize(a_model(), data(), evaluation=data(), moments=evaluated(parts), seed=3, **OPTIONS)


def evaluated(parts: list[Path]) -> Path:
    """All samples in one part, made for samples to check on that come apart."""
    path = parts[0].with_name("evaluated.npz")
    calibrate_shard(a_model(), data(), path, evaluation=data(), options=onnx_lrsd.Options(**OPTIONS))
    return path


def test_moments_need_their_samples_and_a_shard_is_a_part(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="moments goes with"):
        onnx_lrsd.optimize(a_model(), moments="part*.npz")
    with pytest.raises(OptionError, match="no part of a whole"):
        calibrate_shard(a_model(), data(), tmp_path / "part.npz", shard="17/16")


def test_a_part_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="choose another place"):
        calibrate_shard(a_model(), data(), tmp_path / "nowhere" / "part.npz")
