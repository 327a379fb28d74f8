"""What is installed, what works, and how to mend the rest."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, distributions, metadata, requires, version
from typing import NamedTuple

import numpy as np
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from onnx_lrsd.arrays import cupy, gpu_name
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.runtime.session import gist, onnxruntime, open_session, tiny_model
from onnx_lrsd.targets.machine import built_in, stored_at, this_machine

DISTRIBUTION = "onnx-lrsd"


class Finding(NamedTuple):
    """One thing that was checked; ``said`` is a sentence that ends with the remedy, if one is needed.

    ``good`` is True for what works, False for what has to be mended, None for what is optional.
    """

    name: str
    good: bool | None
    said: str


def examine() -> list[Finding]:
    """Check all that onnx-lrsd needs, by the requirements of its own distribution; raises nothing."""
    return [_python(), *map(_package, _requirements()), *_runtime(), _times(), _cupy(), *_cuda()]


def _python() -> Finding:
    found = platform.python_version()
    needed = SpecifierSet(metadata(DISTRIBUTION)["Requires-Python"] or "")
    if not needed.contains(found, prereleases=True):
        return Finding("python", False, f"Python {found} does not do: install Python {needed}.")
    return Finding("python", True, f"Python {found} on {platform.system()} {platform.machine()}.")


def _requirements() -> list[Requirement]:
    """What every installation needs; requirements of extras are left out."""
    found = map(Requirement, requires(DISTRIBUTION) or [])
    return [entry for entry in found if entry.marker is None or entry.marker.evaluate({"extra": ""})]


def _package(needed: Requirement) -> Finding:
    name = needed.name
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, False, f"{name} is not installed: pip install {DISTRIBUTION}.")
    if not needed.specifier.contains(found, prereleases=True):
        return Finding(name, False, f"{name} {found} does not do: pip install '{name}{needed.specifier}'.")
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
        open_session(tiny_model()).run({"x": np.ones(1, np.float32)})
    except LrsdError as error:
        return [Finding(name, False, str(error))]
    except Exception as error:  # a broken installation can raise anything when it is imported
        return [Finding(name, False, f"{name} does not start ({gist(error)}): install it again.")]
    works = f"{' '.join(installed) or name} {module.__version__} runs; providers: {', '.join(providers)}."
    facts = [Finding(name, True, works)]
    if "CUDAExecutionProvider" in providers:
        try:
            open_session(tiny_model(), device="cuda")
            facts.append(Finding("onnxruntime CUDA", True, "ONNX Runtime runs on the GPU."))
        except LrsdError:
            major = cuda_major(str(getattr(module, "cuda_version", "")))
            said = f"ONNX Runtime is built for CUDA {major} and cannot load it"
            remedy = "pip install onnxruntime-gpu[cuda,cudnn], check the driver, or use the CPU"
            facts.append(Finding("onnxruntime CUDA", False, f"{said}: {remedy}."))
    return facts


def _times() -> Finding:
    """Which table predicts times on the processor."""
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
    return Finding("cupy", True, f"{installed[0]} {module.__version__} on {gpu_name()}.")


def _cuda() -> list[Finding]:
    """Whether ONNX Runtime and CuPy are for one major version of CUDA; nothing unless both are for a GPU."""
    try:
        runtime = cuda_major(str(getattr(onnxruntime(), "cuda_version", "")))
    except LrsdError:
        return []
    arrays = [cuda_major(name.removeprefix("cupy-cuda")) for name in _distributions("cupy")]
    if runtime is None or len(arrays) != 1 or arrays[0] is None:
        return []
    if runtime != arrays[0]:
        said = f"ONNX Runtime is for CUDA {runtime} and CuPy for CUDA {arrays[0]}"
        return [Finding("cuda", False, f"{said}: pip install onnx-lrsd[gpu] brings two of one CUDA.")]
    return [Finding("cuda", True, f"ONNX Runtime and CuPy are both for CUDA {runtime}.")]


def cuda_major(said: str) -> int | None:
    """The major version at the start of ``said``; None where there is none.

    >>> cuda_major("13.0"), cuda_major("12x"), cuda_major("")
    (13, 12, None)
    """
    found = re.match(r"\d+", said)
    return int(found[0]) if found else None


def _distributions(name: str) -> list[str]:
    """Installed distributions that bring the module ``name``, such as onnxruntime and onnxruntime-gpu."""
    names = {str(found.metadata["Name"]).lower().replace("_", "-") for found in distributions()}
    beside = tuple(f"{name}-{other}" for other in ("extensions", "genai", "tools"))  # modules of their own
    return sorted(n for n in names if f"{n}-".startswith(f"{name}-") and not n.startswith(beside))
