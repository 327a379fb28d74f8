"""Where a form puts the entries of a weight: (n, m) matrices to groups of inputs, factors to kernels.

Every two-factor form shares its first factor over groups b = 0..B-1 of inputs (see separable.py):
channel B = 1; spatial B = last kernel extent; channel-in and Tucker-2 B = all kernel positions.
"""

from __future__ import annotations

from math import prod

import numpy as np

from onnx_lrsd.arrays import namespace, top_eigenvectors
from onnx_lrsd.types import CHANNEL, CHANNEL_IN, SPATIAL, TUCKER, Array, Factors, Layer


def shared_groups(kernel: tuple[int, ...], kind: str) -> int:
    """B, the number of input groups that share the first factor. Raises ValueError for unknown kinds."""
    if kind == CHANNEL:
        return 1
    if kind == SPATIAL and len(kernel) == 2:
        return kernel[-1]
    if kind in (CHANNEL_IN, TUCKER) and kernel:
        return prod(kernel)
    raise ValueError(f"form {kind!r} does not fit a kernel of shape {kernel}")


def rank_size(layer: Layer, kind: str) -> int:
    """Numbers that one rank of a two-factor form holds: a row of V, and of every H_b a column."""
    groups = shared_groups(layer.kernel, kind)
    return layer.m // groups + groups * layer.n


def group_weight(weight: Array, groups: int) -> Array:
    """(n, m) -> (B, n, A): the fastest axis of m, the kernel positions, is the one that is split."""
    xp = namespace(weight)
    return xp.permute_dims(xp.reshape(weight, (weight.shape[0], -1, groups)), (2, 0, 1))


def group_metric(metric: Array, groups: int) -> Array:
    """(m, m) -> (B, B, A, A)."""
    xp = namespace(metric)
    width = metric.shape[0] // groups
    return xp.permute_dims(xp.reshape(metric, (width, groups, width, groups)), (1, 3, 0, 2))


def ungroup_weight(weight: Array) -> Array:
    """(B, n, A) -> (n, m)."""
    xp = namespace(weight)
    return xp.reshape(xp.permute_dims(weight, (1, 2, 0)), (weight.shape[1], -1))


def factor_kernels(layer: Layer, kind: str, v: Array, h: Array, outer: int = 0) -> tuple[Array, ...]:
    """V (r, A) and H (B, n, r) as the kernels of nodes, applied first to last.

    Tucker-2 has three: H_b = U G_b, where U (n, ``outer``) spans the columns of all H_b.
    """
    xp = namespace(v)
    if kind == TUCKER:
        _, u = top_eigenvectors(xp.sum(xp.matmul(h, xp.permute_dims(h, (0, 2, 1))), axis=0), outer)
        first, core = factor_kernels(layer, CHANNEL_IN, v, xp.matmul(u.T, h))
        return first, core, xp.reshape(u, (*u.shape, *(1,) * len(layer.kernel)))
    rank, n = v.shape[0], h.shape[1]
    outer = xp.permute_dims(h, (1, 2, 0))
    if not layer.kernel:
        return v, xp.reshape(outer, (n, rank))
    ones = (1,) * len(layer.kernel)
    first, last = {
        CHANNEL: (layer.kernel, ones),
        CHANNEL_IN: (ones, layer.kernel),
        SPATIAL: ((*layer.kernel[:-1], 1), (1, *layer.kernel[-1:])),
    }[kind]
    return xp.reshape(v, (rank, -1, *first)), xp.reshape(outer, (n, rank, *last))


def expand(layer: Layer, factors: Factors) -> Array:
    """The weight (n, m) that ``factors`` in floating point stand for, U V + S, as NumPy."""
    weight = np.zeros((layer.n, layer.channels, *layer.kernel))
    if factors.kernels:
        product, *others = factors.kernels
        for kernel in others:
            # On every axis one of the two has extent 1, so their product broadcasts.
            product = np.einsum("or...,rc...->oc...", kernel, product)
        weight += product
    if factors.sparse is not None:
        weight[:, list(factors.channels)] += factors.sparse
    return weight.reshape(layer.n, layer.m)
