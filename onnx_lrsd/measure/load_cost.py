"""Time and memory that it takes to open a model, each measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from onnx_lrsd.errors import VerificationError
from onnx_lrsd.facts import LoadCost
from onnx_lrsd.graph.model import Model, save

_STARTS = 3
"""Processes started; the median counts."""
CODE = """
import json, sys, time
from onnx_lrsd.measure.load_cost import peak_memory
from onnx_lrsd.runtime.session import open_file
start = time.perf_counter()
session = open_file(sys.argv[1])
print(json.dumps([time.perf_counter() - start, peak_memory()]))
"""


def opening_cost(model: Model) -> LoadCost:
    """Median seconds of opening ``model`` from its file, and peak memory of the process that does so.

    Raises VerificationError where the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        found = [_once(path) for _ in range(_STARTS)]
    return LoadCost(median(x.seconds for x in found), round(median(x.peak_bytes for x in found)))


def _once(path: Path) -> LoadCost:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise VerificationError(f"The model could not be opened by itself ({said[0]}): please report this.")
    return LoadCost(*json.loads(done.stdout.splitlines()[-1]))


def peak_memory() -> int:
    """Most bytes of memory that this process has held; 0 where the system does not tell.

    On Linux a child process inherits its parent's peak in getrusage, so /proc is read instead.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):  # not Linux
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
