"""The solver on a GPU beside the CPU, and beside published methods and a plain SVD on the same GPU.

    python -m benchmarks gpu [--size 4096] [--folder FOLDER [--samples N]] [--cpu-only] [--json FILE]

One problem of ``size`` x ``size`` at keep 30 % (a planted spectrum, inputs of decaying variance), and, with a
FOLDER that holds model.onnx and calib.npz, every layer of that model: its error curves and one fit each.
Needs CuPy and a CUDA device; PyTorch's SVD is timed where PyTorch is installed. ``--cpu-only`` runs the same
on the CPU alone, to try the script.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.options import JSON, heading
from benchmarks.reference.oats import oats
from benchmarks.reference.patterns import largest, largest_in_rows
from benchmarks.reference.three_basil import three_basil
from onnx_lrsd import arrays
from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.fit.calibrate import calibrate
from onnx_lrsd.graph.model import load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.solver.admm import low_rank_plus_sparse
from onnx_lrsd.solver.curve import errors
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.problem import Metric, pose
from onnx_lrsd.targets import TARGETS
from onnx_lrsd.types import KINDS, UNSTRUCTURED, Array, Pattern

OPTIONS = (JSON,)
KEEP, SHARE = 0.3, 0.3


def problem(size: int) -> tuple[np.ndarray, np.ndarray]:
    """W and the second moment C (size, size) of its inputs, float64."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((size, size // 8)) @ rng.standard_normal((size // 8, size)) / size**0.5
    weight += rng.standard_normal((size, size)) * (rng.random((size, size)) < 0.1)
    rows = rng.standard_normal((2 * size, size)) * np.geomspace(1, 0.05, size)
    rows = np.maximum(rows + 0.5 * rows[:, rng.permutation(size)], 0)
    rows -= rows.mean(axis=0)
    return weight, rows.T @ rows / len(rows)


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of ``work``, the device idle before and after; on a GPU the second of two runs."""
    module = arrays.cupy() if device == "cuda" else None
    if module is not None:
        work()
        module.cuda.Device().synchronize()
    start = time.perf_counter()
    work()
    if module is not None:
        module.cuda.Device().synchronize()
    return time.perf_counter() - start


def one_problem(size: int, devices: list[str]) -> list[dict[str, Any]]:
    """Seconds of every method on one square problem."""
    weight, second = problem(size)
    rank = round(SHARE * KEEP * size / 2)
    entries = int(KEEP * size * size) - 2 * rank * size
    damping = 0.01 * float(np.trace(second)) / size
    rows = []
    for device in devices:
        w, c = arrays.to_device(weight, device), arrays.to_device(second, device)
        select = partial(largest, density=entries / size**2)
        methods: dict[str, Callable[[], Any]] = {
            "onnx-lrsd": partial(
                low_rank_plus_sparse, w, Metric(c, None, damping), rank, Pattern(UNSTRUCTURED, entries)
            ),
            "OATS": partial(
                oats, w, arrays.diagonal(c), rank, partial(largest_in_rows, density=entries / size**2)
            ),
            "3BASiL": partial(three_basil, w, c, rank, select),
            "torch.linalg.svd": partial(_torch_svd, weight, device),
        }
        for name, method in methods.items():
            if name.startswith("torch") and importlib.util.find_spec("torch") is None:
                continue
            rows.append(
                {"problem": f"{size} x {size}", "method": name, "device": device, "s": timed(method, device)}
            )
            print(row(rows[-1]), flush=True)
    return rows


def _torch_svd(weight: np.ndarray, device: str) -> Any:
    torch = importlib.import_module("torch")
    found = torch.linalg.svd(torch.asarray(weight, dtype=torch.float32, device=device), full_matrices=False)
    return found[1].cpu()


def whole_model(folder: Path, samples: int, devices: list[str]) -> list[dict[str, Any]]:
    """Seconds of all error curves, and of one fit of every layer at about a quarter of its MACs."""
    model = load(folder / "model.onnx")
    graph = model.graph()
    weight_of = partial(read_weight, graph)
    given = read_samples(folder / "calib.npz", inputs_of(model.proto), limit=samples)
    known = calibrate(model, find_layers(graph)[0], given, weight_of)
    offered = {layer.output: TARGETS["onnxruntime"].forms(layer, KINDS) for layer in known.layers}
    layers = [layer for layer in known.layers if offered[layer.output]]
    rows = []
    for device in devices:
        posed = {x.output: pose(x, *weight_of(x), known.moments[x.output], device) for x in layers}
        curves = partial(_each, [partial(errors, posed[x.output], offered[x.output]) for x in layers])
        middle = {x.output: offered[x.output][len(offered[x.output]) // 2] for x in layers}
        fits = partial(_each, [partial(decompose, posed[x.output], middle[x.output]) for x in layers])
        for name, work in (("error curves", curves), ("fits", fits)):
            rows.append({"problem": folder.name, "method": name, "device": device, "s": timed(work, device)})
            print(row(rows[-1]), flush=True)
    return rows


def _each(works: list[Callable[[], Array]]) -> None:
    for work in works:
        work()


def row(entry: dict[str, Any]) -> str:
    """One row of the table."""
    return f"| {entry['problem']} | {entry['method']} | {entry['device']} | {entry['s']:.2f} |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--cpu-only", action="store_true")


def run(given: argparse.Namespace) -> None:
    """Print the table."""
    if not given.cpu_only and arrays.cupy() is None:
        sys.exit('CuPy finds no CUDA device: pip install "onnx-lrsd[gpu]" on a machine with one.')
    devices = ["cpu"] if given.cpu_only else ["cuda", "cpu"]
    print(f"Python {platform.python_version()}, numpy {np.__version__}", file=sys.stderr)
    print(heading("problem", "method", "device", "s"))
    rows = one_problem(given.size, devices)
    if given.folder is not None:
        rows += whole_model(given.folder, given.samples, devices)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
