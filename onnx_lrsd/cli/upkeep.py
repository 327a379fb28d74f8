"""The commands around them: unpack, profile, cache and doctor."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_lrsd.cli.files import (
    check_apart,
    check_writable,
    make_folder,
    write_text,
)
from onnx_lrsd.cli.options import (
    loudness,
    output_option,
    usage_errors,
)
from onnx_lrsd.cli.terminal import colour, progress_shown, say
from onnx_lrsd.commands.cache import clear, listed
from onnx_lrsd.commands.doctor import examine
from onnx_lrsd.commands.profile import ensure_profiled, measure
from onnx_lrsd.commands.unpack import unpack
from onnx_lrsd.errors import LrsdError
from onnx_lrsd.graph.model import save, size_on_disk
from onnx_lrsd.report import (
    machine_table,
)
from onnx_lrsd.targets.machine import PROFILED, stored_at, to_json

PLAIN = ".plain.onnx"


@click.command("unpack")
@click.argument("model", type=click.Path(path_type=Path))
@output_option(f"Where to write the model.  [default: MODEL{PLAIN} beside it]")
@loudness
def unpack_command(model: Path, output: Path | None, verbose: bool, quiet: bool) -> None:
    """Write a plain dense model from one that the target size wrote."""
    target = output or model.with_name(model.stem + PLAIN)
    check_apart([target], [model])
    plain = unpack(model)
    save(plain, target)
    if not quiet:
        say(f"{model} -> {target}: {size_on_disk(model):,} -> {size_on_disk(target):,} bytes")


@click.command("profile")
@output_option(
    "Write the table elsewhere than where optimize looks for it.  [default: in your folder for caches]"
)
@click.option(
    "--device",
    type=click.Choice(PROFILED),
    default=PROFILED[0],
    show_default=True,
    help="Where ONNX Runtime runs the nodes; on a GPU it takes some minutes.",
)
@loudness
def profile_command(output: Path | None, device: str, verbose: bool, quiet: bool) -> None:
    """Measure this machine, in about a minute.

    How fast it runs the nodes that layers are rewritten to. From then on optimize plans with that on the same
    device.
    """
    ensure_profiled(device)
    path = stored_at(device) if output is None else output
    if output is None:
        make_folder(path.parent)
    check_writable(path)
    with progress_shown(quiet) as progress:
        machine = measure(progress, device)
    write_text(path, to_json(machine))
    if not quiet:
        say(f"{machine_table(machine, colour=colour())}\n\nWritten to {path}.")


@click.command("cache")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--clear", "clears", is_flag=True, help="Remove what it keeps.")
@click.option(
    "--keep", metavar="SIZE", help="Remove what was used least recently, until SIZE (say 4GB) is left."
)
@click.pass_context
def cache_command(ctx: click.Context, /, folder: Path, clears: bool, keep: str | None) -> None:
    """List what a work dir keeps, or make room in it.

    DIR is what --work-dir of optimize was given.
    """
    if clears and keep is not None:
        raise click.UsageError("--clear and --keep exclude each other: give one.")
    with usage_errors(ctx):
        click.echo(clear(folder, keep or 0) if clears or keep is not None else listed(folder))


@click.command("doctor")
@click.pass_context
def doctor_command(ctx: click.Context, /) -> None:
    """Say what is installed and what works."""
    findings = examine()
    marks = {True: "ok", False: "BAD", None: "-"}
    for finding in findings:
        click.echo(f"{marks[finding.good]:<4}{finding.name:<18}{finding.said}")
    if any(finding.good is False for finding in findings):
        ctx.exit(LrsdError.code)
