"""Samples are taken from what users have, fed as the model wants them, or refused in one sentence."""

from __future__ import annotations

import base64
import io
import json
import tracemalloc
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lrsd.data import readers as sources
from onnx_lrsd.data.made_up import random_samples
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.errors import DataError
from onnx_lrsd.types import InputSpec

IMAGE = InputSpec("image", "float32", ("N", 3, 4, 4))
IDS = InputSpec("ids", "int64", ("batch", "seq"))
MASK = InputSpec("mask", "bool", ("batch", "seq"))
FIXED = InputSpec("image", "float32", (4, 3, 2, 2))


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 4, 4)).astype(np.float32)


def tokens(ids: tuple[int, ...], mask: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {"ids": np.ones(ids, int), "mask": np.ones(mask, bool)}


def fed(samples: Samples, name: str, size: int = 3) -> np.ndarray:
    """What reaches the model over all batches."""
    return np.concatenate([feed[name] for feed in samples.batches(size)])


def is_mapped(array: Any) -> bool:
    """Whether the values still lie in a file."""
    return isinstance(array, np.memmap) or (array is not None and is_mapped(getattr(array, "base", None)))


def polygraphy(feeds: list[dict[str, np.ndarray]]) -> str:
    """What ``polygraphy run --save-inputs`` 0.53 writes."""

    def encode(array: np.ndarray) -> dict[str, str]:
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=False)
        return {"array": base64.b64encode(stream.getvalue()).decode(), "polygraphy_class": "ndarray"}

    return json.dumps([{name: encode(array) for name, array in feed.items()} for feed in feeds], indent=4)


class Reader:
    """As onnxruntime.quantization.CalibrationDataReader."""

    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


SCRIPT = """
import numpy as np
from beside import SCALE

def batches():
    for index in range(3):
        yield {"image": SCALE * np.full((2, 3, 4, 4), index, np.float32)}

def forever():
    while True:
        yield {"image": np.zeros((3, 4, 4), np.float32)}

def breaks():
    yield {"image": np.zeros((2, 3, 4, 4), np.float32)}
    raise KeyError("no such picture")
"""


def write(folder: Path, kind: str, x: np.ndarray) -> Any:
    """The same samples in every form in which they may come."""
    path = folder / "data"
    if kind == "npz":
        np.savez(path.with_suffix(".npz"), image=x)
        return path.with_suffix(".npz")
    if kind == "compressed":
        np.savez_compressed(path.with_suffix(".npz"), image=x)
        return str(path.with_suffix(".npz"))
    if kind == "lone npz":
        np.savez(path.with_suffix(".npz"), x)
        return path.with_suffix(".npz")
    if kind == "npy":
        np.save(path.with_suffix(".npy"), x)
        return path.with_suffix(".npy")
    if kind == "polygraphy":
        path.with_suffix(".json").write_text(polygraphy([{"image": x[:2]}, {"image": x[2:]}]))
        return path.with_suffix(".json")
    if kind.startswith("folder"):
        path.mkdir()
        if kind == "folder of samples":
            for index, sample in enumerate(x):
                np.save(path / f"{index:03}.npy", sample)
        elif kind == "folder of batches":
            np.savez(path / "a.npz", image=x[:2])
            np.savez(path / "b.npz", image=x[2:])
        else:
            np.save(path / "image.npy", x)
        return path
    return {
        "dict": {"image": x},
        "array": x,
        "iterable": ({"image": sample} for sample in x),
        "list of batches": [{"image": x[:1]}, {"image": x[1:]}],
        "stack of feeds": {"image": x[:, None]},
        "reader": Reader([{"image": x[:3]}, {"image": x[3:]}]),
    }[kind]


KINDS = (
    "npz", "compressed", "lone npz", "npy", "polygraphy", "folder of samples", "folder of batches",
    "folder of inputs", "dict", "array", "iterable", "list of batches", "stack of feeds", "reader",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_samples(tmp_path: Path, kind: str) -> None:
    x = images(7)
    samples = read_samples(write(tmp_path, kind, x), [IMAGE])
    assert samples.count == 7
    assert not samples.notes
    assert np.array_equal(fed(samples, "image"), x)


def test_a_script_yields_samples_and_may_never_end(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("SCALE = 2\n")
    script = tmp_path / "numpy_like.py"
    script.write_text(SCRIPT)
    assert fed(read_samples(f"{script}:batches", [IMAGE]), "image").mean() == 2
    assert read_samples(f"{script}:forever", [IMAGE], limit=5).count == 5
    with pytest.raises(DataError, match=r"breaks failed \(KeyError: 'no such picture'\): mend the script"):
        read_samples(f"{script}:breaks", [IMAGE])
    with pytest.raises(DataError, match="has no function 'absent': check the name"):
        read_samples(f"{script}:absent", [IMAGE])
    with pytest.raises(DataError, match="name the function"):
        read_samples(script, [IMAGE])


def test_large_arrays_stay_in_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAPPED_BYTES", 1)
    x = np.asfortranarray(images(6))
    np.savez(tmp_path / "x.npz", labels=np.arange(6), image=x)
    np.save(tmp_path / "x.npy", x)
    for path in (tmp_path / "x.npz", tmp_path / "x.npy"):
        samples = read_samples(path, [IMAGE])
        assert is_mapped(samples.by_input()["image"])
        assert is_mapped(samples.take(slice(1, 3)).by_input()["image"])
        assert np.array_equal(fed(samples, "image"), x)
        assert all(feed["image"].flags.c_contiguous for feed in samples.batches(4))
    assert np.array_equal(read_samples(tmp_path / "x.npz", [IMAGE]).labels, np.arange(6))  # type: ignore[arg-type]
    damaged = bytearray((tmp_path / "x.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "x.npz").write_bytes(damaged)
    with pytest.raises(DataError, match="damaged"):
        read_samples(tmp_path / "x.npz", [IMAGE])


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "int64"])
def test_safe_casts_are_made_with_a_note(dtype: str) -> None:
    x = np.arange(2 * 48).reshape(2, 3, 4, 4).astype(dtype)
    samples = read_samples({"image": x}, [IMAGE])
    feed = next(samples.batches(2))
    assert feed["image"].dtype == np.float32
    assert np.array_equal(feed["image"], x.astype(np.float32))
    assert samples.notes == (f"image was converted from {dtype} to float32, values as they are.",)


@pytest.mark.parametrize(
    ("value", "spec", "says"),
    [
        (np.full((2, 3), 0.5), IDS, "holds fractions but the model wants int64"),
        (np.full((2, 3), 1e300), InputSpec("ids", "float32", (None, 3)), "which float32 cannot hold"),
        (np.full((2, 3), 300), InputSpec("ids", "uint8", (None, 3)), "which uint8 cannot hold"),
        (np.full((2, 3), 2), InputSpec("ids", "bool", (None, 3)), "which bool cannot hold"),
        (np.full((2, 3), np.nan), InputSpec("ids", "float32", (None, 3)), "has NaN or infinite values"),
        (np.full((2, 3), -np.inf), InputSpec("ids", "float32", (None, 3)), "has NaN or infinite values"),
        (np.full((2, 3), "a"), IDS, "holds str32 but the model wants int64"),
        (np.full((2, 3), 1j), IDS, "holds complex128 but the model wants int64"),
        (np.ones((2, 3)), InputSpec("ids", "object", (None, 3)), "holds float64 but the model wants text"),
    ],
)
def test_values_that_do_not_fit_are_refused(value: np.ndarray, spec: InputSpec, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_samples({"ids": value}, [spec])


def test_text_is_fed_to_models_that_want_text() -> None:
    spec = InputSpec("text", "object", (None, 1))
    for given_text in (
        np.array([["a"], ["b"]]),
        np.array([[b"a"], [b"b"]]),
        np.array([["a"], ["b"]], object),
    ):
        feed = next(read_samples({"text": given_text}, [spec]).batches(2))
        assert feed["text"].dtype == object
        assert feed["text"].tolist() == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({}, "has no ids, mask: name the arrays as the model does, ids int64[batch, seq], mask bool["),
        ({"ids": np.ones((2, 3), int)}, "has no mask"),
        ({"id": np.ones((2, 3), int)}, "has no ids, mask but id"),
        ({k: np.ones((2, 3), bool) for k in ("ids", "mask", "x")}, "has x, which the model does not take"),
        (tokens((2, 3), (3, 3)), "different numbers of samples (ids 2, mask 3)"),
        (tokens((2, 3, 1, 1), (2, 3)), "has shape [2, 3, 1, 1]; the model wants ids int64[batch, seq]"),
        ([], "holds no samples: give at least two"),
        ([3], "yields int where a dict"),
        (3, "cannot be read: give a path"),
        (np.ones((2, 3), int), "has no ids, mask but one array without a name"),
        (
            {"ids": np.ones((1, 3), int), "mask": np.ones((1, 3), bool)},
            "holds 1 sample but one is needed to verify",
        ),
        ({"ids": np.ones((0, 3), int), "mask": np.ones((0, 3), bool)}, "holds no samples"),
    ],
)
def test_samples_that_do_not_fit_are_refused_with_what_the_model_wants(source: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        read_samples(source, [IDS, MASK])
    assert says in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def bad_files(folder: Path) -> dict[str, str]:
    np.savez(folder / "whole.npz", image=images(3))
    whole = (folder / "whole.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "text.npz").write_text("hello")
    (folder / "empty.npy").write_bytes(b"")
    np.save(folder / "objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    np.savez(folder / "objects.npz", image=np.array([{}, 1], dtype=object))
    (folder / "broken.json").write_text("[{")
    (folder / "other.json").write_text('{"a": 1}')
    (folder / "image.png").write_bytes(b"x")
    (folder / "nothing").mkdir()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
    )
    with zipfile.ZipFile(folder / "bomb.npz", "w") as archive:
        archive.writestr("image.npy", header.getvalue())
    return {
        "cut.npz": "damaged",
        "text.npz": "damaged",
        "empty.npy": "damaged",
        "objects.npy": "holds Python objects",
        "objects.npz": "holds Python objects",
        "broken.json": "cannot be read as Polygraphy's inputs",
        "other.json": "is no list of feeds",
        "image.png": "no data that can be read",
        "nothing": "holds no .npy, .npz or .json file",
        "absent.npz": "There is no file",
        "absent.py:f": "There is no file",
        "bomb.npz": "damaged",
    }


def test_files_that_cannot_be_read_are_named_with_the_reason(tmp_path: Path) -> None:
    for name, says in bad_files(tmp_path).items():
        with pytest.raises(DataError, match=says) as caught:
            read_samples(tmp_path / name, [IMAGE])
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_fixed_batch_is_fed_whole_and_the_rest_left_out_with_a_note() -> None:
    x = np.arange(11 * 12, dtype=np.float32).reshape(11, 3, 2, 2)
    samples = read_samples({"image": x, "labels": np.arange(11)}, [FIXED])
    assert samples.count == 8
    assert samples.notes == ("The model takes batches of 4: 3 samples left out.",)
    assert [feed["image"].shape[0] for feed in samples.batches(1)] == [4, 4]
    first, second = samples.split(0.1, seed=0)
    assert (first.count, second.count) == (4, 4)
    assert np.array_equal(second.labels, second.by_input()["image"][:, 0, 0, 0] / 12)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="holds 3 samples but the model takes batches of 4: give at least 8"):
        read_samples({"image": x[:3]}, [FIXED])


def test_too_few_samples_are_those_that_may_be_used() -> None:
    with pytest.raises(DataError, match="Only 1 sample of the given data may be used but one is needed"):
        read_samples({"image": images(10)}, [IMAGE], limit=1)


@pytest.mark.parametrize(("each", "most", "kept"), [(24, 32, 24), (64, 32, 64), (4, 32, 32), (1, 32, 32)])
def test_some_samples_fill_whole_batches(each: int, most: int, kept: int) -> None:
    samples = Samples(groups=({"x": np.zeros((192, 3), np.float32)},), fixed=each)
    assert samples.some(most).count == kept
    assert {len(feed["x"]) for feed in samples.some(most).batches(5)} <= {each, 5, 2}
    assert samples.some(500).count == 192


@pytest.mark.parametrize("texts", [["a", "b", "a"], ["a", "a", "a"]])
def test_texts_are_told_apart(texts: list[str]) -> None:
    spec = InputSpec("text", "object", ("n", 1))
    for dtype in (object, str):
        samples = read_samples({"text": np.array(texts, dtype=dtype)[:, None]}, [spec])
        assert samples.all_alike == (len(set(texts)) == 1)


@pytest.mark.parametrize("size", [64, "samples", None])
def test_a_lone_vector_of_numbers_is_one_sample(size: int | str | None) -> None:
    wave = InputSpec("wave", "float32", (size,))
    given = np.arange(10 * 64, dtype=np.float32).reshape(10, 64)
    for source in (given, {"wave": list(given)}, [{"wave": each} for each in given]):
        samples = read_samples(source, [wave])
        assert samples.count == 10
        assert [feed["wave"].tolist() for feed in samples.batches(8)] == given.tolist()
    rate = InputSpec("rate", "int64", ())
    both = read_samples([{"wave": each, "rate": 16000} for each in given], [wave, rate])
    assert {(feed["wave"].shape, feed["rate"].shape) for feed in both.batches()} == {((64,), ())}


@pytest.mark.parametrize("size", [1, "N", "batch_size"])
def test_a_vector_that_is_called_a_batch_holds_samples(size: int | str) -> None:
    samples = read_samples({"x": np.arange(10, dtype=np.float32)}, [InputSpec("x", "float32", (size,))])
    assert samples.count == 10


def test_sounds_of_their_own_lengths_are_samples_where_the_model_has_no_batch_axis() -> None:
    wave = InputSpec("wave", "float32", ("samples",))
    sounds = [np.full(length, index, np.float32) for index, length in enumerate((30, 50, 30))]
    samples = read_samples({"wave": sounds}, [wave])
    assert sorted(feed["wave"].tolist() for feed in samples.batches()) == [
        sound.tolist() for sound in sorted(sounds, key=lambda s: s[0])
    ]


def test_a_scalar_is_given_once_or_for_each_sample() -> None:
    rate = InputSpec("rate", "int64", ())
    once = read_samples({"image": images(4), "rate": 16000}, [IMAGE, rate])
    same = read_samples({"image": images(4), "rate": np.full(4, 16000)}, [IMAGE, rate])
    for samples in (once, same):
        feed = next(samples.batches(4))
        assert feed["rate"].shape == ()
        assert feed["rate"] == 16000
        assert feed["image"].shape[0] == 4
    each = read_samples({"image": images(4), "rate": np.arange(4)}, [IMAGE, rate])
    assert [int(feed["rate"]) for feed in each.batches(4)] == [0, 1, 2, 3]
    assert all(feed["image"].shape[0] == 1 for feed in each.batches(4))
    feeds = [{"image": images(2), "rate": np.int64(rate)} for rate in (8, 16)]
    assert [int(feed["rate"]) for feed in read_samples(feeds, [IMAGE, rate]).batches(4)] == [8, 8, 16, 16]


@pytest.mark.parametrize(
    "specs",
    [
        [InputSpec("x", "float32", (None, None)), InputSpec("state", "float32", (2, None, 5))],
        [InputSpec("x", "float32", ("batch", "length")), InputSpec("state", "float32", (2, "batch", 5))],
        [InputSpec("x", "float32", ("B", "T")), InputSpec("state", "float32", (2, "B", 5))],
    ],
)
def test_a_recurrent_state_has_its_batch_on_its_second_axis(specs: list[InputSpec]) -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    by_sample = np.arange(40, dtype=np.float32).reshape(4, 2, 5)
    as_fed = np.moveaxis(by_sample, 0, 1)
    for state in (by_sample, as_fed):
        samples = read_samples({"x": x, "state": state}, specs)
        assert samples.count == 4
        assert np.array_equal(next(samples.batches(4))["state"], as_fed)
        assert np.array_equal(next(samples.take([2]).batches(4))["state"], as_fed[:, 2:3])
    feeds = [{"x": x[i : i + 2], "state": as_fed[:, i : i + 2]} for i in (0, 2)]
    assert np.array_equal(next(read_samples(feeds, specs).batches(4))["state"], as_fed)


def test_time_first_inputs_keep_their_batch_where_it_is_named() -> None:
    x = InputSpec("x", "float32", ("sequence", "batch", 3))
    samples = read_samples({"x": np.zeros((7, 5, 3), np.float32)}, [x])
    assert samples.count == 5
    assert next(samples.batches(2))["x"].shape == (7, 2, 3)


def test_an_input_shared_by_the_batch_is_given_once() -> None:
    position = InputSpec("position", "int64", (1, "seq"))
    samples = read_samples({"ids": np.ones((4, 6), int), "position": np.arange(6)[None]}, [IDS, position])
    feed = next(samples.batches(3))
    assert feed["ids"].shape == (3, 6)
    assert np.array_equal(feed["position"], np.arange(6)[None])


def test_an_input_of_open_rank_is_taken_as_it_is() -> None:
    samples = read_samples({"x": images(5)}, [InputSpec("x", "float32", (), ranked=False)])
    assert next(samples.batches(3))["x"].shape == (3, 3, 4, 4)


def test_labels_follow_their_samples() -> None:
    x = np.arange(20, dtype=np.float32)[:, None]
    samples = read_samples({"x": x, "labels": np.arange(20)[:, None]}, [InputSpec("x", "float32", (None, 1))])
    for part in (samples, samples.take(slice(3, 9)), samples.take([5, 1]), *samples.split(0.25, seed=3)):
        assert np.array_equal(part.labels, part.by_input()["x"][:, 0])  # type: ignore[arg-type]
    assert read_samples(samples, [InputSpec("x", "float32", (None, 1))], limit=3).count == 3


def test_labels_that_do_not_match_are_left_out_with_a_note() -> None:
    samples = read_samples({"image": images(4), "labels": np.arange(3)}, [IMAGE])
    assert samples.labels is None
    assert samples.notes == ("There are 3 labels for 4 samples: they were not used.",)


def test_samples_that_share_a_label_stay_together() -> None:
    x = np.arange(40, dtype=np.float32)[:, None]
    samples = read_samples({"x": x, "labels": np.arange(20)}, [InputSpec("x", "float32", (None, 1))])
    assert samples.labelled == 2
    for part in (*samples.split(0.4, 1), *samples.split(7, 2), samples.take(slice(10, 20))):
        rows = part.by_input()["x"][:, 0].astype(int)
        assert np.array_equal(rows[::2] + 1, rows[1::2])
        assert part.labels is not None and np.array_equal(part.labels, rows[::2] // 2)


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(2, 12), st.floats(0, 1), st.integers(0, 9))
def test_a_split_is_disjoint_complete_and_repeatable(each: int, groups: int, share: float, seed: int) -> None:
    x = np.arange(each * groups, dtype=np.float32)[:, None]
    samples = Samples(groups=({"x": x},), fixed=each)
    first, second = samples.split(share, seed)
    both = np.concatenate([first.by_input()["x"], second.by_input()["x"]])
    assert sorted(both[:, 0]) == list(range(each * groups))
    assert first.count % each == 0 < first.count
    assert second.count % each == 0 < second.count
    again = samples.split(share, seed)[1]
    assert np.array_equal(again.by_input()["x"], second.by_input()["x"])


def test_a_split_takes_a_number_of_samples_too() -> None:
    assert Samples(groups=({"x": np.zeros((10, 1))},)).split(3, seed=0)[1].count == 3
    with pytest.raises(DataError, match="at least 2 are needed"):
        Samples(groups=({"x": np.zeros((1, 1))},)).split(1, seed=0)


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 50), st.integers(0, 9))
def test_parts_hold_every_sample_once(each: int, groups: int, size: int, seed: int) -> None:
    samples = Samples(groups=({"x": np.arange(each * groups)[:, None]},), fixed=each)
    found = [part.by_input()["x"][:, 0] for part in samples.parts(size, seed)]
    assert all(len(part) <= max(size, each) and np.all(np.diff(part) > 0) for part in found)
    assert sorted(np.concatenate(found)) == list(range(each * groups))


def test_batches_fit_memory() -> None:
    samples = read_samples({"image": images(40)}, [IMAGE])
    assert samples.batch_size() == 32
    assert samples.batch_size(bytes_each=100 << 20) == 2
    assert samples.batch_size(bytes_each=1 << 40) == 1
    assert sum(feed["image"].shape[0] for feed in samples.batches()) == 40


def test_made_up_samples_have_the_shapes_the_model_states() -> None:
    specs = [
        InputSpec("x", "float32", ("batch", 3, "H")),
        InputSpec("state", "float16", (2, "batch", 5)),
        InputSpec("rate", "int64", ()),
        InputSpec("mask", "bool", ("batch", "H")),
        InputSpec("text", "object", ("batch",)),
    ]
    samples = random_samples(specs, count=2, seed=1, size=7, fill=0)
    feed = next(samples.batches(2))
    assert {name: value.shape for name, value in feed.items()} == {
        "x": (2, 3, 7), "state": (2, 2, 5), "rate": (), "mask": (2, 7), "text": (2,),
    }  # fmt: skip
    assert [feed[spec.name].dtype.name for spec in specs] == [spec.dtype for spec in specs]
    assert not feed["mask"].any()
    assert samples.source == "made up"
    assert next(random_samples([FIXED]).batches(1))["image"].shape == (4, 3, 2, 2)


def texts(lengths: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Feeds of one text each; its ids are its number."""
    return [
        {"ids": np.full((1, length), index), "mask": np.ones((1, length), bool)}
        for index, length in enumerate(lengths)
    ]


def write_ragged(folder: Path, kind: str, feeds: list[dict[str, np.ndarray]]) -> Any:
    """Samples of different shape in every form in which they may come, with their numbers as labels."""
    numbers = range(len(feeds))
    if kind == "folder":
        (folder / "data").mkdir()
        for index, feed in enumerate(feeds):
            np.savez(folder / "data" / f"{index:03}.npz", labels=index, **feed)  # type: ignore[arg-type]
        return folder / "data"
    if kind in ("numbered", "numbered with one array of labels"):
        arrays = {f"{name}/{index}": feeds[index][name] for index in numbers for name in feeds[index]}
        labels = {f"labels/{index}": index for index in numbers}
        np.savez(folder / "x.npz", **arrays, **(labels if kind == "numbered" else {"labels": numbers}))  # type: ignore[arg-type]
        return folder / "x.npz"
    if kind == "script":
        (folder / "sentences.py").write_text(
            "import numpy as np\n\ndef texts():\n"
            f"    for index, n in enumerate({[feed['ids'].shape[1] for feed in feeds]}):\n"
            "        yield {'ids': np.full(n, index), 'mask': np.ones(n, bool), 'labels': index}\n"
        )
        return f"{folder / 'sentences.py'}:texts"
    if kind == "dict of lists":
        return {name: [feed[name] for feed in feeds] for name in feeds[0]} | {"labels": [*numbers]}
    return ({**feed, "labels": index} for index, feed in enumerate(feeds))


RAGGED = ("folder", "numbered", "numbered with one array of labels", "script", "dict of lists", "iterable")
LENGTHS = (3, 5, 3, 4, 5, 3, 4)


@pytest.mark.parametrize("kind", RAGGED)
def test_samples_of_different_shape_are_taken_as_they_are(tmp_path: Path, kind: str) -> None:
    samples = read_samples(write_ragged(tmp_path, kind, texts(LENGTHS)), [IDS, MASK])
    assert samples.ragged and samples.count == len(LENGTHS)
    seen, order = [], []
    for feed in samples.batches(4):
        assert feed["ids"].shape == feed["mask"].shape == (samples.size_of(feed), feed["ids"].shape[1])
        assert (feed["ids"] == feed["ids"][:, :1]).all()
        order += feed["ids"][:, 0].tolist()
        seen += [feed["ids"].shape[1]] * samples.size_of(feed)
    assert [LENGTHS[index] for index in order] == seen
    assert samples.labels is not None and samples.labels.tolist() == order
    assert sum(1 for _ in samples.batches(2)) == samples.batch_count(2) == 4
    assert any("differ in shape" in note for note in samples.notes)


def test_a_model_with_one_input_takes_arrays_that_savez_was_given_one_by_one(tmp_path: Path) -> None:
    spec = InputSpec("image", "float32", ("N", 3, "H", "W"))
    np.savez(tmp_path / "x.npz", *[np.full((3, size, 4), size, np.float32) for size in (4, 6, 4)])
    samples = read_samples(tmp_path / "x.npz", [spec])
    assert [feed["image"].shape for feed in samples.batches(8)] == [(2, 3, 4, 4), (1, 3, 6, 4)]
    assert all((feed["image"] == feed["image"].shape[2]).all() for feed in samples.batches(8))


@settings(max_examples=50)
@given(st.lists(st.integers(1, 4), min_size=4, max_size=20), st.floats(0, 1), st.integers(0, 9))
def test_a_split_of_ragged_samples_keeps_each_with_its_label(
    lengths: list[int], share: float, seed: int
) -> None:
    feeds = [{**feed, "labels": index} for index, feed in enumerate(texts(lengths))]
    samples = read_samples(feeds, [IDS, MASK])
    parts = samples.split(share, seed)
    found = []
    for part in (*parts, samples.take(slice(1, 3)), samples.some(3)):
        ids = [int(sample[0]) for sample in part.by_input()["ids"]]
        assert part.labels is not None and part.labels.tolist() == ids
        assert [len(sample) for sample in part.by_input()["ids"]] == [lengths[index] for index in ids]
        assert part.count == len(ids) == len(part.sizes)
        found.append(ids)
    assert sorted(found[0] + found[1]) == list(range(len(lengths)))


def test_pairs_of_different_length_stay_together() -> None:
    feeds = texts((3, 4, 3, 3, 5, 4, 4, 4))
    samples = read_samples([*feeds, {**feeds[0], "labels": np.arange(4.5, step=1.25)}], [IDS, MASK], limit=8)
    assert samples.labels is None  # nine samples, four labels
    feeds[0]["labels"] = np.arange(4)
    samples = read_samples(feeds, [IDS, MASK])
    assert samples.labelled == 2
    for part in (samples, *samples.split(0.5, 1), samples.take(slice(2, 6))):
        ids = [int(sample[0]) for sample in part.by_input()["ids"]]
        assert part.labels is not None and part.labels.tolist() == [index // 2 for index in ids[::2]]
        assert [index + 1 for index in ids[::2]] == ids[1::2]


def test_a_fixed_batch_is_filled_with_samples_of_one_shape() -> None:
    spec = InputSpec("x", "float32", (2, None))
    lists = {"x": [np.full(length, index, np.float32) for index, length in enumerate((3, 4, 3, 4, 3, 5))]}
    samples = read_samples(lists | {"labels": np.arange(6)}, [spec])
    assert [feed["x"].shape for feed in samples.batches()] == [(2, 3), (2, 4)]
    assert samples.labels is not None and samples.labels.tolist() == [0, 2, 1, 3]
    assert any("2 samples left out" in note for note in samples.notes)


def test_the_example_is_of_middle_size_and_the_extremes_are_not() -> None:
    samples = read_samples(texts((2, 9, 4, 4, 4, 7)), [IDS, MASK])
    lengths = [feed["ids"].shape[1] for feed in (samples.example(), *samples.extremes())]
    assert lengths == [4, 2, 9]
    pictures = [np.zeros((3, *size), np.float32) for size in ((4, 9), (6, 6), (9, 4), (6, 6))]
    extremes = read_samples(
        {"image": pictures}, [InputSpec("image", "float32", ("N", 3, "H", "W"))]
    ).extremes()
    assert sorted(feed["image"].shape[2:] for feed in extremes) == [(4, 9), (9, 4)]
    assert not read_samples({"image": images(4)}, [IMAGE]).extremes()
    assert np.array_equal(samples.sizes, [4, 18, 8, 8, 8, 14])


def test_lists_of_unequal_length_are_refused() -> None:
    ids, mask = ([feed[name] for feed in texts((3, 4, 5))] for name in ("ids", "mask"))
    with pytest.raises(DataError, match=r"differ in length \(ids 3, mask 2\): give as many"):
        read_samples({"ids": ids, "mask": mask[:2]}, [IDS, MASK])
    with pytest.raises(DataError, match="2 labels for 3 samples: give one for each"):
        read_samples({"ids": ids, "mask": mask, "labels": [0, 1]}, [IDS, MASK])


@pytest.mark.parametrize("limit", [1, 2, 5, 7, 30])
@pytest.mark.parametrize("labels", [0, 24, 12, 7])
def test_of_a_compressed_archive_no_more_is_unpacked_than_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, labels: int
) -> None:
    x = images(24)
    given = {"labels": np.arange(labels)} if labels else {}
    np.savez_compressed(tmp_path / "x.npz", image=x, **given)  # type: ignore[arg-type]

    def read() -> Samples | str:
        try:
            return read_samples(tmp_path / "x.npz", [IMAGE], limit=limit)
        except DataError as error:
            return str(error)

    whole = read()
    monkeypatch.setattr(sources, "MAPPED_BYTES", 1)
    monkeypatch.setattr(sources, "_PIECE", 100)
    unpacked = []
    function = sources._unpacked

    def counted(stream: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        unpacked.append(shape[0])
        return function(stream, shape, dtype)

    monkeypatch.setattr(sources, "_unpacked", counted)
    part = read()
    if isinstance(whole, str) or isinstance(part, str):
        assert whole == part
        return
    assert np.array_equal(part.by_input()["image"], whole.by_input()["image"])
    assert (part.labels is None) == (whole.labels is None)
    assert part.labels is None or np.array_equal(part.labels, whole.labels)  # type: ignore[arg-type]
    assert part.notes == whole.notes and part.labelled == whole.labelled
    if limit < 24 and labels != 7:
        assert limit <= max(unpacked) <= limit + 1


def test_a_large_compressed_archive_takes_the_memory_of_what_is_asked(tmp_path: Path) -> None:
    header, shape = io.BytesIO(), (5000, 3, 128, 128)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    archive = zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("image.npy", "w") as file:
        file.write(header.getvalue())
        for _ in range(5):
            file.write(bytes(1000 * 3 * 128 * 128))
    tracemalloc.start()
    spec = InputSpec("image", "float32", (None, 3, 128, 128))
    samples = read_samples(tmp_path / "x.npz", [spec], limit=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert samples.count == 100
    assert peak < 64 << 20 < 3 * 128 * 128 * 5000
