"""Every study of benchmarks/ can be started, and what it replaces in the package is still there."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks import rules
from benchmarks.__main__ import STUDIES, main

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
