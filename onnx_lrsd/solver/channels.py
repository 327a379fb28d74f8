"""The channel-structured sparse part, chosen jointly with the factors.

S is free on the input channels J. For any factors the best S regresses them out, so the
factors are left with the complement c of J and the *conditional* metric
H_cc - H_cJ H_JJ^-1 H_Jc, and S = W_J + (W - UV)_c H_cJ H_JJ^-1: a closed form, no alternation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_lrsd.arrays import diagonal, indices, namespace, spd_inverse, to_numpy
from onnx_lrsd.types import Array


@dataclass(frozen=True)
class Elimination:
    """The layer with the channels J regressed out.

    ``kept`` (j t,) are the columns of J and ``rest`` those of the complement, t = kernel positions;
    ``metric`` is the conditional metric of the rest; ``regression`` (rest, kept) is H_cJ H_JJ^-1.
    """

    channels: tuple[int, ...]
    kept: Array
    rest: Array
    metric: Array
    regression: Array

    def sparse(self, weight: Array, factors: Array) -> Array:
        """S (n, kept) for the product of the ``factors`` on the rest, (n, rest)."""
        xp = namespace(weight)
        beside = xp.take(weight, self.rest, axis=1) - factors
        return xp.take(weight, self.kept, axis=1) + beside @ self.regression

    def join(self, kept: Array, rest: Array) -> Array:
        """(n, m) with the columns ``kept`` (n, kept) of J and ``rest`` (n, rest) of the complement."""
        xp = namespace(kept)
        order = xp.argsort(xp.concat([self.kept, self.rest]))
        return xp.take(xp.concat([kept, rest], axis=1), order, axis=1)


def eliminate(metric: Array, channels: tuple[int, ...], taps: int) -> Elimination:
    """Regress the columns of ``channels`` out of ``metric`` (m, m); a channel has ``taps`` columns."""
    xp = namespace(metric)
    mask = np.zeros(metric.shape[0] // taps, dtype=bool)
    mask[list(channels)] = True
    columns = np.repeat(mask, taps)
    kept, rest = (indices(np.flatnonzero(chosen), metric) for chosen in (columns, ~columns))
    of_rest, of_kept = xp.take(metric, rest, axis=0), xp.take(metric, kept, axis=0)
    cross = xp.take(of_rest, kept, axis=1)
    regression = cross @ spd_inverse(xp.take(of_kept, kept, axis=1))
    conditional = xp.take(of_rest, rest, axis=1) - regression @ cross.T
    return Elimination(channels, kept, rest, (conditional + conditional.T) / 2, regression)


def channel_gains(difference: Array, metric: Array, taps: int) -> np.ndarray:
    """How much the error tr(D H D^T) falls when one channel alone is freed, for every channel.

    ``difference`` D (n, m), ``metric`` H (m, m); the gain of channel g is
    tr((D H)_g H_gg^-1 (D H)_g^T). Shape (channels,).
    """
    xp = namespace(difference)
    n, m = difference.shape
    channels = m // taps
    gradient = xp.permute_dims(xp.reshape(difference @ metric, (n, channels, taps)), (1, 0, 2))
    blocks = xp.permute_dims(xp.reshape(metric, (channels, taps, channels, taps)), (1, 3, 0, 2))
    own = xp.permute_dims(diagonal(blocks), (2, 0, 1))
    return to_numpy(xp.sum(gradient * (gradient @ xp.linalg.inv(own)), axis=(1, 2)))


def best_channels(gains: np.ndarray, count: int) -> tuple[int, ...]:
    """The ``count`` channels of largest gain, ascending; ties go to the lower index."""
    order = np.argsort(-gains, kind="stable")[:count]
    return tuple(sorted(int(c) for c in order))
