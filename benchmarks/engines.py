"""Models that TensorRT takes are still taken after `--target tensorrt`: its own parser and builder judge.

    python -m benchmarks engines FOLDER_OR_MODEL... [--ratio R] [--timeout S]

Needs `pip install -e ".[cpu,tensorrt]"`; TensorRT-RTX builds engines ahead of time on a machine without a
GPU. Each model runs in a process of its own on random data of the shapes it takes, as in corpus: it is parsed
and built as it is, optimised, and parsed and built again. A row is a failure when TensorRT parsed
or built the model before and does not after. Exits 1 if there was a failure.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import onnx_lrsd
from benchmarks.corpus import FAILED, models, rows, samples_for
from benchmarks.options import heading
from onnx_lrsd.data.samples import Samples
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.graph.model import Model, load
from onnx_lrsd.targets.trtexec import open_shapes

OPTIONS = ()
REFUSED = "refused before"


class Taken(NamedTuple):
    """Whether TensorRT-RTX parsed a file, the bytes of the engine it built (0: none), and why it did not."""

    parsed: bool
    size: int
    why: str = ""


def build(path: Path, model: Model, samples: Samples) -> Taken:
    """Parse the file at ``path`` and build an engine for inputs like ``samples``."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return Taken(False, 0, " ".join(parser.get_error(0).desc().split()))
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    least, most = open_shapes(model, samples)
    if least:
        profile = builder.create_optimization_profile()
        for name in least:
            profile.set_shape(name, least[name], most[name], most[name])
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return Taken(True, 0, "no engine") if engine is None else Taken(True, engine.nbytes)


def verdict(path: Path, ratio: float) -> str:
    """What came out, as the cells of a row."""
    try:
        source = load(path)
        samples = samples_for(source, path)
    except LrsdError as error:
        return f"not run | {error} | | |"
    before = build(path, source, samples)
    if not before.parsed:
        return f"{REFUSED} | {before.why[:100]} | | |"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.onnx"
        try:
            model, report, _ = onnx_lrsd.optimize(
                path, samples, ratio=ratio, target="tensorrt", output=output
            )
        except LrsdError as error:
            return f"left alone | {error} | | {before.size / 1e6:.2f} |"
        after = build(output, model, samples)
    split = sum(layer.form != "dense" for layer in report.layers)
    sparse = 0 if report.engine is None else len(report.engine.sparse)
    said = f"{split} of {len(report.layers)} layers split, {sparse} weights 2:4"
    sizes = f"{before.size / 1e6:.2f} | {after.size / 1e6:.2f}"
    found = report.verification
    assert found is not None
    gained = found.before.macs / max(found.after.macs, 1)
    if not after.parsed or (before.size and not after.size):
        return f"{FAILED} | {said}; {after.why} | {gained:.2f} x | {sizes}"
    return f"{'built' if after.size else 'parsed'} | {said} | {gained:.2f} x | {sizes}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--ratio", type=float, default=1.3)
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)


def run(given: argparse.Namespace) -> None:
    """Print a markdown row for every model."""
    if given.here:
        print(verdict(given.models[0], given.ratio))
        return
    print(heading("model", "came out", "what", "MACs", "engine before, MB", "after"))
    for row in rows("engines", models(given.models), given.timeout, ["--ratio", str(given.ratio)]):
        print(row, flush=True)
