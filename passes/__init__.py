"""Edits of a graph: find layers, split them, count what they cost. No arrays beyond folding constants."""

from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.isolate import isolate
from onnx_lrsd.passes.split import split

__all__ = ["find_layers", "isolate", "read_weight", "split"]
