"""Mutated model files through the whole tool: a valid model or one sentence each, and the input untouched.

    python -m benchmarks mutate [--count 10000] [--first 0] [--timeout 60] [--keep DIR] [--json FILE]

File number i is one of a few small models with its bytes changed (flipped, cut out, doubled, cut off, swapped
with others), or with a field of its protobuf changed, taken away, or copied from elsewhere, by random numbers
that i alone seeds: `--first i --count 1` makes one again. ``optimize`` runs in a process of its own, which
goes on to the next file; a file that ends it, or takes longer than the timeout, is a failure as well. Other
failures: a traceback or the words of a bug, no sentence or more than one line, a model written that is not
valid where the input is, or does not run, an input file that is not what it was. Latency is not measured.
Exits 1 if there was a failure; --keep has the files that failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import select
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
from click.testing import CliRunner
from google.protobuf.message import DecodeError, Message
from onnx import numpy_helper

from benchmarks.options import JSON
from benchmarks.replay import fast
from onnx_lrsd.cli import main as command_line
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.graph.model import load
from onnx_lrsd.runtime.session import open_session

OPTIONS = (JSON,)
ROOT = Path(__file__).parent.parent
MEMORY = 12 << 30
"""Bytes of address space that a process may take: a mutated shape may ask for any amount."""
A_MODEL, A_SENTENCE, FAILED = "a model", "a sentence", "FAILED"
LONGEST = 64
"""Bytes that are changed in one place, at most."""

Random = np.random.Generator


def convolutional() -> onnx.ModelProto:
    """Two 3 x 3 convolutions with BatchNormalization and a skip, pooled, and a Gemm."""
    return _model(
        "g (float[N, 64, 8, 8] x) => (float[N, 10] y) {"
        " a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)"
        " n = BatchNormalization (a, scale, shift, mean, var) r = Relu (n)"
        " c = Conv <pads = [1, 1, 1, 1]> (r, w2) s = Add (c, x) t = Relu (s)"
        " p = GlobalAveragePool (t) f = Flatten (p) y = Gemm <transB = 1> (f, w3, b3) }",
        {
            "w1": (64, 64, 3, 3), "b1": (64,), "scale": (64,), "shift": (64,), "mean": (64,), "var": (64,),
            "w2": (64, 64, 3, 3), "w3": (10, 64), "b3": (10,),
        },
    )  # fmt: skip


def dense() -> onnx.ModelProto:
    """Products with biases beside a residual, as transformers have them, with Constant nodes."""
    return _model(
        "g (float[N, 6, 96] x) => (float[N, 6, 96] y) {"
        " h = MatMul (x, w1) i = Add (h, b1) g = Sigmoid (i) m = Mul (i, g)"
        " half = Constant <value_float = 0.5> () k = Mul (m, half)"
        " o = MatMul (k, w2) p = Add (b2, o) y = Add (p, x) }",
        {"w1": (96, 192), "b1": (192,), "w2": (192, 96), "b2": (96,)},
    )


def branched() -> onnx.ModelProto:
    """An If, a table that Gather reads and a Gemm reads too, and a transposed weight."""
    model = _model(
        "g (float[N, 24] x, int64[N] i) => (float[N, 40] y) {"
        " e = Gather (table, i) z = Add (x, e) u = Relu (z)"
        " y = Gemm <transB = 1, alpha = 0.5> (u, table) }",
        {"table": (40, 24)},
    )
    flag = onnx.helper.make_node("Constant", [], ["flag"], value=numpy_helper.from_array(np.array(True)))
    parts = {
        f"{name}_branch": onnx.parser.parse_graph(f"{name} () => (float[N, 24] {name}_out) {{ {body} }}")
        for name, body in (("then", "then_out = Relu (z)"), ("else", "else_out = Neg (z)"))
    }
    model.graph.node.insert(2, onnx.helper.make_node("If", ["flag"], ["v"], **parts))
    model.graph.node.insert(0, flag)
    next(node for node in model.graph.node if node.op_type == "Gemm").input[0] = "v"
    return model


def _model(text: str, shapes: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    graph = onnx.parser.parse_graph(text)
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        if len(shape) > 1:  # of low rank, as weights are that bear a form
            left, right = (rng.standard_normal((size, 4)) for size in (shape[0], prod(shape[1:])))
            values = (left @ right.T / (2 * np.sqrt(prod(shape[1:])))).reshape(shape)
        if name in ("var", "scale"):
            values = 1 + values**2
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


MODELS: tuple[Callable[[], onnx.ModelProto], ...] = (convolutional, dense, branched)


def mutated(number: int) -> bytes:
    """File ``number``."""
    rng = np.random.default_rng(number)
    model = MODELS[number % len(MODELS)]()
    if rng.random() < 0.3:
        return mutated_bytes(bytes(model.SerializeToString()), rng)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        mutate_field(model, rng)
    return bytes(model.SerializeToString())


def mutated_bytes(data: bytes, rng: Random) -> bytes:
    """``data`` with bytes changed in one place to a few; half of the time near the start or the end."""
    held = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        edges = rng.random() < 0.5
        at = int(rng.integers(min(400, len(held)))) if edges else int(rng.integers(len(held)))
        if edges and rng.random() < 0.5:
            at = len(held) - 1 - at
        length = int(rng.integers(1, LONGEST))
        match rng.integers(6):
            case 0:
                held[at] ^= 1 << int(rng.integers(8))
            case 1:
                del held[at : at + length]
            case 2:
                held[at:at] = held[at : at + length]
            case 3:
                del held[at:]
            case 4:
                held[at : at + length] = rng.bytes(length)
            case _:
                other = int(rng.integers(len(held)))
                held[at : at + length] = held[other : other + length]
        if not held:
            return b""
    return bytes(held)


def messages(of: Message) -> Iterator[Message]:
    """``of`` and all messages within."""
    yield of
    for field, value in of.ListFields():
        if field.message_type is not None:
            for item in value if field.is_repeated else [value]:
                yield from messages(item)


def mutate_field(model: onnx.ModelProto, rng: Random) -> None:
    """Change one field of one message: its value, its presence, or its place."""
    every = [message for message in messages(model) if message.ListFields()]
    message = every[rng.integers(len(every))]
    fields = message.ListFields()
    field, value = fields[rng.integers(len(fields))]
    if field.is_repeated and len(value):
        _mutate_list(field, value, every, rng)
    elif field.message_type is not None or rng.random() < 0.25:
        message.ClearField(field.name)
    else:
        _set(message, field.name, _other(field, value, every, rng))


def _mutate_list(field: Any, values: Any, every: list[Message], rng: Random) -> None:
    at = int(rng.integers(len(values)))
    match rng.integers(3):
        case 0:
            del values[at]
        case 1 if field.message_type is not None:
            values.add().CopyFrom(values[at])
        case 1:
            values.append(values[at])
        case _ if field.message_type is not None:
            other = int(rng.integers(len(values)))
            held = type(values[at])()
            held.CopyFrom(values[at])
            values[at].CopyFrom(values[other])
            values[other].CopyFrom(held)
        case _:
            _set(values, at, _other(field, values[at], every, rng))


def _set(holder: Any, place: Any, value: Any) -> None:
    """Set an attribute or an item; a number that its field cannot hold becomes 1."""
    change = holder.__setitem__ if isinstance(place, int) else partial(setattr, holder)
    try:
        change(place, value)
    except ValueError:
        change(place, 1)


def _other(field: Any, value: Any, every: list[Message], rng: Random) -> Any:
    """Another value of the type of ``value``."""
    if field.enum_type is not None:
        numbers = [entry.number for entry in field.enum_type.values]
        return numbers[rng.integers(len(numbers))]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return [0, 1, 2, 3, -1, -7, value + 1, value - 1, 2 * value, 17, 1 << 31, 1 << 40][rng.integers(12)]
    if isinstance(value, float):
        return [0.0, 1.0, -1.0, float("nan"), float("inf"), 1e30, 1e-30, -value][rng.integers(8)]
    if isinstance(value, bytes):
        return mutated_bytes(value, rng) if value else b"\x00"
    same = [
        given for message in every for known, given in message.ListFields()
        if isinstance(given, str) and known.name == field.name
    ]  # fmt: skip
    names = [
        *same,
        "",
        "x",
        "y",
        "w1",
        "no such name",
        "Relu",
        "Conv",
        "MatMul",
        "Gather",
        "com.microsoft",
        "é",
    ]
    return names[rng.integers(len(names))]


def verdict(number: int, folder: Path) -> dict[str, Any]:
    """What the tool makes of file ``number``: what came out, and the words."""
    path, output = folder / "model.onnx", folder / "out.onnx"
    output.unlink(missing_ok=True)
    path.write_bytes(mutated(number))
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    options = [
        ["--ratio", "1.3"],
        ["--target", "size", "--ratio", "2"],
        ["--target", "tensorrt", "--ratio", "1.2"],
    ]
    chosen = options[number // len(MODELS) % len(options)]
    with (
        patch("onnx_lrsd.measure.compare._pace", fast),
        patch("onnx_lrsd.measure.layer_times.SECONDS", 0.0),
    ):
        result = CliRunner().invoke(command_line, ["optimize", str(path), "-o", str(output), "-q", *chosen])
    came_out, said = judged(result.exit_code, result.stderr, result.stdout, path, output)
    if hashlib.sha256(path.read_bytes()).hexdigest() != before:
        came_out, said = FAILED, "the input was changed"
    return {"number": number, "came_out": came_out, "said": said}


def judged(code: int, stderr: str, stdout: str, path: Path, output: Path) -> tuple[str, str]:
    """What came out, and the sentence or what is wrong."""
    said = stderr.strip()
    if "Traceback" in stderr or "this is a bug" in stderr or stdout:
        return FAILED, (said or stdout)[-2000:]
    if code == 1:
        good = said.startswith("Error: ") and "\n" not in said and said.endswith((".", "?"))
        good = good and not output.exists()
        return (A_SENTENCE if good else FAILED), said
    if code not in (0, 3):
        return FAILED, f"exit code {code}: {said}"
    wrong = invalid(path, output)
    return (FAILED, wrong) if wrong else (A_MODEL, said)


def invalid(path: Path, output: Path) -> str:
    """Why the model written is not a valid one; empty where it is, or the input was none either."""
    if not output.exists():
        return "no model was written"
    try:
        onnx.checker.check_model(str(path), full_check=True)
        was_valid = True
    except Exception:  # the checker raises what it likes
        was_valid = False
    try:
        if was_valid:
            onnx.checker.check_model(str(output), full_check=True)
        open_session(load(output).proto)
    except (onnx.checker.ValidationError, LrsdError, DecodeError, ValueError) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return ""


def here(first: int, count: int) -> None:
    """Judge files one after the other and print a line of JSON for each."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if limit == resource.RLIM_INFINITY else limit, limit))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + count):
            print(json.dumps(verdict(number, Path(folder))), flush=True)


def rows(first: int, count: int, timeout: float) -> Iterator[dict[str, Any]]:
    """What came out of every file; a new process goes on behind one that the tool does not outlive."""
    number = first
    while number < first + count:
        command = [sys.executable, "-m", "benchmarks", "mutate", "--here"]
        command += ["--first", str(number), "--count", str(first + count - number)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as worker:
            assert worker.stdout is not None
            while number < first + count:
                ready = select.select([worker.stdout], [], [], timeout)[0]
                line = worker.stdout.readline() if ready else b""
                if not line.startswith(b"{"):
                    if line:
                        continue  # something that a library prints
                    if not ready:
                        worker.kill()
                    code = worker.wait()
                    said = f"exit status {code}" if ready else f"not done after {timeout:g} s"
                    yield {"number": number, "came_out": FAILED, "said": said}
                    number += 1
                    break
                yield json.loads(line)
                number += 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of this study alone."""
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="put the files that failed there")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)


def run(given: argparse.Namespace) -> None:
    """Print what failed, and how many files ended in what."""
    if given.here:
        here(given.first, given.count)
        return
    counts: Counter[str] = Counter()
    failed = []
    for row in rows(given.first, given.count, given.timeout):
        counts[row["came_out"]] += 1
        if row["came_out"] == FAILED:
            failed.append(row)
            print(f"{row['number']}: {row['said']}", flush=True)
            if given.keep is not None:
                given.keep.mkdir(parents=True, exist_ok=True)
                (given.keep / f"{row['number']}.onnx").write_bytes(mutated(row["number"]))
    print(f"\n{', '.join(f'{count} x {kind}' for kind, count in sorted(counts.items()))}.")
    if given.json is not None:
        facts = {"first": given.first, "count": given.count, **counts, "failed": failed}
        given.json.write_text(json.dumps(facts, indent=1) + "\n")
    if failed:
        sys.exit(1)
