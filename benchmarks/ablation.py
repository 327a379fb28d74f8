"""What each part of the planner and of the fit buys: output error on held-out calibration samples.

    python benchmarks/ablation.py FOLDER... --ratio R [--samples N]

A FOLDER holds model.onnx and calib.npz. Each run leaves one part out; MACs are the same. *Sensitivity*:
layers weighed by what their error does to the outputs. *Sequential*: layers fitted for the inputs that
the rewritten layers before them give. *Rectifier*: layers behind a Relu or Clip fitted for what passes.
*Readers*: errors of outputs weighed by what the layers that read them make of them. *Original rows*: a
third of the rows of the sequential fit are those of the original network. *Refit*: layers that stay dense are
fitted for their new inputs. *Repair*: an error counts less the more layers are fitted behind it.
"""

from __future__ import annotations

import argparse
import importlib
from math import inf
from pathlib import Path
from unittest.mock import patch

import onnx_lrsd

PARTS = {
    "all": None,
    "sensitivity": ("onnx_lrsd.plan.planner", "Planner.weigh", lambda planner, measure: None),
    "sequential": ("onnx_lrsd.fit.reconstruct", "STAGES", 1),
    "rectifier": ("onnx_lrsd.solver.decompose", "RECTIFIED_FROM", inf),
    "readers": ("onnx_lrsd.fit.reconstruct", "readers", lambda *_: {}),
    "original rows": ("onnx_lrsd.fit.calibrate", "ORIGINAL", 1 << 40),
    "refit": ("onnx_lrsd.fit.reconstruct", "ROWS_TO_REFIT", inf),
    "repair": ("onnx_lrsd.plan.planner", "REPAIRED", 0.0),
}


def output_error(folder: Path, ratio: float, samples: int | None, part: str) -> float:
    """Largest relative error of an output with ``part`` left out."""

    def run() -> float:
        result = onnx_lrsd.optimize(
            folder / "model.onnx", folder / "calib.npz", ratio=ratio, samples=samples, seed=0
        )
        assert result.report.verification is not None
        return result.report.verification.error

    replaced = PARTS[part]
    if replaced is None:
        return run()
    module, name, value = replaced
    *path, last = name.split(".")
    target = importlib.import_module(module)
    for step in path:
        target = getattr(target, step)
    with patch.object(target, last, value):
        return run()


def main() -> None:
    """Print one markdown row for each folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--ratio", type=float, required=True)
    parser.add_argument("--samples", type=int)
    given = parser.parse_args()
    print("| model, ratio | " + " | ".join(p if p == "all" else f"without {p}" for p in PARTS) + " |")
    print("|---" * (len(PARTS) + 1) + "|")
    for folder in given.folders:
        errors = (output_error(folder, given.ratio, given.samples, part) for part in PARTS)
        cells = " | ".join(f"{error:.5f}" for error in errors)
        print(f"| {folder.name}, {given.ratio:g} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
