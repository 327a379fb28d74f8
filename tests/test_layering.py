"""The layers of the packages (CONTRIBUTING.md), which setup.cfg has as contracts."""

import ast
import importlib
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from types import ModuleType

from onnx_lrsd.passes.operators.operator import Operator

ROOT = Path(__file__).parents[1]


def _dynamic_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "import_module",
            "importlib.import_module",
        ):
            yield ast.literal_eval(node.args[0])


def test_contracts_are_kept() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_imports_by_name_hide_nothing_from_the_contracts() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for folder in ("onnx_lrsd", "passes")
        for path in (ROOT / folder).glob("**/*.py")
        for name in _dynamic_imports(path)
    }
    assert found <= {
        ("onnx_lrsd/runtime/session.py", "onnxruntime"),
        ("onnx_lrsd/runtime/quantiser.py", "onnxruntime.quantization"),
        ("onnx_lrsd/runtime/half.py", "onnxruntime.quantization"),
        ("onnx_lrsd/runtime/half.py", "onnxruntime.transformers.float16"),
        ("onnx_lrsd/runtime/engine.py", "tensorrt"),
        ("onnx_lrsd/arrays.py", "cupy"),
        ("onnx_lrsd/commands/export_factors.py", "safetensors.numpy"),
    }


def _modules() -> Iterator[Path]:
    for folder in ("onnx_lrsd", "passes"):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            if not path.is_relative_to(ROOT / "onnx_lrsd" / "passes"):  # a link to the other folder
                yield path.relative_to(ROOT)


def _public_names(path: Path) -> Iterator[str]:
    """What a module defines at its top level, without what it imports."""
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        match node:
            case ast.ClassDef() | ast.FunctionDef():
                names = [node.name]
            case ast.Assign(targets=targets):
                names = [
                    one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)
                ]
            case ast.AnnAssign(target=ast.Name(id=name)):
                names = [name]
            case _:
                names = []
        yield from (name for name in names if not name.startswith("_"))


def test_public_names_stand_for_one_thing_each() -> None:
    members = set(vars(Operator)) | set(Operator.__annotations__)
    places = defaultdict[str, list[str]](list)
    for path in _modules():
        of_an_operator = path.is_relative_to("passes/operators")
        for name in _public_names(path):
            if not (of_an_operator and name in members):
                places[name].append(path.as_posix())
    assert len(places) > 500
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_no_package_hides_a_module_behind_a_function() -> None:
    for path in _modules():
        if path.parts[0] == "onnx_lrsd" and "integrations" not in path.parts and path.stem[0] != "_":
            package = importlib.import_module(".".join(path.parent.parts))
            importlib.import_module(".".join(path.with_suffix("").parts))
            assert isinstance(getattr(package, path.stem), ModuleType), path


def test_the_picture_of_the_house_names_every_layer() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    layers = config["importlinter:contract:layers"]["layers"].replace("__main__", "").split()
    picture = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    # Names, with bars between them, stand in front of what is said of them.
    drawn = re.findall(r"^(\w+/?(?: *\| *\w+/?)*)(?: |$)", picture, re.MULTILINE)
    names = {name for line in drawn for name in re.findall(r"\w+", line)}
    assert {name for name in layers if name != "|"} <= names
