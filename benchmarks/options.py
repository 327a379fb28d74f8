"""Options that several studies have, as parents of their parsers, and the heading of a markdown table."""

from __future__ import annotations

import argparse
from pathlib import Path

FOLDERS, LIMIT, JSON = (argparse.ArgumentParser(add_help=False) for _ in range(3))
FOLDERS.add_argument(
    "folders",
    nargs="+",
    type=Path,
    metavar="FOLDER",
    help="a prepared model: model.onnx, calib.npz, eval.npz with labels, and about.json "
    'with {"score": "spearman"} where rows 2i and 2i+1 are a pair of sentences, by the output that it names',
)
LIMIT.add_argument("--samples", type=int, metavar="N", help="calibration samples at most")
JSON.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")


def heading(*titles: str) -> str:
    """The two lines that head a table."""
    return f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}"


def comma_separated(text: str) -> list[float]:
    """Numbers with commas between them."""
    return [float(part) for part in text.split(",")]
