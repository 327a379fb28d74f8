"""Targets by name."""

from onnx_lrsd.targets.onnxruntime import ONNXRUNTIME
from onnx_lrsd.targets.target import Target, price

TARGETS: dict[str, Target] = {ONNXRUNTIME.name: ONNXRUNTIME}

__all__ = ["TARGETS", "Target", "price"]
