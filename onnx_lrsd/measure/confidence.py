"""How sure an error is that was measured on some samples."""

from __future__ import annotations

from math import exp, inf, log, sqrt
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]

TAIL = 0.025
"""Probability that the truth is above the interval, and below it."""
RESAMPLES, MOST_UNITS = 1000, 256
"""Resamples, and units they are drawn from, at most: of more samples several are summed to one unit."""
_FEWEST = 8
"""With fewer units resamples say little, and the supposed samples decide alone."""
SUPPOSED, DEVIATION = 4, 1.0
"""What is known beforehand counts like so many samples, whose errors deviate so much relative to the mean."""
WIDEST = 1.5
"""Times that resamples may widen the interval which the deviations give, at most."""
FLOOR = 0.2
"""Least deviation of a resample, as a share of that of the samples: some resamples repeat one sample."""


def ratio_interval(above: _Floats, below: _Floats) -> tuple[float, float]:
    """The 95 % interval of sum(above) / sum(below) over other samples; both (samples,), not negative.

    Errors of samples have a long tail, so the mean of a few is mostly too small. The interval is that of
    the studentised bootstrap on the logarithm of the ratio, which follows such tails, times what Student's
    distribution adds for few samples. It is at least as wide as the deviations of the samples say together
    with four supposed ones: a handful that happen to agree does not make it certain.
    Source: Davison and Hinkley, Bootstrap Methods and their Application (1997), sections 5.2 and 2.4;
    the supposed samples are a scaled inverse chi-squared prior (Gelman et al., Bayesian Data Analysis, 2.6).
    """
    total, whole = float(above.sum()), float(below.sum())
    if total <= 0 or not len(above):
        return 0.0, 0.0
    if whole <= 0 or not np.isfinite(total):
        return inf, inf
    above, below = _units(above), _units(below)
    count, degrees = len(above), SUPPOSED + len(above) - 1
    deviation = float(_deviation(above[None], below[None])[0])
    variance = (SUPPOSED * DEVIATION**2 + (count - 1) * count * deviation**2) / degrees / count
    half = student(degrees) * sqrt(variance)
    down, up = half, half
    if count >= _FEWEST and deviation > 0:
        drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
        tops, bottoms = above[drawn], np.maximum(below[drawn], whole / count * 1e-9)
        ratios = np.maximum(tops.sum(axis=1), total / (2 * count)) / bottoms.sum(axis=1)
        scaled = np.log(ratios / (total / whole)) / np.maximum(_deviation(tops, bottoms), FLOOR * deviation)
        low, high = np.quantile(scaled, (TAIL, 1 - TAIL)) * deviation * student(count - 1) / student(10**9)
        down, up = (min(max(half, float(end)), WIDEST * half) for end in (high, -low))
    middle = log(total / whole)
    return exp(middle - down), exp(min(middle + up, 700.0))


def student(degrees: int) -> float:
    """Where Student's distribution leaves TAIL above, to three digits from four degrees of freedom on.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.5.
    """
    z = float(NormalDist().inv_cdf(1 - TAIL))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    powers = degrees ** np.arange(1.0, len(terms) + 1)
    return z + float(np.sum(np.array(terms) / powers))


def _deviation(above: _Floats, below: _Floats) -> _Floats:
    """Standard deviation of log(sum / sum) of each row of (resamples, samples), by linearisation."""
    count = above.shape[1]
    tops = np.maximum(above.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    parts = above / tops - below / below.sum(axis=1, keepdims=True)
    found: _Floats = np.sqrt((parts**2).sum(axis=1) * count / max(count - 1, 1))
    return found


def _units(values: _Floats) -> _Floats:
    """``values`` as they are, or put together at random in MOST_UNITS sums."""
    if len(values) <= MOST_UNITS:
        return values
    order = np.random.default_rng(0).permutation(len(values))
    sums = np.zeros(MOST_UNITS)
    np.add.at(sums, order % MOST_UNITS, values)
    return sums
