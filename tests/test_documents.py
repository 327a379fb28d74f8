"""What documents and comments point to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import onnx_lrsd
from benchmarks.__main__ import STUDIES

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("results/*.md"), *ROOT.glob("docs/*.md")])
SOURCES = sorted(path for part in ("onnx_lrsd", "passes", "models") for path in (ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (document.parent / link).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_studies_that_documents_name_are_there(document: Path) -> None:
    for study in re.findall(r"python -m benchmarks ([a-z_]+)", document.read_text(encoding="utf-8")):
        assert study in STUDIES


def test_results_that_comments_cite_are_there() -> None:
    cited = {
        name
        for path in SOURCES
        for name in re.findall(r"(?:results|benchmarks)/[A-Za-z_]+\.(?:md|py)", path.read_text("utf-8"))
    }
    assert cited, "constants found by experiment cite the results"
    assert not [name for name in cited if not (ROOT / name).exists()]


def test_every_result_is_in_the_index() -> None:
    index = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "results").glob("*.md"):
        assert path.name == "README.md" or f"({path.name})" in index, path.name


def test_the_citation_is_of_this_version() -> None:
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None and cited[1] == onnx_lrsd.__version__


def test_files_that_recipes_name_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:onnx_lrsd|passes|tests|benchmarks|models|docs)/[\w/.]+)`", text)
    inside = re.findall(r"`((?:fit|plan|solver|graph|measure)/\w+\.py)`", text)
    files = {*named, *(f"onnx_lrsd/{name}" for name in inside)}
    files = {name for name in files if "NAME" not in name}
    assert len(files) > 15
    assert not [name for name in files if not (ROOT / name).exists()]
