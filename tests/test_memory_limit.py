"""A run holds no more memory than it may, and gives to the byte what it gives without a limit."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

import onnx_lrsd
from benchmarks.large_model import write
from onnx_lrsd.cli import main
from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.errors import LrsdError, OptionError
from onnx_lrsd.fit.calibrate import original_inputs, original_outputs
from onnx_lrsd.graph.external_data import is_aside
from onnx_lrsd.graph.model import in_memory, load, save
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.compare import price_and_macs_beside
from onnx_lrsd.measure.load_cost import peak_memory
from onnx_lrsd.memory_limit import MemoryLimit, kept_bytes, working_bytes
from onnx_lrsd.report import report_table, report_to_json
from onnx_lrsd.runtime.session import PartedSession, open_model, open_session, shapes
from onnx_lrsd.scratch import OnDemand, Scratch
from onnx_lrsd.workers import Workers

FLOAT = onnx.TensorProto.FLOAT
BOUND = 4_000_000_000


def a_model(seed: int = 0) -> onnx.ModelProto:
    """Convolutions with more patches than are sampled, a wide matrix, and one that is applied twice."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        n, m = shape[0], int(np.prod(shape[1:]))
        rank = min(n, m) // 4
        values = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, m)) / rank**0.5
        values = (values + 0.1 * rng.standard_normal((n, m))) / max(n, m) ** 0.5
        return numpy_helper.from_array(values.reshape(shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="one", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="two", pads=[1, 1, 1, 1]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "w3"], ["e"], name="three"),
        helper.make_node("Relu", ["e"], ["f"]),
        helper.make_node("MatMul", ["f", "w4"], ["g"], name="four"),
        helper.make_node("Tanh", ["g"], ["h"]),
        helper.make_node("MatMul", ["h", "w4"], ["y"], name="five"),
    ]
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 16, 8, 8])],
        [helper.make_tensor_value_info("y", FLOAT, ["n", 96])],
        [
            weight("w1", 64, 16, 3, 3),
            weight("w2", 32, 64, 3, 3),
            weight("w3", 2048, 96),
            weight("w4", 96, 96),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def data(seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((90, 16, 8, 8)).astype(np.float32)}


@pytest.fixture
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python and a batch take, more than these models by far, does not count."""
    monkeypatch.setattr("onnx_lrsd.memory_limit.BASE_BYTES", 0)


@pytest.fixture
def all_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is limited nothing is kept in it, and weights are put aside however small they are."""
    monkeypatch.setattr(MemoryLimit, "spills", lambda *given: True)
    monkeypatch.setattr("onnx_lrsd.graph.model.ASIDE_BYTES", 64)


def written(folder: Path, **options: Any) -> tuple[bytes, onnx_lrsd.Report]:
    folder.mkdir()
    target = folder / "model.onnx"
    result = onnx_lrsd.optimize(a_model(), data(), target="tensorrt", output=target, **options)
    saved = load(target)
    embedded = in_memory(saved)
    return embedded.SerializeToString(deterministic=True), result.report


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 1.5},
        {"max_error": 0.3},
        {"max_error": 0.5, "forms": ("width",)},
    ],
)
@pytest.mark.usefixtures("all_aside")
def test_what_lies_in_files_gives_the_same_model_to_the_byte(tmp_path: Path, options: Any) -> None:
    plain, said = written(tmp_path / "plain", **options)
    bound, told = written(tmp_path / "bound", memory=BOUND, **options)
    assert told.memory is not None and told.memory.aside and not told.memory.parted
    assert said.verification is not None and said.verification.before.bytes != said.verification.after.bytes
    assert bound == plain
    assert said.memory is None and "memory" not in json.loads(report_to_json(said))
    assert json.loads(report_to_json(told))["memory"]["limit"] == BOUND
    assert "lay in files" in " ".join(report_table(told).split())


@pytest.mark.slow
@pytest.mark.usefixtures("all_aside")
def test_codes_are_the_same_to_the_byte(tmp_path: Path) -> None:
    results = [
        onnx_lrsd.optimize(
            a_model(), data(), target="size", include="four|five", ratio=1.01, samples=40, memory=memory
        )
        for memory in (None, BOUND)
    ]
    found = results[0].report.verification
    assert found is not None and found.after.bytes < found.before.bytes
    models = [in_memory(replace(result.model)) for result in results]
    assert results[1].report.memory is not None and results[1].report.memory.aside
    assert models[0].SerializeToString(deterministic=True) == models[1].SerializeToString(deterministic=True)


def test_what_a_calibration_teaches_is_the_same_from_a_file() -> None:
    model = load(a_model())
    graph = model.graph()
    layers, _ = onnx_lrsd.find_layers(graph)
    samples = onnx_lrsd.read_samples(data(), inputs_of(model.proto))
    weight_of = partial(onnx_lrsd.read_weight, graph)
    plain = onnx_lrsd.calibrate(model, layers, samples, weight_of)
    aside = onnx_lrsd.calibrate(model, layers, samples, weight_of, scratch_for=lambda _: Scratch())
    assert isinstance(aside.moments, OnDemand) and set(aside.moments) == set(plain.moments)
    for layer in plain.layers:
        one, two = plain.moments[layer.output], aside.moments[layer.output]
        assert (one.count, one.samples, one.silent) == (two.count, two.samples, two.silent)
        for name in ("mean", "second", "rows"):
            assert np.array_equal(getattr(one, name), getattr(two, name)), (layer.name, name)
        outputs = [original_outputs(layer, known, weight_of) for known in (plain, aside)]
        assert np.array_equal(outputs[0], outputs[1]), layer.name
        first, second = (original_inputs(layer, known) for known in (plain, aside))
        assert first is not None and second is not None
        assert np.array_equal(first[: len(second)], second), layer.name


def test_no_more_than_one_layer_is_held_while_samples_are_run() -> None:
    """By a count of what NumPy and Python allocate: it hardly grows with the number of layers."""
    peaks = []
    for count in (2, 8):
        weights = [np.eye(256, dtype=np.float32) + 0.01 * index for index in range(count)]
        names = ["x", *(f"h{index}" for index in range(count - 1)), "y"]
        nodes = [
            helper.make_node("MatMul", [names[index], f"w{index}"], [names[index + 1]])
            for index in range(count)
        ]
        graph = helper.make_graph(
            nodes,
            "chain",
            [helper.make_tensor_value_info("x", FLOAT, ["n", 256])],
            [helper.make_tensor_value_info("y", FLOAT, ["n", 256])],
            [numpy_helper.from_array(value, f"w{index}") for index, value in enumerate(weights)],
        )
        opset = helper.make_opsetid("", 17)
        model = load(helper.make_model(graph, opset_imports=[opset], ir_version=8))
        working = model.graph()
        layers, _ = onnx_lrsd.find_layers(working)
        x = np.random.default_rng(0).standard_normal((4096, 256)).astype(np.float32)
        samples = onnx_lrsd.read_samples({"x": x}, inputs_of(model.proto))
        weight_of = partial(onnx_lrsd.read_weight, working)
        tracemalloc.start()
        known = onnx_lrsd.calibrate(model, layers, samples, weight_of, scratch_for=lambda _: Scratch())
        assert sum(known.moments[layer.output].count for layer in layers) == 4096 * count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        del known
    rows = 4 * 4096 * 256
    assert peaks[1] < peaks[0] + rows  # in memory these would be six more
    assert peaks[1] < 6 * rows


@pytest.mark.parametrize("given", ["much", 0, "4 parsecs", True, -1])
def test_what_is_no_size_is_one_sentence(given: Any) -> None:
    with pytest.raises(OptionError, match=r"is no size: write it like 4GB or 512MB\."):
        onnx_lrsd.Options(memory=given)


def test_what_is_no_size_is_one_sentence_on_the_command_line(tmp_path: Path) -> None:
    onnx.save(a_model(), tmp_path / "model.onnx")
    ran = CliRunner().invoke(main, ["optimize", str(tmp_path / "model.onnx"), "--memory", "much"])
    said = " ".join(ran.output.split())
    assert ran.exit_code == 2 and "--memory" in said and "write it like 4GB or 512MB." in said


def test_less_than_any_run_takes_is_one_sentence() -> None:
    with pytest.raises(
        OptionError, match=r"^memory='9MB' is less than what any run takes: give at least \d+MB\.$"
    ):
        onnx_lrsd.optimize(a_model(), data(), memory="9MB")


@pytest.mark.usefixtures("nothing_else")
def test_less_than_the_largest_layer_takes_is_one_sentence_with_what_would_do() -> None:
    with pytest.raises(OptionError) as refused:
        onnx_lrsd.optimize(a_model(), data(), target="tensorrt", ratio=1.5, memory="2MB")
    said = str(refused.value)
    assert said.startswith(
        "memory='2MB' is less than what the largest layer, two, takes while it is worked on"
    )
    assert said.endswith("or leave it out with exclude.") and said.count(". ") == 0
    enough = said.partition("give at least ")[2].partition(",")[0]
    report = onnx_lrsd.optimize(a_model(), data(), target="tensorrt", ratio=1.5, memory=enough).report
    assert report.memory is not None


@pytest.mark.usefixtures("nothing_else")
def test_less_than_a_model_takes_that_is_one_file_is_one_sentence() -> None:
    with pytest.raises(OptionError, match=r"or save it with external data\.$"):
        onnx_lrsd.optimize(a_model(), data(), memory=100_000)


@pytest.mark.usefixtures("all_aside")
def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_lrsd.scratch.tempfile.TemporaryFile", full)
    with pytest.raises(
        LrsdError, match=r"No space left on device\): make room there, or name another folder"
    ):
        onnx_lrsd.optimize(a_model(), data(), target="tensorrt", ratio=1.5, memory=BOUND)


def test_a_scratch_file_has_no_name_and_gives_back_what_was_written(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    values = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    stored, later = scratch.put(values), scratch.reserve((4, 2), np.float64)
    later.write(2, np.ones((2, 2)))
    assert not list(tmp_path.iterdir())
    assert np.array_equal(stored.read(), values) and np.array_equal(later.read()[2:], np.ones((2, 2)))
    assert np.array_equal(stored.first(2).read(), values[:2])


def test_new_weights_that_lie_aside_are_written_as_any(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((700, 700)).astype(np.float32)
    graph = onnx.parser.parse_graph("g (float[n, 700] x) => (float[n, 700] y) { y = MatMul (x, w) }")
    graph.initializer.extend([numpy_helper.from_array(weight, "w")])
    opset = helper.make_opsetid("", 17)
    plain = load(helper.make_model(graph, opset_imports=[opset], ir_version=8))
    kernels = rng.standard_normal((500, 700)), rng.standard_normal((700, 500))
    feed = {"x": rng.standard_normal((3, 700)).astype(np.float32)}
    found = []
    for model in (plain, replace(plain, aside=Scratch(tmp_path))):
        working = model.graph()
        (layer,), _ = onnx_lrsd.find_layers(working)
        form = onnx_lrsd.types.Form("channel", 500)
        factors = onnx_lrsd.types.Factors(form=form, kernels=kernels, bias=np.zeros(700))
        onnx_lrsd.split(working, layer, factors)
        spliced = model.splice(working).splice(working)
        save(spliced, tmp_path / "out.onnx")
        found.append(
            (open_model(spliced).run(feed)["y"], open_model(load(tmp_path / "out.onnx")).run(feed)["y"])
        )
    assert all(is_aside(tensor) for tensor in spliced.proto.graph.initializer)
    assert spliced.proto.ByteSize() < 2000
    assert all(np.array_equal(value, found[0][0]) for pair in found for value in pair)


@pytest.fixture(scope="module")
def parted() -> Iterator[onnx_lrsd.Model]:
    yield replace(load(a_model()), most_bytes=300_000)


def test_a_model_run_part_by_part_gives_what_it_gives_as_a_whole(
    parted: onnx_lrsd.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = list[int]()

    def spied(proto: onnx.ModelProto, **options: Any) -> Any:
        session = open_session(proto, **options)
        opened.append(len(session.outputs))
        return session

    monkeypatch.setattr("onnx_lrsd.runtime.session.open_session", spied)
    feed = {"x": data()["x"][:5]}
    wanted = ["y", "c", "x", "w4", "f"]
    session = open_model(parted, outputs=wanted)
    assert isinstance(session, PartedSession) and session.count == 3
    found = session.run(feed)
    assert len(opened) == 3
    whole = open_session(parted.proto, outputs=wanted).run(feed)
    assert list(found) == wanted
    assert all(np.allclose(found[name], whole[name], rtol=1e-5, atol=1e-6) for name in wanted)
    assert [value.name for value in session.inputs] == ["x"]
    later = open_model(parted, outputs=["y"], given={"f": np.float32})
    assert np.allclose(later.run({"f": whole["f"]})["y"], whole["y"], rtol=1e-5, atol=1e-6)


def test_shapes_are_the_same_part_by_part(parted: onnx_lrsd.Model) -> None:
    feed, names = {"x": data()["x"][:5]}, ["a", "c", "e", "w1", "x", "y"]
    assert shapes(parted.proto, feed, names, most_bytes=300_000) == shapes(parted.proto, feed, names)


def test_macs_are_counted_part_by_part_as_well(
    parted: onnx_lrsd.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int | None]()

    def spied(*given: Any) -> Any:
        asked.append(given[4])
        return shapes(*given)

    monkeypatch.setattr("onnx_lrsd.measure.compare.shapes", spied)
    samples = read_samples(data(), inputs_of(parted.proto))
    price, beside = price_and_macs_beside(parted, samples, ())
    assert asked == [300_000] and price.macs == round(sum(beside.values()))


@pytest.mark.usefixtures("all_aside")
def test_a_model_larger_than_a_session_may_be_is_optimised_part_by_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("onnx_lrsd.memory_limit.SESSION_SHARE", 0.000075)
    options: Any = {"target": "tensorrt", "ratio": 1.5, "forms": ("channel",)}
    plain = onnx_lrsd.optimize(a_model(), data(), **options).report.verification
    report = onnx_lrsd.optimize(a_model(), data(), memory=BOUND, **options).report
    found = report.verification
    assert plain is not None and found is not None and report.memory is not None and report.memory.parted
    assert found.latency_ratio is None and "run part by part" in " ".join(report_table(report).split())
    assert found.after.bytes == pytest.approx(plain.after.bytes, rel=0.05)
    assert found.error == pytest.approx(plain.error, rel=0.05)
    with pytest.raises(OptionError, match="run in parts: give more, or another cost"):
        onnx_lrsd.optimize(a_model(), data(), ratio=1.2, cost="latency", memory=BOUND)


def test_no_more_layers_are_held_than_there_is_room_for() -> None:
    held, most = list[int](), list[int]()

    def given(index: int) -> int:
        held.append(index)
        most.append(len(held))
        return index

    def stored(index: int) -> int:
        held.remove(index)
        return index

    with ThreadPoolExecutor(4) as pool:
        workers = Workers(pool, 4, 4, here=True, at_once=2)
        assert workers.map(abs, given, 9, store=stored) == list(range(9))
    assert not held and max(most) == 2


def test_a_limit_counts_layers_processes_and_what_is_kept() -> None:
    limit = MemoryLimit(4e9)
    assert working_bytes(1024, 1024, 4096) > 8 * 1024**2 and kept_bytes(64, 64, 100) > 4 * 100 * 128
    assert limit.limited and not MemoryLimit().limited and MemoryLimit().session_bytes is None
    assert limit.session_bytes is not None and 0 < limit.session_bytes < 4e9
    told = list[int]()
    watched = limit.watching(lambda stage, done, total: told.append(done))
    assert watched is not None
    watched("curves", 3, 4)
    assert told == [3]
    assert MemoryLimit().watching(None) is None


CODE = """
import json, sys, onnx_lrsd
report = onnx_lrsd.optimize(
    sys.argv[1], sys.argv[2], target="tensorrt", ratio=1.2, forms=("channel",), memory=sys.argv[3]
).report
print(json.dumps([report.memory.limit, report.memory.most, report.memory.runtime, report.memory.aside]))
"""


@pytest.mark.slow
def test_a_process_holds_no_more_than_it_may_and_what_the_runtime_takes(tmp_path: Path) -> None:
    if not peak_memory():
        pytest.skip("the system does not tell what a process holds")
    write(tmp_path, layers=12, size=256, wide=4, table=512)
    ids = np.random.default_rng(1).integers(0, 512, (400, 16))
    np.savez(tmp_path / "calib.npz", ids=ids)
    files = [str(tmp_path / name) for name in ("model.onnx", "calib.npz")]
    command = [sys.executable, "-c", CODE, *files, "440MB"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    limit, most, runtime, aside = json.loads(done.stdout.splitlines()[-1])
    assert limit == 440_000_000 and aside and runtime > 0
    assert most <= limit + runtime
