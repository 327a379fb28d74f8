"""What the passes and the fit must know of an operator whose weight can be written in another form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from onnx_lrsd.graph.working_graph import WorkingGraph
from onnx_lrsd.passes.writer import Writer
from onnx_lrsd.types import Factors, Layer, Rows, Values

Matrix = npt.NDArray[np.float64]

Positions = npt.NDArray[np.int64]


class WeightLayout(NamedTuple):
    """How W (n, m) becomes the weight that a node reads: reshaped, then its axes permuted; None leaves it."""

    shape: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None


class ChannelAxes(NamedTuple):
    """Where a node reads and gives channels, all axes counted from the end.

    ``read`` is the axis of its activation, ``inputs`` and ``outputs`` those of its weight, ``given`` that of
    what it gives, whose number of axes is ``rank``: None where it is that of the activation.
    """

    read: int
    inputs: int
    outputs: int
    given: int
    rank: int | None


class WeightAxes(NamedTuple):
    """The axes along which the channels of a node lie: ``outputs`` and ``inputs`` are those of its weight.

    ``given`` is the axis of what the node gives. Axes below 0 are counted from the end.
    """

    outputs: int
    inputs: int
    given: int


class Operator(Protocol):
    """One operator; each module that ``OPERATORS`` lists has all of this."""

    @property
    def WEIGHT_INPUTS(self) -> tuple[int, ...]:
        """Indices of the inputs that may hold the weight; with two the other may as well be an activation."""

    @property
    def HAS_BIAS_INPUT(self) -> bool:
        """Whether the node itself adds a bias, so one costs no node of its own."""

    @property
    def FETCHES_OUTPUTS(self) -> bool:
        """Whether ONNX Runtime gives the outputs of sampled rows; otherwise they are computed as W x + b."""

    @property
    def FUSES_SUM(self) -> bool:
        """Whether ONNX Runtime fuses a sum behind the node into it."""

    @property
    def SPARSE_MATH(self) -> bool:
        """Whether TensorRT runs a 2:4 weight of it on sparse tensor cores."""

    @property
    def NOT_INT8(self) -> str:
        """Why it stays in float with --int8; empty where ONNX Runtime has an int8 kernel for it."""

    def read(self, node: gs.Node, weight: Values, side: int, working: WorkingGraph) -> Layer | str:
        """The layer that ``node`` is, or why it is none; ``weight`` is its constant input number ``side``."""

    def weight_and_bias(self, layer: Layer, node: gs.Node, last: gs.Node) -> tuple[Matrix, Matrix]:
        """W (n, m) and b (n,), float64; ``last`` is ``node``, or the node behind it that is folded in."""

    def write_factors(self, write: Writer, layer: Layer, source: gs.Tensor, factors: Factors) -> gs.Tensor:
        """Write ``factors`` for the input ``source``; returns the tensor that replaces the layer's."""

    def weight_layout(self, layer: Layer) -> WeightLayout:
        """The layout in which ``write_dense`` wants its weight."""

    def write_dense(
        self, write: Writer, layer: Layer, source: gs.Tensor, weight: gs.Tensor, bias: Matrix
    ) -> gs.Tensor:
        """Write the operator itself with a ``weight`` that other nodes compute, and ``bias`` (n,)."""

    def count_rows(self, layer: Layer, shape: tuple[int, ...]) -> int:
        """How often W is applied to an input of that ``shape``, batch included."""

    def input_rows(self, layer: Layer, x: Values, positions: Positions, out: Rows) -> None:
        """Put the rows (len(positions), m) that W is applied to into ``out``, of the input ``x``.

        Positions are counted in C order, batch first.
        """

    def macs(
        self, node: onnx.NodeProto, first: Sequence[int], second: Sequence[int], output: Sequence[int]
    ) -> int:
        """MACs of ``node`` from the shapes of its two operands and of its output."""

    def channel_axes(self, node: gs.Node, weight: Values, side: int) -> ChannelAxes | None:
        """Where ``node`` reads and gives channels, None in groups. ``weight`` is input ``side``."""

    def weight_axes(self, node: onnx.NodeProto) -> WeightAxes | None:
        """Where the channels of ``node``, whose second input is the weight, lie.

        None in groups, and where the channels it reads are not where an operator in front of it gives them.
        """

    def sparse_axis(self, node: gs.Node) -> int | None:
        """The axis of its weight along which TensorRT takes 2:4; None where it takes none."""
