"""What people run beside this tool: before it and after it, on the same model and data.

    python -m benchmarks next_tools FOLDER... [--ratio R] [--samples N] [--tools NAMES] [--json FILE]

ONNX Runtime's quantisers, float16 converter and transformer optimiser, onnxslim and onnxsim: each alone,
behind onnx-lrsd, and in front of it; at last whether Polygraphy runs and reads what onnx-lrsd wrote. What is
not installed has a row that says so: `pip install onnxslim onnxsim onnxconverter-common polygraphy`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import onnx

import onnx_lrsd
from benchmarks import other_tools
from benchmarks.options import FOLDERS, JSON, LIMIT, heading
from benchmarks.prepared import TOP1, Prepared, read
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.facts import Verification
from onnx_lrsd.graph.model import Model, in_memory, load
from onnx_lrsd.measure.compare import compare
from onnx_lrsd.runtime.quantiser import quantization

OPTIONS = (FOLDERS, LIMIT, JSON)
OURS = "onnx-lrsd"
Tool = Callable[[onnx.ModelProto, Samples, Path], onnx.ModelProto]
"""What it makes of a model with calibration samples; the folder is for files of its own."""


def quantised(
    quantise: Callable[..., onnx.ModelProto],
) -> Tool:
    """One of ONNX Runtime's quantisers, behind the folding of constants and normalisations that it wants."""

    def run(proto: onnx.ModelProto, seen: Samples, folder: Path) -> onnx.ModelProto:
        with quantization() as ort:
            return quantise(ort, other_tools.folded(Model(proto)).proto, seen, folder)

    return run


def onnxruntime_float16(proto: onnx.ModelProto, seen: Samples, folder: Path) -> onnx.ModelProto:
    """Half precision by ONNX Runtime's converter, inputs and outputs as they were."""
    found: onnx.ModelProto = import_module("onnxruntime.transformers.float16").convert_float_to_float16(
        proto, keep_io_types=True
    )
    return found


def common_float16(proto: onnx.ModelProto, seen: Samples, folder: Path) -> onnx.ModelProto:
    """The same by onnxconverter-common."""
    found: onnx.ModelProto = import_module("onnxconverter_common.float16").convert_float_to_float16(
        proto, keep_io_types=True
    )
    return found


def transformer_optimizer(proto: onnx.ModelProto, seen: Samples, folder: Path) -> onnx.ModelProto:
    """Attention, normalisations and GELU fused as for BERT, by the fusions that need no PyTorch."""
    onnx.save(proto, folder / "before.onnx")
    optimizer = import_module("onnxruntime.transformers.optimizer")
    found: onnx.ModelProto = optimizer.optimize_model(
        str(folder / "before.onnx"), model_type="bert", opt_level=0
    ).model
    return found


def slim(proto: onnx.ModelProto, seen: Samples, folder: Path) -> onnx.ModelProto:
    """By onnxslim."""
    found: onnx.ModelProto = import_module("onnxslim").slim(proto)
    return found


def simplify(proto: onnx.ModelProto, seen: Samples, folder: Path) -> onnx.ModelProto:
    """By onnxsim."""
    found: onnx.ModelProto = import_module("onnxsim").simplify(proto)[0]
    return found


TOOLS: Mapping[str, Tool] = {
    "onnxslim": slim,
    "onnxsim": simplify,
    "quantize_dynamic": quantised(other_tools.dynamic_int8),
    "quantize_static": quantised(other_tools.static_int8),
    "float16, onnxruntime": onnxruntime_float16,
    "float16, onnxconverter-common": common_float16,
    "transformer optimizer": transformer_optimizer,
}


@dataclass(frozen=True)
class Row:
    """What came of a model after ``steps``; ratios are of the original to it, ``says`` is a remark."""

    model: str
    steps: str
    says: str = ""
    bytes: float | None = None
    macs: float | None = None
    latency: float | None = None
    interval: tuple[float, float] | None = None
    after: float | None = None
    error: float | None = None

    def line(self) -> str:
        """Its line in the table."""
        if self.bytes is None or self.macs is None or self.after is None or self.error is None:
            return f"| {self.model} | {self.steps} | | | | | | {self.says} |"
        speed = "" if self.latency is None else f"{self.latency:.2f} x"
        if self.interval is not None:
            speed += " ({:.2f} to {:.2f})".format(*self.interval)
        cells = (
            f"{self.bytes:.2f} x | {self.macs:.2f} x | {speed} | {100 * self.after:.2f} | {self.error:.2g}"
        )
        return f"| {self.model} | {self.steps} | {cells} | {self.says} |"


def judged(case: Prepared, steps: str, model: Model, says: str = "") -> Row:
    """The row of a model; what does not run, or has other inputs and outputs, says so."""
    try:
        found = compare(case.source, model, case.evaluation)
        return of_measured(case, steps, model, found, says)
    except Exception as error:  # of other tools' models it may be anything
        return Row(case.name, steps, short(error))


def of_measured(case: Prepared, steps: str, model: Model, found: Verification, says: str) -> Row:
    """A row of what was measured."""
    counted = case.scored_by == TOP1 and found.metric is not None
    return Row(
        model=case.name,
        steps=steps,
        says=says,
        bytes=found.before.bytes / found.after.bytes,
        macs=found.before.macs / max(found.after.macs, 1),
        latency=found.latency_ratio,
        interval=found.latency_interval,
        after=found.metric.after if counted and found.metric is not None else case.score(model),
        error=found.error,
    )


def ours(case: Prepared, given: onnx.ModelProto, ratio: float, limit: int | None) -> tuple[Model, str]:
    """What onnx-lrsd makes of a model, and its last warning where nothing was gained."""
    result = onnx_lrsd.optimize(
        given,
        case.folder / "calib.npz",
        evaluation=case.evaluation,
        ratio=ratio,
        samples=limit,
    )
    promise = result.report.promise
    gained = promise is not None and promise.gained
    return result.model, "" if gained else " ".join(result.report.warnings[-1:]) or "handed back"


def short(error: Exception) -> str:
    """An error in one cell of a table."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:160].replace("|", "/")


def rows(case: Prepared, ratio: float, limit: int | None, names: list[str]) -> Iterator[Row]:
    """The original, ours, and each tool alone, behind ours and in front of it."""
    yield Row(case.name, "as it is", "", 1.0, 1.0, 1.0, None, case.score_before, 0.0)
    original = in_memory(case.source)
    smaller, said = ours(case, original, ratio, limit)
    yield judged(case, OURS, smaller, said)
    for name in names:
        try:
            with tempfile.TemporaryDirectory() as folder:
                alone = load(TOOLS[name](copy(original), case.calibration, Path(folder)))
        except Exception as error:  # each raises what it likes
            yield Row(case.name, name, short(error))
            continue
        yield judged(case, name, alone)
        try:
            with tempfile.TemporaryDirectory() as folder:
                after = load(TOOLS[name](copy(in_memory(smaller)), case.calibration, Path(folder)))
            yield judged(case, f"{OURS}, {name}", after)
        except Exception as error:
            yield Row(case.name, f"{OURS}, {name}", short(error))
        try:
            yield judged(case, f"{name}, {OURS}", *ours(case, in_memory(alone), ratio, limit))
        except Exception as error:
            yield Row(case.name, f"{name}, {OURS}", short(error))
    yield from polygraphy(case, smaller)


def copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Some tools work in place."""
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    return found


def polygraphy(case: Prepared, model: Model) -> Iterator[Row]:
    """Whether Polygraphy runs and reads a model."""
    tool = shutil.which("polygraphy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if tool is None:
        yield Row(case.name, f"{OURS}, polygraphy", "not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(in_memory(model), path)
        for command in (["run", str(path), "--onnxrt"], ["inspect", "model", str(path)]):
            done = subprocess.run([tool, *command], capture_output=True, text=True, check=False)
            told = (done.stdout + done.stderr).strip().splitlines()
            fault = f"exit code {done.returncode}: {told[-1] if told else ''}"
            yield Row(
                case.name, f"{OURS}, polygraphy {command[0]}", "runs" if done.returncode == 0 else fault[:160]
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("--ratio", type=float, default=1.5)
    parser.add_argument("--tools", default=";".join(TOOLS), help="with semicolons between them")


def run(given: argparse.Namespace) -> None:
    """Print a markdown row for every model and step."""
    print(heading("model", "steps", "bytes", "MACs", "latency (95 %)", "score", "output error", ""))
    found = []
    for folder in given.folders:
        for row in rows(read(folder, given.samples), given.ratio, given.samples, given.tools.split(";")):
            found.append(row)
            print(row.line(), flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
