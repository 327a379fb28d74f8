"""Files that commands read and write, checked before the work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from onnx_lrsd.data.made_up import made_up_samples
from onnx_lrsd.data.padding import without_padding
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.facts import NodeData
from onnx_lrsd.graph.model import Model
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.report import (
    node_data_files,
    plan_from_json,
)
from onnx_lrsd.types import Plan
from onnx_lrsd.whole_files import written_whole

STDOUT = Path("-")


def check_writable(path: Path | None) -> None:
    """Find out before the work, not after it, that a file cannot be written. Raises LrsdError."""
    if path is None or path == STDOUT:
        return
    if path.is_dir():
        raise LrsdError(f"{path} is a folder: name a file in it.")
    if path.exists() and not path.is_file():
        raise LrsdError(f"{path} is no ordinary file: name one.")
    if not path.parent.is_dir():
        raise LrsdError(f"There is no folder {path.parent} to write {path.name} to: create it first.")
    if not os.access(path.parent, os.W_OK):
        raise LrsdError(
            f"The folder {path.parent} cannot be written to: choose another place for {path.name}."
        )


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where there is none. Raises LrsdError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LrsdError(
            f"The folder {folder} cannot be made ({error.strerror}): name another place with --output."
        ) from None


def check_apart(outputs: Sequence[Path | None], inputs: Sequence[str | Path | None]) -> None:
    """Find out that outputs can be written, none over another nor over what is read. Raises LrsdError."""
    taken = {Path(path).resolve() for path in inputs if path is not None}
    for path in outputs:
        check_writable(path)
        if path is None or path == STDOUT:
            continue
        if path.resolve() in taken:
            raise LrsdError(f"{path} is read or written already in this run: choose another file.")
        taken.add(path.resolve())


def read_plan(path: Path) -> Plan:
    """The plan in a file. Raises LrsdError."""
    return plan_from_json(read_written(path, "plan", "--save-plan"))


def read_written(path: Path, what: str, option: str) -> str:
    """The text of a file, which is the ``what`` that ``option`` wrote. Raises LrsdError."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LrsdError(f"There is no file {path}: check the path of the {what}.") from None
    except UnicodeDecodeError:
        raise LrsdError(f"{path} is not text: give a {what} that {option} wrote.") from None
    except OSError as error:
        raise LrsdError(f"{path} cannot be read ({error.strerror}): check the path of the {what}.") from None


def write_text(path: Path, text: str) -> None:
    """Write all of ``text`` or nothing; to stdout for -."""
    if path == STDOUT:
        click.echo(text)
        return
    try:
        with written_whole(path) as (file,):
            file.write(f"{text}\n".encode())
    except OSError as error:
        raise LrsdError(f"{path} cannot be written ({error.strerror}): choose another place.") from None


def samples_of(model: Model, data: str | None) -> Samples:
    """The samples at ``data``, without padding; made up where there are none."""
    samples = made_up_samples(model) if data is None else read_samples(data, inputs_of(model.proto), fewest=1)
    return without_padding(model, samples)


def write_node_data(folder: Path, stem: str, found: NodeData) -> None:
    """Write a file for each kind of ``found`` into ``folder``. Raises LrsdError."""
    make_folder(folder)
    for what, text in node_data_files(found).items():
        write_text(folder / f"{stem}.{what}.json", text)
