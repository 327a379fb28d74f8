"""Options in a file: what is printed reads back the same, and what is wrong in it is said in one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

import onnx_lrsd
from onnx_lrsd import cli
from onnx_lrsd.cli import making
from onnx_lrsd.cli.config_option import option_name
from onnx_lrsd.config import Value, read_config, write_config
from onnx_lrsd.option import options_of
from onnx_lrsd.types import KINDS

OPTIMIZE = cli.main.commands["optimize"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, ["optimize", *map(str, arguments)], catch_exceptions=False)


class Stopped(Exception):
    """Raised in place of the work."""


def heard(*arguments: object) -> dict[str, Any]:
    """What ``optimize`` is called with by a command line."""
    called: dict[str, Any] = {}

    def optimize(model: object, calibration: object, **options: Any) -> None:
        called.update(options, model=model, calibration=calibration)
        raise onnx_lrsd.LrsdError("Nothing is done here: go on.")

    with patch.object(making, "optimize", optimize):
        result = run(*arguments)
    assert "Nothing is done here" in result.stderr, result.stderr
    del called["progress"]
    return called


def printed(folder: Path, *arguments: object) -> Path:
    result = run(*arguments, "--print-config")
    assert result.exit_code == 0, result.stderr
    path = folder / "lrsd.toml"
    path.write_text(result.stdout, encoding="utf-8")
    return path


SCALARS = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())


@given(st.dictionaries(st.sampled_from(["a", "max-error", "b"]), st.one_of(SCALARS, st.lists(SCALARS))))
def test_a_written_file_reads_back_the_same(options: dict[str, Value]) -> None:
    assert tomllib.loads(write_config(options)) == options


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).filter(
    lambda name: not name.startswith("-")
)
GIVEN = {
    "--ratio": st.floats(1, 100),
    "--samples": st.integers(1, 999),
    "--seed": st.integers(0, 2**70),
    "--cost": st.sampled_from(["macs", "params", "bytes"]),
    "--target": st.sampled_from(["onnxruntime", "size"]),
    "--forms": st.lists(st.sampled_from(KINDS), min_size=1, max_size=3).map(",".join),
    "--include": st.from_regex(r"[a-z\"\\.é]{1,6}[a-z]", fullmatch=True).filter(
        lambda text: "\\" not in text
    ),
    "--eval": NAMES,
    "--calib": NAMES,
    "-v": st.none(),
    "--details": st.none(),
}


@given(st.fixed_dictionaries({}, optional=GIVEN))
def test_a_command_line_and_the_file_printed_for_it_ask_for_the_same(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, object]
) -> None:
    typed = ["net.onnx", "-o", "out.onnx"]
    for name, value in options.items():
        typed += [name] if value is None else [f"{name}={value}"]
    folder = tmp_path_factory.mktemp("config")
    path = printed(folder, *typed)
    assert heard("-c", path) == heard(*typed)
    assert printed(folder, "-c", path).read_text() == path.read_text(), "once more prints the same"


def test_what_is_typed_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lrsd.toml"
    path.write_text('model = "a.onnx"\nratio = 2\nforms = ["channel", "width"]\neval = "e.npz"\n')
    found = heard("--config", path, "b.onnx", "--ratio", 3)
    assert (found["model"], found["ratio"]) == (Path("b.onnx"), 3.0)
    assert (found["forms"], found["evaluation"]) == (("channel", "width"), "e.npz")


def test_every_option_may_stand_in_a_file() -> None:
    names = {option_name(parameter) for parameter in OPTIMIZE.params} - {""}
    assert {"model", "output", "calib", "eval", "plan", "json", "html", "verbose", "max-error"} <= names
    assert {name.replace("_", "-") for name in options_of(onnx_lrsd.Options)} <= names


def test_every_option_has_its_type_check_and_help_in_one_place() -> None:
    shown = {parameter.name: parameter for parameter in OPTIMIZE.params}
    options = options_of(onnx_lrsd.Options)
    assert options.keys() == onnx_lrsd.Options.__dataclass_fields__.keys()
    for name, (option, default) in options.items():
        parameter = shown[name]
        assert isinstance(parameter, click.Option)
        assert parameter.help is not None and parameter.help.startswith(option.help)
        assert parameter.default == default or (default is False and not parameter.default)
        with pytest.raises(onnx_lrsd.OptionError, match=name):
            option.takes.check(name, object())


WRONG = {
    "max-eror = 0.1": "'max-eror': write max-error",
    "max_error = 0.1": "'max_error': write max-error",
    "colour = 1": "'colour': choose from model, output",
    "config = 'x'": "'config': ",
    "ratio = [1, 2]": "takes one value",
    "ratio = true": "is no option that is true or false",
    "ratio = 'many'": "'many' is not a valid float. It stands in",
    "ratio = 0.5": "--ratio 0.5 is not a number of at least 1",
    "samples = 1.5": "It stands in",
    "int8 = 'yes'": "neither true nor false",
    "int8 = 1": "neither true nor false",
    "seed = 2026-01-01": "no string, number",
    "[optimize]\nratio = 2": "'optimize': ",
    "forms = [['channel']]": "no string, number",
    "ratio =": "is not valid TOML",
    "cost = 'parameters'": "It stands in",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_in_a_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lrsd.toml"
    path.write_text(text)
    result = run("net.onnx", "-c", path)
    assert result.exit_code in (1, 2)
    assert WRONG[text] in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ") and result.stdout == ""


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, says in (("none.toml", "There is no file"), ("bytes", "is not text"), (".", "cannot be read")):
        result = run("net.onnx", "-c", tmp_path / name)
        assert result.exit_code == 1 and says in result.stderr
    with pytest.raises(onnx_lrsd.LrsdError, match="There is no file"):
        read_config(tmp_path / "none.toml", [])


def test_no_file_is_printed_for_a_command_line_that_is_wrong() -> None:
    result = run("net.onnx", "--ratio", 0.5, "--print-config")
    assert result.exit_code == 2 and result.stdout == ""


# Completion in shells


def completed(shell: str, *words: str) -> list[str]:
    """What click's script for ``shell`` is told that the last of the words may become."""
    joined = " ".join(("onnx-lrsd", *words))
    asks = {
        **os.environ,
        "_ONNX_LRSD_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": joined,
        "COMP_CWORD": words[-1] if shell == "fish" else str(len(words)),
    }
    script = "from onnx_lrsd.cli import main; main(prog_name='onnx-lrsd')"
    told = subprocess.run([sys.executable, "-c", script], env=asks, capture_output=True, text=True)
    return told.stdout.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_options_and_what_they_take(shell: str) -> None:
    assert any("max-error" in line for line in completed(shell, "optimize", "--max-e"))
    if shell == "bash":
        assert completed(shell, "optimize", "--target", "s") == ["plain,size"]
        assert completed(shell, "optimize", "--calib", "mod") == ["file,mod"], "names of files"


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_documented_line_works_in_bash(tmp_path: Path) -> None:
    program = tmp_path / "onnx-lrsd"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(Path(onnx_lrsd.__file__).parents[1])!r})\n"
        "from onnx_lrsd.cli import main\nmain(prog_name='onnx-lrsd')\n"
    )
    program.chmod(0o755)
    documented = 'eval "$(_ONNX_LRSD_COMPLETE=bash_source onnx-lrsd)"'
    assert documented in (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
    asks = "COMP_WORDS=(onnx-lrsd optimize --max-d) COMP_CWORD=2; _onnx_lrsd_completion onnx-lrsd"
    shown = 'echo "${COMPREPLY[@]}"'
    path = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    told = subprocess.run(
        ["bash", "-c", f"{documented}\n{asks}\n{shown}"], env=path, capture_output=True, text=True
    )
    assert told.stdout.split() == ["--max-drop"], told.stderr
