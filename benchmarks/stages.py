"""Where the time of a run goes: seconds of the processor, and by the clock, of each stage.

    python -m benchmarks stages FOLDER... [--ratio R] [--target T] [--samples N] [--json FILE]
    python -m benchmarks stages FOLDER --profile FILE

A FOLDER has model.onnx, calib.npz, and eval.npz if there is one. Without --ratio the promise is the default
one. Seconds of the processor count all threads and hardly depend on what else the machine does; set
OPENBLAS_NUM_THREADS=1, or threads that wait for each other count as well. With --profile the calls are
recorded by cProfile, for one folder, in seconds of the processor; it makes Python look slower than it is.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx_lrsd
from benchmarks.options import FOLDERS, JSON, LIMIT, heading
from onnx_lrsd.run import Journal

OPTIONS = (FOLDERS, LIMIT, JSON)
STAGES = ("load", "calibrate", "decompose", "plan", "verify")
TO_MB = 2**10 if sys.platform == "linux" else 2**20
"""The system's unit of the peak of memory, in MB."""


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


def measured(folder: Path, **options: Any) -> dict[str, Any]:
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("--ratio", type=float, metavar="R", help="the default promise without it")
    parser.add_argument("--target", metavar="T", help="onnxruntime (default), size or tensorrt")
    parser.add_argument("--time", metavar="T", help="what a run may take")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="record the calls of the first folder")


def run(given: argparse.Namespace) -> None:
    """Print a row for each folder."""
    asked = {name: getattr(given, name) for name in ("ratio", "target", "samples", "time")}
    options = {name: value for name, value in asked.items() if value is not None}
    if given.profile is not None:
        profile = cProfile.Profile(time.process_time)
        profile.runcall(measured, given.folders[0], **options)
        profile.dump_stats(given.profile)
        return
    print(heading("model", *STAGES, "all", "by the clock", "peak MB", "MACs", "bytes", "output error"))
    rows = []
    for folder in given.folders:
        row = measured(folder, **options)
        rows.append(row)
        stages = [f"{row['processor'].get(stage, 0.0):.1f}" for stage in STAGES]
        whole = f"{row['processor_total']:.1f}", f"{row['clock_total']:.1f}", f"{row['peak_mb']:.0f}"
        gained = f"{row['macs']:.3f} x", f"{row['bytes']:.3f} x", f"{row['error']:.5f}"
        print(f"| {' | '.join([row['model'], *stages, *whole, *gained])} |", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
