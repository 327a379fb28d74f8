"""Options: those of a dataclass by what stands at its fields, and those that several commands have."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from onnx_lrsd.cli.group import VERBOSE
from onnx_lrsd.data.made_up import spelled_shapes
from onnx_lrsd.data.readers import script_function
from onnx_lrsd.errors import OptionError
from onnx_lrsd.option import (
    Address,
    ByteCount,
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
from onnx_lrsd.run import TOP1
from onnx_lrsd.types import Score

FLAGS = {"evaluation": "--eval", "calibration": "--calib", "shapes": "--shape"}
"""Options whose flag is not their name."""


Command = TypeVar("Command", bound=Callable[..., Any])


def comma_listed(value: str | Sequence[str]) -> tuple[str, ...]:
    """A list as a command line has it, with commas between, or as the file of --config has it."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)


def comma_numbers(value: str | Sequence[str]) -> tuple[float, ...]:
    """A list of numbers, as ``comma_listed`` has it."""
    return tuple(float(part) for part in comma_listed(value))


def flag_of(option: str) -> str:
    """How the command line spells an option."""
    return FLAGS.get(option) or "--" + option.replace("_", "-")


def add_options(holder: type, *, without: Collection[str] = ()) -> Callable[[Command], Command]:
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
            add = click.option(flag_of(name), name, default=default, show_default=shown, help=said, **how)
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
            return {"type": comma_numbers, "metavar": option.metavar}
        case Whole():
            return {"type": int, "metavar": option.metavar}
        case OneOf(offered, spelled):
            names = {spelled.get(name, name): name for name in offered}
            return {
                "type": click.Choice(list(names)),
                "callback": lambda _ctx, _option, name: names.get(name),
            }
        case SomeOf():
            return {"type": comma_listed, "metavar": "LIST"}
        case Address() | ByteCount() | Duration():
            return {"metavar": option.metavar}
        case FolderName():
            return {"type": click.Path(path_type=Path), "metavar": option.metavar}
        case Regex():
            return {"metavar": "REGEX"}
        case Function(known):
            return {"callback": _metric, "metavar": f"{known}|FILE.py:FUNCTION"}
    raise AssertionError(f"{option} has no counterpart on the command line")


def _metric(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | Score | None:
    script, _, function = (value or "").rpartition(":")
    if value is None or value == TOP1:
        return value
    if not script.endswith(".py"):
        raise click.BadParameter(f"{value!r} is neither top1 nor FILE.py:FUNCTION.")
    return script_function(Path(script), function)


def shape_by_input(
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


@contextlib.contextmanager
def usage_errors(ctx: click.Context) -> Iterator[None]:
    """Turn what is wrong with an option into click's error, with options and values as they were typed."""
    try:
        yield
    except OptionError as error:
        raise click.UsageError(error.spelled(flag_of, _typed), ctx) from error


def _typed(option: str, value: object) -> str:
    if value is True:
        return flag_of(option)
    if isinstance(value, tuple):
        return f"{flag_of(option)} {','.join(map(_one, value))}"
    if isinstance(value, dict):
        return f"{flag_of(option)} {spelled_shapes(value)}"
    return f"{flag_of(option)} {value}"


def _one(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _note_verbose(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    ctx.meta[VERBOSE] = value
    return value


def loudness(command: Command) -> Command:
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


def output_option(said: str) -> Callable[[Command], Command]:
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
