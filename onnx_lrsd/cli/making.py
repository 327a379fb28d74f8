"""The commands that make models: optimize, sweep, and calibrate for them."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from onnx_lrsd.cli.config_option import GIVEN, Configurable
from onnx_lrsd.cli.files import (
    STDOUT,
    check_apart,
    make_folder,
    read_plan,
    samples_of,
    write_node_data,
    write_text,
)
from onnx_lrsd.cli.group import ARGUMENTS, BROKEN_PROMISE
from onnx_lrsd.cli.options import (
    CALIB_OPTION,
    EVAL_OPTION,
    HTML_OPTION,
    JSON_OPTION,
    NODE_DATA_OPTION,
    add_options,
    loudness,
    output_option,
    usage_errors,
)
from onnx_lrsd.cli.terminal import colour, progress_shown, say
from onnx_lrsd.commands.calibrate import calibrate_shard
from onnx_lrsd.commands.export_factors import export_factors
from onnx_lrsd.commands.node_data import node_data
from onnx_lrsd.commands.optimize import optimize
from onnx_lrsd.commands.sweep import SweepOptions, sweep
from onnx_lrsd.config import write_config
from onnx_lrsd.facts import Promise, Report
from onnx_lrsd.graph.model import load
from onnx_lrsd.report import (
    plan_to_json,
    report_page,
    report_table,
    report_to_json,
    sweep_table,
    sweep_to_json,
)
from onnx_lrsd.run import Options
from onnx_lrsd.wording import counted

RESULT_SUFFIX = ".lrsd.onnx"


GOAL_OPTIONS = (
    *("ratio", "max_error", "max_drop", "metric", "weights", "int8", "precision"),
    *("cost", "device", "work_dir", "jobs", "dask", "memory"),
)
"""Options of optimize that calibrate does not need."""


@click.command("optimize", cls=Configurable)
@click.argument("model", type=click.Path(path_type=Path))
@output_option(f"Where to write the model.  [default: MODEL{RESULT_SUFFIX} beside it]")
@CALIB_OPTION
@EVAL_OPTION
@add_options(Options)
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), metavar="FILE", help="Replay a plan.")
@click.option(
    "--save-plan",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the plan as JSON; - is stdout.",
)
@click.option("--dry-run", is_flag=True, help="Stop at the plan: write no model.")
@click.option(
    "--moments", metavar="PATTERN", help="Take what `onnx-lrsd calibrate` wrote in shards, say 'part*.npz'."
)
@JSON_OPTION
@HTML_OPTION
@NODE_DATA_OPTION
@click.option(
    "--export-factors",
    "factors_folder",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write U, V, S, channels and biases there as safetensors, to go on training.",
)
@click.option("--details", is_flag=True, help="Put into the JSON what the page draws; --html does as well.")
@loudness
@click.pass_context
def optimize_command(
    ctx: click.Context,
    /,
    model: Path,
    output: Path | None,
    calib: str | None,
    evaluation: str | None,
    plan_path: Path | None,
    save_plan: Path | None,
    dry_run: bool,
    moments: str | None,
    json_path: Path | None,
    html_path: Path | None,
    node_folder: Path | None,
    factors_folder: Path | None,
    details: bool,
    verbose: bool,
    quiet: bool,
    print_config: bool,
    **options: Any,
) -> None:
    """Write a smaller, faster model and say what it cost.

    Give --ratio, --max-error, --max-drop or --plan; without any of them the outputs may change by 1 % of
    their variance. PATH is a .npz with arrays named as the model's inputs, a folder of .npy or .npz files,
    Polygraphy's JSON inputs, or file.py:function, whose code is run.
    """
    if [json_path, html_path, save_plan].count(STDOUT) > 1:
        raise click.UsageError("Only one of --json, --html and --save-plan can go to stdout.")
    with usage_errors(ctx):
        Options(**options).check_with(
            calibration=calib,
            evaluation=evaluation,
            plan=plan_path,
            output=output,
            dry_run=dry_run,
            moments=moments,
        )
    if print_config:
        click.echo(write_config(ctx.meta[GIVEN]))
        return
    if dry_run and node_folder is not None:
        raise click.UsageError("--node-data is of the written model: leave out --dry-run.")
    if factors_folder is not None and (dry_run or options["int8"] or options["target"] == "size"):
        raise click.UsageError(
            "--export-factors is of a written model in float: leave out --dry-run, --int8 and --target size."
        )
    target = None if dry_run else output or model.with_name(model.stem + RESULT_SUFFIX)
    check_apart((target, json_path, html_path, save_plan), (model, calib, evaluation, plan_path))
    with usage_errors(ctx), progress_shown(quiet) as progress:
        result = optimize(
            model,
            calib,
            evaluation=evaluation,
            output=target,
            plan=None if plan_path is None else read_plan(plan_path),
            dry_run=dry_run,
            details=details or html_path is not None,
            moments=moments,
            progress=progress,
            **options,
        )
    report = result.report
    if report.details is not None:
        command = shlex.join(["onnx-lrsd", *ctx.meta[ARGUMENTS]])
        report = replace(report, details=replace(report.details, command=command))
    if not quiet:
        say(report_table(report, colour=colour(), every=verbose))
    if save_plan is not None:
        write_text(save_plan, plan_to_json(result.plan))
    if json_path is not None:
        write_text(json_path, report_to_json(report))
    if html_path is not None:
        write_text(html_path, report_page(report_to_json(report)))
    if node_folder is not None and target is not None:
        _write_nodes(node_folder, model, target, report, evaluation or calib, quiet)
    if factors_folder is not None:
        make_folder(factors_folder)
        count = export_factors(result.model, report, factors_folder)
        if not quiet:
            say(f"Factors of {counted(count, 'layer')} written to {factors_folder}.")
    if report.promise is not None and not report.promise.kept:
        say(_broken(report.promise, report.output))
        ctx.exit(BROKEN_PROMISE)


@click.command("sweep", cls=Configurable)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    required=True,
    help="Where to write the models, sweep.json and sweep.html.",
)
@CALIB_OPTION
@EVAL_OPTION
@add_options(SweepOptions, without=["ratio", "time"])
@loudness
@click.pass_context
def sweep_command(
    ctx: click.Context,
    /,
    model: Path,
    output: Path,
    calib: str | None,
    evaluation: str | None,
    verbose: bool,
    quiet: bool,
    print_config: bool,
    **options: Any,
) -> None:
    """Write models for several ratios and say what each gains and costs.

    One calibration serves them all; with --int8 each is made with int8 as well, and int8 alone. The one that
    gains most within --max-error or --max-drop is named. PATH is as for optimize.
    """
    with usage_errors(ctx):
        wanted = SweepOptions(**options)
        wanted.check_with(calibration=calib, evaluation=evaluation, plan=None, output=None, dry_run=False)
    if print_config:
        click.echo(write_config(ctx.meta[GIVEN]))
        return
    make_folder(output)
    check_apart([output / "sweep.json", output / "sweep.html"], [model, calib, evaluation])
    with usage_errors(ctx), progress_shown(quiet) as progress:
        found = sweep(model, calib, folder=output, evaluation=evaluation, options=wanted, progress=progress)
    written = sweep_to_json(found)
    write_text(output / "sweep.json", written)
    write_text(output / "sweep.html", report_page(written))
    if not quiet:
        say(sweep_table(found, colour=colour()))
        say(f"\nWritten to {output}: sweep.html shows the curves.")
    if found.best is None:
        ctx.exit(BROKEN_PROMISE)


@click.command("calibrate")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Where to."
)
@CALIB_OPTION
@EVAL_OPTION
@click.option(
    "--shard", default="1/1", show_default=True, metavar="I/N", help="Run this part of the samples."
)
@add_options(Options, without=GOAL_OPTIONS)
@loudness
@click.pass_context
def calibrate_command(
    ctx: click.Context,
    /,
    model: Path,
    output: Path,
    calib: str | None,
    evaluation: str | None,
    shard: str,
    verbose: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Run one shard of the calibration samples, for optimize --moments.

    Give the options that optimize will be given; the result is the same as without shards.
    """
    if calib is None:
        raise click.UsageError("There are no samples to run: give --calib.")
    check_apart([output], [model, calib, evaluation])
    with usage_errors(ctx), progress_shown(quiet) as progress:
        rows = calibrate_shard(
            model,
            calib,
            output,
            shard=shard,
            evaluation=evaluation,
            options=Options(**options),
            progress=progress,
        )
    if not quiet:
        say(f"{rows:,} rows of shard {shard} -> {output}")


def _write_nodes(
    folder: Path, before: Path, after: Path, report: Report, data: str | None, quiet: bool
) -> None:
    """Write what is known of every node of the model ``after``, which was made of ``before``."""
    original = load(before)
    with progress_shown(quiet) as progress:
        found = node_data(original, load(after), samples_of(original, data), report, progress=progress)
    write_node_data(folder, after.stem, found)


def _broken(promise: Promise, output: str) -> str:
    if not promise.gained:
        return f"Nothing gained: {output or 'the result'} is the model as it came."
    said = f"Promise not kept: {promise.kind} {promise.asked:g} was asked, {promise.got:g} was reached"
    return said + (f"; {output} was written all the same." if output else ".")
