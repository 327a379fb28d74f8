"""Do two checkouts give the same bytes? Saved plans replayed, and the written files compared by their hashes.

    python -m benchmarks replay make DIR [FOLDER...] [--samples N]
    python -m benchmarks replay check DIR [FOLDER...] [--samples N]

*make*, in the old checkout, plans every model for each target and keeps the plan and the hash of what it
gives in DIR. *check*, in the new one, replays the plans and compares: it prints 'same' or 'DIFFERENT' for
each and exits 1 if one differs. Without a FOLDER the example network is taken. Latency is not measured, or
chance would say whether a result is handed back. The bytes are those of one machine and its libraries: BLAS
libraries round differently, so hashes of two machines cannot be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx_lrsd
from benchmarks.options import LIMIT
from onnx_lrsd.measure.compare import Pace

OPTIONS = (LIMIT,)
EXAMPLE = Path(__file__).parent.parent / "models"
RATIOS = {"onnxruntime": (1.5, 1.2, 1.05), "size": (4.0, 2.0, 1.5), "tensorrt": (1.5, 1.2, 1.05)}
"""What each target is asked for: the first ratio at which a layer changes its form."""


def fast(*_: Any, **__: Any) -> Pace:
    """In place of a measurement: clearly faster, so that the result is not handed back."""
    return Pace(ratio=2.0, interval=(2.0, 2.0), before_ms=2.0, after_ms=1.0)


def make_plan(model: Path, calibration: Path, target: str, samples: int | None) -> onnx_lrsd.Plan:
    """The plan for the first ratio of the target at which a layer changes its form."""
    for ratio in RATIOS[target]:
        plan = onnx_lrsd.optimize(
            model, calibration, ratio=ratio, target=target, samples=samples, dry_run=True
        ).plan
        if any(not choice.form.dense for choice in plan.choices.values()):
            break
    return plan


def replayed(model: Path, calibration: Path, plan: onnx_lrsd.Plan, samples: int | None) -> str:
    """SHA-256 of the files that ``plan`` leads to."""
    with tempfile.TemporaryDirectory() as folder, patch("onnx_lrsd.measure.compare._pace", fast):
        onnx_lrsd.optimize(model, calibration, plan=plan, samples=samples, output=Path(folder) / "out.onnx")
        digest = hashlib.sha256()
        for path in sorted(Path(folder).iterdir()):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def cases(folders: list[Path]) -> dict[str, tuple[Path, Path]]:
    """Name -> model and calibration samples."""
    if not folders:
        return {"digits": (EXAMPLE / "digits.onnx", EXAMPLE / "digits_calib.npz")}
    return {folder.name: (folder / "model.onnx", folder / "calib.npz") for folder in folders}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("what", choices=("make", "check"))
    parser.add_argument("kept", type=Path, metavar="DIR")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")


def run(given: argparse.Namespace) -> None:
    """Make or check the plans and hashes of all models and targets."""
    given.kept.mkdir(parents=True, exist_ok=True)
    differ = False
    for name, (model, calibration) in cases(given.folders).items():
        for target in RATIOS:
            plan_file, hash_file = (given.kept / f"{name}-{target}.{end}" for end in ("json", "sha256"))
            if given.what == "make":
                plan = make_plan(model, calibration, target, given.samples)
                plan_file.write_text(onnx_lrsd.plan_to_json(plan))
            plan = onnx_lrsd.plan_from_json(plan_file.read_text())
            found = replayed(model, calibration, plan, given.samples)
            if given.what == "make":
                hash_file.write_text(found)
                split = sum(not choice.form.dense for choice in plan.choices.values())
                print(f"{name} {target}: {split} layers, {found[:12]}", flush=True)
            else:
                same = hash_file.read_text() == found
                differ |= not same
                print(f"{name} {target}: {'same' if same else 'DIFFERENT'}", flush=True)
    if differ:
        sys.exit(1)
