"""Samples are taken from what users have, fed as the model wants them, or refused in one sentence."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lrsd.data import readers as sources
from onnx_lrsd.data.made_up import made_up
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
        assert is_mapped(samples.arrays["image"])
        assert is_mapped(samples.take(slice(1, 3)).arrays["image"])
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
        ([tokens((1, n), (1, 3)) for n in (3, 4)], "differ in shape, as [3] and [4] do: bring them"),
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
    assert np.array_equal(second.labels, second.arrays["image"][:, 0, 0, 0] / 12)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="holds 3 samples but the model takes batches of 4: give at least 8"):
        read_samples({"image": x[:3]}, [FIXED])


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
        assert np.array_equal(part.labels, part.arrays["x"][:, 0])  # type: ignore[arg-type]
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
        rows = part.arrays["x"][:, 0].astype(int)
        assert np.array_equal(rows[::2] + 1, rows[1::2])
        assert part.labels is not None and np.array_equal(part.labels, rows[::2] // 2)


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(2, 12), st.floats(0, 1), st.integers(0, 9))
def test_a_split_is_disjoint_complete_and_repeatable(each: int, groups: int, share: float, seed: int) -> None:
    x = np.arange(each * groups, dtype=np.float32)[:, None]
    samples = Samples(arrays={"x": x}, fixed=each)
    first, second = samples.split(share, seed)
    both = np.concatenate([first.arrays["x"], second.arrays["x"]])
    assert sorted(both[:, 0]) == list(range(each * groups))
    assert first.count % each == 0 < first.count
    assert second.count % each == 0 < second.count
    again = samples.split(share, seed)[1]
    assert np.array_equal(again.arrays["x"], second.arrays["x"])


def test_a_split_takes_a_number_of_samples_too() -> None:
    assert Samples(arrays={"x": np.zeros((10, 1))}).split(3, seed=0)[1].count == 3
    with pytest.raises(DataError, match="at least 2 are needed"):
        Samples(arrays={"x": np.zeros((1, 1))}).split(1, seed=0)


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
    samples = made_up(specs, count=2, seed=1, size=7, fill=0)
    feed = next(samples.batches(2))
    assert {name: value.shape for name, value in feed.items()} == {
        "x": (2, 3, 7), "state": (2, 2, 5), "rate": (), "mask": (2, 7), "text": (2,),
    }  # fmt: skip
    assert [feed[spec.name].dtype.name for spec in specs] == [spec.dtype for spec in specs]
    assert not feed["mask"].any()
    assert samples.source == "made up"
    assert next(made_up([FIXED]).batches(1))["image"].shape == (4, 3, 2, 2)
