"""Whether a result is worth having and keeps what was promised: pure functions of what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist

from onnx_lrsd.facts import ModelCost, Promise, Verification
from onnx_lrsd.fit.fitter import BOTH, INT8, LOW_RANK, ORIGINAL
from onnx_lrsd.measure.speedup import CLEARLY
from onnx_lrsd.run import Options
from onnx_lrsd.targets import Target
from onnx_lrsd.types import COSTS, DENSE, Form, Point, Price
from onnx_lrsd.wording import counted, percent

MUCH = 0.1
"""Output error, or share of samples that are classed otherwise, from which a result that only met its ratio
carries a warning."""
_NEAR = 0.97
"""Share of a ratio from which another fit, aimed higher, is expected to meet it."""
LARGER, RUNS = "is larger as a whole", "runs"
STORED = ("bytes", "parameters")
"""Costs for which a larger file is no gain; where MACs or time were asked it is a warning."""
PAYS = 0.25
"""Share of the time which fewer MACs should save that a result with much error must save."""
_ROUNDING = 1e-9
"""Rounding error of differences and ratios: a promise is kept exactly but for that."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What becomes of a fitted model.

    ``kept`` is the step that is handed out: that of the model itself, of one of its alternatives, or the
    original. ``reason`` says why layers were fitted in vain, if they were. If ``refused``, the promise is
    broken and another model may keep it; ``refusal`` says so to the user, and ``last_resort`` is the step
    that is handed out where there is no other model.
    """

    kept: str
    promise: Promise | None
    reason: str = ""
    warnings: tuple[str, ...] = ()
    refused: bool = False
    refusal: str = ""
    last_resort: str = ORIGINAL


def judge(
    measured: Mapping[str, Verification],
    options: Options,
    target: Target,
    cost: str,
    *,
    planned: bool = False,
    int8_may_gain: bool = False,
) -> Outcome:
    """What becomes of a model that was ``measured`` against the original: itself, then its alternatives.

    The fastest step whose outputs are finite is taken, or the original where that gains nothing. Then the
    promise is looked at. ``cost`` is what a ratio is of. A model that the user ``planned`` is handed out
    whatever it gains, with a warning, if its outputs are finite. If ``int8_may_gain``, the warning that a
    model is no faster names --int8.
    """
    fitted = next(iter(measured))
    sound = [step for step, found in measured.items() if found.finite] or [fitted]
    best = max(sound, key=lambda step: measured[step].latency_ratio or 0.0)
    found, warnings, reason = measured[best], list[str](), ""
    if fitted == BOTH and best == INT8:
        warnings.append("Int8 alone is faster than with low rank: it is handed back alone.")
        reason = "int8 alone is faster"
    elif fitted == BOTH and best == LOW_RANK:
        warnings.append("Int8 is not faster on this machine: it was left out.")
    said = no_gain(found, options, target, cost) if best != ORIGINAL else ""
    if said and planned and found.finite:
        warnings.append(f"The rewritten model {said}: it is as planned, make a plan anew to gain something.")
    elif said:
        remedy = "; --int8 may gain here" if int8_may_gain and said.startswith(RUNS) else ""
        warnings.append(f"The rewritten model {said}: the original is handed back{remedy}.")
        best, reason = ORIGINAL, "the whole model gained nothing by it"
    if best == ORIGINAL:
        promise = promised(None, options, cost)
        return Outcome(kept=best, promise=promise, reason=reason, warnings=tuple(warnings))
    if options.ratio is not None and max(found.error, found.decided_otherwise) > MUCH:
        decided = ""
        if found.decided_otherwise > 0:
            decided = f", and in {percent(found.decided_otherwise)} of the samples they name another class"
        warnings.append(
            f"The outputs changed by {percent(found.error)} of their {found.error_of}{decided}: this model "
            f"does not bear {options.ratio:g} x; ask for less, or name what may be lost with --max-error."
        )
    if found.after.bytes > found.before.bytes and LARGER not in said:
        times = found.after.bytes / found.before.bytes
        warnings.append(
            f"The rewritten model {LARGER} ({times:.2f} x), since weights that it no longer applies are read "
            "elsewhere: where the file must not grow, ask with --cost bytes."
        )
    promise = promised(found, options, cost)
    outcome = Outcome(kept=best, promise=promise, reason=reason, warnings=tuple(warnings))
    if promise is None or promise.kept:
        return outcome
    if promise.kind == "ratio":
        near = best == fitted and promise.got >= _NEAR * promise.asked
        return replace(outcome, refused=near, last_resort=best)
    return replace(outcome, refused=True, refusal=_refusal(promise, found))


def _refusal(promise: Promise, found: Verification) -> str:
    if promise.kind == "max_drop":
        return (
            f"A model that was expected to keep the score lost {promise.got:.2f} points on all "
            f"{counted(found.samples, 'labelled sample')}: a smaller gain was looked for."
        )
    return (
        f"A model within {100 * promise.asked:g} % where it was searched changed the outputs by up to "
        f"{percent(promise.got)} on the samples that confirm: a smaller gain was looked for."
    )


def promised(found: Verification | None, options: Options, cost: str) -> Promise | None:
    """What was asked for, and what a model ``found`` so has of it; None stands for the original."""
    gained = found is not None
    if options.ratio is not None:
        got = 1.0 if found is None else ratio_of(found, cost)
        return Promise("ratio", options.ratio, got, got >= options.ratio * (1 - _ROUNDING), gained)
    if options.max_drop is not None:
        got, sure = 0.0, None
        if found is not None and found.metric is not None:
            got = 100 * (found.metric.before - found.metric.after)
            low, high = found.metric.interval
            sure = _confidence(options.max_drop - got, 100 * (high - low))
        kept = gained and got <= options.max_drop + _ROUNDING
        return Promise("max_drop", options.max_drop, got, kept, gained, sure)
    if options.max_error is not None:
        got = 0.0 if found is None else found.error_bound
        return Promise("max_error", options.max_error, got, gained and got <= options.max_error, gained)
    return None


def _confidence(spare: float, width: float) -> float:
    """The probability that on other samples, too, the score falls by no more than is allowed.

    ``spare`` is what the fall left of the allowance, and ``width`` that of its 95 % interval. Its
    distribution is taken to be normal.
    """
    if width <= 0:
        return float(spare >= 0)
    return NormalDist(0, width / (2 * 1.96)).cdf(spare)


def ratio_of(found: Verification, cost: str) -> float:
    """How many times cheaper the model is, as measured, in the unit ``cost``."""
    if cost == "latency":
        return found.latency_ratio or 0.0
    return _cost(found.before, cost) / max(_cost(found.after, cost), 1.0)


def _cost(model: ModelCost, cost: str) -> float:
    return COSTS[cost](Point(Form(DENSE), 0.0, Price(model.macs, model.parameters, model.bytes)))


def no_gain(found: Verification, options: Options, target: Target, cost: str) -> str:
    """In what the result is no better than the original; empty where it is.

    Where time is what counts it must be clearly gained, and more of it where the outputs suffered; elsewhere
    none may be lost beyond what the measurement leaves open.
    """
    if not found.finite:
        return "gives values that are not finite where the original's are"
    if cost in STORED and found.after.bytes > found.before.bytes:
        return LARGER
    if not target.timed_here or found.latency_ratio is None or found.latency_interval is None:
        return ""
    ratio, (low, high) = found.latency_ratio, found.latency_interval
    said = f"{RUNS} {ratio:.2f} times as fast as a whole ({low:.2f} to {high:.2f})"
    if cost not in ("macs", "latency"):
        return said if high < 1 else ""
    if low < 1 or ratio < CLEARLY:
        return said
    least = 1 + PAYS * (found.before.macs / found.after.macs - 1)
    if options.ratio is not None and found.error > MUCH and ratio < least:
        return f"{said} and changes the outputs by {percent(found.error)} of their {found.error_of}"
    return ""
