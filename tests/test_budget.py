"""A plan never exceeds its budget, and more budget never means more error."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_layers import conv, linear

from onnx_lrsd.errors import BudgetError, DataError
from onnx_lrsd.plan.allocate import allocate, lower_hull
from onnx_lrsd.targets import TARGETS, price
from onnx_lrsd.types import (
    CHANNEL,
    CHANNEL_IN,
    COSTS,
    DENSE,
    KINDS,
    N_OF_M,
    SPATIAL,
    UNSTRUCTURED,
    WIDTH,
    ErrorCurve,
    Form,
    Layer,
    Pattern,
    Point,
    Price,
    whole_channels,
)

MACS = COSTS["macs"]


def curve(name: str, points: list[tuple[int, float]]) -> ErrorCurve:
    layer = linear(8, 8, name)
    made = [Point(Form(CHANNEL, cost), error, Price(cost, cost, 4 * cost)) for cost, error in points]
    return ErrorCurve(layer, (Point(Form(), 0.0, Price(100, 100, 400)), *made))


points = st.lists(
    st.tuples(st.integers(1, 99), st.floats(1e-6, 1)),
    min_size=0,
    max_size=5,
    unique_by=lambda point: point[0],
)
models = st.lists(points, min_size=1, max_size=4).map(
    lambda ps: [curve(f"l{i}", p) for i, p in enumerate(ps)]
)


def spent(chosen: dict[str, Point]) -> tuple[float, float]:
    return sum(MACS(p) for p in chosen.values()), sum(p.error for p in chosen.values())


@settings(max_examples=150)
@given(models, st.floats(0.05, 1))
def test_the_budget_holds_and_the_error_is_near_the_best_of_all_plans(
    curves: list[ErrorCurve], share: float
) -> None:
    rest = 20.0
    budget = share * (rest + 100 * len(curves))
    plans = itertools.product(*(c.points for c in curves))
    costs = [(sum(map(MACS, plan)), sum(p.error for p in plan)) for plan in plans]
    possible = [error for cost, error in costs if cost + rest <= budget * (1 + 1e-9)]
    if not possible:
        with pytest.raises(BudgetError, match=r"at most|No layer"):
            allocate(curves, budget, rest, MACS)
        return
    cost, error = spent(allocate(curves, budget, rest, MACS))
    assert cost + rest <= budget * (1 + 1e-9)
    # One multiplier is exact but for the last step of one layer.
    step = max((p.error for c in curves for p in c.points), default=0.0)
    assert min(possible) - 1e-9 <= error <= min(possible) + step + 1e-9


@settings(max_examples=100)
@given(points)
def test_the_hull_is_convex_and_below_every_point(given_points: list[tuple[int, float]]) -> None:
    every = curve("l", given_points).points
    hull = lower_hull(every, MACS)
    costs, errors = [MACS(p) for p in hull], [p.error for p in hull]
    assert costs == sorted(costs, reverse=True) and errors == sorted(errors)
    for point in every:
        if costs[-1] <= MACS(point) <= costs[0]:
            line = np.interp(MACS(point), costs[::-1], errors[::-1])
            assert point.error >= line - 1e-9


def test_a_sensitive_layer_is_spared() -> None:
    curves = [curve("a", [(20, 0.1)]), curve("b", [(20, 0.1)])]
    chosen = allocate(curves, 130, 0, MACS, {"a": 10.0, "b": 1.0})
    assert chosen["a"].form == Form() and chosen["b"].form != Form()


def conv_of(stride: int, pad: int) -> Layer:
    size = (17, 13)
    out = [(length + 2 * pad - 3) // stride + 1 for length in size]
    return conv(128, 96, strides=(stride, stride), pads=(pad,) * 4, positions=out[0] * out[1], size=size)


@pytest.mark.parametrize("stride, pad", [(1, 1), (1, 0), (2, 1)])
def test_prices_count_the_nodes_as_they_will_run(stride: int, pad: int) -> None:
    layer = conv_of(stride, pad)
    rows, columns = ((length + 2 * pad - 3) // stride + 1 for length in layer.size)
    here = rows * columns
    assert price(layer, Form(DENSE)).macs == 128 * 96 * 9 * here
    assert price(layer, Form(CHANNEL, 32)).macs == 32 * (96 * 9 + 128) * here
    assert price(layer, Form(CHANNEL_IN, 32)).macs == 32 * 96 * 17 * 13 + 128 * 32 * 9 * here
    assert price(layer, Form(SPATIAL, 32)).macs == 32 * 96 * 3 * rows * 13 + 128 * 32 * 3 * here
    assert (
        price(layer, Form(SPATIAL, 32, whole_channels(8))).macs
        == price(layer, Form(SPATIAL, 32)).macs + 128 * 8 * 9 * here
    )
    assert price(layer, Form(CHANNEL, 32)).parameters == 32 * (96 * 9 + 128) + 128


def test_every_form_a_target_offers_is_predicted_to_be_faster() -> None:
    target, layer = TARGETS["onnxruntime"], conv_of(1, 1)
    forms = target.forms(layer, KINDS)
    assert {form.kind for form in forms} == set(KINDS) - {DENSE, WIDTH}  # a pair has a width, no layer
    assert all(
        target.predicted_time(layer, form) < target.predicted_time(layer, Form(DENSE)) for form in forms
    )
    assert all(form.rank % 16 == 0 for form in forms)


@pytest.mark.parametrize(
    ("target", "form", "says"),
    [
        ("onnxruntime", Form(CHANNEL, 8, Pattern(N_OF_M, 2, 4)), "sparse part .*writes only channels"),
        ("tensorrt", Form(CHANNEL, 8, Pattern(UNSTRUCTURED, 100)), "writes only channels or n-of-m"),
        ("size", Form(CHANNEL, 8, whole_channels(8)), "sparse part .*writes only unstructured"),
        ("tensorrt", Form(DENSE, weights=(("int4", 128),)), "in codes"),
        ("onnxruntime", Form(CHANNEL, 999), "rank 999"),
    ],
)
def test_a_target_refuses_in_words_what_it_does_not_write(target: str, form: Form, says: str) -> None:
    with pytest.raises(DataError, match=says):
        TARGETS[target].check(conv_of(1, 1), form)
    TARGETS[target].check(conv_of(1, 1), Form(CHANNEL, 8))
