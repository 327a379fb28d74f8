"""Damaged model files end in a valid model or one sentence, and are left as they are."""

from __future__ import annotations

import random

import onnx
import pytest

from benchmarks.mutate import FAILED, MODELS, mutated, rows

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
