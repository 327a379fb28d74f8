"""What fits a whole model to the forms of a plan: low rank alone, or with another step behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeAlias

import onnx

from onnx_lrsd.fit.calibrate import Calibration
from onnx_lrsd.fit.narrow import Narrower
from onnx_lrsd.fit.reconstruct import reconstruct
from onnx_lrsd.graph.model import Model
from onnx_lrsd.scratch import Scratch
from onnx_lrsd.types import Codes, Entries, Factors, Form, Layer, Packed, Pattern, Progress
from onnx_lrsd.work_dir import KEEP_NOTHING, Keep
from onnx_lrsd.workers import IN_PROCESS, Workers

ORIGINAL, LOW_RANK, INT8, BOTH = "original", "low rank", "int8", "both"
"""What was done to a model: the steps of a ``Fitted``."""

MODELS_KEPT = 3
"""Fitted models that are kept: a search ends with one of those it tried last."""

CLASSES = (onnx.ModelProto, Codes, Entries, Factors, Form, Packed, Pattern)
"""What a fit is made of, to be kept between runs."""

Clock: TypeAlias = Callable[[str], AbstractContextManager[None]]
"""Books the time of a block under the name of a stage."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A fitted model and its factors by layer.

    ``step`` says what was done to it; ``narrow`` are its layers, where channels of some were cut. Where it is
    BOTH, ``alternatives`` makes the models with either step alone, as one of these may be the fastest.
    ``nodes`` counts the nodes in int8; ``left`` are those that stayed in float, with the relative error of
    outputs that each alone causes in int8. ``notes`` go to the user if the model is kept.
    """

    step: str
    model: Model
    factors: Mapping[str, Factors]
    narrow: Sequence[Layer] = ()
    alternatives: Callable[[], Sequence[Fitted]] = tuple
    nodes: int = 0
    left: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether a weight is stored in codes."""
        return any(factors.packed is not None for factors in self.factors.values())


class Fitter(Protocol):
    """Fits a model to forms by layer."""

    def fit(self, forms: Mapping[str, Form]) -> Fitted:
        """The model with every layer in ``forms`` rewritten."""
        ...


@dataclass(frozen=True, kw_only=True)
class LowRankFitter:
    """Fits low rank and sparse weights, nothing else.

    ``narrower`` cuts channels before the layers are fitted. ``original`` is given back where there are no
    forms. Without ``calibration`` the weights alone decide. With ``scratch`` new weights and factors lie in
    such files.
    """

    original: Model
    narrower: Narrower
    calibration: Calibration | None
    device: str
    clock: Clock
    progress: Progress | None = None
    keep: Keep = KEEP_NOTHING
    workers: Workers = IN_PROCESS
    scratch: Scratch | None = None

    def fit(self, forms: Mapping[str, Form]) -> Fitted:
        """The model with every layer in ``forms`` rewritten; the original without any."""
        if not forms:
            return Fitted(step=ORIGINAL, model=self.original, factors={})
        narrow = self.narrower.priced(forms)
        with self.clock("decompose"):
            if self.scratch is not None:
                # A file for each model, which is gone when the model is; no other run could read it.
                narrower = replace(
                    self.narrower, model=replace(self.narrower.model, aside=self.scratch.new())
                )
                model, factors = self._fitted(narrower, forms)
                return Fitted(step=LOW_RANK, model=model, factors=factors, narrow=narrow)
            proto, factors = self.keep("fit", forms, partial(self._kept, forms), CLASSES)
        model = replace(self.narrower.model, proto=proto)
        return Fitted(step=LOW_RANK, model=model, factors=factors, narrow=narrow)

    def _kept(self, forms: Mapping[str, Form]) -> tuple[onnx.ModelProto, Mapping[str, Factors]]:
        """What is kept between runs: the rewritten model and the factors by layer."""
        model, factors = self._fitted(self.narrower, forms)
        return model.proto, factors

    def _fitted(self, narrower: Narrower, forms: Mapping[str, Form]) -> tuple[Model, Mapping[str, Factors]]:
        narrowed = narrower.narrow(forms, self.calibration)
        return reconstruct(
            narrowed.model,
            narrowed.layers,
            forms,
            narrowed.weight_of,
            narrowed.calibration,
            refitted=narrowed.readers,
            device=self.device,
            progress=self.progress,
            workers=self.workers,
        )


@dataclass(frozen=True)
class KeepingFitter:
    """Keeps the last models that ``fitter`` made, so what a search has fitted is not fitted again."""

    fitter: Fitter
    kept: dict[frozenset[tuple[str, Form]], Fitted] = field(default_factory=dict)

    def fit(self, forms: Mapping[str, Form]) -> Fitted:
        """The model with every layer in ``forms`` rewritten, from those that are kept if it is there."""
        key = frozenset(forms.items())
        found = self.kept.pop(key, None) or self.fitter.fit(forms)
        self.kept[key] = found
        if len(self.kept) > MODELS_KEPT:
            del self.kept[next(iter(self.kept))]
        return found
