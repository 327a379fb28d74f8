"""The plain data that stages pass to each other.

Throughout, a layer is ``y = W x + b`` with W of shape (n, m): n outputs, and the m inputs of
one output. For a convolution x is a patch, flattened as (input channel, kernel position), so
m = channels x kernel positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = Any
"""A NumPy, CuPy or other array-API array."""

Values: TypeAlias = npt.NDArray[Any]
"""A NumPy array of any type: values of a tensor."""

Feed: TypeAlias = Mapping[str, Values]
"""Values by name of a tensor: what a model is fed, and what it gives back."""

Rows: TypeAlias = npt.NDArray[np.float32]
"""Rows (count, m) of a layer's input, or (count, n) of its output: one row for each sampled position."""

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``; 0 of 1 is a step of a search, to which later stages belong."""

Score: TypeAlias = Callable[..., float]
"""Called as ``score(outputs by name, labels)`` on all samples at once, with ``inputs`` by name as well where
it has such a parameter; more is better."""

DENSE = "dense"
CHANNEL = "channel"
CHANNEL_IN = "channel-in"
SPATIAL = "spatial"
TUCKER = "tucker"
WIDTH = "width"
KINDS = (DENSE, CHANNEL, CHANNEL_IN, SPATIAL, TUCKER, WIDTH)

UNSTRUCTURED = "unstructured"
N_OF_M = "n-of-m"
CHANNELS = "channels"
PATTERNS = ("none", UNSTRUCTURED, N_OF_M, CHANNELS)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One node with a constant weight that can be written in another form; ``op`` is its type.

    ``output`` is the tensor the layer gives (that of the BatchNormalization folded into it, if any), which
    identifies it; ``name`` is what a person calls it. ``shape`` is the weight as the node reads it.
    ``axis`` is the axis of the input that carries features: 1 for Conv and ConvTranspose, -1 for
    ``x @ W``, -2 for ``W @ x``, 0 for a Gemm with transA. ``positions`` is how often W is applied in one
    sample (0: not known), so that MACs = n m positions. ``size`` is the spatial size of the input, once it
    is known.

    ``kernel`` is that of the patches that a Conv reads, and empty for every other operator. ``strides`` and
    what follows are the attributes of a convolution, transposed or not, as far as it has them. So many
    consecutive rows of W as ``rows_per_bias`` share one bias: the kernel positions of an output channel of
    a ConvTranspose, whose n is output channels x kernel positions; 1 for every other operator.
    ``stored_bytes`` is what one number of the weight takes in the file, where a Cast stands between (0: as
    ``dtype`` has it).

    ``shares`` names the layer, by output, that stores the weight which this one applies too; empty where it
    stores its own. ``also_read`` says what else reads the stored tensor, which then stays beside any other
    form; empty where nothing does. Where that is a layer before it, which applies the weight otherwise, the
    other one ``pays`` for the stored tensor.

    ``full`` is (n, m) before some of its channels were cut, None where none were: the rows that it is
    fitted to are drawn by it, so that they are those that the original layer gave.

    A ``constant`` is the weight of no layer: a table that a Gather reads, the weights of an LSTM. It is n
    rows of m numbers that can be stored in codes, and nothing else; ``output`` and ``weight`` are the
    constant, ``op`` is the type of a node that reads it, and there is no ``input``.
    """

    output: str
    name: str
    op: str
    input: str
    weight: str
    shape: tuple[int, ...]
    dtype: str
    n: int
    m: int
    axis: int = -1
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    output_padding: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    rows_per_bias: int = 1
    stored_bytes: int = 0
    shares: str = ""
    also_read: str = ""
    pays: bool = True
    constant: bool = False
    positions: int = 0
    size: tuple[int, ...] = ()
    full: tuple[int, int] | None = None

    @property
    def channels(self) -> int:
        """Input channels of a Conv or ConvTranspose, input features of a Gemm or MatMul."""
        return self.m // prod(self.kernel)

    @property
    def output_channels(self) -> int:
        """Output channels of a Conv or ConvTranspose, output features of a Gemm or MatMul."""
        return self.n // self.rows_per_bias

    @property
    def channels_first(self) -> bool:
        """Whether its input is (batch, channels, *size), not features along some axis."""
        return self.axis == 1

    @property
    def unnamed(self) -> Layer:
        """The layer without names: layers alike are equal in it, and whatever depends on no weight is too."""
        return replace(
            self, output="", name="", input="", weight="", shares="", also_read="", pays=True, full=None
        )


OUTPUT_OF_MODEL = "they are an output of the model"
"""Why all channels of a last layer stay."""


@dataclass(frozen=True)
class Declined:
    """A node that could carry a weight but is left as it is, and why.

    ``node`` is the label of another node that the reason names, if it names one.
    """

    name: str
    op: str
    reason: str
    node: str = ""

    @property
    def kind(self) -> str:
        """The reason without the label of a node: what several have in common.

        >>> Declined("fc", "MatMul", "Softmax /head/softmax may mix them", "/head/softmax").kind
        'Softmax may mix them'
        """
        return self.reason.replace(f" {self.node}", "", 1) if self.node else self.reason


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and centred second moment of the inputs of one layer.

    ``mean`` is (m,), float64; ``second`` is (m, m), float32, E[(x - mean)(x - mean)^T] in activation
    units squared, over ``count`` rows. When there are fewer rows than half the inputs, ``rows``
    (count, m), float32 and centred, stands in its place and no (m, m) matrix is ever formed.

    When the layer will see other inputs than the original network's (because layers before it
    were rewritten), ``cross`` (n, m) is E[(y - E y)(x - mean)^T] for the *original* outputs y,
    ``output_mean`` (n,) is E y and ``output_energy`` is E|y - E y|^2.

    ``samples`` is how many samples the rows come from, where rows of one sample are alike (0: each
    row is a sample). Inputs and outputs x and y are those of the network times ``scale``, a power of two.
    ``silent`` is how many rows the original network fed were zero throughout.
    """

    name: str
    count: int
    mean: Array
    second: Array | None = None
    rows: Array | None = None
    cross: Array | None = None
    output_mean: Array | None = None
    output_energy: float | None = None
    samples: int = 0
    scale: float = 1.0
    silent: int = 0


def few_rows(inputs: int, rows: int) -> bool:
    """Whether rows are so few that ``Moments`` hold them in place of a moment (inputs, inputs)."""
    return 2 * rows < inputs


@dataclass(frozen=True, order=True)
class Pattern:
    """Which entries the sparse part S may have; data only.

    'unstructured': ``count`` entries anywhere. 'n-of-m': ``count`` of each ``block`` consecutive input
    channels, at every kernel position (2:4). 'channels': ``count`` whole input channels. 'none': no S.
    """

    kind: str = "none"
    count: int = 0
    block: int = 0

    def __str__(self) -> str:
        return f"{self.count}:{self.block}" if self.block else f"{self.count} {self.kind}"


NONE = Pattern()


def whole_channels(count: int) -> Pattern:
    """The pattern that keeps ``count`` input channels; none for 0."""
    return Pattern(CHANNELS, count) if count else NONE


Mix: TypeAlias = tuple[tuple[str, int], ...]
"""Storages by name and how many rows, one after the other, are kept in each."""


@dataclass(frozen=True, order=True)
class Form:
    """How a weight is written: the kind of factors, their rank, and the pattern of the sparse part.

    ``outer`` is the second rank of Tucker-2, outputs of its core; 0 for every other kind. Dense, low
    rank, sparse and both are points of one space.

    A form with ``weights`` is stored in codes that the runtime decodes to one dense weight: how many
    outputs (dense) or ranks (factors, the largest first) are kept in which storage. ``entries`` is then the
    storage of S.
    """

    kind: str = DENSE
    rank: int = 0
    pattern: Pattern = NONE
    outer: int = 0
    weights: Mix = ()
    entries: str = ""

    @property
    def coded(self) -> bool:
        """Whether the weight is stored in codes."""
        return bool(self.weights or self.entries)

    @property
    def dense(self) -> bool:
        """Whether the layer stays as it was."""
        return self.kind == DENSE and not self.coded

    @property
    def channels(self) -> int:
        """How many whole input channels S keeps."""
        return self.pattern.count if self.pattern.kind == CHANNELS else 0

    def __str__(self) -> str:
        rank = f" {self.rank}" if self.rank else ""
        outer = f", {self.outer}" if self.outer else ""
        kept = ", ".join(f"{count} {name}" for name, count in self.weights)
        if self.kind == DENSE and len(self.weights) == 1:
            kept = self.weights[0][0]
        low = f"{self.kind}{rank}{outer}" + (f" ({kept})" if kept else "")
        if self.pattern == NONE:
            return low
        return f"{low} + S {self.pattern}" + (f" ({self.entries})" if self.entries else "")


@dataclass(frozen=True)
class Codes:
    """Rows of numbers in codes: ``blocks`` are consecutive rows, (storage, codes (rows, width)).

    A row's value is (code - (levels - 1) / 2) times its step in ``steps`` (rows,); fp16 rows hold values.
    """

    blocks: tuple[tuple[str, Array], ...]
    steps: Array


@dataclass(frozen=True)
class Entries:
    """The entries of a sparse (n, m) matrix: ``positions`` (count,), ascending, row by row, and their values.

    Values are codes (count,) in ``storage``, to be centred and multiplied with the row's step in ``steps``
    (n,). No two neighbours are further apart than ``reach``.
    """

    positions: Array
    storage: str
    codes: Array
    steps: Array
    reach: int


@dataclass(frozen=True)
class Packed:
    """A weight in codes, that of a layer in a form with ``weights``.

    ``rows`` (n, m) of a dense weight; of factors one row a rank, (r, A + B n): V's row, then H's columns
    (see solver/separable.py), to which alone the step belongs. ``sparse`` is added.
    """

    rows: Codes | None
    sparse: Entries | None = None


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A weight in its new form.

    ``kernels`` are applied first to last. Gemm and MatMul: matrices (out, in). Conv: kernels
    (out, in, *spatial) whose spatial extents multiply up to the layer's own. ``sparse`` is
    (n, j, *kernel) and reads the input channels ``channels`` (ascending). ``bias`` (n,) goes with
    the sum. ``error`` is tr(D C D^T) / tr(W C W^T) on the calibration moments. A form in codes has
    ``packed`` in place of ``kernels`` and ``sparse``.
    """

    form: Form
    kernels: tuple[Array, ...]
    bias: Array
    sparse: Array | None = None
    channels: tuple[int, ...] = ()
    error: float = 0.0
    converged: bool = True
    packed: Packed | None = None


@dataclass(frozen=True)
class Price:
    """What a layer or a model costs for one sample.

    ``seconds``, in one thread, are measured for a dense layer, and predicted from that for another form; None
    where nothing was measured.
    """

    macs: int
    parameters: int
    bytes: int
    seconds: float | None = None

    def __add__(self, other: Price) -> Price:
        both = self.seconds is not None and other.seconds is not None
        return Price(
            self.macs + other.macs,
            self.parameters + other.parameters,
            self.bytes + other.bytes,
            (self.seconds or 0.0) + (other.seconds or 0.0) if both else None,
        )


@dataclass(frozen=True)
class Point:
    """One point of an error curve: a form, its relative output error, its price, and its predicted time.

    ``time`` is predicted from the target's table alone, so it is the same in every run. ``price.seconds`` is
    scaled so that the dense layer takes what was measured.
    """

    form: Form
    error: float
    price: Price
    time: float = 0.0


CostOf: TypeAlias = Callable[[Point], float]

COSTS: Mapping[str, CostOf] = {
    "macs": lambda point: point.price.macs,
    "parameters": lambda point: point.price.parameters,
    "bytes": lambda point: point.price.bytes,
    "latency": lambda point: point.price.seconds or 0.0,
}
"""By name of a cost, which a ratio may be of: how much of it a point has."""


@dataclass(frozen=True)
class ErrorCurve:
    """The error of one layer in each form it may take; the first point is dense, with error 0.

    ``others`` are layers that apply the same weight: errors and prices are of all together.
    """

    layer: Layer
    points: tuple[Point, ...]
    others: tuple[Layer, ...] = ()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers that take one form; the first stores it."""
        return (self.layer, *self.others)


@dataclass(frozen=True)
class Choice:
    """The form that a plan gives one layer, with the error and the prices it was chosen by."""

    form: Form
    error: float
    before: Price
    after: Price
    reason: str = ""


@dataclass(frozen=True)
class Width:
    """How many ``of`` the channels between layers a plan keeps, and what those that read them lose by it."""

    kept: int
    of: int
    error: float


@dataclass(frozen=True)
class Plan:
    """A choice for every layer that was found, by ``Layer.output``; it can be saved as JSON and replayed.

    ``widths`` are those of the pairs of layers between which channels are cut, by the pair's key. Forms are
    those of the layers as they are then.
    """

    target: str
    cost: str
    choices: Mapping[str, Choice]
    widths: Mapping[str, Width] = field(default_factory=dict)


@dataclass(frozen=True)
class InputSpec:
    """An input the caller must feed: numpy dtype name and shape, symbolic dimensions as text or None.

    ``ranked`` is False where the model does not even state the number of dimensions; ``shape`` is () then.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]
    ranked: bool = True
