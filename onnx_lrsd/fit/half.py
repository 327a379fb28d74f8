"""Half precision behind low rank: a fitter whose results are written in float16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from onnx_lrsd.errors import ModelError
from onnx_lrsd.fit.fitter import ORIGINAL, Fitted, Fitter
from onnx_lrsd.graph.model import in_memory
from onnx_lrsd.runtime.half import to_float16
from onnx_lrsd.types import Form


@dataclass(frozen=True)
class HalfFitter:
    """Writes what ``plain`` fits in half precision, so what is verified is what is handed out."""

    plain: Fitter
    warn: Callable[[str], None]

    def fit(self, forms: Mapping[str, Form]) -> Fitted:
        """The model with ``forms`` in float16; in float32 with a warning where it cannot be converted."""
        fitted = self.plain.fit(forms)
        if fitted.step == ORIGINAL:
            return fitted
        try:
            half = to_float16(in_memory(fitted.model))
        except ModelError as error:  # the low rank is worth having all the same
            self.warn(str(error))
            return fitted
        return replace(fitted, model=replace(fitted.model, proto=half))
