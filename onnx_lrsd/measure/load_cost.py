"""What it takes to open a model: measured in processes of their own, where nothing else is in memory."""

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

STARTS = 3
CODE = """
import json, sys, time
from onnx_lrsd.measure.load_cost import peak_memory
from onnx_lrsd.runtime.session import open_file
start = time.perf_counter()
session = open_file(sys.argv[1])
print(json.dumps([time.perf_counter() - start, peak_memory()]))
"""


def loading(model: Model) -> LoadCost:
    """Median seconds of opening ``model`` from its file, and peak memory of the process that does so.

    Raises VerificationError where the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        found = [_once(path) for _ in range(STARTS)]
    return LoadCost(median(s for s, _ in found), round(median(b for _, b in found)))


def _once(path: Path) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise VerificationError(f"The model could not be opened by itself ({said[0]}): please report this.")
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def peak_memory() -> int:
    """Most bytes of memory that this process has held; 0 where the system does not tell.

    Linux hands getrusage's figure on from a parent to what it starts, so that its own is read instead.
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
