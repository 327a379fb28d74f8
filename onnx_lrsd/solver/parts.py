"""The low-rank part of U V + S while S is searched: each time S changes, it takes one cheap step.

A part approximates A (n, m) in a metric M that changes from step to step. ``FreeFactors`` is the
channel form, L = P P^T A; ``SharedFactors`` is any form whose first factor serves several groups of
inputs (spatial, channel-in, Tucker-2), L_b = H_b V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnx_lrsd.arrays import from_numpy, namespace, top_eigenvectors
from onnx_lrsd.solver import separable
from onnx_lrsd.solver.layout import group_metric, group_weight, ungroup_weight
from onnx_lrsd.solver.resolvent import Resolvent
from onnx_lrsd.types import Array

START_STEPS = 4
"""Subspace iterations of the first step, which starts from a random basis."""
_V_STEPS = 2
"""Conjugate gradient steps on V in one step of shared factors."""


class Part(Protocol):
    """A low-rank part; all arrays are float32, in the scaled columns of a Resolvent."""

    def shift(self, h: Resolvent, rho: float) -> None:
        """Change to the metric M = rho H (H + rho I)^-1."""

    def follow(self, a: Array, g: Array) -> Array:
        """Improve L for the target ``a``, of which g = a M / rho; returns (a - L) M / rho."""

    def refit(self, target: Array, h: Resolvent) -> None:
        """Improve L for ``target`` in the metric H."""

    def miss(self, target: Array) -> Array:
        """``target`` - L."""

    def tangent(self, d: Array) -> Array:
        """How ``miss`` changes when the target changes by ``d``."""


@dataclass
class FreeFactors:
    """L = P P^T A with P (n, r) orthonormal: the best right factor for any target A is known."""

    p: Array
    started: bool = False

    @staticmethod
    def random(like: Array, rank: int, seed: int) -> FreeFactors:
        """A random start, drawn with ``seed``."""
        start = np.random.default_rng(seed).standard_normal((like.shape[0], rank))
        return FreeFactors(orthonormal(from_numpy(start, like)))

    def shift(self, h: Resolvent, rho: float) -> None:
        """Nothing to do: ``follow`` is given all it needs of M."""

    def follow(self, a: Array, g: Array) -> Array:
        """One step of subspace iteration for the top eigenvectors of A M A^T."""
        for _ in range(1 if self.started else START_STEPS):
            self.p = orthonormal(a @ (g.T @ self.p))
        self.started = True
        return self.miss(g)

    def refit(self, target: Array, h: Resolvent) -> None:
        """Two steps of subspace iteration for A H A^T, and its eigenvectors in order."""
        if not self.p.shape[1]:
            return
        for _ in range(2):
            self.p = orthonormal(target @ h.apply(self.p.T @ target).T)
        small = self.p.T @ target
        self.p = self.p @ top_eigenvectors(h.apply(small) @ small.T, small.shape[0])[1]

    def miss(self, target: Array) -> Array:
        """(I - P P^T) target."""
        return target - self.p @ (self.p.T @ target)

    def tangent(self, d: Array) -> Array:
        """The same as ``miss``, which is linear."""
        return self.miss(d)


class SharedFactors:
    """L_b = H_b V over ``groups`` of inputs; with ``outer``, H_b = U G_b of that rank (Tucker-2)."""

    def __init__(self, target: Array, h: Resolvent, groups: int, rank: int, outer: int = 0) -> None:
        self._groups, self._outer = groups, outer
        self._metric = self._grouped(h.matrix)
        problem = separable.separable_problem(group_weight(target, groups), self._metric)
        self.v, self.h, _ = separable.fit(problem, rank, 1, outer=outer)
        self._low = self._product()

    def shift(self, h: Resolvent, rho: float) -> None:
        """Factorise what all steps at this rho share."""
        self._metric = self._grouped(h.envelope(rho))
        self._inverse, self._rho = h.shifted_inverse(rho), rho

    def follow(self, a: Array, g: Array) -> Array:
        """One sweep of alternating least squares in M."""
        self._sweep(a, self._rho * g)
        return g - (self._low - self._rho * self._inverse(self._low))

    def refit(self, target: Array, h: Resolvent) -> None:
        """Two sweeps of alternating least squares in H."""
        self._metric = self._grouped(h.matrix)
        product = h.apply(target)
        for _ in range(2):
            self._sweep(target, product)

    def miss(self, target: Array) -> Array:
        """``target`` - L, for a fixed L."""
        return target - self._low

    def tangent(self, d: Array) -> Array:
        """``d``: L is fixed."""
        return d

    def _grouped(self, metric: Array) -> separable.GroupedMetric:
        return separable.grouped_metric(group_metric(metric, self._groups))

    def _sweep(self, target: Array, product: Array) -> None:
        weight, image = group_weight(target, self._groups), group_weight(product, self._groups)
        problem = separable.separable_problem(weight, self._metric, image)
        self.v, self.h, _ = separable.alternate(problem, self.v, self.h, _V_STEPS, self._outer)
        self._low = self._product()

    def _product(self) -> Array:
        return ungroup_weight(namespace(self.v).matmul(self.h, self.v))


def orthonormal(p: Array) -> Array:
    """An orthonormal basis of the columns of ``p`` (n, r)."""
    return namespace(p).linalg.qr(p)[0] if p.shape[1] else p
