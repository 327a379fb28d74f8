"""The command line: options in, one table out, errors as one sentence and an exit code.

Exit codes: 0 done, 1 error, 2 usage, 3 promise not kept or nothing gained, 130 interrupted. stdout carries
only what was asked for with ``--json -`` or ``--save-plan -``; everything else goes to stderr.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

import onnx_lrsd
from onnx_lrsd.commands.cache import clear, listed
from onnx_lrsd.commands.calibrate import calibrate_shard
from onnx_lrsd.commands.doctor import examine
from onnx_lrsd.commands.export_factors import export_factors
from onnx_lrsd.commands.inspect import inspect
from onnx_lrsd.commands.node_data import node_data
from onnx_lrsd.commands.optimize import optimize
from onnx_lrsd.commands.profile import measure
from onnx_lrsd.commands.sweep import SweepOptions, sweep
from onnx_lrsd.commands.unpack import unpack
from onnx_lrsd.config import Value, read_config, write_config
from onnx_lrsd.data.made_up import made_up_samples, spelled_shapes
from onnx_lrsd.data.padding import without_padding
from onnx_lrsd.data.readers import script_function
from onnx_lrsd.data.samples import Samples, read_samples
from onnx_lrsd.errors import LrsdError, OptionError
from onnx_lrsd.facts import NodeData, Promise
from onnx_lrsd.graph.model import Model, load, save, size_on_disk
from onnx_lrsd.graph.subgraph import inputs_of
from onnx_lrsd.measure.compare import compare
from onnx_lrsd.measure.drift import drift
from onnx_lrsd.option import (
    Address,
    Duration,
    Flag,
    FolderName,
    Function,
    Number,
    Numbers,
    OneOf,
    Option,
    Regex,
    SomeOf,
    Whole,
    options_of,
)
from onnx_lrsd.report import (
    comparison_table,
    comparison_to_json,
    drift_table,
    inspection_table,
    inspection_to_json,
    machine_table,
    node_data_files,
    plan_from_json,
    plan_to_json,
    report_page,
    report_table,
    report_to_json,
    sweep_table,
    sweep_to_json,
)
from onnx_lrsd.report.progress import BarProgress, PlainProgress
from onnx_lrsd.run import TOP1, Options
from onnx_lrsd.targets.machine import stored_at, to_json
from onnx_lrsd.types import Plan, Progress, Score
from onnx_lrsd.whole_files import written_whole
from onnx_lrsd.wording import counted

COMMANDLINE, DEFAULT_MAP = click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.DEFAULT_MAP
BROKEN_PROMISE, INTERRUPTED = 3, 130
STDOUT = Path("-")
RESULT_SUFFIX, PLAIN = ".lrsd.onnx", ".plain.onnx"
FLAGS = {"evaluation": "--eval", "calibration": "--calib", "shapes": "--shape"}
"""Options whose flag is not their name."""
VERBOSE, ARGUMENTS, GIVEN = "onnx_lrsd.verbose", "onnx_lrsd.arguments", "onnx_lrsd.given"
"""What a context keeps: whether a bug's traceback is wanted, what was typed, which options were given."""

GOAL_OPTIONS = (
    *("ratio", "max_error", "max_drop", "metric", "weights", "int8", "precision"),
    *("cost", "device", "work_dir", "jobs", "dask"),
)
"""Options of optimize that calibrate does not need."""

Command = TypeVar("Command", bound=Callable[..., Any])


class _Commands(click.Group):
    """Turns what commands raise into one sentence on stderr and an exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LrsdError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.code)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.meta.get(VERBOSE):
                traceback.print_exc()
            said = " ".join(str(error).split())
            click.echo(
                f"Error: this is a bug in onnx-lrsd ({type(error).__name__}: {said}): "
                "please report it with what -v prints.",
                err=True,
            )
            ctx.exit(LrsdError.code)


def _listed(value: str | Sequence[str]) -> tuple[str, ...]:
    """A list as a command line has it, with commas between, or as the file of --config has it."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)


def _numbers(value: str | Sequence[str]) -> tuple[float, ...]:
    """A list of numbers, as ``_listed`` has it."""
    return tuple(float(part) for part in _listed(value))


class _Configurable(click.Command):
    """A command whose options may also stand in a file: --config reads it, --print-config writes it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        path = click.Path(path_type=Path)
        read = "Take the options that are not given here from this TOML file."
        self.params += [
            click.Option(["-c", "--config"], type=path, metavar="FILE", expose_value=False, help=read),
            click.Option(
                ["--print-config"],
                is_flag=True,
                help="Write the options that are given as such a file to stdout, and stop.",
            ),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        typed = self.make_parser(ctx).parse_args(list(args))[0]
        by_name = {_name(parameter): parameter for parameter in self.params if _name(parameter)}
        path, in_file = typed.get("config"), {}
        if isinstance(path, str):
            for name, value in read_config(Path(path), by_name).items():
                in_file[str(by_name[name].name)] = _as_typed(by_name[name], value, name, path)
        ctx.default_map = in_file
        try:
            rest = super().parse_args(ctx, args)
        except click.BadParameter as error:
            if error.param is not None and error.param.name in in_file and error.param.name not in typed:
                raise click.BadParameter(f"{error.message} It stands in {path}.", ctx, error.param) from None
            raise
        ctx.meta[GIVEN] = {}
        for name, parameter in by_name.items():
            key = str(parameter.name)
            source = ctx.get_parameter_source(key)
            if source in (COMMANDLINE, DEFAULT_MAP):
                said = typed[key] if source == COMMANDLINE else in_file[key]
                ctx.meta[GIVEN][name] = _as_written(ctx.params[key], said)
        return rest


def _name(parameter: click.Parameter) -> str:
    """What an option is called in a file; empty for those that have no place there."""
    if isinstance(parameter, click.Argument):
        return str(parameter.name)
    if parameter.name in ("config", "print_config", "help"):
        return ""
    return max(parameter.opts, key=len).lstrip("-")


def _as_typed(parameter: click.Parameter, value: Value, name: str, path: str) -> Any:
    """A value of a file as the command line would have it. Raises LrsdError for one of the wrong type."""
    values = value if isinstance(value, list) else [value]
    if isinstance(parameter, click.Option) and parameter.is_flag:
        if not isinstance(value, bool):
            raise LrsdError(f"{name} in {path} is neither true nor false: write one.")
        return value
    if any(isinstance(one, bool) for one in values):
        raise LrsdError(f"{name} in {path} is no option that is true or false: write its value.")
    if parameter.multiple or _is_list(parameter):
        return [str(one) for one in values]
    if isinstance(value, list):
        raise LrsdError(f"{name} in {path} is a list, and the option takes one value: write one.")
    return str(value)


def _is_list(parameter: click.Parameter) -> bool:
    return getattr(parameter.type, "func", None) in (_listed, _numbers)


def _as_written(value: Any, typed: Any) -> Value:
    """An option as the file has it: numbers, flags and lists by value, anything else as it was typed."""
    if isinstance(value, bool | int | float):
        return value
    found: Value = list(value) if isinstance(value, tuple) else typed
    return found


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(onnx_lrsd.__version__, prog_name="onnx-lrsd")
def main() -> None:
    """Make trained ONNX models smaller and faster, without retraining."""


def _note_verbose(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    ctx.meta[VERBOSE] = value
    return value


def _loudness(command: Command) -> Command:
    """Options -v and -q."""
    quiet = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
    verbose = click.option(
        "-v",
        "--verbose",
        is_flag=True,
        callback=_note_verbose,
        help="List every layer; show the traceback of a bug.",
    )
    return verbose(quiet(command))


def _metric(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | Score | None:
    script, _, function = (value or "").rpartition(":")
    if value is None or value == TOP1:
        return value
    if not script.endswith(".py"):
        raise click.BadParameter(f"{value!r} is neither top1 nor FILE.py:FUNCTION.")
    return script_function(Path(script), function)


def _shapes(
    ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """Shapes by input, of ``NAME:1x3x224x224`` each; what stands before the last colon is the name."""
    found: dict[str, tuple[int, ...]] = {}
    for value in values:
        name, _, sizes = value.rpartition(":")
        if not name or not re.fullmatch(r"[0-9]+(x[0-9]+)*", sizes):
            raise click.BadParameter(f"{value!r} is not NAME:SIZExSIZE...: write NAME:1x3x224x224.")
        if name in found:
            raise click.BadParameter(f"{name} is given twice: give one shape for each input.")
        found[name] = tuple(map(int, sizes.split("x")))
    return found


def _flag(option: str) -> str:
    return FLAGS.get(option) or "--" + option.replace("_", "-")


def _options_of(holder: type, *, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """The options of a dataclass, each with the type, help and default that stand at its field."""

    def decorated(command: Command) -> Command:
        for name, (option, default) in reversed(options_of(holder).items()):
            if name in without:
                continue
            said = f"{option.help}  [default: {option.default}]" if option.default else option.help
            shown: bool | str = default is not None and default is not False
            if isinstance(default, tuple):
                default, shown = ",".join(f"{one:g}" for one in default), True
            how = _click_options(option)
            add = click.option(_flag(name), name, default=default, show_default=shown, help=said, **how)
            command = add(command)
        return command

    return decorated


def _click_options(option: Option) -> dict[str, Any]:
    """What click has to know of the values that an option takes."""
    match option.takes:
        case Flag():
            return {"is_flag": True}
        case Number():
            return {"type": float, "metavar": option.metavar}
        case Numbers():
            return {"type": _numbers, "metavar": option.metavar}
        case Whole():
            return {"type": int, "metavar": option.metavar}
        case OneOf(offered, spelled):
            names = {spelled.get(name, name): name for name in offered}
            return {
                "type": click.Choice(list(names)),
                "callback": lambda _ctx, _option, name: names.get(name),
            }
        case SomeOf():
            return {"type": _listed, "metavar": "LIST"}
        case Address() | Duration():
            return {"metavar": option.metavar}
        case FolderName():
            return {"type": click.Path(path_type=Path), "metavar": option.metavar}
        case Regex():
            return {"metavar": "REGEX"}
        case Function(known):
            return {"callback": _metric, "metavar": f"{known}|FILE.py:FUNCTION"}
    raise AssertionError(f"{option} has no counterpart on the command line")


def _output(said: str) -> Callable[[Command], Command]:
    """Option -o, with its help."""
    path = click.Path(path_type=Path)
    return click.option("-o", "--output", type=path, metavar="FILE", help=said)


JSON_OPTION = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the report as JSON; - is stdout.",
)
HTML_OPTION = click.option(
    "--html",
    "html_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the report as a page for a browser, in one file that needs no network.",
)


CALIB_OPTION = click.option(
    "--calib",
    type=click.Path(),
    metavar="PATH",
    help="Unlabelled samples to calibrate on: a few hundred are enough.",
)
EVAL_OPTION = click.option(
    "--eval",
    "evaluation",
    type=click.Path(),
    metavar="PATH",
    help="Samples to verify on; with labels, accuracy is measured.",
)


NODE_DATA_OPTION = click.option(
    "--node-data",
    "node_folder",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Write time, error and form of every node into this folder, for Model Explorer.",
)


@main.command("optimize", cls=_Configurable)
@click.argument("model", type=click.Path(path_type=Path))
@_output(f"Where to write the model.  [default: MODEL{RESULT_SUFFIX} beside it]")
@CALIB_OPTION
@EVAL_OPTION
@_options_of(Options)
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
@_loudness
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
    with _usage(ctx):
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
    _check_apart((target, json_path, html_path, save_plan), (model, calib, evaluation, plan_path))
    with _usage(ctx), _progress(quiet) as progress:
        result = optimize(
            model,
            calib,
            evaluation=evaluation,
            output=target,
            plan=None if plan_path is None else _read_plan(plan_path),
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
        _say(report_table(report, colour=_colour(), every=verbose))
    if save_plan is not None:
        _write(save_plan, plan_to_json(result.plan))
    if json_path is not None:
        _write(json_path, report_to_json(report))
    if html_path is not None:
        _write(html_path, report_page(report_to_json(report)))
    if node_folder is not None and target is not None:
        original = load(model)
        with _progress(quiet) as progress:
            samples = _samples_of(original, evaluation or calib)
            found = node_data(original, load(target), samples, report, progress=progress)
        _write_node_data(node_folder, target.stem, found)
    if factors_folder is not None:
        _make_folder(factors_folder)
        count = export_factors(result.model, report, factors_folder)
        if not quiet:
            _say(f"Factors of {counted(count, 'layer')} written to {factors_folder}.")
    if report.promise is not None and not report.promise.kept:
        _say(_broken(report.promise, report.output))
        ctx.exit(BROKEN_PROMISE)


@main.command("sweep", cls=_Configurable)
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
@_options_of(SweepOptions, without=["ratio", "time"])
@_loudness
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
    with _usage(ctx):
        wanted = SweepOptions(**options)
        wanted.check_with(calibration=calib, evaluation=evaluation, plan=None, output=None, dry_run=False)
    if print_config:
        click.echo(write_config(ctx.meta[GIVEN]))
        return
    _make_folder(output)
    _check_apart([output / "sweep.json", output / "sweep.html"], [model, calib, evaluation])
    with _usage(ctx), _progress(quiet) as progress:
        found = sweep(model, calib, folder=output, evaluation=evaluation, options=wanted, progress=progress)
    written = sweep_to_json(found)
    _write(output / "sweep.json", written)
    _write(output / "sweep.html", report_page(written))
    if not quiet:
        _say(sweep_table(found, colour=_colour()))
        _say(f"\nWritten to {output}: sweep.html shows the curves.")
    if found.best is None:
        ctx.exit(BROKEN_PROMISE)


@main.command("inspect")
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
    callback=_shapes,
    metavar="NAME:1x3x320x320",
    help="Count MACs with this shape of an input; may be given for each.",
)
@JSON_OPTION
@_loudness
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
    _check_apart([json_path], [model, calib])
    with _usage(ctx):
        found = inspect(model, calib, shapes=shapes)
    if not quiet:
        _say(inspection_table(found, str(model), colour=_colour(), every=verbose))
    if json_path is not None:
        _write(json_path, inspection_to_json(found, str(model)))


@main.command("compare")
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
@_loudness
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
    _check_apart((json_path, html_path), (before, after, data))
    one, two = load(before), load(after)
    samples = _samples_of(one, data)
    with _progress(quiet) as progress:
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
            _write_node_data(node_folder, after.stem, node_data(one, two, samples, progress=progress))
    if not quiet:
        _say(comparison_table(found, str(before), str(after), colour=_colour()))
        if apart is not None:
            _say("\n" + drift_table(apart, colour=_colour(), every=verbose))
        for note in samples.notes:
            _say(f"Warning: {note}")
        if data is None:
            _say("Warning: outputs were compared on made-up data, their errors mean little: give --data.")
    written = comparison_to_json(found, str(before), str(after), samples.source, apart)
    if json_path is not None:
        _write(json_path, written)
    if html_path is not None:
        _write(html_path, report_page(written))


@main.command("report")
@click.argument("report", type=click.Path(path_type=Path))
@_output("Where to write the page.  [default: REPORT.html beside it]")
def report_command(report: Path, output: Path | None) -> None:
    """Make a page for a browser of a report.

    REPORT is the JSON that optimize or compare wrote; the page is the one that --html would have written.
    """
    target = output or report.with_suffix(".html")
    _check_apart([target], [report])
    _write(target, report_page(_read(report, "report", "--json")))


@main.command("unpack")
@click.argument("model", type=click.Path(path_type=Path))
@_output(f"Where to write the model.  [default: MODEL{PLAIN} beside it]")
@_loudness
def unpack_command(model: Path, output: Path | None, verbose: bool, quiet: bool) -> None:
    """Write a plain dense model from one that the target size wrote."""
    target = output or model.with_name(model.stem + PLAIN)
    _check_apart([target], [model])
    plain = unpack(model)
    save(plain, target)
    if not quiet:
        _say(f"{model} -> {target}: {size_on_disk(model):,} -> {size_on_disk(target):,} bytes")


@main.command("profile")
@_output("Write the table elsewhere than where optimize looks for it.  [default: in your folder for caches]")
@_loudness
def profile_command(output: Path | None, verbose: bool, quiet: bool) -> None:
    """Measure this machine, in about a minute.

    How fast it runs the nodes that layers are rewritten to. From then on optimize plans with that.
    """
    path = stored_at() if output is None else output
    if output is None:
        _make_folder(path.parent)
    _check_writable(path)
    with _progress(quiet) as progress:
        machine = measure(progress)
    _write(path, to_json(machine))
    if not quiet:
        _say(f"{machine_table(machine, colour=_colour())}\n\nWritten to {path}.")


@main.command("calibrate")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Where to."
)
@CALIB_OPTION
@EVAL_OPTION
@click.option(
    "--shard", default="1/1", show_default=True, metavar="I/N", help="Run this part of the samples."
)
@_options_of(Options, without=GOAL_OPTIONS)
@_loudness
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
    _check_apart([output], [model, calib, evaluation])
    with _usage(ctx), _progress(quiet) as progress:
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
        _say(f"{rows:,} rows of shard {shard} -> {output}")


@main.command("cache")
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
    with _usage(ctx):
        click.echo(clear(folder, keep or 0) if clears or keep is not None else listed(folder))


@main.command("doctor")
@click.pass_context
def doctor_command(ctx: click.Context, /) -> None:
    """Say what is installed and what works."""
    findings = examine()
    marks = {True: "ok", False: "BAD", None: "-"}
    for finding in findings:
        click.echo(f"{marks[finding.good]:<4}{finding.name:<18}{finding.said}")
    if any(finding.good is False for finding in findings):
        ctx.exit(LrsdError.code)


@contextlib.contextmanager
def _usage(ctx: click.Context) -> Iterator[None]:
    """Turn what is wrong with an option into click's error, with options and values as they were typed."""
    try:
        yield
    except OptionError as error:
        raise click.UsageError(error.spelled(_flag, _typed), ctx) from error


def _typed(option: str, value: object) -> str:
    if value is True:
        return _flag(option)
    if isinstance(value, tuple):
        return f"{_flag(option)} {','.join(map(_one, value))}"
    if isinstance(value, dict):
        return f"{_flag(option)} {spelled_shapes(value)}"
    return f"{_flag(option)} {value}"


def _one(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _broken(promise: Promise, output: str) -> str:
    if not promise.gained:
        return f"Nothing gained: {output or 'the result'} is the model as it came."
    said = f"Promise not kept: {promise.kind} {promise.asked:g} was asked, {promise.got:g} was reached"
    return said + (f"; {output} was written all the same." if output else ".")


def _check_writable(path: Path | None) -> None:
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


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LrsdError(
            f"The folder {folder} cannot be made ({error.strerror}): name another place with --output."
        ) from None


def _check_apart(outputs: Sequence[Path | None], inputs: Sequence[str | Path | None]) -> None:
    """Find out that outputs can be written, none over another nor over what is read. Raises LrsdError."""
    taken = {Path(path).resolve() for path in inputs if path is not None}
    for path in outputs:
        _check_writable(path)
        if path is None or path == STDOUT:
            continue
        if path.resolve() in taken:
            raise LrsdError(f"{path} is read or written already in this run: choose another file.")
        taken.add(path.resolve())


def _read_plan(path: Path) -> Plan:
    return plan_from_json(_read(path, "plan", "--save-plan"))


def _read(path: Path, what: str, option: str) -> str:
    """The text of a file, which is the ``what`` that ``option`` wrote. Raises LrsdError."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LrsdError(f"There is no file {path}: check the path of the {what}.") from None
    except UnicodeDecodeError:
        raise LrsdError(f"{path} is not text: give a {what} that {option} wrote.") from None
    except OSError as error:
        raise LrsdError(f"{path} cannot be read ({error.strerror}): check the path of the {what}.") from None


def _write(path: Path, text: str) -> None:
    """Write all of ``text`` or nothing; to stdout for -."""
    if path == STDOUT:
        click.echo(text)
        return
    try:
        with written_whole(path) as (file,):
            file.write(f"{text}\n".encode())
    except OSError as error:
        raise LrsdError(f"{path} cannot be written ({error.strerror}): choose another place.") from None


def _samples_of(model: Model, data: str | None) -> Samples:
    """The samples at ``data``, without padding; made up where there are none."""
    samples = made_up_samples(model) if data is None else read_samples(data, inputs_of(model.proto))
    return without_padding(model, samples)


def _write_node_data(folder: Path, stem: str, found: NodeData) -> None:
    _make_folder(folder)
    for what, text in node_data_files(found).items():
        _write(folder / f"{stem}.{what}.json", text)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _colour() -> bool:
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Progress | None]:
    """A callback that draws one line on a terminal and wipes it at the end; plain lines elsewhere."""
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        yield PlainProgress(_say)
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
