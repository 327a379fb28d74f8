"""A script of a user that is typed is clean for pyright in its strict mode: the package tells its types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
from pathlib import Path

import numpy as np

import onnx_lrsd
from onnx_lrsd import LrsdError, Model, Options, Plan, Report, Result


def squeeze(path: Path, images: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]") -> Report:
    try:
        result: Result = onnx_lrsd.optimize(path, {"image": images}, ratio=2, samples=100)
    except LrsdError as error:
        raise SystemExit(str(error)) from error
    model, report, plan = result
    onnx_lrsd.save(model, "out.onnx")
    again: Plan = onnx_lrsd.plan_from_json(onnx_lrsd.plan_to_json(plan))
    kept: bool = report.promise is not None and report.promise.kept
    print(onnx_lrsd.report_table(report), kept, again.choices)
    return report


def speed(before: Path, after: Path, samples: Path) -> float | None:
    one: Model = onnx_lrsd.load(before)
    two: Model = onnx_lrsd.load(after)
    return onnx_lrsd.compare(one, two, onnx_lrsd.read_samples(samples, [])).latency_ratio


options = Options(ratio=2.0, forms=("spatial", "tucker"))
"""


def checked(folder: Path, script: str) -> list[str]:
    """What pyright has to say of a script."""
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)], "include": ["script.py"]}
    (folder / "script.py").write_text(script)
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    try:
        return [str(one["message"]) for one in json.loads(done.stdout)["generalDiagnostics"]]
    except ValueError:
        pytest.skip(f"pyright does not run here: {(done.stderr or done.stdout).strip()[-200:]}")


@pytest.mark.slow
def test_a_typed_script_is_clean_and_a_wrong_type_is_found(tmp_path: Path) -> None:
    pytest.importorskip("pyright", reason="pyright is not installed")
    assert checked(tmp_path, SCRIPT) == []
    wrong = SCRIPT.replace("ratio=2.0", 'ratio="2"').replace("-> float | None", "-> str")
    assert len(checked(tmp_path, wrong)) == 2
