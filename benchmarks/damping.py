"""How much damping: one plan, fitted with several rules, judged on calibration samples kept apart.

    python benchmarks/damping.py FOLDER [--ratio R] [--samples N]

A FOLDER holds model.onnx and calib.npz; a fifth of the samples judges. Rows are values of the least
relative damping; 'rule' is what the tool uses.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnx_lrsd
from onnx_lrsd.solver import problem as whiten
from onnx_lrsd.types import Plan

TRIED = (None, 0.01, 0.03, 0.1, 0.3)


def main() -> None:
    """Print the error of the model's first output for every rule."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratio", type=float, default=2.0)
    parser.add_argument("--samples", type=int)
    given = parser.parse_args()
    rule, plan = whiten.relative_damping, None
    print("| damping at least | held-out output error |\n|---|---|")
    for least in TRIED:
        if least is not None:
            whiten.relative_damping = lambda inputs, rows, _, least=least: max(least, 0.06 * inputs / rows)
        goal: dict[str, float | Plan] = {"ratio": given.ratio} if plan is None else {"plan": plan}
        found = onnx_lrsd.optimize(
            given.folder / "model.onnx", given.folder / "calib.npz", samples=given.samples, **goal
        )
        plan = found.plan
        assert found.report.verification is not None
        error = found.report.verification.outputs[0].relative_error
        print(f"| {'rule' if least is None else least} | {error:.5f} |", flush=True)
    whiten.relative_damping = rule


if __name__ == "__main__":
    main()
