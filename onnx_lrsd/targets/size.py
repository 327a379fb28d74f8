"""The file is what counts: weights in codes, decoded to the dense layers that stood there before.

Latency and memory are those of the original once the model is open; opening it takes the decoding.
"""

from __future__ import annotations

from onnx_lrsd.passes.pack import OPSET
from onnx_lrsd.solver.codes.curve import coded_errors
from onnx_lrsd.storage import STORAGES
from onnx_lrsd.targets.target import Target, price
from onnx_lrsd.types import DENSE, UNSTRUCTURED, Form, Layer

MOST_FOLDED = 1 << 30
"""Bytes of a constant up to which ONNX Runtime folds it, unless it is told otherwise."""


def predicted_time(layer: Layer, form: Form) -> float:
    """MACs of the dense layer, whatever the form."""
    return float(price(layer, form).macs)


def forms(layer: Layer, kinds: tuple[str, ...]) -> tuple[Form, ...]:
    """The dense weight in every storage that makes it smaller; other forms take the layer's data.

    None for a weight that is too large to be folded: it would be decoded in every run.
    """
    if 4 * layer.n * layer.m > MOST_FOLDED:
        return ()
    stored = [Form(DENSE, weights=((name, layer.n),)) for name in STORAGES]
    dense = price(layer, Form()).bytes
    return tuple(form for form in stored if price(layer, form).bytes < dense)


SIZE = Target(
    "size",
    forms,
    predicted_time,
    patterns=(UNSTRUCTURED,),
    timed_here=False,
    coded_errors=coded_errors,
    counts="bytes",
    opset=OPSET,
    first_ratio=6.0,
)
