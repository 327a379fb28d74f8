"""How fast a machine runs the nodes of the forms: one table, measured there or built in.

A node takes a fixed time, and its MACs at the rate measured for its kind, outputs, input channels and
positions. Rates are lower for small counts (a vector unit half empty, the edges of a map, weights read for
few positions) and constant for large ones, so they are interpolated between a few powers of two and held
beyond the last.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs

from onnx_lrsd.arrays import gpu_name
from onnx_lrsd.runtime.session import onnxruntime
from onnx_lrsd.targets.target import Node

SQUARE, COLUMN, ROW, POINT, MATRIX = "k x k", "k x 1", "1 x k", "1 x 1", "matrix"
NODES = (SQUARE, COLUMN, ROW, POINT, MATRIX)
"""Kinds of nodes. Convolutions that are not over two axes run as products of matrices."""
PROFILED = ("cpu", "cuda")
"""Devices of ONNX Runtime that there can be a table of."""
_SCHEMA = 1
BUILT_IN = Path(__file__).with_name("built_in.json")
"""The table used where none was measured: what ``onnx-lrsd profile`` wrote for a server CPU with AVX-512."""


@dataclass(frozen=True)
class Rates:
    """MACs a second of one kind of node, on a grid.

    ``macs`` holds outputs x channels x positions values, the last axis fastest. ``channels`` are those that
    one output reads, of a matrix product all its inputs.
    """

    outputs: tuple[int, ...]
    channels: tuple[int, ...]
    positions: tuple[int, ...]
    macs: tuple[float, ...]

    def at(self, outputs: float, channels: float, positions: float) -> float:
        """The rate, interpolated in logarithms; beyond the grid that of its edge.

        >>> round(Rates((16, 64), (16,), (1,), (1e9, 4e9)).at(32, 999, 7) / 1e9, 6)
        2.0
        """
        axes = (self.outputs, self.channels, self.positions)
        places = [_around(axis, x) for axis, x in zip(axes, (outputs, channels, positions), strict=True)]
        total = 0.0
        for i, j, k in product(*places):
            weight = i.weight * j.weight * k.weight
            if weight:
                index = (i.at * len(self.channels) + j.at) * len(self.positions) + k.at
                total += weight * math.log(self.macs[index])
        return math.exp(total)


class _Place(NamedTuple):
    """A grid point of one axis, and its weight in an interpolation."""

    at: int
    weight: float


def _around(axis: Sequence[int], x: float) -> list[_Place]:
    """The grid points of ``axis`` on both sides of ``x``; the last one alone beyond the grid."""
    for low, (left, right) in enumerate(pairwise(axis)):
        if x < right:
            share = max(math.log(x / left), 0.0) / math.log(right / left)
            return [_Place(low, 1 - share), _Place(low + 1, share)]
    return [_Place(len(axis) - 1, 1.0)]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The table of one machine, for float32; of a processor for one thread.

    ``block`` is the number of outputs that convolutions are padded to, ``node`` the seconds any node takes
    beside its work, ``value`` the seconds to copy one value from one layout to another. ``processor`` and
    ``runtime`` say what it was measured on; for the ``device`` 'cuda' the processor is a GPU. ``rates`` has
    an entry for each of NODES.
    """

    processor: str
    runtime: str
    block: int
    node: float
    value: float
    rates: Mapping[str, Rates]
    device: str = "cpu"

    def seconds(self, node: Node) -> float:
        """Predicted time of ``node``, and of handing its values to the next one.

        Rates are those of a node whose input was read a moment ago; what another node just wrote costs more.
        """
        kind = kind_of(node.kernel)
        outputs = node.outputs if kind == MATRIX else math.ceil(node.outputs / self.block) * self.block
        channels = node.inner if kind == MATRIX else node.channels
        macs = outputs * node.inner * node.times
        work = macs / self.rates[kind].at(outputs, channels, node.times)
        return self.node + work + outputs * node.times * self.value

    def copying(self, values: int) -> float:
        """Predicted time of a node that only moves values: a change of layout, a Gather."""
        return self.node + values * self.value


def kind_of(kernel: Sequence[int]) -> str:
    """Which rates a node with this kernel runs at."""
    if len(kernel) != 2:
        return MATRIX
    rows, columns = (extent > 1 for extent in kernel)
    return {(True, True): SQUARE, (True, False): COLUMN, (False, True): ROW, (False, False): POINT}[
        rows, columns
    ]


def to_json(machine: Machine) -> str:
    """The table as text, in MACs a second and in seconds, to three digits."""
    lines = [f'    "{kind}": {json.dumps(_rounded(asdict(rates)))}' for kind, rates in machine.rates.items()]
    facts = {key: value for key, value in asdict(machine).items() if key != "rates"}
    head = json.dumps({"schema": _SCHEMA, **_rounded(facts)}, indent=2).removesuffix("\n}")
    return head + ',\n  "rates": {\n' + ",\n".join(lines) + "\n  }\n}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.2e}") if isinstance(value, float) else value


def from_json(text: str) -> Machine:
    """Read what ``to_json`` wrote. Raises ValueError for anything else."""
    try:
        facts = json.loads(text)
        if facts.pop("schema") != _SCHEMA:
            raise ValueError("another schema")
        rates = {kind: Rates(**{k: tuple(v) for k, v in facts["rates"][kind].items()}) for kind in NODES}
        machine = Machine(**{**facts, "rates": rates})
        for grid in rates.values():
            if len(grid.macs) != len(grid.outputs) * len(grid.channels) * len(grid.positions):
                raise ValueError("a table with gaps")
        numbers = [machine.block, machine.node, machine.value, *(m for g in rates.values() for m in g.macs)]
        if not all(isinstance(x, int | float) and math.isfinite(x) and x > 0 for x in numbers):
            raise ValueError("a number that is not positive")
        if machine.device not in PROFILED:
            raise ValueError("a device that is not known")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no table of a machine: {error}") from error
    return machine


@cache
def built_in() -> Machine:
    """The table that comes with the package."""
    return from_json(BUILT_IN.read_text(encoding="utf-8"))


def stored_at(device: str = "cpu") -> Path:
    """Where ``onnx-lrsd profile`` keeps the table of this machine: the user's folder for caches.

    There is one table for the processor and one for each GPU, by its name.
    """
    folder = platformdirs.user_cache_path("onnx-lrsd", appauthor=False, opinion=False)
    if device == "cpu":
        return folder / "machine.json"
    return folder / f"machine-{re.sub('[^a-z0-9]+', '-', processor(device).lower()).strip('-')}.json"


def command_to_profile(device: str) -> str:
    """The command that measures the table of ``device``."""
    return "onnx-lrsd profile" if device == "cpu" else f"onnx-lrsd profile --device {device}"


def this_machine(device: str = "cpu") -> tuple[Machine, str]:
    """The table to predict with on ``device``, and a warning about it for the user, which may be empty.

    The measured table is used if it was made on this processor, or this GPU, with this version of ONNX
    Runtime.
    """
    path = stored_at(device)
    again = f"run `{command_to_profile(device)}` again"
    try:
        found = from_json(path.read_text(encoding="utf-8"))
    except OSError:  # most often there is none
        return built_in(), ""
    except ValueError:
        return built_in(), f"{path} is no table of a machine and was not used: {again}."
    if (found.device, found.processor, found.runtime) != (device, processor(device), runtime()):
        return built_in(), (
            f"The table of this machine was measured on {found.processor} with ONNX Runtime {found.runtime} "
            f"and was not used: {again}."
        )
    return found, ""


def processor(device: str = "cpu") -> str:
    """The processor's name; on Linux with its family and model, since names can be equal.

    For the device 'cuda' the GPU's, which is empty where CuPy finds none.
    """
    if device != "cpu":
        return gpu_name()
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    told = [facts[key] for key in ("model name", "CPU implementer", "CPU part") if key in facts]
    numbers = [f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return ", ".join([*told, *numbers]) or platform.machine()


def runtime() -> str:
    """The version of ONNX Runtime."""
    return str(onnxruntime().__version__)
