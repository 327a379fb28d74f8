"""Any model at all through the whole tool: an optimised model that holds what was promised, or one sentence.

    python -m benchmarks corpus [FOLDER_OR_MODEL...] [--ratio R] [--timeout S] [--target T] [--filled]
    python -m benchmarks corpus FOLDER_OR_MODEL... --engines [--ratio R] [--timeout S]

Without arguments: the models that the installed onnx package ships with its backend tests. Each runs
in a process of its own, so that a crash or a hang is a row of the table, on random data of the shapes
it takes, or on the inputs stored beside it where it does not run on those. A row is a failure when
anything but an LrsdError was raised, or the result does not pass onnx.checker where the original does,
has another interface, does not run, or is larger or slower. With --filled, weights that
ConstantOfShape makes are random numbers in the file instead, as those of a trained model would be.
Exits 1 if there was a failure.

With --engines TensorRT's own parser and builder judge what --target tensorrt gives, for which the extra
tensorrt must be installed; TensorRT-RTX builds engines ahead of time on a machine without a GPU. A model is
parsed and built as it is, optimised, and parsed and built again. A row is a failure when TensorRT parsed or
built the model before and does not after.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

import onnx_lrsd
from benchmarks.options import heading
from onnx_lrsd.data.made_up import GUESSES, random_samples
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.graph.model import Model, check, load
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.runtime.session import open_session
from onnx_lrsd.targets import TARGETS
from onnx_lrsd.targets.trtexec import open_shapes

OPTIONS = ()
ROOT = Path(__file__).parent.parent
SHIPPED = Path(onnx.__file__).parent / "backend" / "test" / "data"
SAMPLES = 20
FAILED, REFUSED = "FAILED", "refused before"


def models(given: list[Path]) -> Iterator[Path]:
    """The model files meant by ``given``."""
    for path in given:
        yield from sorted(path.rglob("*.onnx")) if path.is_dir() else [path]


def samples_for(model: Model, path: Path) -> Samples:
    """Random samples the model runs on, or those stored beside it."""
    inputs = inputs_of(model.proto)
    session = open_session(model.proto, folder=model.folder)
    problem: LrsdError | None = None
    for size in GUESSES:
        for fill in (1, 0):
            samples = random_samples(inputs, SAMPLES, size=size, fill=fill)
            try:
                session.run(next(samples.batches(1)))
            except LrsdError as error:
                problem = problem or error
                continue
            return samples
    stored = sorted(path.parent.glob("test_data_set_*"))
    if not stored and problem is not None:
        raise problem
    feeds = [
        {
            spec.name: numpy_helper.to_array(onnx.load_tensor(str(folder / f"input_{index}.pb")))
            for index, spec in enumerate(inputs)
        }
        for folder in stored
    ]
    return read_samples(feeds * SAMPLES, inputs)


def filled(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with random initializers in place of ConstantOfShape nodes, scaled by their inputs."""
    rng = np.random.default_rng(0)
    known = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in list(proto.graph.node):
        if node.op_type == "ConstantOfShape" and node.input[0] in known:
            shape = tuple(numpy_helper.to_array(known[node.input[0]]).astype(int))
            scale = 1 / np.sqrt(max(np.prod(shape[1:]), 1)) if len(shape) > 1 else 0.1
            values = (1.0 if len(shape) == 1 else 0.0) + scale * rng.standard_normal(shape)
            proto.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
            proto.graph.node.remove(node)
    return proto


def verdict(path: Path, ratio: float, fill: bool, target: str) -> str:
    """What came out, as the cells of a row."""
    with tempfile.TemporaryDirectory() as folder:
        if fill:
            proto = filled(onnx.load(path))
            path = Path(folder) / path.name
            onnx.save(proto, path)
        try:
            source = load(path)
            output = Path(folder) / "out.onnx"
            samples = samples_for(source, path)
            _, report, _ = onnx_lrsd.optimize(path, samples, ratio=ratio, output=output, target=target)
            result = load(output)
            check(result, source)
        except LrsdError as error:
            return f"a sentence | {error} | | | |"
        except Exception as error:  # this is what is looked for
            traceback.print_exc()
            return f"{FAILED} | {type(error).__name__}: {' '.join(str(error).split())} | | | |"
        found = report.verification
        assert found is not None
        faults = [f"other {end}s" for end in ("input", "output") if ends(source, end) != ends(result, end)]
        faults += ["larger"] if found.after.bytes > found.before.bytes else []
        split = sum(not layer.left for layer in report.layers)
        # The original that is handed back can only seem to be slower than itself.
        timed = split and TARGETS[target].timed_here
        faults += ["slower"] if timed and found.latency_interval and found.latency_interval[1] < 1 else []
        worst = max((output.relative_error for output in found.outputs), default=0.0)
        said = f"{split} of {len(report.layers)} layers rewritten" if split else report.warnings[-1:]
        said = "; ".join([*faults, *([said] if isinstance(said, str) else said)])
        return (
            f"{FAILED if faults else 'a model'} | {said} "
            f"| {found.before.macs / max(found.after.macs, 1):.2f} x "
            f"| {found.before.bytes / found.after.bytes:.2f} x | {found.latency_ratio:.2f} x | {worst:.1e}"
        )


def ends(model: Model, end: str) -> list[str]:
    """What the model must be fed, or its outputs as the file declares them."""
    return list(map(str, inputs_of(model.proto) if end == "input" else model.proto.graph.output))


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


def verdict_of_engine(path: Path, ratio: float) -> str:
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


def rows(paths: Iterable[Path], timeout: float, options: Sequence[str]) -> Iterator[str]:
    """Every model in a process of its own: the verdict of it, and the counts at the end.

    Raises SystemExit with 1 behind the last row if there was a failure.
    """
    counts: Counter[str] = Counter()
    for path in paths:
        command = [sys.executable, "-m", "benchmarks", "corpus", str(path.resolve()), "--here", *options]
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT
            )
            said = run.stdout.strip().splitlines()
            row = said[-1] if said else f"{FAILED} | exit status {run.returncode} | | | |"
            if run.returncode or FAILED in row:
                sys.stderr.write(run.stderr)
        except subprocess.TimeoutExpired:
            row = f"{FAILED} | not done after {timeout:g} s | | | |"
        counts[row.split(" | ")[0]] += 1
        name = path.stem if path.stem != "model" else path.parent.name
        yield f"| {name} | {row} |"
    yield f"\n{', '.join(f'{count} x {kind}' for kind, count in counts.items())}."
    if counts[FAILED]:
        raise SystemExit(1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("models", nargs="*", type=Path, default=[SHIPPED])
    parser.add_argument("--ratio", type=float, default=1.3)
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--target", choices=list(TARGETS), default="onnxruntime")
    parser.add_argument("--filled", action="store_true")
    parser.add_argument("--engines", action="store_true", help="TensorRT-RTX judges")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)


def run(given: argparse.Namespace) -> None:
    """Print a markdown row for every model."""
    if given.here:
        if given.engines:
            print(verdict_of_engine(given.models[0], given.ratio))
        else:
            print(verdict(given.models[0], given.ratio, given.filled, given.target))
        return
    if given.engines and given.filled:
        raise SystemExit("--engines takes models as they are: leave out --filled")
    options = ["--ratio", str(given.ratio), "--target", given.target]
    options += ["--filled"] if given.filled else []
    options += ["--engines"] if given.engines else []
    columns: tuple[str, ...] = "MACs", "bytes", "latency", "output error"
    if given.engines:
        columns = "MACs", "engine before, MB", "after"
    print(heading("model", "came out", "what", *columns))
    for row in rows(models(given.models), given.timeout, options):
        print(row, flush=True)
