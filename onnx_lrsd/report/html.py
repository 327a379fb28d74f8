"""The report as one page for a browser: one file that holds its data, styles and script and loads nothing.

The page is made from the report's JSON alone, so a report that was kept gives the same page later.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from onnx_lrsd.errors import DataError
from onnx_lrsd.report.json import SCHEMA

SCRIPTS = ("charts.js", "report.js", "compare.js", "sweep.js", "main.js")


def report_page(text: str) -> str:
    """The page of a report, a comparison or a sweep, whose JSON is ``text``.

    Raises DataError for what is neither, or of another schema.
    """
    try:
        facts = json.loads(text)
    except ValueError as error:
        raise DataError(f"The report is not valid JSON ({error}): make one with --json.") from None
    model = facts.get("model") if isinstance(facts, dict) else None
    if (
        not isinstance(model, dict)
        or not {"outputs", "points"} & facts.keys()
        or not {"input", "before"} & model.keys()
    ):
        raise DataError("This JSON is no report of optimize, compare or sweep: make one with --json.")
    if facts.get("schema") != SCHEMA:
        raise DataError(f"The report has schema {facts.get('schema')!r}, not {SCHEMA}: make one with --json.")
    return _page(facts, PurePath(str(model.get("input") or model.get("before"))).name)


def _page(facts: dict[str, Any], title: str) -> str:
    script = "\n".join(_part(name) for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "title": escape(f"{title}, onnx-lrsd"),
        "script_source": f"'sha256-{digest}'",
        "style": _part("page.css"),
        "data": _embedded(facts),
        "script": script,
    }
    page = _part("template.html")
    pieces = page.split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled)


def _part(name: str) -> str:
    return (files("onnx_lrsd.report") / "page" / name).read_text(encoding="utf-8")


def _embedded(facts: dict[str, Any]) -> str:
    """JSON that ends no element early, whatever names a model gives its tensors."""
    text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
