"""A pass of onnx-ir, to stand in one sequence with its own and those of onnxscript.

    from onnx_ir.passes import Sequential
    from onnx_ir.passes.common import DeduplicateInitializersPass
    from onnx_lrsd.integrations.onnx_ir import LrsdPass

    result = Sequential(DeduplicateInitializersPass(), LrsdPass("calib.npz", ratio=2))(model)

Needs `pip install "onnx-lrsd[onnx-ir]"`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
from onnx_ir.external_data import load_to_model
from onnx_ir.passes import FunctionalPass, PassResult

from onnx_lrsd.commands.optimize import optimize
from onnx_lrsd.facts import Report
from onnx_lrsd.run import Options

MODEL, DATA, RESULT = "model.onnx", "model.onnx.data", "result.onnx"


class LrsdPass(FunctionalPass):
    """``onnx_lrsd.optimize`` as a pass: a new model, the one that is given stays as it was.

    ``calibration``, ``evaluation`` and ``options`` are those of ``onnx_lrsd.optimize``. ``report`` is what
    the last call said, None before the first. Raises OptionError for options that are wrong or do not go
    together, and in a call another LrsdError for anything that is wrong with model or samples.
    """

    def __init__(self, calibration: Any = None, *, evaluation: Any = None, **options: Any) -> None:
        Options(**options).check_with(
            calibration=calibration, evaluation=evaluation, plan=None, output=None, dry_run=False
        )
        self.calibration, self.evaluation, self.options = calibration, evaluation, options
        self.report: Report | None = None

    def call(self, model: onnx_ir.Model) -> PassResult:
        """The optimised model, all of it in memory; ``modified`` is False where the original came back."""
        with tempfile.TemporaryDirectory(prefix="onnx-lrsd-") as folder:
            given, written = Path(folder) / MODEL, Path(folder) / RESULT
            # By files: tensors of a model may lie on disk, and more than 2 GB fit in no protobuf message.
            onnx_ir.save(model, given, external_data=DATA)
            result = optimize(
                given, self.calibration, evaluation=self.evaluation, output=written, **self.options
            )
            self.report = result.report
            modified = result.model.proto != onnx.load(given, load_external_data=False)
            return PassResult(load_to_model(onnx_ir.load(written)), modified=modified)
