"""A build stops where a promise is not kept, and the steps that others run are as they are written."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

import onnx_lrsd

ROOT = Path(__file__).parents[1]
ACTION = ROOT / ".github" / "actions" / "optimize" / "action.yml"
PIPELINES = ROOT / "docs" / "pipelines.md"
KEPT, OUT_OF_REACH = "--ratio 4 --forms channel", "--ratio 1000 --forms channel"
"""A product of rank 4 is a hundred times cheaper at best, and at 4 x clearly faster on any machine."""
BROKEN_PROMISE = 3
TOOL = """#!{python}
from onnx_lrsd import cli
from onnx_lrsd.measure import compare, layer_times

pair_latency = compare.pair_latency
compare.pair_latency = lambda *runs, **options: pair_latency(*runs, **{{**options, "seconds": 0.05}})
layer_times.SECONDS = 0.01
cli.main(prog_name="onnx-lrsd")
"""
"""The command, with timings for a moment: none of the promises is of time."""


def small_model() -> onnx.ModelProto:
    """A product with a weight of rank 4, of which a fraction of the MACs is needed."""
    rng = np.random.default_rng(0)
    graph = onnx.parser.parse_graph("g (float[n, 512] x) => (float[n, 512] y) { y = MatMul (x, w) }")
    weight = rng.standard_normal((512, 4)) @ rng.standard_normal((4, 512))
    graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), "w"))
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """net.onnx with its samples, and onnx-lrsd on the path as an installation has it."""
    onnx.save(small_model(), tmp_path / "net.onnx")
    samples = np.random.default_rng(1).standard_normal((90, 512)).astype(np.float32)
    np.savez(tmp_path / "net_calib.npz", x=samples[:60])
    np.savez(tmp_path / "net_eval.npz", x=samples[60:])
    tool = tmp_path / "bin" / "onnx-lrsd"
    tool.parent.mkdir()
    tool.write_text(TOOL.format(python=sys.executable))
    tool.chmod(0o755)
    return tmp_path


def environment(folder: Path, **more: str) -> dict[str, str]:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **more}


def step(name: str) -> dict[str, Any]:
    steps = yaml.safe_load(ACTION.read_text("utf-8"))["runs"]["steps"]
    (found,) = (one for one in steps if one["name"] == name)
    return dict(found)


def filled(text: str, inputs: dict[str, str]) -> str:
    """``text`` as GitHub fills in the inputs."""
    return re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda found: inputs[found[1]], text)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(("options", "code"), [(KEPT, 0), (OUT_OF_REACH, BROKEN_PROMISE)])
def test_the_step_of_github_fails_where_the_promise_is_not_kept(
    folder: Path, options: str, code: int
) -> None:
    found = yaml.safe_load(ACTION.read_text("utf-8"))
    inputs = {name: str(one.get("default", "")) for name, one in found["inputs"].items()}
    inputs |= {"model": "net.onnx", "calib": "net_calib.npz", "eval": "net_eval.npz", "options": options}
    optimise = step("Optimise")
    given = {name: filled(value, inputs) for name, value in optimise["env"].items()}
    told, summary = folder / "told", folder / "summary"
    # as GitHub runs a script whose shell is bash
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", optimise["run"]]
    given |= {"GITHUB_OUTPUT": str(told), "GITHUB_STEP_SUMMARY": str(summary)}
    done = subprocess.run(
        command, cwd=folder, env=environment(folder, **given), capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    outputs = dict(line.split("=", 1) for line in told.read_text().splitlines())
    assert set(outputs) == set(found["outputs"])
    assert (folder / outputs["model"]).exists()
    kept = json.loads((folder / outputs["report"]).read_text())["promise"]["kept"]
    assert kept == (code == 0)
    assert ("::error::" in done.stdout) == (code != 0)
    assert "promise" in summary.read_text()


def test_the_step_of_github_installs_this_repository(tmp_path: Path) -> None:
    install = step("Install onnx-lrsd")
    source = install["env"]["SOURCE"].replace("${{ github.action_path }}", str(ACTION.parent))
    assert Path(source).resolve() == ROOT
    extras = re.findall(r"\$SOURCE\[([\w,]+)\]", install["run"])
    assert extras and set(extras[0].split(",")) <= extras_of_setup()


def test_the_step_that_the_docs_show_has_inputs_that_are_there() -> None:
    (shown,) = (text for text in fenced("yaml") if "actions/optimize" in text)
    given = next(one["with"] for one in yaml.safe_load(shown) if "actions/optimize" in one["uses"])
    inputs = yaml.safe_load(ACTION.read_text("utf-8"))["inputs"]
    assert set(given) <= set(inputs)
    assert {name for name, one in inputs.items() if one.get("required")} <= set(given)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_rule_of_make_stops_the_build_and_leaves_no_model_behind(folder: Path) -> None:
    (rule,) = fenced("make")
    promise = "--max-drop 0.5"
    assert promise in rule
    for options, kept in ((KEPT, True), (OUT_OF_REACH, False)):
        (folder / "Makefile").write_text(rule.replace(promise, options))
        (folder / "net.lrsd.onnx").unlink(missing_ok=True)
        command = ["make", "net.lrsd.onnx"]
        done = subprocess.run(
            command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
        )
        assert (done.returncode == 0) == kept, done.stderr
        assert kept or f"Error {BROKEN_PROMISE}" in done.stderr
        assert (folder / "net.lrsd.onnx").exists() == kept
        assert (folder / "net.report.json").exists()


def test_the_image_installs_what_is_there_and_starts_the_command() -> None:
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    said = dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    assert next(iter(said)) == "FROM" and said["FROM"].startswith("python:3.")
    extras = re.findall(r"\[([\w,]+)\]", said["RUN"])
    assert extras and set(extras[0].split(",")) <= extras_of_setup()
    (entry,) = json.loads(said["ENTRYPOINT"])
    assert f"{entry} = " in setup()["options.entry_points"]["console_scripts"]
    assert json.loads(said["CMD"]) == ["--help"]
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in kept)
    assert {
        "setup.cfg",
        "pyproject.toml",
        "onnx_lrsd",
        "passes",
        setup()["metadata"]["license_files"],
    } <= set(kept)


def test_workflows_run_what_is_there() -> None:
    workflows = ROOT / ".github" / "workflows"
    tests, publish = (
        yaml.safe_load((workflows / f"{name}.yml").read_text()) for name in ("tests", "publish")
    )
    matrix = tests["jobs"]["tests"]["strategy"]["matrix"]
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    classified = re.findall(r"Python :: (3\.\d+)", setup()["metadata"]["classifiers"])
    assert set(classified) <= set(matrix["python"])
    job = publish["jobs"]["publish"]
    assert job["permissions"] == {"id-token": "write"}  # a trusted publisher, and no password
    assert "password" not in (workflows / "publish.yml").read_text().replace("no password", "")
    (tagged,) = (
        one["run"] for one in publish["jobs"]["build"]["steps"] if one.get("name", "").endswith("version")
    )
    given = {**os.environ, "GITHUB_REF_NAME": f"v{onnx_lrsd.__version__}"}
    assert subprocess.run(["bash", "-c", tagged], cwd=ROOT, env=given, check=False).returncode == 0
    given["GITHUB_REF_NAME"] = "v0.0.0"
    assert subprocess.run(["bash", "-c", tagged], cwd=ROOT, env=given, check=False).returncode == 1


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PIPELINES.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def setup() -> configparser.ConfigParser:
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def extras_of_setup() -> set[str]:
    return set(setup()["options.extras_require"])
