"""Writes the nodes that take a layer's place: names derived from the layer's, its dtype, its position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.nodes import unused_name
from onnx_lrsd.types import Factors, Layer

_LEAST_NORMAL = float(np.finfo(np.float32).tiny)
"""Below it numbers of float32 are subnormal, with which a processor takes up to a hundred times as long.
Weights of outputs that are always zero are fitted to such."""
PART = "/lrsd/"
"""Stands between the name of a layer and the part of it that a new node is."""


def beside_factors(factors: Factors) -> str:
    """What the part is called that is no factor: S, or the weight of a layer that stayed dense."""
    return "refitted" if factors.form.dense else "S"


Stored = dict[Any, gs.Tensor]
"""Tensors that layers which apply one weight have in common, by what is in them."""


class Writer:
    """Collects the new nodes of one layer; names are ``NODE/lrsd/PART``, unique in the graph.

    What is ``stored`` already is taken from there, and what is new is put there.
    """

    def __init__(self, working: WorkingGraph, layer: Layer, stored: Stored | None = None) -> None:
        self.nodes: list[gs.Node] = []
        self.opset = working.opset
        self._stored = stored
        self._working, self._layer = working, layer
        self._taken = set(working.tensors()) | {node.name for node in working.nodes}
        self._dtype = np.dtype(layer.dtype)

    def constant(self, part: str, values: np.ndarray) -> gs.Constant:
        """``values`` in the layer's dtype, as an initializer; zeros for numbers that are subnormal."""
        values = np.ascontiguousarray(values).astype(self._dtype)
        values[np.abs(values) < _LEAST_NORMAL] = 0
        if self._stored is None:
            return gs.Constant(self._name(f"{part}_weight"), values)
        key = values.shape, sha256(values.tobytes()).digest()
        if key not in self._stored:
            self._stored[key] = gs.Constant(self._name(f"{part}_weight"), values)
        return self._stored[key]

    def once(self, part: str, write: Callable[[], gs.Tensor]) -> gs.Tensor:
        """What ``write`` gives, written by the first of the layers that share it."""
        if self._stored is None:
            return write()
        if part not in self._stored:
            self._stored[part] = write()
        return self._stored[part]

    def node(
        self,
        op: str,
        part: str,
        inputs: Sequence[gs.Tensor],
        attributes: dict[str, Any],
        optional_c: bool = False,
    ) -> gs.Tensor:
        """A new node and its one output. Gemm without C gets a zero where the opset demands one."""
        given = list(inputs)
        if optional_c and self.opset < 11:
            given.append(self.constant(f"{part}_zero", np.zeros(1)))
        if op in ("Gemm", "Add") and self.opset < 7:
            attributes = {**attributes, "broadcast": 1}
        output = gs.Variable(self._name(f"{part}_out"))
        self.nodes.append(gs.Node(op, self._name(part), dict(attributes), given, [output]))
        return output

    def add(self, node: gs.Node) -> None:
        """A node that someone else has made."""
        self.nodes.append(node)

    def tensors(self) -> dict[str, gs.Tensor]:
        """Tensors of the graph by name."""
        return self._working.tensors()

    def gather(self, source: gs.Tensor, channels: Sequence[int], axis: int, total: int) -> gs.Tensor:
        """The chosen channels of ``source``; ``source`` itself when all are chosen."""
        if len(channels) == total:
            return source
        indices = gs.Constant(self._name("S_channels"), np.asarray(channels, dtype=np.int64))
        output = gs.Variable(self._name("S_in"))
        # Gather takes negative axes from opset 11 on only; -1 and -2 come from MatMul alone.
        self.nodes.append(
            gs.Node("Gather", self._name("S_gather"), {"axis": axis}, [source, indices], [output])
        )
        return output

    def _name(self, part: str) -> str:
        return unused_name(f"{self._layer.name}{PART}{part}", self._taken)
