"""A pass of Microsoft Olive, for its workflows in JSON.

    python -m onnx_lrsd.integrations.olive > packages.json
    olive run --config workflow.json --package-config packages.json

where a pass of workflow.json is `{"type": "Lrsd", "calibration": "calib.npz", "ratio": 2}`: any option of
`onnx_lrsd.optimize` by its name. packages.json lists Olive's own passes and this one. Needs
`pip install "onnx-lrsd[olive]"`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, get_type_hints

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from onnx_lrsd.commands.optimize import optimize
from onnx_lrsd.data.readers import script_function
from onnx_lrsd.option import options_of
from onnx_lrsd.report import report_to_json
from onnx_lrsd.run import Options

REPORT = "lrsd_report.json"
"""Written beside the model."""
SAMPLE_PATHS = {
    "calibration": "Path of unlabelled samples to calibrate on.",
    "evaluation": "Path of samples to verify on; with labels, accuracy is measured.",
}
OF_OTHER_TYPES = {"metric": str | None, "forms": list[str] | None}
"""What JSON has in place of a function and of a tuple."""

logger = logging.getLogger(__name__)


class Lrsd(Pass):
    """``onnx_lrsd.optimize`` as a pass of Olive, of an ONNX model to an ONNX model."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        """The samples, and each field of ``Options``; ``metric`` is 'top1' or FILE.py:FUNCTION."""
        given = {
            name: PassConfigParam(type_=str | None, default_value=None, description=said)
            for name, said in SAMPLE_PATHS.items()
        }
        types = {**get_type_hints(Options), **OF_OTHER_TYPES}
        options = {
            name: PassConfigParam(type_=types[name], default_value=default, description=option.help)
            for name, (option, default) in options_of(Options).items()
        }
        return {**given, **options}

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        """Optimise the file of ``model``; the report is written beside the result.

        A promise that was not kept is a warning of Olive's log. Raises LrsdError for what is wrong with
        the options, the model or the samples.
        """
        output = Path(resolve_onnx_path(output_model_path, Path(model.model_path).name))
        output.parent.mkdir(parents=True, exist_ok=True)
        given = {name: getattr(config, name) for name in [*SAMPLE_PATHS, *options_of(Options)]}
        if given["metric"] not in (None, "top1"):
            script, _, function = given["metric"].rpartition(":")
            given["metric"] = script_function(Path(script), function)
        if given["forms"] is not None:
            given["forms"] = tuple(given["forms"])
        result = optimize(model.model_path, output=output, **given)
        report = output.with_name(REPORT)
        report.write_text(report_to_json(result.report) + "\n", encoding="utf-8")
        promise = result.report.promise
        if promise is not None and not promise.kept:
            logger.warning(
                "onnx-lrsd: %s %g was asked, %g was reached", promise.kind, promise.asked, promise.got
            )
        attributes = dict(model.model_attributes or {})
        attributes["additional_files"] = sorted({*attributes.get("additional_files", []), str(report)})
        return ONNXModelHandler(model_path=str(output), model_attributes=attributes)


def package_config() -> dict[str, Any]:
    """What Olive's ``run`` takes as package_config: its own passes and Lrsd."""
    config: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text("utf-8"))
    config["passes"]["Lrsd"] = {
        "module_path": "onnx_lrsd.integrations.olive.Lrsd",
        "supported_providers": ["*"],
        "supported_accelerators": ["*"],
        "supported_precisions": ["*"],
        "supported_algorithms": [],
        "supported_quantization_encodings": [],
        "dataset": "dataset_optional",
    }
    return config


if __name__ == "__main__":
    print(json.dumps(package_config(), indent=1))
