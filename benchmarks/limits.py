"""How far from the best that is known: long searches from several starts on two layers.

    python benchmarks/limits.py --layers DIR [--only res_s2_red,lm_l0_query] [--starts 5]

Errors are relative to those of the standard effort on the same problem: held out and, in brackets, on the
calibration rows. Where S has nothing the optimum is known (whitened SVD), and where W is a sum U V + S it is
reached (benchmarks/solvers.py); in between no bound from below is known, so that the best of many long runs
stands for it.
"""

from __future__ import annotations

import os

os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1"))

import argparse
from pathlib import Path

from methods import SHARE, spend
from problems import LayerProblem, read_problems

from onnx_lrsd.solver import admm
from onnx_lrsd.types import UNSTRUCTURED, Pattern

LONG = {"standard": (10, 8), "thorough": (16, 16), "800 iterations": (20, 40), "3200 iterations": (40, 80)}
KEEPS = (0.5, 0.15)


def errors(problem: LayerProblem, keep: float, effort: str, seed: int) -> tuple[float, float]:
    """Held-out and calibration error."""
    n, m = problem.weight.shape
    budget, posed = spend(n, m, keep, SHARE), problem.posed()
    pattern = Pattern(UNSTRUCTURED, int(budget.density * n * m + 1e-6))
    found = admm.low_rank_plus_sparse(
        posed.weight, posed.metric, budget.rank, pattern, taps=problem.taps, effort=effort, seed=seed
    )
    return problem.errors(found.left @ found.right + found.sparse)


def main() -> None:
    """Print a row for each layer and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=Path, required=True)
    parser.add_argument("--only", default="res_s2_red,lm_l0_query")
    parser.add_argument("--starts", type=int, default=5)
    given = parser.parse_args()
    admm.EFFORTS.update(LONG)
    wanted = given.only.split(",")
    problems = [problem for problem in read_problems(given.layers) if problem.name in wanted]
    print(
        f"| layer | keep | {' | '.join(LONG)} | best of {given.starts} |\n|---|---|{'---|' * (len(LONG) + 1)}"
    )
    for problem in problems:
        for keep in KEEPS:
            found = [errors(problem, keep, effort, 0) for effort in LONG]
            starts = [errors(problem, keep, "3200 iterations", seed) for seed in range(1, given.starts)]
            found.append(min([found[-1], *starts], key=lambda pair: pair[1]))
            held, fitted = found[0]
            cells = [f"{one / held:.3f} ({two / fitted:.3f})" for one, two in found]
            print(f"| {problem.name} | {keep:.0%} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
