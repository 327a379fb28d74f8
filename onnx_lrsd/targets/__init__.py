"""Targets by name."""

from onnx_lrsd.targets.machine import Machine, built_in, processor, this_machine
from onnx_lrsd.targets.onnxruntime import ONNXRUNTIME
from onnx_lrsd.targets.target import Target, price

TARGETS: dict[str, Target] = {ONNXRUNTIME.name: ONNXRUNTIME}

__all__ = ["TARGETS", "Machine", "Target", "built_in", "price", "processor", "this_machine"]
