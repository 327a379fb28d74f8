"""The package's solver against the published ones on layer problems: held-out error and CPU time, as ratios.

    python -m benchmarks solvers [--layers DIR] [--json FILE] [--plot FILE] [--keep .5,.3,.15]
                                 [--methods "NAME;NAME"] [--only LAYERS]

DIR holds .npz files with W (n, m), X and XH (rows of the layer's input, for fitting and held out) and meta,
JSON with weight_shape; without it the layers of models/digits.onnx are taken. One BLAS thread. All get the
same centred moments and the exact bias. Every method runs unless named: hassle-free takes most of the time.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import scipy

from benchmarks import plot
from benchmarks.layer_problems import LayerProblem, example_problems, planted, read_problems
from benchmarks.methods import FREE, METHODS, SHARE, TWO_OF_FOUR, Row, budgets, ours, run_method
from benchmarks.options import JSON, comma_separated
from benchmarks.reference.patterns import largest
from benchmarks.reference.three_basil import three_basil
from onnx_lrsd.types import UNSTRUCTURED, Pattern

OPTIONS = (JSON,)
SINGULAR = "vgg_b1c2"
"""A layer whose moments are nearly singular: its ratios are extreme, so means are given without it too."""
PLANTED = 1e-10


@dataclass(frozen=True)
class Comparison:
    """A row of the table. ``bars``: keep -> (geometric mean, worst layer or None) not to be exceeded."""

    ours: str
    peer: str
    bars: dict[float, tuple[float, float | None]]
    time: float | None = None
    pattern: str = FREE
    without: str = ""


CHOSEN = "ours, split chosen"
COMPARISONS = (
    Comparison("ours", "3basil", {0.5: (0.58, 0.88), 0.3: (0.79, 1.0), 0.15: (0.93, 1.03)}, 0.16),
    Comparison(
        "ours", "3basil", {0.5: (0.66, None), 0.3: (0.87, None), 0.15: (0.97, None)}, without=SINGULAR
    ),
    Comparison("ours", "oats", {0.5: (0.21, 0.62), 0.3: (0.24, 0.80), 0.15: (0.28, 0.92)}, 0.60),
    Comparison(CHOSEN, "alps", {0.5: (0.56, 0.85), 0.3: (0.80, 1.03), 0.15: (0.94, 1.03)}, 2.2),
    Comparison(CHOSEN, "whitened svd", {0.5: (0.09, None), 0.3: (0.17, None), 0.15: (0.22, None)}),
    Comparison("ours", "3basil", {0.6: (0.68, 0.88)}, 0.18, TWO_OF_FOUR),
    Comparison("ours, fast", "3basil", {0.5: (0.65, 0.92), 0.3: (0.83, 1.01), 0.15: (0.97, 1.04)}, 0.10),
    Comparison("ours, thorough", "3basil", {0.5: (0.54, 0.83), 0.3: (0.77, 0.98), 0.15: (0.91, 1.02)}, 0.40),
    Comparison("ours", "oats", {}, pattern=TWO_OF_FOUR),
    Comparison("ours", "hassle-free", {}),
    Comparison("ours, sparse only", "alps", {}),
    Comparison("ours, sparse only", "alps", {}, pattern=TWO_OF_FOUR),
    Comparison("ours, sparse only", "sparsegpt", {}),
    Comparison("ours, sparse only", "sparsegpt", {}, pattern=TWO_OF_FOUR),
    Comparison(CHOSEN, "sparsegpt", {}),
    Comparison(CHOSEN, "wanda", {}),
    Comparison(CHOSEN, "magnitude", {}),
    Comparison(CHOSEN, "svd", {}),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("--layers", type=Path, metavar="DIR")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=comma_separated, default=[0.5, 0.3, 0.15])
    parser.add_argument(
        "--methods", type=lambda text: text.split(";"), default=list(METHODS), help="NAME;NAME"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="LAYER,LAYER")


def run(given: argparse.Namespace) -> None:
    """Print the tables, write the files."""
    unknown = [name for name in given.methods if name not in METHODS]
    if unknown:
        raise SystemExit(f"no method {unknown[0]!r}: choose from {'; '.join(METHODS)}")
    source = read_problems(given.layers) if given.layers else example_problems()
    problems = [problem for problem in source if not given.only or problem.name in given.only]
    if not problems:
        raise SystemExit(
            "no layer left: name a folder with .npz problems in --layers, and some of them in --only"
        )
    rows: list[Row] = []
    for problem in problems:
        for method in given.methods:
            rows += [run_method(problem, method, budget) for budget in budgets(problem, method, given.keep)]
        if given.json:
            given.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    print(
        f"NumPy {np.__version__}, SciPy {scipy.__version__}, Python {platform.python_version()}, one thread, "
    )
    print(f"{len(problems)} layers; errors held out, CPU seconds; in brackets the worst layer\n")
    print_errors(rows)
    print_ratios(rows, given.keep)
    print_planted(problems, given.keep)
    if given.plot:
        plot.write(given.plot, rows)


def print_errors(rows: Sequence[Row]) -> None:
    """Held-out error and seconds of every method, layer by layer."""
    methods = list(dict.fromkeys(row.method for row in rows))
    print(f"| layer | keep | {' | '.join(methods)} |\n|---|---|{'---|' * len(methods)}")
    for layer in dict.fromkeys(row.layer for row in rows):
        own = [row for row in rows if row.layer == layer]
        for pattern, keep in dict.fromkeys((row.pattern, row.keep) for row in own):
            at = {row.method: row for row in own if (row.pattern, row.keep) == (pattern, keep)}
            cells = [f"{at[x].error:.3g} ({at[x].seconds:.2g} s)" if x in at else "" for x in methods]
            title = f"{keep:.0%}" if pattern == FREE else f"{pattern}, {keep:.0%}"
            print(f"| {layer} | {title} | {' | '.join(cells)} |")


def print_ratios(rows: Sequence[Row], keeps: Sequence[float]) -> None:
    """Ours / peer for every comparison whose rows are there, with the bar it should not exceed."""
    titles = " | ".join(f"keep {keep:.0%}" for keep in keeps)
    print(f"\n| ours / peer | {titles} | CPU time | with the choice of the split |")
    print(f"|---|{'---|' * (len(keeps) + 2)}")
    layers = {row.layer for row in rows}
    for comparison in COMPARISONS:
        if comparison.without and comparison.without not in layers:
            continue
        cells, times, whole = [], [], []
        own_keeps = (
            list(keeps)
            if comparison.pattern == FREE
            else [0.6 if comparison.peer in ("3basil", "oats") else 0.5]
        )
        for keep in own_keeps:
            pairs = list(_pairs(rows, comparison, keep))
            ratios = [mine.error / theirs.error for mine, theirs in pairs]
            times += [mine.seconds / theirs.seconds for mine, theirs in pairs]
            whole += [(mine.seconds + mine.choosing_seconds) / theirs.seconds for mine, theirs in pairs]
            bar = comparison.bars.get(keep)
            cells.append(
                f"{_mean(ratios):.3f} [{max(ratios):.2f}]{_bar(*bar) if bar else ''}" if ratios else ""
            )
        if not any(cells):
            continue
        cells += [""] * (len(keeps) - len(cells))
        title = f"{comparison.ours} / {comparison.peer}"
        if comparison.pattern != FREE:
            title += f", {comparison.pattern}"
        if comparison.without:
            title += f", without {comparison.without}"
        cells.append(f"{_mean(times):.2f}{_bar(comparison.time) if comparison.time else ''}")
        cells.append(f"{_mean(whole):.2f}" if comparison.ours == CHOSEN else "")
        print(f"| {title} | {' | '.join(cells)} |")


def print_planted(problems: Sequence[LayerProblem], keeps: Sequence[float]) -> None:
    """Error of the fit of a weight that is exactly U V + S, with the inputs of a square layer if any."""
    like = next((x for x in problems if x.layer.n == x.layer.m), problems[0])
    print(f"\nPlanted U V + S, n = m = {like.layer.m}, inputs of {like.name}\n")
    print(f"| keep | ours (bar ≤ {PLANTED:g}) | 3basil |\n|---|---|---|")
    for keep in keeps:
        problem, rank, entries = planted(like, keep, SHARE)
        mine = ours(problem, problem.posed(), rank, Pattern(UNSTRUCTURED, entries))
        density = entries / problem.weight.size
        select = partial(largest, density=density)
        left, right, sparse = three_basil(problem.weight, problem.second, rank, select)
        theirs = left @ right + sparse
        print(f"| {keep:.0%} | {problem.errors(mine)[0]:.1e} | {problem.errors(theirs)[0]:.1e} |")


def _pairs(rows: Sequence[Row], comparison: Comparison, keep: float) -> Sequence[tuple[Row, Row]]:
    at = {(x.method, x.layer): x for x in rows if (x.pattern, x.keep) == (comparison.pattern, keep)}
    layers = [layer for method, layer in at if method == comparison.ours and layer != comparison.without]
    return [
        (at[comparison.ours, layer], at[comparison.peer, layer])
        for layer in layers
        if (comparison.peer, layer) in at
    ]


def _mean(ratios: Sequence[float]) -> float:
    """Geometric."""
    return float(np.exp(np.mean(np.log(np.maximum(ratios, 1e-12)))))


def _bar(mean: float, worst: float | None = None) -> str:
    return f" (≤ {mean:g}{f' [{worst:g}]' if worst else ''})"
