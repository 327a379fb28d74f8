"""The options --config and --print-config: a file that options may stand in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnx_lrsd.cli.options import comma_listed, comma_numbers
from onnx_lrsd.config import Value, read_config
from onnx_lrsd.errors import LrsdError

COMMANDLINE, DEFAULT_MAP = click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.DEFAULT_MAP
GIVEN = "onnx_lrsd.given"
"""Where a context keeps which options were given."""


class Configurable(click.Command):
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
        """Take from the file what is not typed, and note in the context what either has given."""
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        typed = self.make_parser(ctx).parse_args(list(args))[0]
        by_name = {option_name(parameter): parameter for parameter in self.params if option_name(parameter)}
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


def option_name(parameter: click.Parameter) -> str:
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
    return getattr(parameter.type, "func", None) in (comma_listed, comma_numbers)


def _as_written(value: Any, typed: Any) -> Value:
    """An option as the file has it: numbers, flags and lists by value, anything else as it was typed."""
    if isinstance(value, bool | int | float):
        return value
    found: Value = list(value) if isinstance(value, tuple) else typed
    return found
