"""What is installed, what works, and what to do about the rest."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from typing import NamedTuple

import numpy as np
import onnx

from onnx_lrsd.arrays import cupy
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.runtime.session import gist, onnxruntime, open_session
from onnx_lrsd.targets.machine import built_in, stored_at, this_machine

NEEDED = {"numpy": (2, 0), "onnx": (1, 16), "onnx-graphsurgeon": (0, 6)}
"""Package -> the oldest version that will do."""
OLDEST_PYTHON = (3, 11)


class Finding(NamedTuple):
    """One thing that was looked at; ``said`` is a sentence that ends with the remedy if there is one.

    ``good`` is True for what works, False for what has to be mended, None for what one can do without.
    """

    name: str
    good: bool | None
    said: str


def examine() -> list[Finding]:
    """Look at everything that onnx-lrsd stands on; nothing is changed and nothing is raised."""
    return [_python(), *(_package(name) for name in NEEDED), *_runtime(), _times(), _cupy()]


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        return Finding("python", False, f"Python {found} is too old: install Python 3.11 or newer.")
    return Finding("python", True, f"Python {found} on {platform.system()} {platform.machine()}.")


def _package(name: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, False, f"{name} is not installed: pip install onnx-lrsd.")
    parts = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    least = ".".join(map(str, NEEDED[name]))
    if parts < NEEDED[name]:
        return Finding(name, False, f"{name} {found} is too old: pip install '{name}>={least}'.")
    if name == "onnx-graphsurgeon" and parts >= (0, 7):  # parts of it that we use are not public
        return Finding(name, False, f"{name} {found} was never tried: pip install '{name}>=0.6,<0.7'.")
    return Finding(name, True, f"{name} {found}.")


def _runtime() -> list[Finding]:
    name = "onnxruntime"
    installed = _distributions(name)
    if len(installed) > 1:
        listed = " and ".join(installed)
        return [
            Finding(
                name,
                False,
                f"{listed} are installed together and overwrite each other's files: "
                f"pip uninstall {' '.join(installed)}, then install one of them.",
            )
        ]
    try:
        module = onnxruntime()
        providers = list(module.get_available_providers())
        open_session(_tiny()).run({"x": np.ones(1, np.float32)})
    except LrsdError as error:
        return [Finding(name, False, str(error))]
    except Exception as error:  # a broken installation can raise anything when it is imported
        return [Finding(name, False, f"{name} does not start ({gist(error)}): install it again.")]
    works = f"{' '.join(installed) or name} {module.__version__} runs; providers: {', '.join(providers)}."
    facts = [Finding(name, True, works)]
    if "CUDAExecutionProvider" in providers:
        try:
            open_session(_tiny(), device="cuda")
            facts.append(Finding("onnxruntime CUDA", True, "ONNX Runtime runs on the GPU."))
        except LrsdError:
            said = "ONNX Runtime has CUDA but cannot load it: install CUDA 12 and cuDNN 9, or use the CPU."
            facts.append(Finding("onnxruntime CUDA", False, said))
    return facts


def _times() -> Finding:
    """Which table predicts times."""
    try:
        found, said = this_machine()
    except LrsdError:  # there is no ONNX Runtime, which has been said
        return Finding("times", None, "Without ONNX Runtime no times are predicted: install it first.")
    if said:
        return Finding("times", None, said)
    if found is built_in():
        told = f"Times are predicted with a table measured on {found.processor}"
        return Finding("times", None, f"{told}: for one of this machine, run `onnx-lrsd profile`.")
    return Finding("times", True, f"Times are predicted with the table measured here ({stored_at()}).")


def _cupy() -> Finding:
    installed = _distributions("cupy")
    if not installed:
        said = "CuPy is not installed, so NumPy does the work: for a GPU, pip install onnx-lrsd[gpu]."
        return Finding("cupy", None, said)
    if len(installed) > 1:
        listed = " and ".join(installed)
        return Finding("cupy", False, f"{listed} are installed together: pip uninstall all but one.")
    module = cupy()
    if module is None:
        return Finding("cupy", None, f"{installed[0]} finds no GPU, NumPy does the work: check the driver.")
    device = module.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return Finding("cupy", True, f"{installed[0]} {module.__version__} on {device}.")


def _distributions(name: str) -> list[str]:
    """Installed distributions that bring the module ``name``, such as onnxruntime and onnxruntime-gpu."""
    names = {str(found.metadata["Name"]).lower().replace("_", "-") for found in distributions()}
    beside = tuple(f"{name}-{other}" for other in ("extensions", "genai", "tools"))  # modules of their own
    return sorted(n for n in names if f"{n}-".startswith(f"{name}-") and not n.startswith(beside))


def _tiny() -> onnx.ModelProto:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "tiny",
        [value("x", onnx.TensorProto.FLOAT, [1])],
        [value("y", onnx.TensorProto.FLOAT, [1])],
    )
    opset = onnx.helper.make_opsetid("", 17)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
