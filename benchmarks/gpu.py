"""Everything that a GPU does here, beside the CPU: solver, curves and fits, calibration and verification.

    python -m benchmarks gpu [--wheels FOLDER] [--network vgg16 | --folder FOLDER] [--samples 200]
                             [--size 4096] [--cpu-only] [--json FILE]

In this order, each row printed as soon as it is there: the solver's tests on CuPy's arrays; calibration
and verification in ONNX Runtime of a published network (its weights are generated, see
models/published.py), or of model.onnx and calib.npz in --folder; error curves and one fit of each of its
layers; one problem of ``size`` x ``size`` at keep 30 % (a planted spectrum, inputs of decaying variance)
beside the published methods, and torch.linalg.svd where PyTorch is installed. Needs CuPy and a CUDA
device, and for the rows of ONNX Runtime onnxruntime-gpu.

A machine without network: ``--wheels`` installs from a folder, filled elsewhere by ``pip download -d FOLDER
".[gpu,dev]"``. ``--cpu-only`` runs the same on the CPU alone, to try the script.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.options import JSON, heading
from benchmarks.reference.oats import oats
from benchmarks.reference.patterns import largest, largest_in_rows
from benchmarks.reference.three_basil import three_basil
from onnx_lrsd import arrays
from onnx_lrsd.data.samples import read_samples
from onnx_lrsd.errors import DeviceError
from onnx_lrsd.fit.calibrate import calibrate
from onnx_lrsd.graph.model import load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.compare import compare
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.runtime.session import inference_device
from onnx_lrsd.solver.admm import low_rank_plus_sparse
from onnx_lrsd.solver.curve import errors
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.problem import Metric, pose
from onnx_lrsd.targets import TARGETS
from onnx_lrsd.types import KINDS, UNSTRUCTURED, Array, Pattern

OPTIONS = (JSON,)
KEEP, SHARE = 0.3, 0.3
TEST_PACKAGES = ("pytest", "pytest-xdist", "array-api-strict", "scipy", "hypothesis")


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
            rows.append(entry(f"{size} x {size}", name, device, timed(method, device)))
    return rows


def _torch_svd(weight: np.ndarray, device: str) -> Any:
    torch = importlib.import_module("torch")
    found = torch.linalg.svd(torch.asarray(weight, dtype=torch.float32, device=device), full_matrices=False)
    return found[1].cpu()


def solver_tests() -> list[dict[str, Any]]:
    """Whether the solver's tests pass on CuPy's arrays; they compare with NumPy or with what is exact."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-n0", "-k", "cupy", str(root / "tests" / "test_sparse.py")]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    said = "passed" if done.returncode == 0 else "FAILED"
    if said == "FAILED":
        print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr)
    return [entry("tests/test_sparse.py", said, "cuda", time.perf_counter() - start)]


def made(network: str, samples: int, folder: Path) -> None:
    """Write ``network`` with generated weights and natural images into ``folder``, as --folder has them."""
    sys.path.append(str(Path(__file__).parents[1] / "models"))
    published = importlib.import_module("published")
    net = published.NETWORKS[network]()
    onnx.save(net.model(published.generated(net)), folder / "model.onnx")
    images = published.natural_images(samples, net.size, np.random.default_rng(1))
    np.savez(folder / "calib.npz", **{published.INPUT: images})


def whole_model(folder: Path, name: str, samples: int, devices: list[str]) -> list[dict[str, Any]]:
    """Seconds of all error curves, of one fit of every layer, and of calibration and verification."""
    model = load(folder / "model.onnx")
    graph = model.graph()
    weight_of = partial(read_weight, graph)
    given = read_samples(folder / "calib.npz", inputs_of(model.proto), limit=samples)
    found = find_layers(graph)[0]
    rows, known = [], None
    for device in devices:
        try:
            placed = replace(model, device=inference_device(device))
        except DeviceError as error:
            print(f"{error} Rows of ONNX Runtime on the GPU are left out.", file=sys.stderr)
            continue
        start = time.perf_counter()
        known = calibrate(placed, found, given, weight_of)
        rows.append(entry(name, f"calibration, {given.count} samples", device, time.perf_counter() - start))
        check = partial(compare, placed, placed, given, latency=False)
        rows.append(entry(name, f"verification, {given.count} samples", device, timed(check, device)))
    known = known or calibrate(model, found, given, weight_of)
    offered = {layer.output: TARGETS["onnxruntime"].forms(layer, KINDS) for layer in known.layers}
    layers = [layer for layer in known.layers if offered[layer.output]]
    for device in devices:
        posed = {x.output: pose(x, *weight_of(x), known.moments[x.output], device) for x in layers}
        curves = partial(_each, [partial(errors, posed[x.output], offered[x.output]) for x in layers])
        middle = {x.output: offered[x.output][len(offered[x.output]) // 2] for x in layers}
        fits = partial(_each, [partial(decompose, posed[x.output], middle[x.output]) for x in layers])
        for what, work in (("error curves", curves), ("fits", fits)):
            rows.append(entry(name, f"{what}, {len(layers)} layers", device, timed(work, device)))
    return rows


def entry(problem: str, method: str, device: str, seconds: float) -> dict[str, Any]:
    """One row, printed as soon as it is there."""
    found = {"problem": problem, "method": method, "device": device, "s": seconds}
    print(row(found), flush=True)
    return found


def _each(works: list[Callable[[], Array]]) -> None:
    for work in works:
        work()


def row(found: dict[str, Any]) -> str:
    """One row of the table."""
    return f"| {found['problem']} | {found['method']} | {found['device']} | {found['s']:.2f} |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument(
        "--wheels", type=Path, metavar="FOLDER", help="install from here first, without network"
    )
    parser.add_argument("--network", default="vgg16", help="of models/published.py; 'none' leaves it out")
    parser.add_argument("--folder", type=Path, help="a prepared model in place of the network")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--cpu-only", action="store_true")


def installed(wheels: Path) -> None:
    """Install what the GPU needs from the folder ``wheels`` into this environment."""
    packages = [
        "cupy-cuda13x[ctk]",
        "onnxruntime-gpu[cuda,cudnn]",
        "pytest",
        "pytest-xdist",
        "array-api-strict",
    ]
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(wheels), *packages]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f'{wheels} lacks a wheel: fill it with pip download -d {wheels} ".[gpu,dev]" elsewhere.')


def run(given: argparse.Namespace) -> None:
    """Print the table."""
    if given.wheels is not None:
        installed(given.wheels)
    if not given.cpu_only and arrays.cupy() is None:
        sys.exit('CuPy finds no CUDA device: pip install "onnx-lrsd[gpu]" on a machine with one.')
    devices = ["cpu"] if given.cpu_only else ["cuda", "cpu"]
    print(f"Python {platform.python_version()}, numpy {np.__version__}", file=sys.stderr)
    print(heading("problem", "method", "device", "s"))
    rows = [] if given.cpu_only else solver_tests()
    if given.folder is not None:
        rows += whole_model(given.folder, given.folder.name, given.samples, devices)
    elif given.network != "none":
        with tempfile.TemporaryDirectory() as folder:
            made(given.network, given.samples, Path(folder))
            rows += whole_model(Path(folder), given.network, given.samples, devices)
    rows += one_problem(given.size, devices)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
