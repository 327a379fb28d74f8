"""From the forms that were chosen to a plan that can be kept, and back from a plan to its forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from onnx_lrsd.errors import DataError
from onnx_lrsd.fit.narrow import least_width, narrow_layer
from onnx_lrsd.passes.pairs import Pair
from onnx_lrsd.plan.units import Curves
from onnx_lrsd.run import NOT_NEEDED, Run
from onnx_lrsd.targets import TARGETS, price
from onnx_lrsd.types import DENSE, WIDTH, Choice, Form, Layer, Plan, Price, Width


def make_plan(run: Run, curves: Curves, chosen: Mapping[str, Form]) -> Plan:
    """The plan with the forms in ``chosen``, of layers and pairs; any other layer says why it stays dense."""
    points = curves.chosen(chosen)
    choices = {}
    for curve in curves.layers:
        whole, point = curve.points[0], points[curve.layer.output]
        for layer in curve.layers:
            reason = run.journal.reasons.get(layer.output, NOT_NEEDED) if point == whole else ""
            before, after = whole.price, point.price
            if curve.others:
                before, after = _own(layer, Form(DENSE), before), _own(layer, point.form, after)
            choices[layer.output] = Choice(point.form, point.error, before, after, reason)
    widths = {
        pair.key: Width(points[pair.key].form.rank, pair.channels, points[pair.key].error)
        for pair in curves.pairs
        if pair.key in points
    }
    return Plan(run.target.name, run.cost, choices, widths)


def _own(layer: Layer, form: Form, together: Price) -> Price:
    """The price of one of several layers that apply one weight; the time of all stands with the first."""
    return replace(price(layer, form), seconds=None if layer.shares else together.seconds)


def forms_of(plan: Plan, layers: Sequence[Layer], pairs: Mapping[str, Pair]) -> dict[str, Form]:
    """The forms of a plan that change something. Raises DataError for those this model cannot take."""
    known = {layer.output: layer for layer in layers}
    widths = {key: _checked(key, width.kept, pairs) for key, width in plan.widths.items()}
    forms = {name: choice.form for name, choice in plan.choices.items() if not choice.form.dense}
    for name, form in forms.items():
        if name not in known:
            raise DataError(
                f"The plan names the layer {name}, which this model does not have: "
                "make a plan for this model with --save-plan."
            )
        TARGETS[plan.target].check(narrow_layer(known[name], widths, pairs), form)
    return forms | {key: Form(WIDTH, kept) for key, kept in widths.items()}


def _checked(key: str, kept: int, pairs: Mapping[str, Pair]) -> int:
    """``kept`` itself, where that is a width of the pair."""
    if key not in pairs:
        raise DataError(
            f"The plan cuts channels between {key}, which is not possible in this model: "
            "make a plan for this model with --save-plan."
        )
    least, channels = least_width(pairs[key]), pairs[key].channels
    if not least <= kept < channels:
        raise DataError(
            f"The plan keeps {kept} channels between {key}, which is not between {least} and {channels - 1}: "
            "change it there."
        )
    return kept
