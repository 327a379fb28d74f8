"""What is told on stderr, and progress."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from onnx_lrsd.report.progress import BarProgress, PlainProgress
from onnx_lrsd.types import Progress


def say(text: str) -> None:
    """Tell the user, on stderr."""
    click.echo(text, err=True)


def colour() -> bool:
    """Whether what is told may be coloured."""
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ


@contextlib.contextmanager
def progress_shown(quiet: bool) -> Iterator[Progress | None]:
    """A callback that draws one line on a terminal and wipes it at the end; plain lines elsewhere."""
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        yield PlainProgress(say)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", left="")

        def draw(said: str, done: int, total: int, left: str) -> None:
            bar.update(task, description=said, completed=done, total=total, left=left)

        yield BarProgress(draw)
