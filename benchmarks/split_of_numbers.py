"""How a budget of numbers is best split between factors and S, layer by layer, on samples not seen.

    python benchmarks/split_of_numbers.py FOLDER [--samples N] [--layers 2,5]

A FOLDER holds model.onnx and calib.npz. The named k x k convolutions (counted from 0) are fitted on one half
of the samples with a share of their numbers: factors hold part of it and the entries of a free S the rest.
The error is that of the outputs on the other half, relative to their variance. Fits with an S are brief
ones, as the tool makes for its curves.
"""

from __future__ import annotations

import argparse
from math import prod
from pathlib import Path

from forms import halves

from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.layout import expand
from onnx_lrsd.solver.resolvent import Resolvent
from onnx_lrsd.solver.share import split_forms
from onnx_lrsd.types import CHANNEL, NONE, SPATIAL

SHARES, PARTS = (0.067, 0.125, 0.25), (0.0, 0.3, 0.6, 1.0)


def main() -> None:
    """Print a row for each layer, kind of factors and budget."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--layers", default="")
    given = parser.parse_args()
    wanted = {int(number) for number in given.layers.split(",") if number}
    titles = ["S alone", *(f"{part:.0%} in factors" for part in PARTS[1:-1]), "factors alone"]
    print(f"| layer | factors | numbers left | {' | '.join(titles)} |\n{'|---' * (3 + len(titles))}|")
    for index, (posed, judge) in enumerate(halves(given.folder, given.samples)):
        layer = posed.layer
        if wanted and index not in wanted:
            continue
        resolvent = Resolvent(posed.metric, posed.weight, prod(layer.kernel))
        for kind in (SPATIAL, CHANNEL):
            for share in SHARES:
                errors = []
                for form in split_forms(layer, kind, share * layer.n * layer.m, shares=PARTS):
                    effort = "standard" if form.pattern == NONE else "brief"
                    fitted = decompose(posed, form, effort=effort, resolvent=resolvent)
                    errors.append(judge.error(expand(layer, fitted)))
                shape = "x".join(map(str, layer.shape))
                cells = " | ".join(f"{error:.5f}" for error in errors)
                print(f"| {shape} | {kind} | {share:.1%} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
