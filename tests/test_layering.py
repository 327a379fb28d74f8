"""The layers of the packages (CONTRIBUTING.md), which setup.cfg has as contracts."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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
        ("onnx_lrsd/arrays.py", "cupy"),
        ("onnx_lrsd/commands/export_factors.py", "safetensors.numpy"),
    }
