"""One fit for layers that apply the same weight: their moments add up, biases stay their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx_lrsd.fit.calibrate import WeightOf
from onnx_lrsd.solver.decompose import decompose_shared
from onnx_lrsd.solver.effort import STANDARD, Effort
from onnx_lrsd.solver.problem import Problem, add_moments, pose
from onnx_lrsd.types import UNSTRUCTURED, Factors, Form, Layer, Moments


def pose_shared(
    layers: Sequence[Layer],
    weight_of: WeightOf,
    moments: Mapping[str, Moments],
    device: str,
    entries: bool = False,
) -> Problem:
    """The problem of ``layers`` together, posed for the first of them; that of a single one as it is."""
    weight, bias = weight_of(layers[0])
    known = [found for layer in layers if (found := moments.get(layer.output)) is not None]
    biased = len(known) > 1 and any(weight_of(layer)[1].any() for layer in layers)
    return pose(layers[0], weight, bias, add_moments(known, biased=biased), device, entries=entries)


def fit_shared(
    layers: Sequence[Layer],
    form: Form,
    weight_of: WeightOf,
    moments: Mapping[str, Moments],
    device: str,
    effort: Effort = STANDARD,
) -> dict[str, Factors]:
    """Factors of ``layers`` in ``form``, by output: the same ones, with a bias of their own."""
    problem = pose_shared(layers, weight_of, moments, device, form.pattern.kind == UNSTRUCTURED)
    own = [problem]
    if len(layers) > 1:
        own = [pose(one, *weight_of(one), moments.get(one.output), device, regressed=False) for one in layers]
    fitted = decompose_shared(problem, own, form, effort=effort)
    return {layer.output: factors for layer, factors in zip(layers, fitted, strict=True)}
