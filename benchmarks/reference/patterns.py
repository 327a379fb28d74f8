"""Which entries a sparse matrix keeps: boolean masks from scores, with exact cardinality."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from onnx_lrsd.arrays import namespace
from onnx_lrsd.types import Array

Select: TypeAlias = Callable[[Array], Array]
"""Scores (n, m), higher is better, to a boolean mask (n, m) of what is kept."""


def largest(scores: Array, density: float) -> Array:
    """The floor(density · size) highest scores, ties by position."""
    xp = namespace(scores)
    count = int(density * scores.size + 1e-6)
    flat = scores.reshape(-1)
    mask = xp.zeros(flat.size, dtype=bool)
    if count:
        mask[xp.argpartition(flat, flat.size - count)[flat.size - count :]] = True
    return mask.reshape(scores.shape)


def largest_in_rows(scores: Array, density: float) -> Array:
    """The floor(density · m) highest scores of every row."""
    xp = namespace(scores)
    width = scores.shape[1]
    count = int(density * width + 1e-6)
    mask = xp.zeros(scores.shape, dtype=bool)
    if count:
        kept = xp.argpartition(scores, width - count, axis=1)[:, width - count :]
        mask[xp.arange(scores.shape[0])[:, None], kept] = True
    return mask


def largest_in_groups(scores: Array, kept: int = 2, group: int = 4) -> Array:
    """The ``kept`` highest of every ``group`` neighbouring columns. Raises ValueError if m is no multiple."""
    xp = namespace(scores)
    if scores.shape[1] % group:
        raise ValueError(f"{scores.shape[1]} columns are not groups of {group}")
    parts = scores.reshape(scores.shape[0], -1, group)
    mask = xp.empty(parts.shape, dtype=bool)
    for one in range(group):
        better = xp.zeros(parts.shape[:2], dtype=xp.int8)
        for other in range(group):
            if other != one:  # of equals the first wins
                first = other < one
                beats = parts[..., other] >= parts[..., one] if first else parts[..., other] > parts[..., one]
                better += beats
        mask[..., one] = better < kept
    return mask.reshape(scores.shape)
