"""The commands that look at models and reports: inspect, compare and report."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_lrsd.cli.files import (
    check_apart,
    read_written,
    samples_of,
    write_node_data,
    write_text,
)
from onnx_lrsd.cli.options import (
    HTML_OPTION,
    JSON_OPTION,
    NODE_DATA_OPTION,
    loudness,
    output_option,
    shape_by_input,
    usage_errors,
)
from onnx_lrsd.cli.terminal import colour, progress_shown, say
from onnx_lrsd.commands.inspect import inspect
from onnx_lrsd.commands.node_data import node_data
from onnx_lrsd.graph.model import load, size_on_disk
from onnx_lrsd.measure.compare import compare
from onnx_lrsd.measure.drift import drift
from onnx_lrsd.report import (
    comparison_table,
    comparison_to_json,
    drift_table,
    inspection_table,
    inspection_to_json,
    report_page,
)


@click.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--calib",
    type=click.Path(),
    metavar="PATH",
    help="Count MACs with inputs of the shape of the first sample here.",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    callback=shape_by_input,
    metavar="NAME:1x3x320x320",
    help="Count MACs with this shape of an input; may be given for each.",
)
@JSON_OPTION
@loudness
@click.pass_context
def inspect_command(
    ctx: click.Context,
    /,
    model: Path,
    calib: str | None,
    shapes: dict[str, tuple[int, ...]],
    json_path: Path | None,
    verbose: bool,
    quiet: bool,
) -> None:
    """List the layers of a model.

    Those that can be worked on with their share of the MACs, and why the others are left alone.
    """
    check_apart([json_path], [model, calib])
    with usage_errors(ctx):
        found = inspect(model, calib, shapes=shapes)
    if not quiet:
        say(inspection_table(found, str(model), colour=colour(), every=verbose))
    if json_path is not None:
        write_text(json_path, inspection_to_json(found, str(model)))


@click.command("compare")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option(
    "--data", type=click.Path(), metavar="PATH", help="Samples, as for --eval.  [default: made-up data]"
)
@click.option(
    "--layers",
    is_flag=True,
    help="Also compare every tensor that has one name in both, to see where they part.",
)
@JSON_OPTION
@HTML_OPTION
@NODE_DATA_OPTION
@loudness
def compare_command(
    before: Path,
    after: Path,
    data: str | None,
    layers: bool,
    json_path: Path | None,
    html_path: Path | None,
    node_folder: Path | None,
    verbose: bool,
    quiet: bool,
) -> None:
    """Run two models side by side.

    Their size, MACs and latency are compared, and how far their outputs differ.
    """
    check_apart((json_path, html_path), (before, after, data))
    one, two = load(before), load(after)
    samples = samples_of(one, data)
    with progress_shown(quiet) as progress:
        apart = drift(one, two, samples, progress=progress) if layers else None
        found = compare(
            one,
            two,
            samples,
            bytes_before=size_on_disk(before),
            bytes_after=size_on_disk(after),
            progress=progress,
        )
        if node_folder is not None:
            write_node_data(node_folder, after.stem, node_data(one, two, samples, progress=progress))
    if not quiet:
        say(comparison_table(found, str(before), str(after), colour=colour()))
        if apart is not None:
            say("\n" + drift_table(apart, colour=colour(), every=verbose))
        for note in samples.notes:
            say(f"Warning: {note}")
        if data is None:
            say("Warning: outputs were compared on made-up data, their errors mean little: give --data.")
    written = comparison_to_json(found, str(before), str(after), samples.source, apart)
    if json_path is not None:
        write_text(json_path, written)
    if html_path is not None:
        write_text(html_path, report_page(written))


@click.command("report")
@click.argument("report", type=click.Path(path_type=Path))
@output_option("Where to write the page.  [default: REPORT.html beside it]")
def report_command(report: Path, output: Path | None) -> None:
    """Make a page for a browser of a report.

    REPORT is the JSON that optimize or compare wrote; the page is the one that --html would have written.
    """
    target = output or report.with_suffix(".html")
    check_apart([target], [report])
    write_text(target, report_page(read_written(report, "report", "--json")))
