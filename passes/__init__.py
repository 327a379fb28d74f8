"""Edits of a graph: find layers, split them, count what they cost. No arrays beyond folding constants."""

from onnx_lrsd.passes.count import compute_tensors, macs, parameters
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.isolate import isolate
from onnx_lrsd.passes.order_sums import order_sums
from onnx_lrsd.passes.readers import Reading, readers
from onnx_lrsd.passes.rectifiers import rectifiers
from onnx_lrsd.passes.split import split
from onnx_lrsd.passes.two_of_four import two_of_four
from onnx_lrsd.passes.unavoidable import unavoidable
from onnx_lrsd.passes.unpack import decoding, unpack

__all__ = [
    "Reading",
    "compute_tensors",
    "decoding",
    "find_layers",
    "isolate",
    "macs",
    "order_sums",
    "parameters",
    "read_weight",
    "readers",
    "rectifiers",
    "split",
    "two_of_four",
    "unavoidable",
    "unpack",
]
