"""Make trained ONNX models smaller and faster: low rank plus sparse weights, without retraining.

    optimised, report, plan = onnx_lrsd.optimize("model.onnx", calibration="calib.npz", ratio=2)
    onnx_lrsd.save(optimised, "model.lrsd.onnx")

Every stage of ``optimize`` is public as well.
"""

from onnx_lrsd.commands.calibrate import calibrate_shard
from onnx_lrsd.commands.inspect import inspect
from onnx_lrsd.commands.optimize import Result, optimize
from onnx_lrsd.commands.sweep import SweepOptions, sweep
from onnx_lrsd.commands.unpack import unpack
from onnx_lrsd.data.padding import without_padding
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.errors import LrsdError, OptionError
from onnx_lrsd.facts import Report, Sweep, Verification
from onnx_lrsd.fit.calibrate import Calibration, calibrate
from onnx_lrsd.graph.model import Model, load, save
from onnx_lrsd.measure.compare import compare
from onnx_lrsd.passes.find_layers import find_layers, read_weight
from onnx_lrsd.passes.split import split
from onnx_lrsd.plan.allocate import allocate
from onnx_lrsd.report import plan_from_json, plan_to_json, report_table, report_to_json
from onnx_lrsd.run import Options
from onnx_lrsd.solver.decompose import decompose
from onnx_lrsd.solver.problem import pose
from onnx_lrsd.types import Factors, Form, Layer, Moments, Plan

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Factors",
    "Form",
    "Layer",
    "LrsdError",
    "Model",
    "Moments",
    "OptionError",
    "Options",
    "Plan",
    "Report",
    "Result",
    "Samples",
    "Sweep",
    "SweepOptions",
    "Verification",
    "allocate",
    "calibrate",
    "calibrate_shard",
    "compare",
    "decompose",
    "find_layers",
    "inspect",
    "load",
    "optimize",
    "plan_from_json",
    "plan_to_json",
    "pose",
    "read_samples",
    "read_weight",
    "report_table",
    "report_to_json",
    "save",
    "split",
    "sweep",
    "unpack",
    "without_padding",
]
