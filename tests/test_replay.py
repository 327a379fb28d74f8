"""A plan replayed gives the same bytes, in another process as well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.replay import RATIOS

ROOT = Path(__file__).parent.parent
SAMPLES = 60


def replay(what: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "replay", what, str(folder), "--samples", str(SAMPLES)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_plan_replayed_gives_the_same_bytes_for_every_target(tmp_path: Path) -> None:
    made = replay("make", tmp_path)
    assert made.returncode == 0, made.stderr
    same = replay("check", tmp_path)
    assert same.stdout.splitlines() == [f"digits {target}: same" for target in RATIOS]
    assert same.returncode == 0
    (tmp_path / "digits-size.sha256").write_text("of other bytes")
    other = replay("check", tmp_path)
    assert "digits size: DIFFERENT" in other.stdout.splitlines()
    assert other.returncode == 1
