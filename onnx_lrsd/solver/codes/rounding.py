"""Weights as whole numbers, rounded for the least error of the output.

Codes k of L levels stand for (k - (L - 1) / 2) s. Rounding W to Q costs tr(E H E^T), E = W - Q. With
H = R R^T and R upper triangular, |E R|^2 is settled column by column: the error of a column moves the targets
of the later ones, as far as the inputs are correlated. This is Babai's nearest-plane algorithm; it does in
one pass what optimal brain surgeon does with an inverse (Frantar et al., GPTQ, ICLR 2023; equivalence: Chen
et al., The Geometry of LLM Quantization, 2025). Columns of large inputs go first, while there are others left
that can compensate for them. ``settle`` is coordinate descent on the codes, which may have a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lrsd.arrays import cast, diagonal, namespace
from onnx_lrsd.types import Array

_COLUMNS = 64
"""Columns in a block: errors are carried on one by one within it, and by one product to all behind it."""
CLIPS = np.linspace(0.28, 1.0, 13)
"""Steps tried, as shares of the one that reaches the largest number."""
_AT_ONCE, _TURNS = 1 << 18, 3
"""Numbers that ``round_rows`` rounds at a time, and how often it finds codes and steps in turn."""
TINY = 1e-30
"""Stands for the largest number of a row of zeros, whose step may be any."""


def steps_of(weight: Array, importance: Array, levels: Array) -> Array:
    """The step (n, 1) of every row of ``weight`` (n, m) of least squared error, rounded to the nearest.

    Columns are weighted by ``importance``, (m,) or (n, m). ``levels`` is (n, 1).
    """
    xp = namespace(weight)
    top = (levels - 1) / 2
    largest = xp.maximum(xp.max(xp.abs(weight), axis=1, keepdims=True), TINY) / xp.maximum(top, 0.5)
    least, best = None, largest
    for clip in CLIPS:
        steps = largest * float(clip)
        missed = xp.square(weight - nearest(weight, steps, levels) * steps)
        error = xp.sum(missed * importance, axis=1, keepdims=True)
        if least is None:
            least, best = error, steps
        else:
            best = xp.where(error < least, steps, best)
            least = xp.minimum(error, least)
    return best


def nearest(weight: Array, steps: Array, levels: Array) -> Array:
    """Centred codes: ``weight`` / ``steps`` rounded to k - (L - 1) / 2, k of 0..L-1; all broadcast."""
    xp = namespace(weight)
    top = (levels - 1) / 2
    return xp.clip(xp.round(weight / steps + top), 0 * top, 2 * top) - top


def round_rows(weight: Array, levels: int) -> tuple[Array, Array]:
    """Centred codes (n, m) and steps (n, 1), float32, of ``weight`` (n, m) where no metric is known.

    Codes and the step of least squared error are found in turn, from the step of ``steps_of`` on: Lloyd's
    method for equally spaced levels. Rows are taken a few at a time, so they stay in the cache.
    """
    xp = namespace(weight)
    rows = max(_AT_ONCE // weight.shape[1], 1)
    codes, steps = [], []
    for start in range(0, weight.shape[0], rows):
        part = cast(weight[start : start + rows, :], xp.float32)
        counts = xp.full_like(part[:, :1], float(levels))
        step = steps_of(part, xp.ones_like(part[0, :]), counts)
        for _ in range(_TURNS):
            code = nearest(part, step, counts)
            above = xp.sum(part * code, axis=1, keepdims=True)
            below = xp.sum(xp.square(code), axis=1, keepdims=True)
            best = above / xp.where(below > 0, below, xp.ones_like(below))
            step = xp.where(best > 0, best, step)
        codes.append(code)
        steps.append(step)
    return xp.concat(codes, axis=0), xp.concat(steps, axis=0)


@dataclass(frozen=True)
class Feedback:
    """How errors of columns are carried into later ones in a metric H (m, m), positive definite.

    Columns are rounded in ``order`` (m,), and H = R R^T in that order. ``root`` (m, m), float32, is R with
    column j divided by R_jj: an error e of column i moves the target of a later column j by e R_ij / R_jj.
    ``left`` (m,), float64, is R_jj^2, in the order of H: what a unit error of column j costs once the columns
    behind it have compensated for what they can.
    """

    order: Array
    root: Array
    left: Array

    @staticmethod
    def of(metric: Array) -> Feedback:
        """One factorisation; it serves all weights and storages in this metric."""
        xp = namespace(metric)
        order = xp.argsort(-diagonal(metric))
        root = _upper_root(xp.take(xp.take(metric, order, axis=0), order, axis=1))
        own = diagonal(root)
        left = xp.take(xp.square(own), xp.argsort(order), axis=0)
        return Feedback(order, cast(root / own, xp.float32), left)


def round_columns(weight: Array, feedback: Feedback, steps: Array, levels: Array) -> Array:
    """Centred codes (n, m), float32, of ``weight`` (n, m), errors of columns carried into those that follow.

    ``steps`` and ``levels`` broadcast against (n, m).
    """
    xp = namespace(weight)
    m = weight.shape[1]
    order, root = feedback.order, feedback.root
    w = cast(xp.take(weight, order, axis=1), xp.float32)
    steps, levels = (
        cast(xp.take(xp.broadcast_to(x, (x.shape[0], m)), order, axis=1), xp.float32) for x in (steps, levels)
    )
    codes, carried = xp.zeros_like(w), xp.zeros_like(w)
    for start in range(0, m, _COLUMNS):
        stop = min(start + _COLUMNS, m)
        aim = w[:, start:stop] + carried[:, start:stop]
        errors = xp.zeros_like(aim)
        for j in range(start, stop):
            i = j - start
            codes[:, j] = nearest(aim[:, i], steps[:, j], levels[:, j])
            errors[:, i] = w[:, j] - codes[:, j] * steps[:, j]
            aim[:, i + 1 :] += errors[:, i : i + 1] * root[j : j + 1, j + 1 : stop]
        carried[:, stop:] += errors @ root[start:stop, stop:]
    return xp.take(codes, xp.argsort(order), axis=1)


def settle(
    weight: Array, metric: Array, codes: Array, steps: Array, levels: Array, mask: Array | None = None
) -> Array:
    """One sweep of coordinate descent: each column's codes set to their best beside all others.

    Shapes as in ``round_columns``; ``mask`` (n, m) says which codes exist, the others count as zero.
    """
    xp = namespace(codes)
    m = codes.shape[1]
    own = diagonal(metric)
    h = cast(metric, xp.float32)
    steps, levels = (cast(xp.broadcast_to(x, (x.shape[0], m)), xp.float32) for x in (steps, levels))
    present = codes if mask is None else xp.where(mask, codes, xp.zeros_like(codes))
    gradient = cast(weight, xp.float32) - present * steps
    gradient = gradient @ h
    codes = xp.asarray(codes, copy=True)
    for start in range(0, m, _COLUMNS):
        stop = min(start + _COLUMNS, m)
        local, moved = xp.asarray(gradient[:, start:stop], copy=True), xp.zeros_like(codes[:, start:stop])
        for j in range(start, stop):
            i = j - start
            step = steps[:, j]
            better = nearest(codes[:, j] * step + local[:, i] / float(own[j]), step, levels[:, j])
            change = better - codes[:, j]
            if mask is not None:
                change = xp.where(mask[:, j], change, xp.zeros_like(change))
            codes[:, j] += change
            moved[:, i] = change * step
            local -= moved[:, i : i + 1] * h[j : j + 1, start:stop]
        gradient[:, stop:] -= moved @ h[start:stop, stop:]
    return codes


def best_scale(weight: Array, metric: Array, codes: Array, steps: Array) -> Array:
    """The step (n, 1) of every row of least error tr(E H E^T) for its centred ``codes`` (n, m).

    A row whose best step is not positive keeps that of ``steps`` (n, 1).
    """
    xp = namespace(weight)
    codes = cast(codes, xp.float64)
    image = codes @ metric
    above = xp.sum(weight * image, axis=1, keepdims=True)
    below = xp.sum(codes * image, axis=1, keepdims=True)
    best = above / xp.where(below > 0, below, xp.ones_like(below))
    return xp.where(best > 0, best, steps)


def _upper_root(metric: Array) -> Array:
    """R (m, m), upper triangular, with R R^T = H, float64."""
    xp = namespace(metric)
    flipped = xp.flip(cast(metric, xp.float64))
    return xp.flip(xp.linalg.cholesky(flipped))
