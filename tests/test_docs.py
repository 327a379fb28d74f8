"""Every command of docs/ runs, the reference is whole, and the site is built without a warning."""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

import onnx_lrsd
from benchmarks.__main__ import parser_of
from onnx_lrsd import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
NEEDS = {"onnx_lrsd.integrations.onnx_ir": "onnx_ir"}
"""Modules of blocks of Python, and what they cannot do without."""

LOADED = r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:[^"]+)'
"""What a browser fetches from another place to show a page."""
Paces = tuple[float, float, float, tuple[float, float]]


class Block(NamedTuple):
    """A fenced block of a page; ``not_run`` is the reason that the page gives for not running it."""

    language: str
    text: str
    not_run: str


def blocks(page: Path) -> Iterator[Block]:
    fence = r"(?:^<!-- not run: (.+?) -->\n)?^```(\w+)\n(.*?)^```$"
    for reason, language, text in re.findall(fence, page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        yield Block(language, text, reason)


def small_network(folder: Path) -> None:
    """In place of models/digits.*: the same names and inputs, a network of which half is not needed."""
    rng = np.random.default_rng(0)

    def low_rank(n: int, *m: int) -> Any:
        rows = rng.standard_normal((n, 2)) @ rng.standard_normal((2, int(np.prod(m))))
        return (rows.reshape(n, *m) / np.sqrt(np.prod(m))).astype(np.float32)

    graph = onnx.parser.parse_graph(
        """digits (float[n, 1, 8, 8] image) => (float[n, 10] scores) {
            a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, w1)
            b = Relu (a)
            c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (b, w2)
            d = Relu (c)
            e = MaxPool <kernel_shape = [4, 4], strides = [4, 4]> (d)
            f = Flatten (e)
            scores = Gemm (f, w3)
        }"""
    )
    weights = {"w1": low_rank(64, 1, 3, 3), "w2": low_rank(64, 64, 3, 3), "w3": low_rank(256, 10)}
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    names = ("conv1", "relu1", "conv2", "relu2", "pool", "flatten", "dense1")
    for node, name in zip(graph.node, names, strict=True):
        node.name = name
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), folder / "digits.onnx")
    images = rng.random((340, 1, 8, 8), dtype=np.float32)
    np.savez(folder / "digits_calib.npz", image=images[:40])
    session = onnxruntime.InferenceSession(str(folder / "digits.onnx"))
    labels = session.run(None, {"image": images[40:]})[0].argmax(axis=1)
    np.savez(folder / "digits_eval.npz", image=images[40:], labels=labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where commands run: models/ beside them, and timings of a machine on which every rewrite pays."""

    def pays(
        *runs: Callable[[], object], **options: object
    ) -> tuple[float, float, float, tuple[float, float]]:
        for run in runs:
            run()
        return 2.0, 1.0, 2.0, (1.9, 2.1)

    path = tmp_path_factory.mktemp("docs")
    (path / "models").mkdir()
    small_network(path / "models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnx_lrsd.measure.compare.pair_latency", pays)
        patch.setattr("onnx_lrsd.measure.layer_times.SECONDS", 0.01)
        patch.chdir(path)
        run_page(DOCS / "tutorial.md")
        yield path


def run_page(page: Path) -> None:
    for block in blocks(page):
        if block.not_run:
            continue
        if block.language in ("bash", "console"):
            for line in block.text.replace("\\\n", " ").splitlines():
                run_line(line.removeprefix("$ "))
        if block.language == "toml":
            Path("lrsd.toml").write_text(block.text, encoding="utf-8")
        if block.language == "python" and not missing(block.text):
            exec(compile(block.text, page.name, "exec"), {})


def missing(code: str) -> bool:
    return any(name in code and importlib.util.find_spec(tool) is None for name, tool in NEEDS.items())


def run_line(line: str) -> None:
    """Run a command of onnx-lrsd; of a study, read its command line."""
    words = shlex.split(line, comments=True)
    if not words:
        return
    output = words[words.index(">") + 1] if ">" in words else None
    words = words[: words.index(">")] if ">" in words else words
    if words[0] == "onnx-lrsd":
        result = CliRunner().invoke(cli.main, words[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{line}: {result.stderr}"
        if output is not None:
            Path(output).write_text(result.stdout, encoding="utf-8")
    elif words[:3] == ["python", "-m", "benchmarks"]:
        parser_of(words[3]).parse_args(words[4:])
    else:
        pytest.fail(f"{line}: say `<!-- not run: why -->` above the block, or have this test run it")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_every_command_of_the_page_runs(page: Path, folder: Path) -> None:
    if page.name != "tutorial.md":  # which the fixture has run
        run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_commands_stand_in_blocks_that_are_run(page: Path) -> None:
    indented = re.findall(r"^    (?:\$ )?(?:onnx-lrsd|python) .*$", page.read_text("utf-8"), re.MULTILINE)
    assert not indented, "write them in a block of bash"


def test_what_is_not_run_says_why_and_names_extras_that_are_there() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for found in re.findall(r"pip install .*?\[([\w,-]+)\]", page.read_text("utf-8")):
            assert set(found.split(",")) <= extras, f"{page.name}: {found}"


def test_the_reference_has_every_public_name() -> None:
    text = (DOCS / "reference" / "python.md").read_text("utf-8")
    listed = re.findall(r"^::: onnx_lrsd\.(\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(onnx_lrsd.__all__), "docs/reference/python.md lists onnx_lrsd.__all__"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    mathematics = (tmp_path / "mathematics" / "index.html").read_text("utf-8")
    assert mathematics.count("<math") > 40 and "$" not in re.sub(r"<code.*?</code>", "", mathematics)
    commands = (tmp_path / "reference" / "cli" / "index.html").read_text("utf-8")
    assert all(f'id="onnx-lrsd-{name}"' in commands for name in cli.main.commands)
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(LOADED, page.read_text("utf-8"))
        assert not loaded, page
