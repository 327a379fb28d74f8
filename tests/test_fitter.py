"""A search asks for many fits of a whole model: none is made twice."""

from collections.abc import Mapping

import onnx

from onnx_lrsd.fit.fitter import LOW_RANK, MODELS_KEPT, Fitted, KeepingFitter
from onnx_lrsd.graph.model import Model
from onnx_lrsd.types import CHANNEL, Form


class Counting:
    """A fitter that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[Mapping[str, Form]] = []

    def fit(self, forms: Mapping[str, Form]) -> Fitted:
        self.asked.append(forms)
        return Fitted(step=LOW_RANK, model=Model(onnx.ModelProto()), factors={})


def of_rank(rank: int) -> dict[str, Form]:
    return {"y": Form(CHANNEL, rank)}


def test_what_a_search_has_fitted_is_not_fitted_again() -> None:
    inner = Counting()
    fitter = KeepingFitter(inner)
    first = fitter.fit(of_rank(1))
    fitter.fit(of_rank(2))
    assert fitter.fit(of_rank(1)) is first and inner.asked == [of_rank(1), of_rank(2)]


def test_models_are_kept_within_bounds_and_the_oldest_goes_first() -> None:
    inner = Counting()
    fitter = KeepingFitter(inner)
    for rank in range(1, MODELS_KEPT + 2):
        fitter.fit(of_rank(rank))
    assert len(fitter.kept) == MODELS_KEPT
    fitter.fit(of_rank(MODELS_KEPT + 1))
    fitter.fit(of_rank(1))
    assert inner.asked[-1] == of_rank(1) and len(inner.asked) == MODELS_KEPT + 2
