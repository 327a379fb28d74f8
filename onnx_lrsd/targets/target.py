"""What a target is: the forms it takes, what they cost there, and when a split pays.

Adding a target is adding a row to ``TARGETS`` and, where its storage differs, an encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from onnx_lrsd.data.samples import Samples
from onnx_lrsd.errors import DataError
from onnx_lrsd.facts import Engine
from onnx_lrsd.graph.model import Model
from onnx_lrsd.passes.operators.conv import output_size
from onnx_lrsd.solver.curve import errors
from onnx_lrsd.solver.decompose import check_form
from onnx_lrsd.solver.layout import rank_size
from onnx_lrsd.solver.pattern import nonzeros
from onnx_lrsd.solver.problem import Problem
from onnx_lrsd.storage import FP16, STORAGES, entry_bytes
from onnx_lrsd.types import (
    CHANNEL,
    CHANNEL_IN,
    DENSE,
    NONE,
    SPATIAL,
    TUCKER,
    UNSTRUCTURED,
    Form,
    Layer,
    Price,
)

LAYER_BYTES, FACTORS_BYTES, BLOCK_BYTES, ENTRIES_BYTES = 150, 300, 330, 1250
"""What the nodes take that decode a weight, the product of factors, each block of one storage, and an S."""

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


ErrorsOfForms: TypeAlias = Callable[[Problem, Sequence[str], str | None], Mapping[Form, float]]


@dataclass(frozen=True)
class Target:
    """``forms(layer, kinds)`` are worth trying; ``predicted_time(layer, form)`` is that of one sample.

    ``with_table(machine)`` is the same target with the table of another machine. Where there is one, times
    are in seconds, otherwise in a unit of the target's own. ``patterns`` are the kinds of S that are written.

    ``timed_here``: the latency that ONNX Runtime measures on this machine is what counts, so that a form or
    a model that is no faster by it is not kept. False where another engine runs the result, or speed is
    not what is wanted.

    ``coded_errors(problem, kinds, weights)`` gives the errors of forms in codes, which only the layer's data
    can tell, in the storage ``weights`` if it is not None; without it weights are stored as numbers.
    ``counts`` is what a ratio is of, if nothing else is asked for. ``opset`` is the oldest its operators are
    in. A search for a promise begins at ``first_ratio``. ``half``: it computes in half precision.
    ``engine(model, samples, output, before)`` says how the engine that runs the result is built from it, and
    how fast it is beside that of the model ``before``, if that is not None; None where ONNX Runtime runs it.
    """

    name: str
    forms: Callable[[Layer, tuple[str, ...]], tuple[Form, ...]]
    predicted_time: Callable[[Layer, Form], float]
    with_table: Callable[[Any], Target] | None = None
    patterns: tuple[str, ...] = ()
    timed_here: bool = True
    coded_errors: ErrorsOfForms | None = None
    counts: str = "macs"
    opset: int = 1
    first_ratio: float = 2.0
    half: bool = False
    engine: Callable[[Model, Samples, Path | None, Model | None], Engine] | None = None

    @property
    def times(self) -> bool:
        """Whether predicted times are seconds, from the table of a machine."""
        return self.with_table is not None

    @property
    def stores_codes(self) -> bool:
        """Whether weights are stored in codes."""
        return self.coded_errors is not None

    def on(self, machine: Any) -> Target:
        """The target with the times of ``machine``; as it is where it has no table of times."""
        return self if self.with_table is None else self.with_table(machine)

    def errors(self, problem: Problem, kinds: tuple[str, ...], weights: str | None) -> Mapping[Form, float]:
        """The relative error of every form worth trying, in the storage ``weights`` if it is not None."""
        if self.coded_errors is not None:
            return self.coded_errors(problem, kinds, weights)
        return errors(problem, self.forms(problem.layer, kinds))

    def check(self, layer: Layer, form: Form) -> None:
        """Raise DataError for a planned form that the target does not write or the layer cannot take."""
        if form.coded and not self.stores_codes:
            raise DataError(
                f"The plan stores {layer.output} in codes, which its target does not: write size there."
            )
        if form.pattern != NONE and form.pattern.kind not in self.patterns:
            known = f"only {' or '.join(self.patterns)}" if self.patterns else "none"
            raise DataError(
                f"The plan gives {layer.output} a sparse part ({form.pattern}), and its target {self.name} "
                f"writes {known}: take it out there."
            )
        try:
            check_form(layer, form)
        except ValueError as error:
            raise DataError(f"The plan does not fit ({error}): change it there.") from error


def price(layer: Layer, form: Form) -> Price:
    """What ``form`` costs for one sample of a layer whose positions and size are known.

    A constant has neither MACs nor a bias.

    N:M is stored dense and its MACs are those of a dense weight: what an engine makes of its zeros is in
    the target's predicted time. Codes are decoded once, so that a form in codes has the MACs of the dense
    layer. A weight that several layers apply is paid for by the one that stores it; where something else
    reads the stored tensor too, it is paid for beside any other form, by the first layer that reads it.
    """
    alone = _price_alone(layer, form)
    if layer.shares:
        return replace(alone, parameters=0, bytes=0)
    if not layer.also_read or form.dense == layer.pays:
        return alone
    kept, each = layer.n * layer.m, layer.stored_bytes or BYTES[layer.dtype]
    sign = 1 if layer.pays else -1
    return replace(alone, parameters=alone.parameters + sign * kept, bytes=alone.bytes + sign * kept * each)


def _price_alone(layer: Layer, form: Form) -> Price:
    """What ``form`` costs where the layer alone reads its weight."""
    dense = 0 if layer.constant else layer.n * layer.m * max(layer.positions, 1)
    nodes = node_shapes(layer, form)
    biases = 0 if layer.constant else layer.output_channels
    parameters = sum(out * inner for out, inner, _ in nodes) + biases
    if form.pattern.kind == UNSTRUCTURED:
        parameters += nonzeros(form.pattern, layer.n, layer.m, prod(layer.kernel)) - layer.n * layer.m
    if form.coded:
        return Price(dense, parameters, _coded_bytes(layer, form) + biases * BYTES[layer.dtype])
    macs = 0 if layer.constant else sum(out * inner * times for out, inner, times in nodes)
    total = parameters * BYTES[layer.dtype]
    if form.dense and layer.stored_bytes:
        total += layer.n * layer.m * (layer.stored_bytes - BYTES[layer.dtype])
    return Price(macs, parameters, total)


class Node(NamedTuple):
    """A node that a form needs: it applies ``outputs`` x (``channels`` x kernel) weights ``times`` a sample.

    ``kernel`` is empty where a row of inputs is no patch.
    """

    outputs: int
    channels: int
    kernel: tuple[int, ...]
    times: int

    @property
    def inner(self) -> int:
        """Inputs of one output."""
        return self.channels * prod(self.kernel)


def node_shapes(layer: Layer, form: Form) -> list[tuple[int, int, int]]:
    """(outputs, inputs of one output, times it is applied in a sample) of every node the form needs."""
    return [(node.outputs, node.inner, node.times) for node in nodes_of(layer, form)]


def nodes_of(layer: Layer, form: Form) -> list[Node]:
    """Every node the form needs, in the order they run.

    A factor runs at the input's resolution along the axes that a later factor spans.
    """
    positions, kernel = max(layer.positions, 1), layer.kernel
    point = (1,) * len(kernel)
    rank, channels = form.rank, layer.channels
    if form.kind == DENSE and form.pattern == NONE:
        return [Node(layer.n, channels, kernel, positions)]
    nodes: list[Node] = []
    if rank and form.kind == CHANNEL:
        nodes = [Node(rank, channels, kernel, positions), Node(layer.n, rank, point, positions)]
    elif rank and form.kind == CHANNEL_IN:
        before = _positions_before(layer, [extent > 1 for extent in kernel])
        nodes = [Node(rank, channels, point, before), Node(layer.n, rank, kernel, positions)]
    elif rank and form.kind == SPATIAL:
        rows, columns = kernel
        before = _positions_before(layer, [False, True])
        nodes = [Node(rank, channels, (rows, 1), before), Node(layer.n, rank, (1, columns), positions)]
    elif rank and form.kind == TUCKER:
        first = Node(rank, channels, point, _positions_before(layer, [extent > 1 for extent in kernel]))
        nodes = [
            first,
            Node(form.outer, rank, kernel, positions),
            Node(layer.n, form.outer, point, positions),
        ]
    if form.channels:
        nodes.append(Node(layer.n, form.channels, kernel, positions))
    elif form.pattern != NONE:
        nodes.append(Node(layer.n, channels, kernel, positions))
    return nodes


def _positions_before(layer: Layer, later: list[bool]) -> int:
    """Outputs of a first factor that leaves the axes marked ``later`` to the factor behind it."""
    if not layer.size:
        return max(layer.positions, 1)
    sizes = zip(layer.size, output_size(layer, layer.size), later, strict=True)
    return prod(before if waits else after for before, after, waits in sizes)


def _coded_bytes(layer: Layer, form: Form) -> int:
    """Bytes of a weight in codes, with the steps of its rows and the nodes that decode it."""
    width = layer.m if form.kind == DENSE else rank_size(layer, form.kind)
    total = sum(STORAGES[name].bytes(count * width) + BLOCK_BYTES for name, count in form.weights)
    total += LAYER_BYTES + (FACTORS_BYTES if form.rank else 0)
    total += 4 * sum(count for name, count in form.weights if name != FP16.name)
    if form.entries:
        total += entry_bytes(form.pattern.count, layer.n * layer.m, STORAGES[form.entries])
        total += ENTRIES_BYTES + 4 * layer.n
    return total
