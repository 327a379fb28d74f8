"""What was worked out is found again by all that it depends on, and nothing else is ever believed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

import onnx_lrsd
from onnx_lrsd.cli import main
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.facts import LoadCost
from onnx_lrsd.fit import fitter
from onnx_lrsd.types import Form, Pattern
from onnx_lrsd.work_dir import ENTRY_SUFFIX, MARK, Kept, WorkDir, open_work_dir

FLOAT = onnx.TensorProto.FLOAT


class Named(NamedTuple):
    one: int
    two: float


VALUE: dict[Any, Any] = {
    "plain": (None, True, 3, 0.1, float("inf"), "text", [1, (2,)], frozenset({"b", "a"}), b"bytes"),
    Form("channel", 8, Pattern("channels", 3), weights=(("int4", 2),)): Named(1, 2.5),
    "arrays": [np.arange(12).reshape(3, 4), np.zeros((0, 5), np.float32), np.array(["x", "yz"])],
    7: np.float64(1.25),
}
CLASSES = (Form, Pattern, Named, onnx.ModelProto)


def same(one: Any, two: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == two.dtype and one.shape == two.shape and bool((one == two).all())
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def kept_in(folder: Path, base: str = "base", **options: Any) -> Kept:
    return Kept(open_work_dir(folder, **options), base, {"model": "m.onnx"}, warn=pytest.fail)


def as_it_is(value: Any) -> Any:
    return value


def never(*given: object, **options: object) -> Any:
    raise AssertionError("it was kept")


def test_what_was_made_is_not_made_again_and_is_the_same(tmp_path: Path) -> None:
    graph = helper.make_graph([], "g", [], [])
    for value in (VALUE, None, helper.make_model(graph)):
        facts = [Form(), repr(type(value))]
        made = kept_in(tmp_path)("kind", facts, partial(as_it_is, value), CLASSES)
        found = kept_in(tmp_path)("kind", facts, never, CLASSES)
        assert made is value and same(found, value)


@pytest.mark.parametrize("other", ["base", "kind", "facts"])
def test_whatever_it_depends_on_has_an_entry_of_its_own(tmp_path: Path, other: str) -> None:
    kept_in(tmp_path)("kind", np.arange(3), lambda: 1)
    changed = {"base": "base", "kind": "kind", "facts": np.arange(3)}
    changed[other] = np.arange(1, 4) if other == "facts" else "another"
    found = kept_in(tmp_path, str(changed["base"]))(str(changed["kind"]), changed["facts"], lambda: 2)
    assert found == 2


def test_of_200_damaged_entries_none_is_believed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kept_in(tmp_path)("kind", 0, lambda: VALUE, CLASSES)
    (path,) = tmp_path.glob(f"*{ENTRY_SUFFIX}")
    whole = path.read_bytes()
    for number in range(200):
        damaged = bytearray(whole)
        match number % 4:
            case 0:
                damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
            case 1:
                del damaged[rng.integers(len(whole)) :]
            case 2:
                start = rng.integers(len(whole))
                damaged[start : start + 50] = rng.bytes(int(rng.integers(1, 100)))
                if damaged == whole:
                    continue
            case 3:
                damaged += rng.bytes(int(rng.integers(1, 100)))
        path.write_bytes(damaged)
        assert open_work_dir(tmp_path).read(path.stem, CLASSES) is None
    assert kept_in(tmp_path)("kind", 0, lambda: "made again", CLASSES) == "made again"


def test_an_entry_under_another_name_is_not_believed(tmp_path: Path) -> None:
    kept_in(tmp_path)("kind", 0, lambda: 1)
    (path,) = tmp_path.glob(f"*{ENTRY_SUFFIX}")
    path.rename(path.with_stem("0" * 32))
    assert open_work_dir(tmp_path).read("0" * 32, ()) is None


def test_an_entry_of_classes_that_are_not_expected_is_not_believed(tmp_path: Path) -> None:
    kept_in(tmp_path)("kind", 0, lambda: Form(), (Form,))
    assert kept_in(tmp_path)("kind", 0, lambda: 2, (Pattern,)) == 2


def test_the_size_is_bounded_and_what_was_used_least_recently_goes(tmp_path: Path) -> None:
    keep = kept_in(tmp_path, most_bytes=10_000)
    for number in range(6):
        keep("kind", number, lambda: np.zeros(300))
        for age, entry in enumerate(reversed(keep.work_dir.entries())):
            os.utime(entry.path, (1e9 - age, 1e9 - age))
        keep("kind", 0, never)
    assert sum(entry.bytes for entry in keep.work_dir.entries()) <= 10_000
    keep("kind", 0, never)
    keep("kind", 5, never)
    assert keep("kind", 1, lambda: 2) == 2
    assert keep("kind", "large", lambda: np.zeros(3000)).size == 3000  # larger than all: not kept


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder: (folder / "mine.txt").write_text("x"), "not empty"),
        (lambda folder: (folder / MARK).write_text(json.dumps({"format": 99})), "another version"),
        (lambda folder: (folder / MARK).write_text("{"), "damaged"),
        (lambda folder: (folder / "x").symlink_to(folder / "y"), "not empty"),
    ],
)
def test_a_folder_that_is_no_work_dir_is_left_alone(
    tmp_path: Path, prepare: Callable[[Path], object], says: str
) -> None:
    prepare(tmp_path)
    before = {path: path.is_symlink() or path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(LrsdError, match=rf"{says}.*: \w.*\.$"):
        open_work_dir(tmp_path)
    assert {path: path.is_symlink() or path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_is_no_work_dir(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LrsdError, match="name another folder"):
        open_work_dir(tmp_path / "file")


def test_a_full_disk_is_said_once_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    keep = Kept(open_work_dir(tmp_path), "base", {}, said.append)

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.link", full)
    monkeypatch.setattr("os.replace", full)
    assert [keep("kind", number, partial(as_it_is, number)) for number in range(3)] == [0, 1, 2]
    assert len(said) == 1 and "No space left" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == [MARK]


def test_the_command_lists_and_clears(tmp_path: Path) -> None:
    for number in range(3):
        kept_in(tmp_path)("curves", number, lambda: np.zeros(1000))
    (tmp_path / f"mine{ENTRY_SUFFIX}").write_text("not an entry")

    def said(*arguments: object) -> str:
        result = CliRunner().invoke(main, ["cache", str(tmp_path), *map(str, arguments)])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert "curves" in said() and "3 entries" in said() and "m.onnx" in said()
    assert "2 entries" in said("--keep", "10kB") and "1 entry" in said()
    assert "0 entries" in said("--clear") and "empty" in said()
    assert (tmp_path / f"mine{ENTRY_SUFFIX}").exists()
    for arguments, code in ((["--keep", "much"], 2), (["--clear", "--keep", "1GB"], 2)):
        assert CliRunner().invoke(main, ["cache", str(tmp_path), *arguments]).exit_code == code
    assert CliRunner().invoke(main, ["cache", str(tmp_path / "none")]).exit_code == 1


# The whole tool


def small_model() -> onnx.ModelProto:
    """Three layers whose inputs are correlated."""
    rng = np.random.default_rng(0)

    def weight(name: str, rows: int, columns: int) -> onnx.TensorProto:
        values = rng.standard_normal((rows, columns)) * 0.8 ** np.arange(columns)
        return numpy_helper.from_array(values.astype(np.float32) / 4, name)

    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="one"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w2"], ["c"], name="two"),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "w3"], ["y"], name="three"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", FLOAT, ["n", 64])],
        [weight("w1", 64, 96), weight("w2", 96, 96), weight("w3", 96, 64)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def data(seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": (rng.standard_normal((160, 16)) @ rng.standard_normal((16, 64))).astype(np.float32)}


def optimised(folder: Path | None, **options: Any) -> onnx_lrsd.Result:
    options = {"target": "size", "ratio": 3, "samples": 120, **options}
    return onnx_lrsd.optimize(small_model(), options.pop("calibration", data()), work_dir=folder, **options)


def content(result: onnx_lrsd.Result) -> bytes:
    return bytes(result.model.proto.SerializeToString(deterministic=True))


@pytest.fixture(scope="module", autouse=True)
def opening_untimed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("onnx_lrsd.commands.optimize.opening_cost", lambda model: LoadCost(0.1, 1))
        yield


@pytest.fixture(scope="module")
def fresh(opening_untimed: None) -> bytes:
    """What a run without a work dir gives."""
    return content(optimised(None))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, opening_untimed: None) -> tuple[Path, bytes]:
    """A work dir that one run has filled, and the model that the run gave."""
    folder = tmp_path_factory.mktemp("kept") / "work"
    return folder, content(optimised(folder))


def test_the_result_is_that_of_a_run_without_and_a_second_run_fits_nothing(
    filled: tuple[Path, bytes], fresh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, written = filled
    assert fresh == written
    monkeypatch.setattr(fitter, "reconstruct", never)
    monkeypatch.setattr("onnx_lrsd.commands.prepare.calibrate", never)
    assert content(optimised(folder)) == written


@pytest.mark.parametrize("change", [{"ratio": 4}, {"ratio": None, "max_error": 0.05}])
def test_another_promise_works_with_what_was_kept_and_gives_what_it_would_have(
    filled: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    without = content(optimised(None, **change))
    monkeypatch.setattr("onnx_lrsd.commands.prepare.calibrate", never)
    monkeypatch.setattr("onnx_lrsd.plan.curves.pose_shared", never)
    assert content(optimised(filled[0], **change)) == without


@pytest.mark.parametrize("change", [{"seed": 3}, {"calibration": data(2)}])
def test_another_input_is_worked_out_anew(filled: tuple[Path, bytes], change: dict[str, Any]) -> None:
    assert content(optimised(filled[0], **change)) == content(optimised(None, **change))


def test_damage_costs_time_and_nothing_else(filled: tuple[Path, bytes]) -> None:
    folder, written = filled
    for path in folder.glob(f"*{ENTRY_SUFFIX}"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert content(optimised(folder)) == written


def test_a_run_that_was_interrupted_goes_on(
    tmp_path: Path, fresh: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "decompose":
            raise Stopped

    with pytest.raises(Stopped):
        optimised(tmp_path / "work", progress=stop)
    monkeypatch.setattr("onnx_lrsd.commands.prepare.calibrate", never)
    monkeypatch.setattr("onnx_lrsd.fit.sensitivity.fit_shared", never)
    assert content(optimised(tmp_path / "work")) == fresh


def test_a_work_dir_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(LrsdError, match="not empty"):
        optimised(tmp_path)
    with pytest.raises(onnx_lrsd.OptionError, match="work_dir=3 is no path"):
        optimised(3)  # type: ignore[arg-type]


def test_entries_are_plain_files_of_one_folder(filled: tuple[Path, bytes]) -> None:
    names = [path.name for path in filled[0].iterdir()]
    assert all(name == MARK or name.endswith(ENTRY_SUFFIX) for name in names)
    assert isinstance(open_work_dir(filled[0]), WorkDir)
