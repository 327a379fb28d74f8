"""What the site needs beyond docs/: pages of other folders, links, formulas, the help of commands."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import click
from latex2mathml.converter import convert
from mkdocs.structure.files import File

from onnx_lrsd.cli import main

ROOT = Path(__file__).parents[2]
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "results/*.md", "results/*.svg")
"""What else is on the site, under the names that it has in the repository."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^(```.*?^```$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
COMMANDS = "<!-- the help of every command -->"
"""What stands for it in a page."""
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie beside docs/."""
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links as they are in the repository to those of the site, and formulas to MathML; add commands.

    A link to a file of the repository that is no page becomes its text. The rest is left to MkDocs, which
    warns of links that lead nowhere.
    """
    inside = not Path(page.file.abs_src_path).is_relative_to(ROOT / "docs")
    here = page.file.src_uri if inside else f"docs/{page.file.src_uri}"

    def turned(found: re.Match[str]) -> str:
        picture, text, target, anchor = found.groups(default="")
        if "://" in target:
            return found[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        source = there.removeprefix("docs/")
        if files.get_file_from_path(source) is not None:
            relative = posixpath.relpath(source, posixpath.dirname(page.file.src_uri) or ".")
            return f"{picture}[{text}]({relative}{anchor})"
        return text if (ROOT / there).exists() else found[0]

    parts = FENCE.split(markdown)
    for place in range(0, len(parts), 2):  # the others are code
        parts[place] = LINK.sub(turned, FORMULA.sub(_mathml, parts[place]))
    return "".join(parts).replace(COMMANDS, _commands())


def _commands() -> str:
    """What --help says of onnx-lrsd and of each of its commands."""
    top = click.Context(main, info_name="onnx-lrsd", terminal_width=100, **main.context_settings)
    said = [f"```text\n{main.get_help(top)}\n```"]
    for name, command in main.commands.items():
        context = click.Context(command, top, name)
        said.append(f"## onnx-lrsd {name}\n\n```text\n{command.get_help(context)}\n```")
    return "\n\n".join(said)


def _mathml(found: re.Match[str]) -> str:
    block, inline = found.groups()
    if block is None:
        return convert(inline)
    return f"\n\n{convert(block.strip(), display='block')}\n\n"
