"""What a width loses on rows that its reader was not fitted to.

A reader of few channels has many weights to fit, and samples are few: on the rows it was fitted to its error
may be a tenth of what it is on others, and the damped metric, which stands for what was not seen, is wrong by
a factor that differs from layer to layer (results/width.md). So a few widths are judged by cross-validation:
each third of the rows judges a fit to the other two. The ratio of that error to the damped one is
interpolated for the widths in between.
"""

from __future__ import annotations

from itertools import pairwise
from math import ceil

import numpy as np
import numpy.typing as npt

from onnx_lrsd.arrays import cast, from_numpy, indices, namespace
from onnx_lrsd.solver.problem import Metric, Problem, regress
from onnx_lrsd.solver.width import Columns, Widths, restricted
from onnx_lrsd.types import Array, Rows

FOLDS = 3
MOST_JUDGED = 6144
"""Rows that fit and judge, at most: with more, the fits of wide layers take longer than all the rest."""
FEWEST_JUDGED = 4 * FOLDS
"""With fewer rows nothing is judged."""
ROUNDING_ERROR = 1e-12
"""A relative error this small is rounding: a ratio to it says nothing."""
MANY_INPUTS = 1024
"""Inputs from which a single third of the rows judges."""
JUDGED_SHARES = (0.75, 0.5, 0.25)
"""Shares of the channels at which widths are judged."""


def some_rows(rows: Rows) -> Rows:
    """As many of ``rows`` (N, m) as fit and judge, evenly over all."""
    return rows[:: max(ceil(len(rows) / MOST_JUDGED), 1)]


def width_errors(
    problem: Problem, columns: Columns, found: Widths, damped: npt.NDArray[np.float64], rows: Rows
) -> npt.NDArray[np.float64]:
    """The relative error of one reader by the number of channels kept (channels + 1,), on rows kept apart.

    ``columns`` (channels, k) are the inputs of each channel, as in ``widths``. That function ``found`` the
    channels, and the ``damped`` errors (channels + 1,) of this reader. ``rows`` (N, m), float32, are its
    inputs, rows of one sample side by side. An error is never larger than that of fewer channels.
    """
    total, count = len(columns), rows.shape[0]
    tried = [max(round(share * total), total - len(found.dropped)) for share in JUDGED_SHARES]
    tried = [width for width in tried if 0 < width < total and damped[width] > ROUNDING_ERROR]
    if count < FEWEST_JUDGED or problem.energy <= 0 or not tried:
        return damped
    judged = _judged(problem, columns, found, tried, some_rows(rows))
    ratios = np.log(
        [max(error, ROUNDING_ERROR) / damped[width] for error, width in zip(judged, tried, strict=True)]
    )
    known = np.isfinite(damped)
    errors = damped.copy()
    errors[known] *= np.exp(np.interp(np.flatnonzero(known), tried[::-1], ratios[::-1]))
    errors[known] = np.maximum.accumulate(errors[known][::-1])[::-1]
    return errors


def _judged(
    problem: Problem, columns: Columns, found: Widths, tried: list[int], rows: Rows
) -> npt.NDArray[np.float64]:
    """The relative error of each width in ``tried``; each third of the rows judges once.

    With MANY_INPUTS only the middle third does: fits take most of a run there, and rows are many.
    """
    xp = namespace(problem.weight)
    weight = cast(problem.weight, xp.float32)
    centred = from_numpy(rows, like=weight)
    mean = xp.mean(centred, axis=0)
    if not problem.keeps_zero:
        centred = centred - mean
    outputs, energy = centred @ weight.T, 0.0
    edges = np.arange(FOLDS + 1) * rows.shape[0] // FOLDS
    folds = [slice(int(start), int(stop)) for start, stop in pairwise(edges)]
    thin = problem.metric.rows is not None
    judging = range(FOLDS) if thin or weight.shape[1] < MANY_INPUTS else range(1, 2)
    seconds: dict[int, Array] = {}  # X^T X of each fold that some fit needs
    if not thin:
        for fold in range(FOLDS):
            if any(fold != judge for judge in judging):
                seconds[fold] = centred[folds[fold], :].T @ centred[folds[fold], :]
    missed = np.zeros(len(tried))
    for judge in judging:
        energy += _energy(outputs[folds[judge], :])
        others = [fold for fold in range(FOLDS) if fold != judge]
        fit = xp.concat([centred[folds[fold], :] for fold in others], axis=0)
        middle = xp.mean(fit, axis=0)
        if problem.keeps_zero:
            middle = xp.zeros_like(middle)
        if thin:
            metric = Metric(None, fit - middle, problem.metric.damping)
        else:
            second = sum((seconds[fold] for fold in others[1:]), start=seconds[others[0]]) / fit.shape[0]
            metric = Metric(second - middle[:, None] * middle[None, :], None, problem.metric.damping)
        aim = metric.apply(weight)
        judges = centred[folds[judge], :] - middle
        wanted = outputs[folds[judge], :] - middle @ weight.T
        for place, width in enumerate(tried):
            gone = columns[np.setdiff1d(np.arange(len(columns)), np.asarray(found.kept(width)))]
            at = indices(np.setdiff1d(np.arange(weight.shape[1]), gone), weight)
            narrow = regress(xp.take(aim, at, axis=1), restricted(metric, at))
            missed[place] += _energy(wanted - xp.take(judges, at, axis=1) @ narrow.T)
    relative: npt.NDArray[np.float64] = missed / max(energy, 1e-300)
    return relative


def _energy(values: Array) -> float:
    return float(namespace(values).sum(namespace(values).square(values)))
