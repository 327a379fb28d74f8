"""The group of all commands: errors as one sentence and an exit code."""

from __future__ import annotations

import traceback
from typing import Any

import click

from onnx_lrsd.errors import LrsdError

BROKEN_PROMISE, INTERRUPTED = 3, 130


VERBOSE, ARGUMENTS = "onnx_lrsd.verbose", "onnx_lrsd.arguments"
"""What a context keeps: whether the traceback of a bug is wanted, and what was typed."""


class Commands(click.Group):
    """Turns what commands raise into one sentence on stderr and an exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep what was typed, for reports."""
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; say in one sentence what is wrong."""
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
