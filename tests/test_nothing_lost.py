"""What is not rewritten stays as it was, to the byte; files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lrsd.errors import ModelError, VerificationError
from onnx_lrsd.graph.model import Model, check, load, model_bytes, save, size_on_disk
from onnx_lrsd.measure.speedup import placeholder
from onnx_lrsd.passes.find_layers import find_layers
from onnx_lrsd.passes.split import split
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.types import CHANNEL, Form

BACKEND = Path(onnx.__file__).parent / "backend" / "test" / "data"
SHIPPED = sorted(BACKEND.glob("*/*/model.onnx")) + sorted(BACKEND.glob("light/*.onnx"))
FLOAT = TensorProto.FLOAT


def same(one: Model, two: Model) -> bool:
    return bool(
        one.proto.SerializeToString(deterministic=True) == two.proto.SerializeToString(deterministic=True)
    )


def weight(name: str, *shape: int) -> TensorProto:
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


def rich_model() -> onnx.ModelProto:
    """A model that holds what graphsurgeon's own round trip loses."""
    first = helper.make_node("MatMul", ["x", "w1"], ["h"], name="first", doc_string="about the first")
    second = helper.make_node("Relu", ["h"], ["r"], doc_string="no name")
    second.metadata_props.add(key="stage", value="activation")
    third = helper.make_node("MatMul", ["r", "w2"], ["y"], name="third", doc_string="about the third")
    third.metadata_props.add(key="stage", value="last")
    body = helper.make_graph(
        [helper.make_node("Identity", ["w3"], ["inner"])],
        "body",
        [],
        [helper.make_empty_tensor_value_info("inner")],
    )
    branch = helper.make_node("If", ["flag"], ["z"], name="branch", then_branch=body, else_branch=body)
    call = helper.make_node("Twice", ["y"], ["t"], domain="local")
    graph = helper.make_graph(
        [first, second, third, branch, call],
        "rich",
        [
            helper.make_tensor_value_info("x", FLOAT, ["batch", 16]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
            helper.make_tensor_value_info("override", FLOAT, [4]),
            helper.make_tensor_value_info("unused", FLOAT, [4]),
        ],
        [
            helper.make_tensor_value_info("t", FLOAT, ["batch", 12]),
            helper.make_tensor_value_info("z", FLOAT, [4]),
        ],
        [
            weight("w1", 16, 20),
            weight("w2", 20, 12),
            weight("w3", 4),
            weight("override", 4),
            weight("dead", 3),
        ],
        doc_string="about the graph",
        value_info=[helper.make_tensor_value_info("h", FLOAT, ["batch", 20])],
    )
    graph.input[0].doc_string = "the input"
    graph.input[0].type.denotation = "IMAGE"
    graph.initializer[4].doc_string = "read by nobody"
    graph.metadata_props.add(key="graph", value="kept")
    note = graph.quantization_annotation.add(tensor_name="h")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w3")
    twice = helper.make_function(
        "local",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 17)],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("local", 1)],
        functions=[twice],
        ir_version=8,
        producer_name="someone",
        doc_string="about the model",
        model_version=7,
        domain="org.example",
    )
    model.metadata_props.add(key="author", value="someone")
    return model


def halve(model: Model, node: str) -> Model:
    """The model with one layer split."""
    graph = model.graph()
    layer = next(layer for layer in find_layers(graph)[0] if layer.name == node)
    split(graph, layer, placeholder(layer, Form(CHANNEL, 4)))
    return model.splice(graph)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_optimising_nothing_changes_no_byte_of_the_models_onnx_ships(path: Path) -> None:
    model = load(path)
    assert same(model, model.splice(model.graph()))


def test_optimising_nothing_changes_no_byte_of_a_model_that_holds_everything() -> None:
    model = load(rich_model())
    assert same(model, model.splice(model.graph()))


def test_splitting_one_layer_leaves_all_else() -> None:
    model = load(rich_model())
    changed = halve(model, "third").proto
    before, after = model.proto, changed
    assert [n.SerializeToString() for n in before.graph.node if n.name != "third"] == [
        n.SerializeToString() for n in after.graph.node if "third" not in n.name
    ]
    last = next(node for node in after.graph.node if "y" in node.output)
    for name in ("graph", "opset_import", "functions", "metadata_props"):
        if name != "graph":
            assert getattr(before, name) == getattr(after, name)
    assert (after.doc_string, after.domain, after.model_version) == ("about the model", "org.example", 7)
    assert after.graph.doc_string == "about the graph" and after.graph.metadata_props[0].value == "kept"
    assert after.graph.input == before.graph.input and after.graph.output == before.graph.output
    assert after.graph.value_info == before.graph.value_info
    assert after.graph.quantization_annotation == before.graph.quantization_annotation
    names = {tensor.name for tensor in after.graph.initializer}
    assert "w2" not in names and {"w1", "w3", "override", "dead"} <= names
    assert last.name.startswith("third/lrsd/")


def test_what_describes_a_tensor_that_is_gone_goes_with_it() -> None:
    proto = rich_model()
    del proto.graph.node[2:]
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info("b", FLOAT, None))
    proto.graph.node[1].CopyFrom(helper.make_node("Add", ["h", "bias"], ["b"]))
    proto.graph.initializer.append(weight("bias", 20))
    changed = halve(load(proto), "first").proto
    assert not changed.graph.value_info and not changed.graph.quantization_annotation
    assert {node.op_type for node in changed.graph.node} == {"MatMul", "Add"}


def test_a_weight_that_another_node_still_reads_stays() -> None:
    proto = rich_model()
    proto.graph.node.add().CopyFrom(helper.make_node("MatMul", ["x", "w1"], ["other"], name="other"))
    proto.graph.output.append(helper.make_tensor_value_info("other", FLOAT, None))
    names = {tensor.name for tensor in halve(load(proto), "first").proto.graph.initializer}
    assert "w1" in names


def external(folder: Path) -> Path:
    path = folder / "in.onnx"
    big = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h"], name="one"),
            helper.make_node("MatMul", ["h", "w2"], ["y"], name="two"),
        ],
        "external",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", FLOAT, ["n", 64])],
        [weight("w1", 64, 96), weight("w2", 96, 64)],
    )
    model = helper.make_model(big, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=True, location="in.data", size_threshold=0)
    return path


def test_external_data_in_external_data_out(tmp_path: Path) -> None:
    model = load(external(tmp_path))
    assert model.external and same(model, model.splice(model.graph()))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    changed = halve(model, "two")
    save(changed, tmp_path / "out.onnx")
    assert all(file.read_bytes() == content for file, content in before.items())
    assert {file.name for file in tmp_path.iterdir()} == {"in.onnx", "in.data", "out.onnx", "out.onnx.data"}
    check(load(tmp_path / "out.onnx"), model)
    again = onnx.load(tmp_path / "out.onnx")
    kept = next(tensor for tensor in again.graph.initializer if tensor.name == "w1")
    np.testing.assert_array_equal(numpy_helper.to_array(kept), numpy_helper.to_array(weight("w1", 64, 96)))
    assert size_on_disk(tmp_path / "out.onnx") >= model_bytes(changed) > 0


@pytest.mark.parametrize("size", [200, 1100, 40_000, 1 << 20])
def test_the_bytes_of_a_model_are_those_of_its_files(tmp_path: Path, size: int) -> None:
    """However many tensors lie in the data file, as before it is written so behind it."""
    weights = [weight(f"w{index}", size // 4 + index) for index in range(12)]
    nodes = [helper.make_node("Add", [f"t{i}", f"w{i}"], [f"t{i + 1}"]) for i in range(12)]
    ends = [helper.make_tensor_value_info(name, FLOAT, None) for name in ("t0", "t12")]
    proto = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights))
    inside = load(proto)
    assert model_bytes(inside) == proto.ByteSize()
    made = Model(inside.proto, None, True)
    expected = model_bytes(made)
    save(made, tmp_path / "model.onnx")
    taken = size_on_disk(tmp_path / "model.onnx")
    assert taken <= proto.ByteSize() + 12 * (85 + (4096 if size >= 1 << 20 else 16))
    for said in (expected, model_bytes(load(tmp_path / "model.onnx"))):
        assert 0.995 * taken <= said <= taken


def test_small_nested_and_packed_tensors_leave_the_old_data_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scale = helper.make_node("Constant", [], ["scale"], value=weight("scale", 64))
    graph = helper.make_graph(
        [
            scale,
            helper.make_node("MatMul", ["x", "w"], ["h"], name="one"),
            helper.make_node("Add", ["h", "small"], ["a"]),
            helper.make_node("Mul", ["a", "scale"], ["y"]),
            helper.make_node("DequantizeLinear", ["q", "s"], ["z"]),
        ],
        "external",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 64])],
        [
            helper.make_tensor_value_info("y", FLOAT, ["n", 64]),
            helper.make_tensor_value_info("z", FLOAT, [51, 51]),
        ],
        [weight("w", 64, 64), weight("small", 64), weight("s")],
    )
    packed = TensorProto(name="q", data_type=TensorProto.INT4, dims=[51, 51], raw_data=rng.bytes(1301))
    graph.initializer.append(packed)
    path = tmp_path / "in.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feed = {"x": rng.standard_normal((2, 64)).astype(np.float32)}
    before = open_session(model).run(feed)
    onnx.save(
        model, path, save_as_external_data=True, location="in.data", size_threshold=0, convert_attribute=True
    )
    (tmp_path / "out").mkdir()
    save(load(path), tmp_path / "out" / "out.onnx")
    written = load(tmp_path / "out" / "out.onnx")
    after = open_session(written.proto, folder=written.folder).run(feed)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    check(written, load(path))


@pytest.mark.parametrize("location", ["../outside.data", "/etc/hostname", "missing.data"])
def test_external_data_outside_the_folder_or_missing_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "outside.data").write_bytes(b"\0" * 100_000)
    folder = tmp_path / "model"
    folder.mkdir()
    proto = onnx.load(external(folder), load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    (folder / "bad.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r": \w+"):
        load(folder / "bad.onnx")


def test_external_data_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = external(tmp_path)
    data = tmp_path / "in.data"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ModelError, match="too short"):
        load(path)


@pytest.mark.parametrize("unnamed", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, unnamed: bool
) -> None:
    model = load(external(tmp_path))
    if there:
        save(model, tmp_path / "out.onnx")
    if not unnamed:
        monkeypatch.setattr("onnx_lrsd.whole_files._UNNAMED", 0)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    if not there:
        monkeypatch.setattr("os.link", fail)
    with pytest.raises(ModelError, match="No space left"):
        save(model, tmp_path / "out.onnx")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_input_is_never_written_over(tmp_path: Path) -> None:
    path = external(tmp_path)
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    for target in (path, link):
        with pytest.raises(ModelError, match="choose another output"):
            save(load(path), target)


def test_a_model_handed_over_in_memory_is_not_changed() -> None:
    proto = rich_model()
    before = proto.SerializeToString(deterministic=True)
    halve(load(proto), "first")
    assert proto.SerializeToString(deterministic=True) == before


def test_a_rewrite_that_the_checker_refuses_is_caught() -> None:
    model = load(rich_model())
    broken = onnx.ModelProto()
    broken.CopyFrom(model.proto)
    broken.graph.node[0].input[0] = "nowhere"
    with pytest.raises(VerificationError, match="checker"):
        check(Model(broken), model)
