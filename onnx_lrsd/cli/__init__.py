"""The command line: options in, one table out, errors as one sentence and an exit code.

Exit codes: 0 done, 1 error, 2 usage, 3 promise not kept or nothing gained, 130 interrupted. stdout carries
only what was asked for with ``--json -`` or ``--save-plan -``; everything else goes to stderr.
"""

from __future__ import annotations

import click

import onnx_lrsd
from onnx_lrsd.cli.examining import compare_command, inspect_command, report_command
from onnx_lrsd.cli.group import Commands
from onnx_lrsd.cli.making import calibrate_command, optimize_command, sweep_command
from onnx_lrsd.cli.upkeep import cache_command, doctor_command, profile_command, unpack_command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(onnx_lrsd.__version__, prog_name="onnx-lrsd")
def main() -> None:
    """Make trained ONNX models smaller and faster, without retraining."""


for command in (
    *(optimize_command, sweep_command, calibrate_command),
    *(inspect_command, compare_command, report_command),
    *(unpack_command, profile_command, cache_command, doctor_command),
):
    main.add_command(command)
