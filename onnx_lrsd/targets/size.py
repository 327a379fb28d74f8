"""The smallest file: weights in codes, which the runtime decodes to the dense weights of the original layers.

Weights are decoded when the model is opened; from then on latency and memory are those of the original.
"""

from __future__ import annotations

from onnx_lrsd.passes.pack import OPSET
from onnx_lrsd.solver.codes.curve import coded_errors
from onnx_lrsd.storage import STORAGES
from onnx_lrsd.targets.target import Target, price
from onnx_lrsd.types import DENSE, UNSTRUCTURED, Form, Layer

MOST_FOLDED = 1 << 30
"""Bytes of the largest constant that ONNX Runtime folds by default."""


def _dense_macs(layer: Layer, form: Form) -> float:
    """MACs of the dense layer, whatever the form."""
    return float(price(layer, form).macs)


def _forms(layer: Layer, kinds: tuple[str, ...]) -> tuple[Form, ...]:
    """The dense weight in every storage that makes it smaller; all other forms depend on the layer's data.

    Nothing for a weight too large to be folded, which would be decoded in every run.
    """
    if 4 * layer.n * layer.m > MOST_FOLDED:
        return ()
    stored = [Form(DENSE, weights=((name, layer.n),)) for name in STORAGES]
    dense = price(layer, Form()).bytes
    return tuple(form for form in stored if price(layer, form).bytes < dense)


SIZE = Target(
    "size",
    _forms,
    _dense_macs,
    patterns=(UNSTRUCTURED,),
    timed_here=False,
    coded_errors=coded_errors,
    counts="bytes",
    opset=OPSET,
    first_ratio=6.0,
)
