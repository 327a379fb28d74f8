"""Patterns of the sparse part: which entries of an (n, m) matrix it keeps.

One projection serves every pattern: the nearest matrix of the pattern keeps the entries of largest
magnitude (unstructured), the N largest of each M along the input channels (N:M), or the input
channels of largest norm, all kernel positions together (channels).
"""

from __future__ import annotations

from onnx_lrsd.arrays import cast, kth_largest, namespace
from onnx_lrsd.types import CHANNELS, N_OF_M, UNSTRUCTURED, Array, Pattern


def support(values: Array, pattern: Pattern, taps: int = 1, *, exact: bool = True) -> Array:
    """The boolean mask (n, m) of the entries of ``values`` that their projection onto ``pattern`` keeps.

    Columns are (input channel, kernel position), ``taps`` positions to a channel. The cardinality is
    exact, ties go to the lower index; without ``exact``, which saves time, all tied entries are kept.
    """
    xp = namespace(values)
    n, m = values.shape
    if pattern.kind == UNSTRUCTURED:
        magnitudes = xp.reshape(xp.abs(values), (1, -1))
        return xp.reshape(_largest(magnitudes, pattern.count, exact), (n, m))
    if pattern.kind == N_OF_M:
        blocks = xp.reshape(xp.abs(values), (n, m // (taps * pattern.block), pattern.block, taps))
        return xp.reshape(_largest_of_few(blocks, pattern.count), (n, m))
    if pattern.kind == CHANNELS:
        energy = xp.sum(xp.reshape(values**2, (n, m // taps, taps)), axis=(0, 2))
        kept = _largest(energy[None, :], pattern.count, exact)
        every = xp.zeros_like(xp.reshape(values, (n, m // taps, taps)), dtype=kept.dtype)
        return xp.reshape(every | kept[0, :, None], (n, m))
    return xp.zeros_like(values, dtype=xp.bool)


def nonzeros(pattern: Pattern, n: int, m: int, taps: int = 1) -> int:
    """Entries that ``pattern`` keeps of an (n, m) matrix."""
    return {
        UNSTRUCTURED: pattern.count,
        N_OF_M: n * m * pattern.count // max(pattern.block, 1),
        CHANNELS: n * pattern.count * taps,
    }.get(pattern.kind, 0)


def check_pattern(pattern: Pattern, n: int, m: int, taps: int = 1) -> None:
    """Raise ValueError, naming the pattern, when an (n, m) matrix cannot have it."""
    channels = m // taps
    most = {UNSTRUCTURED: n * m, N_OF_M: pattern.block, CHANNELS: channels}.get(pattern.kind, 0)
    if not 0 <= pattern.count <= most:
        raise ValueError(f"pattern {pattern} of an ({n}, {m}) weight: its count is not in 0..{most}")
    if pattern.kind == N_OF_M and channels % pattern.block:
        raise ValueError(f"pattern {pattern}: {channels} input channels are no multiple of {pattern.block}")


def grown(pattern: Pattern, share: float) -> Pattern:
    """The pattern with this share of its entries, where entries are free; else the pattern itself."""
    if pattern.kind != UNSTRUCTURED:
        return pattern
    return Pattern(UNSTRUCTURED, max(1, round(min(share, 1.0) * pattern.count)))


def _largest(values: Array, count: int, exact: bool) -> Array:
    """Mask of the ``count`` largest of a (1, k) array, ties to the lower index or, if not ``exact``, kept."""
    xp = namespace(values)
    size = values.shape[1]
    if count <= 0 or count >= size:
        return xp.full_like(values, count > 0, dtype=xp.bool)
    least = kth_largest(values[0, :], count)
    if not exact:
        return values >= least
    above, level = values > least, values == least
    ranks = xp.cumulative_sum(cast(level[0, :], xp.int32))[None, :]
    return above | (level & (ranks <= count - xp.count_nonzero(above)))


def _largest_of_few(values: Array, count: int) -> Array:
    """Mask of the ``count`` largest along the third, short axis of four, ties to the lower index."""
    xp = namespace(values)
    parts = [values[:, :, place, :] for place in range(values.shape[2])]
    beaten_by = [xp.zeros_like(part, dtype=xp.int8) for part in parts]
    for second in range(len(parts)):
        for first in range(second):
            won = cast(parts[first] >= parts[second], xp.int8)
            beaten_by[second] = beaten_by[second] + won
            beaten_by[first] = beaten_by[first] + (1 - won)
    return xp.stack([times < count for times in beaten_by], axis=2)
