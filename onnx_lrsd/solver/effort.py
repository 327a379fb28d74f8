"""How much work one fit may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Steps of a fit.

    ``sweeps`` of alternating least squares for factors alone: the first gives most of the gain, the fourth
    half a percent. Beside an S with free entries, ADMM goes through ``penalties`` values of rho, with
    ``iterations`` at each.
    """

    sweeps: int
    penalties: int
    iterations: int


BRIEF = Effort(sweeps=0, penalties=5, iterations=4)
FAST = Effort(sweeps=1, penalties=5, iterations=8)
STANDARD = Effort(sweeps=4, penalties=10, iterations=8)
