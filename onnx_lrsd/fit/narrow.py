"""Narrower networks: channels between layers are cut, and the layers that read them are fitted to the others.

The channels are chosen in the original network, where their readers can do without them best; a narrower
network is then fitted in graph order like any other, to the outputs of the original.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import numpy as np
import numpy.typing as npt

from onnx_lrsd.fit.calibrate import Calibration, WeightOf, original_inputs, original_outputs
from onnx_lrsd.graph.model import Model
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.pairs import End, Pair, cut, inverses, turn
from onnx_lrsd.passes.split import split
from onnx_lrsd.scratch import made_for_each
from onnx_lrsd.solver.cross_validation import some_rows, width_errors
from onnx_lrsd.solver.heads import (
    Bases,
    head_bases,
    product_bases,
    turned,
    turned_inputs,
    turned_outputs,
)
from onnx_lrsd.solver.problem import Problem, pose
from onnx_lrsd.solver.width import Widths, fit_width, widths
from onnx_lrsd.types import DENSE, WIDTH, Declined, Factors, Form, Layer, Moments, Rows, Values

_Positions = npt.NDArray[np.int64]

MOST_LAYERS = 6
"""Layers that a pair has, at most: a residual stream that a whole network adds to is left alone."""
FEWEST_CHANNELS = 32
"""Channels that a pair must have before any of them are worth cutting."""
NARROWEST = 8
"""The least width that is tried is an eighth."""


@dataclass(frozen=True)
class Inner:
    """The channels of a pair, and in which order the layers that read them can do without them.

    Where rows were given, the errors of the widths are those on rows that the readers were not fitted to.
    With ``bases`` the channels are those of attention heads in other bases: the network is written in these
    before it is cut. Those of keys are then the inverses of the ones of queries, transposed.
    """

    pair: Pair
    widths: Widths
    bases: Bases | None = None


@dataclass(frozen=True, kw_only=True)
class Narrowed:
    """A narrower network; ``layers`` are in graph order, and those that were cut know their ``full`` size.

    ``readers`` are the layers that read fewer channels and have to be refitted. Without ``calibration`` the
    weights alone decide.
    """

    model: Model
    layers: tuple[Layer, ...]
    weight_of: WeightOf
    calibration: Calibration | None
    readers: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Narrower:
    """Cuts the channels of pairs in ``model``; ``inner`` are those it may cut, by the pair's key."""

    model: Model
    layers: tuple[Layer, ...]
    weight_of: WeightOf
    moments: Mapping[str, Moments]
    inner: Mapping[str, Inner]
    device: str

    @property
    def outputs(self) -> set[str]:
        """The layers that give or read channels that may be cut."""
        pairs = [inner.pair for inner in self.inner.values()]
        return {end.output for pair in pairs for end in (*pair.producers, *pair.consumers)}

    def narrow(self, forms: Mapping[str, Form], calibration: Calibration | None) -> Narrowed:
        """The network with the widths in ``forms``; the original one where there are none."""
        cuts = self._cuts(forms)
        if not cuts:
            return Narrowed(
                model=self.model, layers=self.layers, weight_of=self.weight_of, calibration=calibration
            )
        model, cut_layers = self.cut(forms)
        kept_of = {layer.output: _Kept.of(layer, cuts) for layer in self.layers}
        working = model.graph()
        now = {layer.output: layer for layer in cut_layers}
        by_output = {layer.output: layer for layer in self.layers}
        keys = [key for key, form in forms.items() if form.kind == WIDTH]
        for pair, kept in cuts:
            for end in pair.consumers:
                layer = by_output[end.output]
                factors = fit_width(self.problem(layer, keys), columns(layer, end), kept)
                split(working, now[end.output], kept_of[end.output].cut_outputs(layer, factors))
                model.put_aside(working)
        model = model.splice(working)
        working = model.graph()
        found = {layer.output: layer for layer in find_layers(working)[0]}  # weights have other names now
        layers = tuple(kept_of[la.output].of_layer(la, found.get(la.output)) for la in self.layers)
        if calibration is not None:
            calibration = self._calibration(calibration, layers, kept_of, keys)
        return Narrowed(
            model=model,
            layers=layers,
            weight_of=partial(read_weight, working),
            calibration=calibration,
            readers=frozenset(end.output for pair, _ in cuts for end in pair.consumers),
        )

    def cut(self, forms: Mapping[str, Form]) -> tuple[Model, tuple[Layer, ...]]:
        """The network with the widths in ``forms``, with nothing refitted, and its layers."""
        cuts = self._cuts(forms)
        if not cuts:
            return self.model, self.layers
        working = self.model.graph()
        for key, form in forms.items():
            inner = self.inner[key] if form.kind == WIDTH else None
            if inner is not None and inner.bases is not None:
                turn(working, inner.pair, inner.bases)
        cut(working, cuts)
        model = self.model.splice(working)
        found = {layer.output: layer for layer in find_layers(model.graph())[0]}
        return model, tuple(_Kept.of(la, cuts).of_layer(la, found.get(la.output)) for la in self.layers)

    def priced(self, forms: Mapping[str, Form]) -> tuple[Layer, ...]:
        """The layers of the network with the widths in ``forms``, enough to tell what they cost."""
        widths = {key: form.rank for key, form in forms.items() if form.kind == WIDTH}
        pairs = {key: self.inner[key].pair for key in widths}
        return tuple(narrow_layer(layer, widths, pairs) for layer in self.layers)

    def _cuts(self, forms: Mapping[str, Form]) -> list[tuple[Pair, tuple[int, ...]]]:
        """The pairs that ``forms`` cuts, and the channels that they keep."""
        return [
            (self.inner[key].pair, self.inner[key].widths.kept(form.rank))
            for key, form in forms.items()
            if form.kind == WIDTH
        ]

    def left(self, layer: Layer, widths: Mapping[str, int]) -> tuple[_Positions, _Positions]:
        """The rows and columns of W that ``layer`` keeps where pairs have these widths."""
        found = _Kept.of(layer, self._cuts({key: Form(WIDTH, width) for key, width in widths.items()}))
        return found.outputs, found.inputs

    def problem(self, layer: Layer, cuts: Iterable[str] = ()) -> Problem:
        """The problem of ``layer`` in the original network, in the bases of the pairs ``cuts``."""
        posed = pose(layer, *self.weight_of(layer), self.moments.get(layer.output), self.device)
        for at, bases in self._turns(layer, cuts, giving=True):
            posed = turned_outputs(posed, at, bases)
        for at, bases in self._turns(layer, cuts, giving=False):
            posed = turned_inputs(posed, at, bases)
        return posed

    def _turns(self, layer: Layer, cuts: Iterable[str], *, giving: bool) -> list[tuple[_Positions, Bases]]:
        """Rows of W of ``layer`` (columns, if not ``giving``) that these pairs turn, and the bases."""
        found = []
        for inner in (self.inner[key] for key in cuts):
            if inner.bases is None:
                continue
            for number, end in enumerate(inner.pair.producers if giving else inner.pair.consumers):
                if end.output == layer.output:
                    of_keys = bool(inner.pair.product) and number == 1
                    bases = inverses(inner.bases) if of_keys else inner.bases
                    found.append((rows(layer, end) if giving else columns(layer, end), bases))
        return found

    def masking(self, key: str) -> tuple[Layer, ...]:
        """The layers that ``masked`` gives, in the order of the graph: readers of a pair, or queries."""
        pair = self.inner[key].pair
        outputs = {end.output for end in pair.consumers or pair.producers[:1]}
        return tuple(layer for layer in self.layers if layer.output in outputs)

    def masked(self, key: str, width: int) -> dict[str, Factors]:
        """The readers of a pair at that width, by output, in the original network.

        They have weights of zero for the channels that are cut, so they give the same as in the narrower
        network, which need not be made. Where queries have zeros in place of channels, keys need none.
        """
        pair, kept = self.inner[key].pair, self.inner[key].widths.kept(width)
        if pair.product:
            (layer,) = self.masking(key)
            return {layer.output: self._masked_queries(layer, self.inner[key], kept)}
        ends = {end.output: end for end in pair.consumers}
        found = {}
        for layer in self.masking(key):
            factors = fit_width(self.problem(layer, [key]), columns(layer, ends[layer.output]), kept)
            found[layer.output] = _in_place(layer, factors, self._turns(layer, [key], giving=False))
        return found

    def _masked_queries(self, layer: Layer, inner: Inner, kept: Sequence[int]) -> Factors:
        """The ``layer`` of the queries without the channels that are not ``kept``, in the original bases."""
        assert inner.bases is not None
        weight, bias = self.weight_of(layer)
        at = rows(layer, inner.pair.producers[0])
        affine = turned(np.column_stack([weight, bias]).T.astype(np.float64), at, inner.bases)
        affine[:, np.delete(at, list(kept), axis=0).ravel()] = 0.0
        affine = turned(affine, at, inverses(inner.bases), back=True).T
        return Factors(
            form=Form(DENSE),
            kernels=(),
            bias=affine[:, -1],
            sparse=affine[:, :-1].reshape(layer.n, layer.channels, *layer.kernel),
            channels=tuple(range(layer.channels)),
            error=float(inner.widths.errors[0, len(kept)]),
        )

    def _calibration(
        self, known: Calibration, layers: tuple[Layer, ...], kept: Mapping[str, _Kept], cuts: Sequence[str]
    ) -> Calibration:
        """What the original network taught, for the outputs and inputs that the layers keep."""
        of_cut = {layer.output for layer in layers if layer.full is not None} & known.kept.keys()
        by_name = {layer.output: layer for layer in self.layers}

        def kept_outputs(name: str) -> Rows:
            if name not in of_cut:
                return known.kept[name]
            found = original_outputs(by_name[name], known, self.weight_of)
            for at, bases in self._turns(by_name[name], cuts, giving=True):
                found = turned(found, at, bases)
            return found[:, kept[name].outputs]

        def kept_inputs(name: str) -> Rows:
            found = known.inputs[name]
            if name in of_cut:
                for at, bases in self._turns(by_name[name], cuts, giving=False):
                    found = turned(found, at, bases)
                found = found[:, kept[name].inputs]
            return np.ascontiguousarray(found)

        return replace(
            known,
            layers=layers,
            kept=made_for_each(known.kept, kept_outputs),
            by_inputs=known.by_inputs - of_cut,
            inputs=made_for_each(known.inputs, kept_inputs),
        )


@dataclass(frozen=True)
class _Kept:
    """The rows ``outputs`` (k,) and the columns ``inputs`` (k,) of W that a layer keeps, ascending."""

    outputs: _Positions
    inputs: _Positions

    @staticmethod
    def of(layer: Layer, cuts: Sequence[tuple[Pair, Sequence[int]]]) -> _Kept:
        """What ``layer`` keeps under ``cuts``, pairs with the channels that stay."""
        outputs, inputs = np.ones(layer.n, dtype=bool), np.ones(layer.m, dtype=bool)
        for pair, kept in cuts:
            gone = np.setdiff1d(np.arange(pair.channels), np.asarray(kept))
            for end in pair.producers:
                if end.output == layer.output:
                    outputs[rows(layer, end)[gone]] = False
            for end in pair.consumers:
                if end.output == layer.output:
                    inputs[columns(layer, end)[gone]] = False
        return _Kept(np.flatnonzero(outputs), np.flatnonzero(inputs))

    def of_layer(self, layer: Layer, found: Layer | None) -> Layer:
        """``found``, which is ``layer`` in the narrower network, with what is known of the original one.

        A constant is not found as a layer there. It is the same as before: cuts change none of them.
        """
        if found is None:
            assert layer.constant
            return layer
        whole = (len(self.outputs), len(self.inputs)) == (layer.n, layer.m)
        full = None if whole else (layer.n, layer.m)
        return replace(
            found,
            name=layer.name,
            shares=layer.shares,
            also_read=layer.also_read,
            pays=layer.pays,
            positions=layer.positions,
            size=layer.size,
            full=full,
        )

    def cut_outputs(self, layer: Layer, factors: Factors) -> Factors:
        """A dense weight of the kept inputs, without the outputs that are gone."""
        assert factors.sparse is not None
        channels = len(self.inputs) // prod(layer.kernel)
        sparse = factors.sparse[self.outputs].reshape(len(self.outputs), channels, *layer.kernel)
        bias = factors.bias[self.outputs]
        return replace(factors, form=Form(DENSE), sparse=sparse, bias=bias, channels=tuple(range(channels)))


def _in_place(layer: Layer, factors: Factors, turns: Iterable[tuple[_Positions, Bases]]) -> Factors:
    """``factors``, a dense weight of some inputs, as one of all inputs of ``layer``; ``turns`` are undone."""
    assert factors.sparse is not None
    weight = np.zeros((layer.n, layer.m))
    weight[:, list(factors.channels)] = factors.sparse
    for at, bases in turns:
        weight = turned(weight, at, bases, back=True)
    return replace(
        factors,
        form=Form(DENSE),
        sparse=weight.reshape(layer.n, layer.channels, *layer.kernel),
        channels=tuple(range(layer.channels)),
    )


def columns(layer: Layer, end: End) -> _Positions:
    """The columns (channels, k) of W that read each channel of a pair."""
    taps = prod(layer.kernel)
    wide = end.positions[:, :, None] * taps + np.arange(taps)
    return wide.reshape(len(end.positions), -1)


def rows(layer: Layer, end: End) -> _Positions:
    """The rows (channels, k) of W that give each channel of a pair."""
    each = layer.rows_per_bias
    wide = end.positions[:, :, None] * each + np.arange(each)
    return wide.reshape(len(end.positions), -1)


def narrow_layer(layer: Layer, widths: Mapping[str, int], pairs: Mapping[str, Pair]) -> Layer:
    """``layer`` as it is where ``pairs`` are cut to ``widths``, by key; enough to tell what it costs."""
    outputs, channels = layer.output_channels, layer.channels
    for key, kept in widths.items():
        pair = pairs[key]
        gone = pair.channels - kept
        outputs -= sum(gone * e.positions.shape[1] for e in pair.producers if e.output == layer.output)
        channels -= sum(gone * e.positions.shape[1] for e in pair.consumers if e.output == layer.output)
    if (outputs, channels) == (layer.output_channels, layer.channels):
        return layer
    taps = layer.m // layer.channels
    return replace(layer, n=outputs * layer.rows_per_bias, m=channels * taps, full=(layer.n, layer.m))


def planned_pairs(
    pairs: Sequence[Pair], layers: set[str], excluded: set[str]
) -> tuple[dict[str, Pair], dict[str, str]]:
    """The pairs that are worth planning, by key, and why others stay whole, by the layers that give channels.

    Only ``layers`` read a pair that is planned, and few of them. A layer gives the channels of one pair at
    most, and reads those of one. No pair is planned whose channels a layer in ``excluded`` gives.
    """
    found: dict[str, Pair] = {}
    reasons: dict[str, str] = {}
    giving, reading = set[str](), set[str]()
    for pair in pairs:
        gives = {end.output for end in pair.producers}
        reads = {end.output for end in pair.consumers}
        deciding = {end.output for end in pair.deciding}
        reason = ""
        if pair.channels * max(pair.heads, 1) < FEWEST_CHANNELS:
            reason = f"they are fewer than {FEWEST_CHANNELS}"
        elif len(gives | reads) > MOST_LAYERS:
            reason = f"more than {MOST_LAYERS} layers give or read them"
        elif not deciding <= layers or not gives & layers or gives & excluded:
            reason = "a layer that gives or reads them is left alone, or shares its weight"
        elif gives & giving or reads & reading:
            reason = "another set of channels is planned between the same layers"
        if reason:
            reasons |= dict.fromkeys(gives - giving, reason)
            continue
        giving |= gives
        reading |= reads
        found[key_of(pair)] = pair
    return found, {output: reason for output, reason in reasons.items() if output not in giving}


def left_whole(
    stay: Sequence[Declined], unplanned: Mapping[str, str], layers: Sequence[Layer]
) -> tuple[Declined, ...]:
    """Why the channels of ``layers`` stay: those that ``find_pairs`` declined, and those ``unplanned``.

    ``stay`` is what ``find_pairs`` declined; ``unplanned`` are reasons by the output of the layer.
    """
    names = {layer.name for layer in layers}
    of_layers = [entry for entry in stay if entry.name in names]
    by_output = {layer.output: layer for layer in layers}
    return (
        *of_layers,
        *(
            Declined(by_output[output].name, by_output[output].op, reason)
            for output, reason in unplanned.items()
            if output in by_output
        ),
    )


def least_width(pair: Pair) -> int:
    """The fewest channels that may be kept."""
    return max(pair.channels // NARROWEST, 1)


def key_of(pair: Pair) -> str:
    """What identifies a pair in a plan: the tensors of the first layers that give and that read it.

    For a product those of the layers that give its operands.
    """
    if pair.product:
        return " x ".join(end.output for end in pair.producers)
    return f"{pair.producers[0].output} -> {pair.consumers[0].output}"


@dataclass(frozen=True, kw_only=True)
class OrderTask:
    """A pair and the layers that decide what a cut of it loses, for a worker.

    By the output of each: ``affine``, W (n, m) and b (n,), ``moments`` of its inputs, and ``rows`` (count, m)
    of these that judge the errors of the widths. A layer without rows has the errors of the damped metric.
    """

    pair: Pair
    layers: tuple[Layer, ...]
    affine: Mapping[str, tuple[Values, Values]]
    moments: Mapping[str, Moments]
    rows: Mapping[str, Rows]
    device: str


def order_task(pair: Pair, narrower: Narrower, judged_by: Calibration | None = None) -> OrderTask:
    """The task for ``pair``, whose widths the original inputs in ``judged_by`` judge, if it is not None."""
    by_output = {layer.output: layer for layer in narrower.layers}
    layers = tuple(by_output[end.output] for end in pair.deciding)
    rows = {}
    for layer in () if pair.product else layers:
        seen = None if judged_by is None else original_inputs(layer, judged_by)
        if seen is not None:
            rows[layer.output] = some_rows(seen)
    return OrderTask(
        pair=pair,
        layers=layers,
        affine={layer.output: narrower.weight_of(layer) for layer in layers},
        moments={la.output: narrower.moments[la.output] for la in layers if la.output in narrower.moments},
        rows=rows,
        device=narrower.device,
    )


def drop_order(task: OrderTask) -> tuple[Widths, Bases | None]:
    """The order in which a pair's channels go, down to an eighth of them, and the bases they are in.

    Errors of a product are those of the damped metric: bases of so few channels fit other rows as well.
    """
    pair = task.pair
    problems = [
        pose(layer, *task.affine[layer.output], task.moments.get(layer.output), task.device)
        for layer in task.layers
    ]
    if pair.product:
        places = [rows(layer, end) for layer, end in zip(task.layers, pair.producers, strict=True)]
        turns, found = product_bases(problems[0], problems[1], (places[0], places[1]), shifted=pair.softmax)
        return replace(found, dropped=found.dropped[: pair.channels - least_width(pair)]), turns
    own = [columns(layer, end) for layer, end in zip(task.layers, pair.consumers, strict=True)]
    bases = head_bases(problems, own) if pair.heads else None
    if bases is not None:
        problems = [turned_inputs(p, at, bases) for p, at in zip(problems, own, strict=True)]
    order = widths(problems, own, least=least_width(pair))
    errors = order.errors.copy()
    for reader, layer in enumerate(task.layers):
        seen = task.rows.get(layer.output)
        if seen is not None:
            seen = seen if bases is None else turned(seen, own[reader], bases)
            errors[reader] = width_errors(problems[reader], own[reader], order, errors[reader], seen)
    return replace(order, errors=errors), bases
