"""The best U V of every rank, from one symmetric eigenproblem.

min |W - U V|_H^2 has U = P_r, V = P_r^T W with P the eigenvectors of W H W^T. Where n > m the
smaller problem is L^T W^T W L with H = L L^T.
Source: Eckart and Young, Psychometrika 1 (1936); Yu, Liu, Wang, Tao, CVPR 2017 (SVD-free).
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lrsd.arrays import namespace, top_eigenvectors
from onnx_lrsd.solver.problem import Metric
from onnx_lrsd.types import Array


@dataclass(frozen=True)
class LowRank:
    """Factors of every rank r up to k = min(n, m): ``left[:, :r] @ right[:r]``.

    ``left`` is (n, k), ``right`` (k, m); ``errors`` (k + 1,), that of rank r at r, are relative to
    tr(W H W^T).
    """

    left: Array
    right: Array
    errors: Array


def low_rank(weight: Array, metric: Metric, image: Array | None = None) -> LowRank:
    """Solve for ``weight`` (n, m) and all ranks up to min(n, m); ``image``, if it is known, is W H (n, m)."""
    xp = namespace(weight)
    n, m = weight.shape
    if n <= m or metric.rows is not None:
        sandwich = (metric.apply(weight) if image is None else image) @ weight.T
        values, left = top_eigenvectors((sandwich + sandwich.T) / 2, min(n, m))
        right = left.T @ weight
    else:
        scale, vectors = xp.linalg.eigh(metric.matrix(weight))
        scale = xp.sqrt(xp.maximum(scale, scale[-1] * 1e-14))
        root = weight @ (vectors * scale)
        values, inner = top_eigenvectors(root.T @ root, m)
        left, right = root @ inner, (inner / scale[:, None]).T @ vectors.T
    return LowRank(left, right, _tail(values))


def low_rank_errors(weight: Array, metric: Metric, image: Array | None = None) -> Array:
    """``LowRank.errors`` (min(n, m) + 1,) alone: eigenvalues take a fraction of the time of eigenvectors."""
    xp = namespace(weight)
    n, m = weight.shape
    if n <= m or metric.rows is not None:
        sandwich = (metric.apply(weight) if image is None else image) @ weight.T
    else:
        root = weight @ xp.linalg.cholesky(metric.matrix(weight))
        sandwich = root.T @ root
    values = xp.linalg.eigvalsh((sandwich + sandwich.T) / 2)
    return _tail(xp.flip(values)[: min(n, m)])


def _tail(values: Array) -> Array:
    """The share of the sum of descending eigenvalues (k,) that each rank misses: (k + 1,), from 1 on."""
    xp = namespace(values)
    values = xp.maximum(values, 0.0)
    tail = xp.flip(xp.cumulative_sum(xp.flip(values)))
    total = tail[0] if float(tail[0]) > 0 else xp.ones_like(tail[0])
    return xp.concat([tail, xp.zeros_like(tail[:1])]) / total
