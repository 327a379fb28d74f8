"""Damaged model files end in a valid model or one sentence, and are left as they are."""

from __future__ import annotations

import random

import onnx
import pytest
from onnx import numpy_helper

import onnx_lrsd
from benchmarks.mutate import FAILED, MODELS, mutated, rows
from onnx_lrsd.errors import LrsdError

FEW, MANY = 25, 300


def test_the_models_that_are_mutated_are_valid() -> None:
    for make in MODELS:
        onnx.checker.check_model(make(), full_check=True)


def test_a_number_gives_the_same_file_again_and_another_number_another() -> None:
    numbers = random.Random(0).sample(range(10_000), 20)
    files = [mutated(number) for number in numbers]
    assert files == [mutated(number) for number in numbers]
    assert len(set(files)) > 15


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_damaged_file_gives_a_valid_model_or_one_sentence(count: int) -> None:
    found = list(rows(0, count, timeout=120))
    assert [row["number"] for row in found] == list(range(count))
    assert len({row["came_out"] for row in found}) == 2, "models and sentences both come out"
    assert [row for row in found if row["came_out"] == FAILED] == []


def test_damage_is_said_in_words() -> None:
    model = MODELS[0]()
    types, dims, opset, pads, none, dead, few, wide, huge = (onnx.ModelProto() for _ in range(9))
    for damaged in (types, dims, opset, pads, none, dead, few, wide, huge):
        damaged.CopyFrom(model)
    types.graph.output[0].type.tensor_type.elem_type = -1
    dims.graph.initializer[0].ClearField("raw_data")
    opset.opset_import[0].domain = "no such name"
    none.graph.node[0].ClearField("output")
    dead.graph.node.append(onnx.helper.make_node("Gemm", ["f", "no such tensor"], ["unread"]))
    few.graph.node[0].op_type = "MatMul"
    del few.graph.node[0].input[1:]
    few.graph.node[0].ClearField("attribute")
    wide.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 1 << 31
    pads.graph.node[0].attribute[0].type = onnx.AttributeProto.FLOAT
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[0, 0, 0, 0] = 1e38
    huge.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w1"))
    for damaged, says in (
        (types, "damaged"),
        (dims, "Tensor .* is damaged"),
        (opset, "opset"),
        (pads, "Attribute .* is damaged"),
        (none, "gives nothing"),
        (dead, "reads no such tensor, which nothing gives"),
        (few, "reads 1 of the 2 inputs that MatMul has"),
        (wide, "too large"),
    ):
        with pytest.raises(LrsdError, match=says):
            onnx_lrsd.optimize(damaged, ratio=1.3, target="size", dry_run=True)
    found = onnx_lrsd.inspect(huge)
    assert any("entries above" in declined.reason for declined in found.declined)


def test_what_onnx_runtime_runs_is_worked_on_though_onnx_cannot_infer_its_shapes() -> None:
    odd = onnx.ModelProto()
    odd.CopyFrom(MODELS[0]())
    odd.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["unread"], value_float=1.0))
    odd.opset_import[0].domain = "another"  # ONNX Runtime takes the newest opset it has
    names = {layer.output for layer in onnx_lrsd.find_layers(onnx_lrsd.load(odd).graph())[0]}
    assert set(onnx_lrsd.optimize(odd, ratio=1.05, dry_run=True).plan.choices) <= names != set()
