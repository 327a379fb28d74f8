"""Targets by name."""

from onnx_lrsd.targets.machine import Machine, built_in, processor, this_machine
from onnx_lrsd.targets.onnxruntime import ONNXRUNTIME
from onnx_lrsd.targets.size import SIZE
from onnx_lrsd.targets.target import Target, price
from onnx_lrsd.targets.tensorrt import TENSORRT

TARGETS: dict[str, Target] = {target.name: target for target in (ONNXRUNTIME, SIZE, TENSORRT)}

__all__ = ["TARGETS", "Machine", "Target", "built_in", "price", "processor", "this_machine"]
