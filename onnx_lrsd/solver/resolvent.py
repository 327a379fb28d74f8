"""H and (H + rho I)^-1 for many rho, from one eigendecomposition.

H is the damped second moment of a layer's inputs in scaled columns x_j / s_j, where its mean diagonal
is one. s_j = d_j^SCALING up to a factor, with d the mean of diag(H) over the kernel positions of a
channel: all positions of a channel are scaled alike. The magnitudes by which entries of S compete are
then nearer to their effect on the output. Where there are few rows F (N, m), H = F^T F + damping I,
everything goes through the (N, N) matrix F F^T and no (m, m) matrix is formed (Woodbury); one s serves
all columns.
"""

from __future__ import annotations

from collections.abc import Callable

from onnx_lrsd.arrays import cast, diagonal, namespace
from onnx_lrsd.solver.problem import Metric
from onnx_lrsd.types import Array

SCALING = 0.2
"""Between 0 (none) and 1/2 (unit diagonal): found on calibration errors (results/solvers.md)."""

THIN = 8
"""For a weight this many times wider than high, forming the inverse (m, m) costs more than it saves."""

_Map = Callable[[Array], Array]


class Resolvent:
    """The scaled metric of a layer: ``matrix`` (m, m), float32, or None where there are few rows.

    ``columns`` (m,), float64, is s, and ``damping`` is in units of the mean diagonal.

    Eigenvectors are float32: they are off by about 1e-7 of the largest eigenvalue, at most m in these
    units, which the damping of .01 and more outweighs.
    """

    def __init__(self, metric: Metric, like: Array, taps: int = 1) -> None:
        xp = namespace(like)
        self._rows = self.matrix = None
        self._thin = THIN * like.shape[0] < like.shape[1]
        if metric.rows is not None:
            energy = xp.sum(metric.rows**2) / (metric.rows.shape[0] * like.shape[1]) + metric.damping
            self.columns = xp.sqrt(energy) * xp.ones_like(like[0, :])
            self._rows = cast(metric.rows / (metric.rows.shape[0] ** 0.5 * self.columns), xp.float32)
            gram = self._rows @ self._rows.T
        else:
            matrix = metric.matrix(like)
            own = xp.maximum(diagonal(matrix), 1e-30)
            energy = xp.mean(own)
            channels = xp.mean(xp.reshape(own, (-1, taps)), axis=1)
            scale = xp.repeat(channels, taps) ** SCALING
            self.columns = scale * xp.sqrt(xp.mean(own / scale**2))
            self.matrix = gram = cast(matrix / self.columns[:, None] / self.columns, xp.float32)
        self.damping = float(metric.damping / energy)
        self._values, self._vectors = xp.linalg.eigh(gram)
        self._values = xp.maximum(self._values, 0.0)

    def apply(self, x: Array) -> Array:
        """``x`` (n, m) times H."""
        if self._rows is None:
            return x @ self.matrix
        return (x @ self._rows.T) @ self._rows + self.damping * x

    def shifted_inverse(self, rho: float) -> _Map:
        """A function from x (n, m) to x (H + rho I)^-1."""
        rows, shift = self._rows, rho + (self.damping if self._rows is not None else 0.0)
        vectors, values = self._vectors, self._values + shift
        if rows is None and self._thin:
            return lambda x: ((x @ vectors) / values) @ vectors.T
        root = vectors / values**0.5
        inverse = root @ root.T
        if rows is None:
            return lambda x: x @ inverse
        return lambda x: (x - ((x @ rows.T) @ inverse) @ rows) / shift

    def envelope(self, rho: float) -> Array:
        """rho H (H + rho I)^-1, (m, m): H with its large eigenvalues held down to rho.

        It is the metric of min_Z |X - Z|_H^2 + rho |Z|^2 as a function of X (Moreau envelope).
        """
        root = self._vectors * (rho * self._values / (self._values + rho)) ** 0.5
        return root @ root.T
