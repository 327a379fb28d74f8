"""The graph that passes edit, with what they must know of the model it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs


@dataclass(frozen=True)
class WorkingGraph:
    """A copy of a model's main graph to edit; ``Model.splice`` takes it back.

    ``overridable`` are the initializers that a caller of the model may override. ``origins`` holds each
    node that was read, by ``id``, with the NodeProto it was read from; it keeps the nodes alive, so that
    an id stays that of its node.
    """

    graph: gs.Graph
    overridable: frozenset[str]
    origins: Mapping[int, tuple[gs.Node, onnx.NodeProto]]

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        return int(self.graph.opset)

    @property
    def nodes(self) -> list[gs.Node]:
        """The nodes in their order; the list may be edited."""
        found: list[gs.Node] = self.graph.nodes
        return found

    @property
    def outputs(self) -> list[gs.Tensor]:
        """The outputs of the model."""
        found: list[gs.Tensor] = self.graph.outputs
        return found

    def tensors(self) -> dict[str, gs.Tensor]:
        """Tensors by name."""
        found: dict[str, gs.Tensor] = self.graph.tensors()
        return found
