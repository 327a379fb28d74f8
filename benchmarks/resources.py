"""Where time and memory go: in each stage of a run, and as layers, their number, samples and processes grow.

    python -m benchmarks resources stages FOLDER... [--ratio R] [--target T] [--samples N] [--json FILE]
    python -m benchmarks resources stages FOLDER --profile FILE
    python -m benchmarks resources growth [--sizes 512,768,1024] [--counts 4,8,16] [--samples 64,128]
                                          [--jobs 1,2] [--memory SIZE] [--json FILE]

Seconds of the processor count all threads and hardly depend on what else the machine does; set
OPENBLAS_NUM_THREADS=1, or threads that wait for each other count as well.

*stages*: a FOLDER has model.onnx, calib.npz, and eval.npz if there is one. Without --ratio the promise is the
default one. With --profile the calls are recorded by cProfile, for one folder, in seconds of the processor;
it makes Python look slower than it is.

*growth*: each row is one run of the whole tool, in a process of its own, on a chain of square matrices whose
spectra fall as those of trained layers (results/published.md), with a Relu behind each. The target is
tensorrt, where nothing is timed on the way. One of the numbers varies, the others are the first ones given.
Seconds are those of all processes and without the check of the result; memory is the peak of the main
process, less what it held before. Powers are slopes of a straight line through the logarithms. The projection
for a model of 7 billion parameters goes far beyond what was measured: it is no measurement.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

import onnx_lrsd
from benchmarks.options import FOLDERS, JSON, LIMIT, comma_separated, heading
from onnx_lrsd.measure.load_cost import peak_memory
from onnx_lrsd.run import Journal

OPTIONS = ()
STAGES = ("load", "calibrate", "decompose", "plan", "verify")
TO_MB = 2**10 if sys.platform == "linux" else 2**20
"""The system's unit of the peak of memory, in MB."""
AXES = {"size": "sizes", "count": "counts", "samples": "samples", "jobs": "jobs"}
LARGE_SIZE, LARGE_COUNT = 5590, 224
"""A model of 7 billion parameters: 32 blocks of 7 matrices, of 31 million numbers each on average."""
RATIO = 1.5
FALL = 0.12, 2.5
"""a and b of the singular values i^-a exp(-b i / size) of trained dense layers (results/published.md)."""


class Clocks:
    """Seconds of the processor by stage, taken where the journal takes those by the clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._plain = Journal.clock

    @contextmanager
    def clock(self, journal: Journal, stage: str) -> Iterator[None]:
        """In place of ``Journal.clock``: a stage within another counts for itself."""
        start, before = time.process_time(), sum(self.seconds.values())
        with self._plain(journal, stage):
            yield
        spent = time.process_time() - start - (sum(self.seconds.values()) - before)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


def run_by_stage(folder: Path, **options: Any) -> dict[str, Any]:
    """One run of the model in ``folder``, by stage, with what it gained and what it cost."""
    clocks, evaluation = Clocks(), folder / "eval.npz"
    start, busy = time.perf_counter(), time.process_time()
    with patch.object(Journal, "clock", lambda journal, stage: clocks.clock(journal, stage)):
        report = onnx_lrsd.optimize(
            folder / "model.onnx",
            folder / "calib.npz",
            evaluation=evaluation if evaluation.exists() else None,
            **options,
        ).report
    found = report.verification
    assert found is not None
    return {
        "model": folder.name,
        "options": options,
        "processor": clocks.seconds,
        "clock": dict(report.seconds),
        "processor_total": time.process_time() - busy,
        "clock_total": time.perf_counter() - start,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / TO_MB,
        "macs": found.before.macs / max(found.after.macs, 1),
        "bytes": found.before.bytes / found.after.bytes,
        "error": found.error,
    }


def run_stages(given: argparse.Namespace) -> None:
    """Print a row for each folder."""
    asked = {name: getattr(given, name) for name in ("ratio", "target", "samples", "time")}
    options = {name: value for name, value in asked.items() if value is not None}
    if given.profile is not None:
        profile = cProfile.Profile(time.process_time)
        profile.runcall(run_by_stage, given.folders[0], **options)
        profile.dump_stats(given.profile)
        return
    print(heading("model", *STAGES, "all", "by the clock", "peak MB", "MACs", "bytes", "output error"))
    rows = []
    for folder in given.folders:
        row = run_by_stage(folder, **options)
        rows.append(row)
        stages = [f"{row['processor'].get(stage, 0.0):.1f}" for stage in STAGES]
        whole = f"{row['processor_total']:.1f}", f"{row['clock_total']:.1f}", f"{row['peak_mb']:.0f}"
        gained = f"{row['macs']:.3f} x", f"{row['bytes']:.3f} x", f"{row['error']:.5f}"
        print(f"| {' | '.join([row['model'], *stages, *whole, *gained])} |", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def trained_like(size: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """A weight (size, size) with the spectrum of a trained one, which keeps the variance behind a Relu."""
    left, right = (np.linalg.qr(rng.standard_normal((size, size), np.float32))[0] for _ in range(2))
    i = np.arange(1, size + 1)
    values = i ** -FALL[0] * np.exp(-FALL[1] * i / size)
    values *= np.sqrt(2 * size / np.sum(values**2))
    return np.ascontiguousarray((left * values.astype(np.float32)) @ right.T)


def chain(size: int, count: int) -> onnx.ModelProto:
    """So many matrices (size, size), each with a Relu behind it but the last."""
    rng = np.random.default_rng(0)
    names = ["x", *(f"h{index}" for index in range(count - 1)), "y"]
    nodes, weights, last = [], [], "x"
    for index, name in enumerate(names[1:]):
        weights.append(numpy_helper.from_array(trained_like(size, rng), f"w{index}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [name], name=f"layer{index}"))
        if name != "y":
            nodes.append(helper.make_node("Relu", [name], [f"r{index}"]))
            last = f"r{index}"
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 16, size]) for name in "xy"]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run_of_size(size: int, count: int, samples: int, jobs: int, memory: str | None = None) -> dict[str, Any]:
    """One run, of a model with external data where memory is limited; seconds of the processor and bytes."""
    rng = np.random.default_rng(1)
    low = rng.standard_normal((samples * 5 // 4, 16, size // 4)) @ rng.standard_normal((size // 4, size))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(chain(size, count), path, save_as_external_data=memory is not None)
        clocks, before = Clocks(), peak_memory()
        with patch.object(Journal, "clock", lambda journal, stage: clocks.clock(journal, stage)):
            onnx_lrsd.optimize(
                path, {"x": low.astype(np.float32)}, target="tensorrt", ratio=RATIO, jobs=jobs, memory=memory
            )
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = sum(clocks.seconds.get(stage, 0.0) for stage in STAGES if stage != "verify")
    return {
        "size": size,
        "count": count,
        "samples": samples,
        "jobs": jobs,
        "seconds": own + others.ru_utime + others.ru_stime,
        "bytes": peak_memory() - before,
    }


def exponent(rows: list[dict[str, Any]], axis: str, what: str) -> float:
    """The power of ``axis`` that ``what`` grows with."""
    x, y = (np.log([row[key] for row in rows]) for key in (axis, what))
    return float(np.polyfit(x, y, 1)[0])


def projected_seconds(rows: dict[str, list[dict[str, Any]]]) -> float:
    """Seconds for 7 billion parameters, by the powers of size and number of layers."""
    base = rows["size"][-1]
    by_size = (LARGE_SIZE / base["size"]) ** exponent(rows["size"], "size", "seconds")
    by_count = (LARGE_COUNT / base["count"]) ** exponent(rows["count"], "count", "seconds")
    return float(base["seconds"] * by_size * by_count)


def bytes_a_parameter(rows: dict[str, list[dict[str, Any]]]) -> float:
    """By how much memory grows with each parameter, beside what any run takes; a least-squares line."""
    points = [*rows["size"], *rows["count"]]
    parameters = [row["size"] ** 2 * row["count"] for row in points]
    return float(np.polyfit(parameters, [row["bytes"] for row in points], 1)[0])


def run_growth(given: argparse.Namespace) -> None:
    """Print a row for each run, the exponents and the projection."""
    if given.one is not None:
        print(json.dumps(run_of_size(**json.loads(given.one))))
        return
    values = {axis: [int(value) for value in getattr(given, option)] for axis, option in AXES.items()}
    first = {axis: found[0] for axis, found in values.items()}
    rows: dict[str, list[dict[str, Any]]] = {}
    known: dict[str, dict[str, Any]] = {}
    print(heading("layer size", "layers", "samples", "processes", "processor seconds", "memory, MB"))
    for axis, found in values.items():
        for value in found:
            what = json.dumps({**first, axis: value, "memory": given.memory})
            if what not in known:
                command = [sys.executable, "-m", "benchmarks", "resources", "growth", "--one", what]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
                known[what] = json.loads(done.stdout.splitlines()[-1])
                row = known[what]
                cells = [row["size"], row["count"], row["samples"], row["jobs"]]
                print(
                    f"| {' | '.join(map(str, cells))} | {row['seconds']:.1f} | {row['bytes'] / 1e6:.0f} |",
                    flush=True,
                )
            rows.setdefault(axis, []).append(known[what])
    print(f"\n{heading('grows with', 'seconds, power', 'memory, power')}")
    for axis in ("size", "count", "samples"):
        if len(rows[axis]) > 1:
            powers = [exponent(rows[axis], axis, what) for what in ("seconds", "bytes")]
            print(f"| {axis} | {powers[0]:.2f} | {powers[1]:.2f} |")
    hours, each = projected_seconds(rows) / 3600, bytes_a_parameter(rows)
    gigabytes = each * LARGE_SIZE**2 * LARGE_COUNT / 1e9
    print(
        f"\nMemory grows by {each:.1f} bytes with each parameter. A projection, not a measurement: 7 billion "
        f"parameters ({LARGE_COUNT} matrices of {LARGE_SIZE} x {LARGE_SIZE}) would take {hours:.0f} hours of "
        f"one core and {gigabytes:.0f} GB."
    )
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two parts and what each takes."""
    parts = parser.add_subparsers(required=True)
    stages = parts.add_parser("stages", parents=[FOLDERS, LIMIT, JSON], help="of runs of real models")
    stages.add_argument("--ratio", type=float, metavar="R", help="the default promise without it")
    stages.add_argument("--target", metavar="T", help="onnxruntime (default), size or tensorrt")
    stages.add_argument("--time", metavar="T", help="what a run may take")
    stages.add_argument("--profile", type=Path, metavar="FILE", help="record the calls of the first folder")
    stages.set_defaults(part=run_stages)
    growth = parts.add_parser("growth", parents=[JSON], help="with size, layers, samples and processes")
    growth.add_argument("--sizes", type=comma_separated, default=[512, 768, 1024])
    growth.add_argument("--counts", type=comma_separated, default=[4, 8, 16])
    growth.add_argument("--samples", type=comma_separated, default=[64, 128])
    growth.add_argument("--jobs", type=comma_separated, default=[1, 2])
    growth.add_argument("--memory", metavar="SIZE", help="what a run may hold")
    growth.add_argument("--one", help=argparse.SUPPRESS)
    growth.set_defaults(part=run_growth)


def run(given: argparse.Namespace) -> None:
    """Run one of the two."""
    given.part(given)
