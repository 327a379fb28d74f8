"""Distribution-aware Tucker-2 of a convolution: 1 x 1, k x k and 1 x 1, fitted in the metric of the data.

Source: "Distribution-Aware Tensor Decomposition for Compression of Convolutional Neural Networks",
NeurIPS 2025, arXiv 2511.04494 (alternating least squares for min ‖(W − W~) Σ^½‖). Here each half-step
is optimal for two of the three factors together, which is never worse than one after the other.
"""

from __future__ import annotations

from benchmarks.reference.linalg import eigen
from benchmarks.reference.metric import damped
from onnx_lrsd.arrays import namespace
from onnx_lrsd.types import Array

SWEEPS, STEPS = 6, 12


def tucker2(
    weight: Array,
    second: Array,
    taps: int,
    ranks: tuple[int, int],
    damping: float = 0.01,
    sweeps: int = SWEEPS,
) -> tuple[Array, Array, Array]:
    """``last`` (n, q), ``core`` (taps, q, p) and ``first`` (p, c) for ``ranks`` = (p, q), float32.

    Columns of ``weight`` (n, m = c · taps) are (input channel, kernel position), as in ONNX.
    """
    xp = namespace(weight)
    n, m = weight.shape
    order = xp.arange(m).reshape(-1, taps).T.reshape(-1)
    metric = damped(second, damping)[order][:, order].astype(xp.float32)
    target = weight[:, order].astype(xp.float32)
    product = target @ metric
    channels, (inner, outer) = m // taps, ranks
    blocks = metric.reshape(taps, channels, taps, channels)
    mean = sum(blocks[b, :, b] for b in range(taps)) / taps
    values, vectors = eigen(mean)
    # The start: right singular vectors of all W_b stacked, in the metric mean_b C_bb.
    stacked = target.reshape(n * taps, channels) @ (vectors * xp.sqrt(values))
    first = (eigen(stacked.T @ stacked)[1][:, : -inner - 1 : -1].T / xp.sqrt(values)) @ vectors.T
    last, core = _outputs(product, blocks, first, outer)
    for _ in range(sweeps):
        first = _inputs(product, metric, (values, vectors), first, xp.matmul(last, core))
        last, core = _outputs(product, blocks, first, outer)
    return last, core, first


def expand(last: Array, core: Array, first: Array) -> Array:
    """The weight (n, c · taps) that the factors stand for."""
    xp = namespace(last)
    positions = xp.matmul(xp.matmul(last, core), first)
    return positions.transpose(1, 2, 0).reshape(last.shape[0], -1)


def _outputs(product: Array, blocks: Array, first: Array, outer: int) -> tuple[Array, Array]:
    """The best ``last`` and ``core`` for a fixed ``first``: reduced-rank regression on the features V x_b."""
    xp = namespace(first)
    taps, rank = blocks.shape[0], first.shape[0]
    gram = xp.stack([xp.stack([first @ blocks[b, :, d] @ first.T for d in range(taps)]) for b in range(taps)])
    gram = gram.transpose(0, 2, 1, 3).reshape(taps * rank, -1).astype(xp.float64)
    gram = gram + 1e-6 * xp.mean(xp.diagonal(gram)) * xp.eye(taps * rank)
    right = xp.matmul(product.reshape(-1, taps, first.shape[1]), first.T).reshape(-1, taps * rank)
    solution = xp.linalg.solve(gram, right.T.astype(xp.float64)).T
    last = xp.linalg.eigh(solution @ right.T)[1][:, : -outer - 1 : -1]
    core = (last.T @ solution).reshape(outer, taps, rank).transpose(1, 0, 2)
    return last.astype(xp.float32), core.astype(xp.float32)


def _inputs(
    product: Array, metric: Array, spectrum: tuple[Array, Array], first: Array, heads: Array
) -> Array:
    """``first`` for fixed ``heads`` H_b (taps, n, p), by conjugate gradients.

    It solves Σ_bd H_bᵀ H_d V C_db = Σ_b H_bᵀ (W C)_b, preconditioned with Σ_b H_bᵀ H_b on the left and
    mean_b C_bb, whose ``spectrum`` is given, on the right.
    """
    xp = namespace(first)
    taps, channels = heads.shape[0], first.shape[1]
    gram = xp.matmul(heads.transpose(0, 2, 1)[:, None], heads[None])
    own = sum(gram[b, b] for b in range(taps))
    left = xp.linalg.inv(own + 1e-6 * xp.mean(xp.diagonal(own)) * xp.eye(len(own), dtype=own.dtype))
    right = spectrum[1] / spectrum[0] @ spectrum[1].T

    def image(x: Array) -> Array:
        total = xp.zeros_like(x)
        for b in range(taps):
            wide = xp.matmul(gram[b], x).transpose(1, 0, 2).reshape(len(x), -1)
            total += wide @ metric[:, b * channels : (b + 1) * channels]
        return total

    wanted = xp.matmul(heads.transpose(0, 2, 1), product.reshape(-1, taps, channels).transpose(1, 0, 2))
    residual = xp.sum(wanted, axis=0) - image(first)
    direction = step = left @ residual @ right
    fall = xp.sum(residual * step)
    for _ in range(STEPS):
        moved = image(direction)
        length = fall / xp.sum(direction * moved)
        first = first + length * direction
        residual = residual - length * moved
        step = left @ residual @ right
        fall, before = xp.sum(residual * step), fall
        direction = step + fall / before * direction
    return first
