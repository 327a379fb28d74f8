"""Measure how fast ONNX Runtime runs the nodes of factors on this machine, on a CPU in one thread.

On a CPU nodes of all kinds and numbers of outputs read the same tensor in one model, so a few sessions
measure them all. Every pass over the sessions measures each node again; the fastest pass counts, since other
work of the machine only adds time. On a GPU, where the record of a node is that of its launch, each one is
measured in a model that has nothing but a few of its like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import isqrt, prod

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_lrsd.errors import DeviceError
from onnx_lrsd.measure.layer_times import bare_node, bare_run, seconds_on
from onnx_lrsd.runtime.kernel_times import kernels
from onnx_lrsd.runtime.session import inference_device
from onnx_lrsd.targets.machine import (
    COLUMN,
    MATRIX,
    POINT,
    ROW,
    SQUARE,
    Machine,
    Rates,
    processor,
    runtime,
)
from onnx_lrsd.types import Progress

KERNELS = {SQUARE: (3, 3), COLUMN: (3, 1), ROW: (1, 3), POINT: (1, 1)}
SIDES = (7, 14, 28, 56, 112, 224)
_CHANNELS = (8, 16, 64, 256)
MATRIX_ROWS, MATRIX_INPUTS, MATRIX_OUTPUTS = (1, 16, 128), (64, 256, 1024), (16, 64, 256, 1024)
MOST_MACS = 600_000_000
"""Nodes above it are not measured on a CPU and get the rate of the next smaller map."""
TIMED_PASSES, _SECONDS = 4, 0.35
"""Passes over all sessions, and about how long one session runs in a pass."""
COPIES, _SECONDS_ON_A_GPU = 4, 0.05
"""Nodes alike in each model that is timed on a GPU, and about how long it runs."""
SHORTEST, LONG = 1e-7, 2e-5
"""Seconds. Shorter work is rounded up to SHORTEST; from LONG on the time of recording hardly counts."""
_BLOCKS = (16, 8, 4)
"""Blocks that outputs may be padded to, the largest first."""
_SAME = 0.9
"""Outputs are padded to a block if half a block takes at least this share of the time of a whole one."""
Measured = dict[str, float]
"""Seconds by name of a node."""


def ensure_profiled(device: str) -> None:
    """Raise DeviceError where ``device`` is a GPU that ONNX Runtime does not run on, or that has no name."""
    if inference_device(device) != "cpu" and not processor(device):
        raise DeviceError("CuPy, which tells the GPU's name, finds none: pip install onnx-lrsd[gpu].")


def measure(progress: Progress | None = None, device: str = "cpu") -> Machine:
    """The table of this machine; it takes about a minute, of a GPU some. ``progress`` follows it."""
    block = _block(device)
    outputs = _outputs(block)
    best = _best(_on_cpu(outputs) if device == "cpu" else _on_gpu(device, outputs), progress)
    squares = tuple(side * side for side in SIDES)
    rates = {kind: _rates(best, kind, outputs, _CHANNELS, squares) for kind in KERNELS}
    rates[MATRIX] = _rates(best, MATRIX, MATRIX_OUTPUTS, MATRIX_INPUTS, MATRIX_ROWS)
    return Machine(
        processor=processor(device),
        runtime=runtime(),
        block=block,
        node=bare_run(device).node,
        value=_value(device),
        rates=rates,
        device=device,
    )


def _on_cpu(outputs: Sequence[int]) -> list[Callable[[], Measured]]:
    """What measures all nodes on a CPU, several times over."""
    sessions = [
        _session(_convolutions(channels, side, outputs), (1, _BLOCKS[0], side, side))
        for channels, side in product(_CHANNELS, SIDES)
    ]
    sessions += [
        _session(_products(inputs, rows), (rows, MATRIX_OUTPUTS[0]))
        for inputs, rows in product(MATRIX_INPUTS, MATRIX_ROWS)
    ]
    return sessions * TIMED_PASSES


def _on_gpu(device: str, outputs: Sequence[int]) -> list[Callable[[], Measured]]:
    """What measures all nodes on the GPU ``device``."""
    convolutions = [
        partial(_convolutions_on, device, channels, side, outputs)
        for channels, side in product(_CHANNELS, SIDES)
    ]
    return [
        *convolutions,
        *(
            partial(_products_on, device, inputs, rows)
            for inputs, rows in product(MATRIX_INPUTS, MATRIX_ROWS)
        ),
    ]


def _best(sessions: Sequence[Callable[[], Measured]], progress: Progress | None = None) -> Measured:
    """The fewest seconds that each node took in any of ``sessions``."""
    best: Measured = {}
    for done, session in enumerate(sessions):
        for name, seconds in session().items():
            best[name] = min(seconds, best.get(name, seconds))
        if progress is not None:
            progress("profile", done + 1, len(sessions))
    return best


def _outputs(block: int) -> tuple[int, ...]:
    """Numbers of outputs measured: convolutions take up to four blocks at once."""
    return tuple(sorted({block, 2 * block, 4 * block, 256}))


def _rates(
    best: Measured,
    kind: str,
    outputs: Sequence[int],
    channels: Sequence[int],
    positions: Sequence[int],
) -> Rates:
    """The grid of one kind; a node that was not measured has the rate of the next smaller map.

    The time of very short work is uncertain, and its rate may come out far too high. So no rate exceeds the
    highest one of nodes that took long.
    """
    grid: list[float] = []
    peak = 0.0
    for out, inputs, places in product(outputs, channels, positions):
        seconds = best.get(_name(kind, out, inputs, places))
        macs = out * inputs * prod(KERNELS.get(kind, ())) * places
        grid.append(grid[-1] if seconds is None else macs / seconds)
        if seconds is not None and seconds >= LONG:
            peak = max(peak, grid[-1])
    rates = (min(rate, peak) if peak else rate for rate in grid)
    return Rates(tuple(outputs), tuple(channels), tuple(positions), tuple(rates))


def _name(kind: str, outputs: int, channels: int, positions: int) -> str:
    return f"{kind}, {outputs} of {channels}, {positions}"


def _session(proto: onnx.ModelProto, shape: tuple[int, ...]) -> Callable[[], Measured]:
    """A function that runs ``proto`` for a moment and gives the seconds that its nodes work."""
    feed = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}

    def run() -> Measured:
        once = sum(kernel.fastest for kernel in kernels(proto, feed, runs=1))
        runs = int(np.clip(_SECONDS / max(once, SHORTEST), 3, 200))
        beside = bare_node().seconds + bare_node().recording
        return {k.name: max(k.fastest - beside, SHORTEST) for k in kernels(proto, feed, runs=runs)}

    return run


def _convolutions(channels: int, side: int, outputs: Sequence[int]) -> onnx.ModelProto:
    """Convolutions of every kind and number of ``outputs`` over one map, each output reduced at once."""
    nodes = [_conv("h", "x", channels, _BLOCKS[0], (1, 1))]
    tensors = [_weight("h", channels, _BLOCKS[0], 1, 1)]
    ends = []
    for (kind, kernel), out in product(KERNELS.items(), outputs):
        if out * channels * prod(kernel) * side * side > MOST_MACS:
            continue
        name = _name(kind, out, channels, side * side)
        nodes += [_conv(name, "h", out, channels, kernel)]
        nodes += [helper.make_node("GlobalMaxPool", [name], [f"{name} max"])]
        tensors.append(_weight(name, out, channels, *kernel))
        ends.append(helper.make_tensor_value_info(f"{name} max", TensorProto.FLOAT, [1, out, 1, 1]))
    return _model(nodes, (1, _BLOCKS[0], side, side), ends, tensors)


def _products(inputs: int, rows: int) -> onnx.ModelProto:
    """Products of the same matrix (rows, inputs) with weights of every number of outputs."""
    nodes = [helper.make_node("MatMul", ["x", "h weight"], ["h"], "h")]
    tensors, ends = [_weight("h", MATRIX_OUTPUTS[0], inputs)], []
    for out in MATRIX_OUTPUTS:
        name = _name(MATRIX, out, inputs, rows)
        nodes += [helper.make_node("MatMul", ["h", f"{name} weight"], [name], name)]
        tensors.append(_weight(name, inputs, out))
        ends.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, out]))
    return _model(nodes, (rows, MATRIX_OUTPUTS[0]), ends, tensors)


def _conv(name: str, source: str, outputs: int, channels: int, kernel: tuple[int, ...]) -> onnx.NodeProto:
    pads = [extent // 2 for extent in kernel] * 2
    return helper.make_node(
        "Conv", [source, f"{name} weight"], [name], name, kernel_shape=list(kernel), pads=pads
    )


def _weight(name: str, *shape: int, seed: int = 0) -> onnx.TensorProto:
    values = np.random.default_rng(seed).standard_normal(shape) / isqrt(prod(shape[1:]) + 1)
    return numpy_helper.from_array(values.astype(np.float32), f"{name} weight")


def _model(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int],
    ends: Sequence[onnx.ValueInfoProto],
    tensors: Sequence[onnx.TensorProto],
) -> onnx.ModelProto:
    start = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "profile", [start], ends, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _block(device: str) -> int:
    """The number of outputs that convolutions are padded to."""
    channels, side = 64, 28
    outputs = (2, *_BLOCKS)
    if device == "cpu":
        session = _session(_convolutions(channels, side, outputs), (1, _BLOCKS[0], side, side))
    else:
        session = partial(_convolutions_on, device, channels, side, outputs, (SQUARE,))
    best = _best([session] * TIMED_PASSES)

    def padded(block: int) -> bool:
        half, full = (best[_name(SQUARE, out, channels, side * side)] for out in (block // 2, block))
        return bool(half >= _SAME * full)

    return next((block for block in _BLOCKS if padded(block)), _BLOCKS[-1])


def _value(device: str) -> float:
    """Seconds to gather one value of a map."""
    channels, side = 64, SIDES[-1]
    shape, values = (1, channels, side, side), channels // 2 * side * side
    if device != "cpu":
        return _seconds_on(device, _gathers(channels, side), shape) / values
    session = _session(_gathers(channels, side, 1), shape)
    return min(session()[_copy("gather", 0)] for _ in range(TIMED_PASSES)) / values


def _gathers(channels: int, side: int, copies: int = COPIES) -> onnx.ModelProto:
    """``copies`` of a Gather of every second channel of a map, each beginning at another one."""
    nodes, tensors, ends = list[onnx.NodeProto](), list[onnx.TensorProto](), list[onnx.ValueInfoProto]()
    for i in range(copies):
        name = _copy("gather", i)
        nodes.append(helper.make_node("Gather", ["x", f"{name} index"], [name], name, axis=1))
        tensors.append(numpy_helper.from_array((np.arange(0, channels, 2) + i) % channels, f"{name} index"))
        ends.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels // 2, side, side]))
    return _model(nodes, (1, channels, side, side), ends, tensors)


def _convolutions_on(
    device: str, channels: int, side: int, outputs: Sequence[int], kinds: Sequence[str] = tuple(KERNELS)
) -> Measured:
    """Seconds of convolutions over one map, each of the ``kinds`` and ``outputs`` measured by itself."""
    shape, found = (1, channels, side, side), Measured()
    for kind, out in product(kinds, outputs):
        nodes, tensors, ends = list[onnx.NodeProto](), list[onnx.TensorProto](), list[onnx.ValueInfoProto]()
        for i in range(COPIES):
            name = _copy("conv", i)
            nodes.append(_conv(name, "x", out, channels, KERNELS[kind]))
            tensors.append(_weight(name, out, channels, *KERNELS[kind], seed=i))
            ends.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, out, side, side]))
        proto = _model(nodes, shape, ends, tensors)
        found[_name(kind, out, channels, side * side)] = _seconds_on(device, proto, shape)
    return found


def _products_on(device: str, inputs: int, rows: int) -> Measured:
    """Seconds of products of a matrix (rows, inputs), each number of outputs measured by itself."""
    shape, found = (rows, inputs), Measured()
    for out in MATRIX_OUTPUTS:
        nodes, tensors, ends = list[onnx.NodeProto](), list[onnx.TensorProto](), list[onnx.ValueInfoProto]()
        for i in range(COPIES):
            name = _copy("product", i)
            nodes.append(helper.make_node("MatMul", ["x", f"{name} weight"], [name], name))
            tensors.append(_weight(name, inputs, out, seed=i))
            ends.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, out]))
        found[_name(MATRIX, out, inputs, rows)] = _seconds_on(
            device, _model(nodes, shape, ends, tensors), shape
        )
    return found


def _copy(name: str, index: int) -> str:
    return f"{name} {index}"


def _seconds_on(device: str, proto: onnx.ModelProto, shape: tuple[int, ...]) -> float:
    """Seconds that one of the COPIES of a node works on the GPU ``device``.

    What any node takes is left out; a kernel hides behind its launch where that takes longer.
    """
    feed = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    seconds = seconds_on(device, proto, feed, seconds=_SECONDS_ON_A_GPU) / COPIES
    return max(seconds - bare_run(device).node, SHORTEST)
