"""From the forms that were chosen to a plan that can be kept, and back from a plan to its forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from onnx_lrsd.errors import DataError
from onnx_lrsd.run import NOT_NEEDED, Run
from onnx_lrsd.targets import TARGETS, price
from onnx_lrsd.types import DENSE, Choice, ErrorCurve, Form, Layer, Plan, Price


def make_plan(run: Run, curves: Sequence[ErrorCurve], chosen: Mapping[str, Form]) -> Plan:
    """The plan that gives the layers in ``chosen`` their forms; every other one says why it stays dense."""
    choices = {}
    for curve in curves:
        form = chosen.get(curve.layer.output, Form(DENSE))
        point = next(p for p in curve.points if p.form == form)
        for layer in curve.layers:
            reason = "" if not form.dense else run.journal.reasons.get(layer.output, NOT_NEEDED)
            before, after = curve.points[0].price, point.price
            if curve.others:
                before, after = _own(layer, Form(DENSE), before), _own(layer, form, after)
            choices[layer.output] = Choice(form, point.error, before, after, reason)
    return Plan(run.target.name, run.cost, choices)


def _own(layer: Layer, form: Form, together: Price) -> Price:
    """The price of one of several layers that apply one weight; the time of all stands with the first."""
    return replace(price(layer, form), seconds=None if layer.shares else together.seconds)


def forms_of(plan: Plan, layers: Sequence[Layer]) -> dict[str, Form]:
    """The forms of a plan that change something. Raises DataError for those this model cannot take."""
    known = {layer.output: layer for layer in layers}
    forms = {name: choice.form for name, choice in plan.choices.items() if not choice.form.dense}
    for name, form in forms.items():
        if name not in known:
            raise DataError(
                f"The plan names the layer {name}, which this model does not have: "
                "make a plan for this model with --save-plan."
            )
        TARGETS[plan.target].check(known[name], form)
    return forms
