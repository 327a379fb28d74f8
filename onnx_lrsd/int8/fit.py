"""Int8 behind low rank: a fitter whose results are quantised, and what each of the two steps does alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from onnx_lrsd.data.samples import Samples
from onnx_lrsd.errors import ModelError
from onnx_lrsd.fit.fitter import BOTH, INT8, ORIGINAL, Fitted, Fitter
from onnx_lrsd.graph.model import Model
from onnx_lrsd.int8.quantise import Quantised, quantise
from onnx_lrsd.run import Run
from onnx_lrsd.runtime.quantiser import saturates
from onnx_lrsd.types import Form
from onnx_lrsd.wording import counted

TOLERANCE = 0.01
"""Output error that int8 may add, where the user names none for the whole."""
SATURATES = (
    "Sums of int8 products saturate on this processor, so weights take 7 bits of their 8. "
    "The result is right on any; one made on a processor with VNNI would be a little closer."
)


@dataclass(frozen=True)
class Int8Fitter:
    """Quantises what ``plain`` fits, by the ranges that activations have on ``samples``."""

    run: Run
    plain: Fitter
    samples: Samples

    def fit(self, forms: Mapping[str, Form]) -> Fitted:
        """The model with ``forms`` and int8; what each step does alone are its alternatives."""
        low_rank = self.plain.fit(forms)
        if low_rank.step == ORIGINAL:
            return self._alone
        both = self._with_int8(low_rank, BOTH)
        if not both.nodes:
            return both

        def alternatives() -> tuple[Fitted, ...]:
            return (self._alone, low_rank) if self._alone.nodes else (low_rank,)

        return replace(both, alternatives=alternatives)

    @cached_property
    def _alone(self) -> Fitted:
        return self._with_int8(self.plain.fit({}), INT8)

    def _with_int8(self, fitted: Fitted, step: str) -> Fitted:
        """``fitted`` quantised, as ``step``; as it is where no layer bears int8."""
        made = self._quantised(fitted.model)
        notes = tuple(_in_float(count, reason) for reason, count in made.without_kernel.items())
        if not made.nodes:
            return replace(fitted, left=made.left, notes=notes)
        if saturates():
            notes = (*notes, SATURATES)
        return replace(fitted, step=step, model=made.model, nodes=made.nodes, left=made.left, notes=notes)

    def _quantised(self, model: Model) -> Quantised:
        most = self.run.options.max_error
        tolerance = TOLERANCE if most is None else most / 2
        with self.run.journal.clock("int8"):
            try:
                return quantise(model, self.samples, tolerance, progress=self.run.progress)
            except ModelError as error:  # the low rank is worth having all the same
                self.run.journal.warn(str(error))
                return Quantised(model, 0, {}, 0.0)


def _in_float(count: int, reason: str) -> str:
    return f"{counted(count, 'node stays', 'nodes stay')} in float: {reason}."
