"""The least-squares problem of one layer: what to reproduce, and in which metric.

Let D = W - W~ and C = E[(x - mu)(x - mu)^T]. The bias makes up for the mean of the error, D mu, exactly, so
the error that remains is tr(D C D^T). Solvers work in the damped metric H = C + lambda I.

Where k consecutive outputs share one bias (the kernel positions of a transposed convolution) it makes up only
for the mean of D mu over them. The error |Q D mu|^2 remains as well, where Q takes from each output the mean
of its k outputs. As Q acts on outputs, no metric of the inputs can express it: solvers work in
C + (1 - 1/k) mu mu^T, for 1 - 1/k is the share of a vector's energy that Q keeps on average over all
directions. The bias and the error that are reported are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from onnx_lrsd.arrays import add_to_diagonal, cast, identity, indices, namespace, to_device, trace
from onnx_lrsd.types import Array, Layer, Moments

OWN = 2.0
"""Weight of a layer's own output error in the metric of its outputs; its readers together weigh 1."""
OF_SAMPLES = 6.0
"""Damping for one sample, in units of the mean diagonal of C; it falls with the number of samples."""
OF_ENTRIES = 6.0
"""Factor on OF_SAMPLES for an S of free entries, whose positions are fitted to the samples as well."""
PARTS = 8
"""Consecutive parts that few rows are divided into: parts 0, 2, 4 and 6 fit, the others judge."""


@dataclass(frozen=True)
class Metric:
    """H = C + damping I, the damped second moment of a layer's inputs.

    C (m, m) is ``second``, or rows^T rows / N for ``rows`` (N, m). If both are None, nothing is known of the
    inputs and C is the identity. ``factorised`` caches the metric factorised for groups of inputs
    (``separable.GroupedMetric``), by the numbers of groups and of inputs.
    """

    second: Array | None
    rows: Array | None
    damping: float
    factorised: dict[tuple[int, int], Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def apply(self, weight: Array) -> Array:
        """``weight`` (n, m) times H, (n, m)."""
        return self.undamped(weight) + self.damping * weight

    def undamped(self, weight: Array) -> Array:
        """``weight`` (n, m) times C, (n, m)."""
        if self.second is not None:
            return weight @ self.second
        if self.rows is not None:
            return (weight @ self.rows.T) @ self.rows / self.rows.shape[0]
        return weight

    def matrix(self, like: Array) -> Array:
        """H as an (m, m) array in the namespace, precision and device of ``like`` (n, m)."""
        if self.second is not None:
            result = self.second
        elif self.rows is not None:
            result = (self.rows.T @ self.rows) / self.rows.shape[0]
        else:
            return (1 + self.damping) * identity(like.shape[1], like)
        return add_to_diagonal(cast(result, like.dtype), self.damping)


@dataclass(frozen=True)
class Outputs:
    """The metric G (n, n) of a layer's outputs: ``root`` is G^(1/2), ``inverse`` is G^(-1/2), float64.

    Factors without S minimise tr(G D C D^T) in place of tr(D C D^T), D = W - W~.
    """

    root: Array
    inverse: Array

    def apply(self, right: Array) -> Array:
        """G times ``right`` (n, ...)."""
        return _times(self.root, _times(self.root, right))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Reproduce y = W x + b: ``weight`` (n, m) is what to aim at, float64.

    For unchanged inputs that is W. For the inputs that a compressed network feeds, it is the ridge
    regression of the original outputs on them. ``mean`` (m,) is E x and ``output_mean`` (n,) E y, from which
    the bias follows. ``energy`` is E|y - E y|^2, and ``cross`` (n, m), where outputs and inputs come from
    different networks, E[(y - E y)(x - E x)^T]. With ``outputs`` None, errors of all outputs count alike.
    ``entries_damping`` is the damping for an S of free entries. ``offset`` (n,) is the bias of W where
    several outputs share one, else None. Inputs and outputs are those of the network times ``scale``. A layer
    that ``keeps_zero`` has no bias and gets none; moments are taken about zero then.
    """

    layer: Layer
    weight: Array
    mean: Array
    output_mean: Array
    metric: Metric
    energy: float
    cross: Array | None = None
    outputs: Outputs | None = None
    entries_damping: float = 0.0
    offset: Array | None = None
    scale: float = 1.0
    keeps_zero: bool = False

    def error(self, weight: Array) -> float:
        """E|y - y~|^2 / E|y - E y|^2 of ``weight`` (n, m) with its best bias; 0 for a constant output."""
        if self.energy <= 0:
            return 0.0
        xp = namespace(weight)
        if self.cross is None:
            difference = self.weight - weight
            missed = float(xp.sum(self.metric.undamped(difference) * difference))
        else:
            own = float(xp.sum(self.metric.undamped(weight) * weight))
            nothing = self._mean_missed(self.output_mean)
            missed = self.energy - nothing - 2 * float(xp.sum(weight * self.cross)) + own
        missed += self._mean_missed(self.output_mean - weight @ self.mean)
        return max(missed, 0.0) / self.energy

    def expected(self, weight: Array) -> float:
        """The relative error of ``weight`` (n, m) expected on other samples: that in the damped metric.

        The inputs must be those of the original network.
        """
        difference = self.weight - weight
        missed = float(namespace(weight).sum(self.metric.apply(difference) * difference))
        return missed / self.energy if self.energy > 0 else 0.0

    def for_entries(self) -> Problem:
        """The problem with the damping for an S of free entries; for the inputs of the original network."""
        return replace(self, metric=replace(self.metric, damping=self.entries_damping))

    def halves(self) -> tuple[Problem, Problem]:
        """The problem on one half of its rows and on the other half, for fitting and for judging.

        Consecutive rows are often of one sample and stay together. Raises ValueError without rows.
        """
        rows = self.metric.rows
        if rows is None:
            raise ValueError("the metric has no rows to divide")
        xp = namespace(rows)
        part_of_row = np.arange(rows.shape[0]) * PARTS // rows.shape[0]
        judging = part_of_row % 2 == 1

        def of(chosen: np.ndarray) -> Problem:
            kept = xp.take(rows, indices(np.flatnonzero(chosen), rows), axis=0)
            metric = replace(self.metric, rows=kept)
            energy = float(xp.sum(metric.undamped(self.weight) * self.weight))
            return replace(self, metric=metric, energy=energy)

        return of(~judging), of(judging)

    def weigh(self, right: Array) -> Array:
        """G^(1/2) times ``right`` (n, ...); ``right`` itself where outputs count alike."""
        return right if self.outputs is None else _times(self.outputs.root, right)

    def unweigh(self, right: Array) -> Array:
        """Inverse of ``weigh``."""
        return right if self.outputs is None else _times(self.outputs.inverse, right)

    def bias(self, weight: Array) -> Array:
        """The best bias (n,) of ``weight`` (n, m); outputs that share one get the mean of theirs."""
        missed = self.output_mean - weight @ self.mean
        return missed if self.offset is None else _group_means(missed, self.layer.rows_per_bias)

    def _mean_missed(self, missed: Array) -> float:
        """The error that shared biases leave where outputs miss ``missed`` (n,) on average.

        What the metric counts of it already, by ``_mean_share``, is taken off.
        """
        if self.offset is None:
            return 0.0
        xp, shared = namespace(missed), self.layer.rows_per_bias
        left = xp.sum(xp.square(missed - _group_means(missed, shared)))
        return float(left - _mean_share(shared) * xp.sum(xp.square(missed - self.offset)))


def relative_damping(inputs: int, rows: int, samples: int, entries: bool = False) -> float:
    """Damping in units of the mean diagonal of C, between .01 and .3: more if less was seen.

    Rows of one sample are alike, so the number of samples counts as well as that of rows, and counts more for
    an S of free ``entries``. The rule was found on calibration samples kept apart from the fit
    (results/decisions.md).
    """
    of_samples = OF_SAMPLES * (OF_ENTRIES if entries else 1.0)
    return min(0.3, max(0.01, 0.06 * inputs / max(rows, 1), of_samples / max(samples, 1)))


def output_metric(read: Sequence[np.ndarray]) -> np.ndarray:
    """G (n, n), trace n, for outputs that are read with weights (outputs, places, n) each.

    An error e of the outputs gives a reader the error sum_p R_p e_p; with e alike at all places and
    independent between them its energy is e^T (sum_p R_p^T R_p) e. Readers count alike, and the error itself
    counts beside them (OWN). Only direct readers count: for errors further on the layers between are
    refitted.
    """
    n = read[0].shape[2]
    metric: np.ndarray = OWN * np.eye(n)
    for weight in read:
        rows = weight.reshape(-1, n).astype(np.float64)
        seen = rows.T @ rows
        metric += seen * (n / max(np.trace(seen), 1e-300) / len(read))
    metric *= n / np.trace(metric)
    return metric


def pose(
    layer: Layer,
    weight: np.ndarray,
    bias: np.ndarray,
    moments: Moments | None,
    device: str = "cpu",
    outputs: np.ndarray | None = None,
    entries: bool = False,
    pull: float = 1.0,
    regressed: bool = True,
) -> Problem:
    """The problem of one layer: ``weight`` (n, m), ``bias`` (n,), and the moments of its inputs.

    ``outputs`` is the metric (n, n) of the outputs, positive definite, or None for that of all alike;
    ``entries`` asks for the damping of an S of free entries.

    With ``moments.cross`` the weight to aim at is (cross + lambda W)(C + lambda I)^-1, which gives the
    original outputs on the new inputs (Zhang, Zou, He, Sun, TPAMI 2016, asymmetric reconstruction, with ridge
    towards W, ``pull`` times as strong as the damping). That regression is left out, and W is the aim, if
    ``regressed`` is False: errors and biases of a given weight are the same. Without moments weights alone
    decide. A layer without a bias whose inputs were zero in some rows gets none, so it still gives zeros
    there. Raises ValueError where shapes do not fit.
    """
    if weight.shape != (layer.n, layer.m) or bias.shape != (layer.n,):
        raise ValueError(
            f"weight {weight.shape} or bias {bias.shape} is not ({layer.n}, {layer.m}), ({layer.n},)"
        )
    keeps_zero = moments is not None and moments.silent > 0 and not bias.any()
    scale = 1.0 if moments is None else moments.scale
    w, b = to_device(cast(weight, np.float64), device), to_device(cast(scale * bias, np.float64), device)
    xp = namespace(w)
    weighed = None if outputs is None else _roots(to_device(outputs, device))
    offset = b if layer.rows_per_bias > 1 else None
    if moments is None or moments.count == 0:
        return Problem(
            layer=layer,
            weight=w,
            mean=xp.zeros(layer.m, dtype=w.dtype),
            output_mean=b,
            metric=Metric(None, None, 0.0),
            energy=float(xp.sum(w * w)),
            outputs=weighed,
            offset=offset,
            scale=scale,
        )
    if keeps_zero:
        moments = about_zero(moments)
    mean = to_device(moments.mean, device)
    metric, entries_damping = _damped_metric(layer, moments, mean, device, entries)
    posed = partial(
        Problem,
        layer=layer,
        mean=mean,
        metric=metric,
        outputs=weighed,
        entries_damping=entries_damping,
        offset=offset,
        scale=scale,
        keeps_zero=keeps_zero,
    )
    if moments.cross is None:
        energy = float(xp.sum(metric.undamped(w) * w))
        middle = b + w @ mean
        found = posed(weight=w, output_mean=middle, energy=energy)
        return replace(found, energy=energy + found._mean_missed(middle))
    cross = cast(to_device(moments.cross, device), xp.float64)
    middle = to_device(moments.output_mean, device)
    energy = float(moments.output_energy or 0.0)
    share = _mean_share(layer.rows_per_bias)
    if share:
        cross = cross + share * (middle - b)[:, None] * mean[None, :]
        energy += share * float(xp.sum(xp.square(middle - b)))
    ridge = replace(metric, damping=pull * metric.damping)
    best = regress(cross + ridge.damping * w, ridge) if regressed else w
    found = posed(weight=best, output_mean=middle, energy=energy, cross=cross)
    return replace(found, energy=energy + found._mean_missed(middle))


def _damped_metric(
    layer: Layer, moments: Moments, mean: Array, device: str, entries: bool
) -> tuple[Metric, float]:
    """The damped metric of a layer's inputs of that ``mean`` (m,), and the damping for an S of free entries.

    ``entries`` asks for the latter in the metric.
    """
    xp = namespace(mean)
    second = None if moments.second is None else cast(to_device(moments.second, device), xp.float64)
    rows = None if moments.rows is None else cast(to_device(moments.rows, device), xp.float64)
    total = trace(second) if rows is None else float(xp.sum(xp.square(rows))) / moments.count
    relative = partial(relative_damping, layer.m, moments.count, moments.samples or moments.count)
    diagonal = total / layer.m
    share = _mean_share(layer.rows_per_bias)
    if share and second is not None:
        second = second + share * mean[:, None] * mean[None, :]
    if share and rows is not None:
        rows = rows + share**0.5 * mean  # they are centred: their second moment grows by share mu mu^T
    metric = Metric(second, rows, max(relative(entries) * diagonal, 1e-30))
    return metric, max(relative(True) * diagonal, 1e-30)


def add_moments(parts: Sequence[Moments], *, biased: bool) -> Moments | None:
    """The moments for one weight that several layers apply; each layer's own bias makes up for its own mean.

    Layers count alike, however many rows they have. Where they are not ``biased`` and some rows were zeros,
    moments are about zero. None where nothing is known of any.
    """
    parts = [part for part in parts if part.count] or list(parts[:1])
    if len(parts) < 2:
        return parts[0] if parts else None
    silent = 0 if biased else sum(part.silent for part in parts)
    if silent:
        parts = [about_zero(part) for part in parts]
    share, first = 1 / len(parts), parts[0]
    scales = [first.scale / part.scale for part in parts]
    count = sum(part.count for part in parts)

    def mean(values: Sequence[Array | None], power: int) -> Array | None:
        known = [
            scale**power * value for scale, value in zip(scales, values, strict=True) if value is not None
        ]
        return share * sum(known[1:], known[0]) if len(known) == len(parts) else None

    rows = None
    if all(part.rows is not None for part in parts):
        # Each layer's rows weigh as much as any other's in the mean over all of them.
        weights = [scale * (share * count / p.count) ** 0.5 for scale, p in zip(scales, parts, strict=True)]
        each = [weight * np.asarray(part.rows) for weight, part in zip(weights, parts, strict=True)]
        rows = np.concatenate(each).astype(np.float32)
    energy = mean([part.output_energy for part in parts], 2)
    return replace(
        first,
        count=count,
        mean=mean([part.mean for part in parts], 1),
        second=None if rows is not None else mean([second_moment(part) for part in parts], 2),
        rows=rows,
        cross=mean([part.cross for part in parts], 2),
        output_mean=mean([part.output_mean for part in parts], 1),
        output_energy=None if energy is None else float(energy),
        silent=silent,
    )


def second_moment(moments: Moments) -> Array:
    """The second moment (m, m), from rows where these stand in its place."""
    if moments.rows is None:
        return moments.second
    return moments.rows.T @ moments.rows / max(moments.count, 1)


def about_zero(moments: Moments) -> Moments:
    """The moments about zero, E[x x^T] and so on, with means of zero: no bias then takes up a mean."""
    mean, output_mean = moments.mean, moments.output_mean
    xp = namespace(mean)
    second, rows, cross, energy = moments.second, moments.rows, moments.cross, moments.output_energy
    if second is not None:
        second = cast(second, xp.float64) + mean[:, None] * mean[None, :]
    if rows is not None:
        rows = cast(rows, xp.float64) + mean
    if cross is not None and output_mean is not None:
        cross = cast(cross, xp.float64) + output_mean[:, None] * mean[None, :]
        energy = float(energy or 0.0) + float(xp.sum(xp.square(output_mean)))
        output_mean = xp.zeros_like(output_mean)
    return replace(
        moments,
        mean=xp.zeros_like(mean),
        second=second,
        rows=rows,
        cross=cross,
        output_mean=output_mean,
        output_energy=energy,
    )


def _mean_share(shared: int) -> float:
    """The share of mu mu^T that the metric counts where so many outputs share a bias; 0 for one."""
    return 1 - 1 / shared


def _group_means(values: Array, size: int) -> Array:
    """Each of ``values`` (n,) replaced by the mean of the ``size`` consecutive ones that it belongs to."""
    xp = namespace(values)
    groups = xp.reshape(values, (-1, size))
    return xp.reshape(xp.broadcast_to(xp.mean(groups, axis=1, keepdims=True), groups.shape), (-1,))


def _times(left: Array, right: Array) -> Array:
    """The product of two matrices, in the precision of the right one."""
    xp = namespace(right)
    return xp.matmul(cast(left, right.dtype), right)


def _roots(metric: Array) -> Outputs:
    """The square root of ``metric`` (n, n) and its inverse, float64."""
    xp = namespace(metric)
    values, vectors = xp.linalg.eigh(cast(metric, xp.float64))
    root = xp.sqrt(xp.maximum(values, values[-1] * 1e-12))
    return Outputs((vectors * root) @ vectors.T, (vectors / root) @ vectors.T)


def regress(right: Array, metric: Metric) -> Array:
    """The regression ``right`` H^-1 (n, m); ``right`` (n, m) are the cross moments of outputs and inputs.

    With rows F (N, m) the inverse of H (m, m) takes that of an (N, N) matrix (Woodbury).
    """
    xp = namespace(right)
    if metric.rows is None:
        return xp.linalg.solve(metric.matrix(right), right.T).T
    rows, count = metric.rows, metric.rows.shape[0]
    gram = rows @ rows.T / count + metric.damping * identity(count, rows)
    inner = xp.linalg.solve(gram, (right @ rows.T).T).T
    return (right - inner @ rows / count) / metric.damping
