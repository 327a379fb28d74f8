"""Every study of benchmarks/ can be started, and what it replaces in the package is still there."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import pytest

from benchmarks import honesty, resources, rules
from benchmarks.__main__ import STUDIES, main
from benchmarks.honesty import read_lines
from benchmarks.mutate import dense

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_says_how_it_is_run(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    with patch.dict("os.environ"), pytest.raises(SystemExit) as end:
        main([study, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert f"python -m benchmarks {study}" in said
    assert callable(importlib.import_module(f"benchmarks.{study}").run)


def test_every_study_is_listed() -> None:
    found = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "\ndef run(" in path.read_text()}
    assert found == set(STUDIES)


@pytest.mark.parametrize("arguments, code", [([], 0), (["--help"], 0), (["no_such_study"], 2)])
def test_without_a_study_they_are_listed(arguments: list[str], code: int) -> None:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert all(f"  {study} " in done.stdout for study in STUDIES)


@pytest.mark.parametrize(
    "place", sorted({rule[0] for about in rules.RULES.values() for rule in about.values() if rule})
)
def test_every_rule_replaces_something_of_the_package(place: str) -> None:
    with patch(place):
        pass


def test_lines_are_read_without_blanks_and_repeats() -> None:
    best = np.array([[0, 3, 3, 0, 3, 5], [0, 0, 0, 0, 0, 0]])
    assert read_lines(np.eye(6)[best]) == [(3, 3, 5), ()]


def test_each_model_is_judged_once_with_its_own_samples_and_the_smallest_first(tmp_path: Path) -> None:
    small, large = dense(), dense()
    large.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 60
    large.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 60
    (tmp_path / "with_samples").mkdir()
    onnx.save(large, tmp_path / "a.onnx")
    onnx.save(small, tmp_path / "b.onnx")
    onnx.save(small, tmp_path / "with_samples" / "model.onnx")
    for name in ("calib", "eval"):
        np.savez(tmp_path / "with_samples" / f"{name}.npz", x=np.zeros((4, 6, 96), np.float32))
    found = honesty.models([tmp_path])
    assert [path.name for path in found] == ["with_samples", "a.onnx"]
    rows = [{"model": "a.onnx", "asked": "1.5", "code": code} for code in (0, None)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert honesty.kept_rows(tmp_path / "rows.json") == rows[:1]


def test_growth_finds_the_powers_and_the_bytes_that_are_there() -> None:
    def row(size: int, count: int) -> dict[str, float]:
        return {
            "size": size,
            "count": count,
            "seconds": 3e-9 * size**3 * count,
            "bytes": 5e7 + 12 * size**2 * count,
        }

    rows = {"size": [row(size, 2) for size in (256, 512, 1024)], "count": [row(256, n) for n in (2, 4, 8)]}
    assert resources.exponent(rows["size"], "size", "seconds") == pytest.approx(3)
    assert resources.exponent(rows["count"], "count", "seconds") == pytest.approx(1)
    assert resources.bytes_a_parameter(rows) == pytest.approx(12)
    assert resources.projected_seconds(rows) == pytest.approx(
        3e-9 * resources.LARGE_SIZE**3 * resources.LARGE_COUNT
    )
