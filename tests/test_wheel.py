"""What is installed is the package onnx_lrsd and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("onnx_lrsd", "passes", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def _build(folder: Path, kind: str, source: Path) -> Path:
    out = folder / f"{kind}_of_{source.name}"
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        f"--{kind}",
        "--outdir",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    (built,) = out.iterdir()
    return built


def _names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheel")


@pytest.fixture(scope="module")
def copy(folder: Path) -> Path:
    """The sources as a clone has them, so that nothing built here before gets in."""
    target = folder / "source"
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target / name, symlinks=True, ignore=ignored)
        else:
            target.mkdir(exist_ok=True)
            shutil.copy(source, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(folder: Path, copy: Path) -> list[str]:
    return _names(_build(folder, "wheel", copy))


def test_the_wheel_holds_onnx_lrsd_alone(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {"onnx_lrsd", next(top for top in tops if top.endswith(".dist-info"))}


def test_every_module_is_in_the_wheel(wheel: list[str]) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "onnx_lrsd").glob("**/*.py")}
    modules |= {
        f"onnx_lrsd/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "passes").glob("**/*.py")
    }
    assert {name for name in wheel if name.endswith(".py")} == modules
    assert "onnx_lrsd/py.typed" in wheel
    page = {f"onnx_lrsd/report/page/{path.name}" for path in (ROOT / "onnx_lrsd/report/page").iterdir()}
    assert page and page <= set(wheel)


def test_the_sdist_builds_the_same_wheel(folder: Path, copy: Path, wheel: list[str]) -> None:
    shutil.unpack_archive(_build(folder, "sdist", copy), folder / "sdist")
    (source,) = (folder / "sdist").iterdir()
    assert sorted(_names(_build(folder, "wheel", source))) == sorted(wheel)


def test_importing_is_light() -> None:
    heavy = {"onnxruntime", "cupy", "click", "sklearn", "scipy"}
    code = f"import sys, onnx_lrsd; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
