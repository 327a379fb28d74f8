"""Examples in docstrings as blocks of code, which Markdown would take for quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"((?:^[ ]*>>> .*\n?)(?:^[ ]*\S.*\n?)*)", re.MULTILINE)


class Doctests(griffe.Extension):
    """Fences every run of lines that begins with >>>."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Of one object, after its docstring is known."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\1\n```\n", obj.docstring.value)
