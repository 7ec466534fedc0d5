"""`composite-logstore run`."""

from __future__ import annotations

import sys

import click

from composite_logstore.cli.console import Command


@click.command(
    cls=Command,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    examples=["run -- torchrun --nproc-per-node=4 train.py", "run --capture-fd -- ./simulate"],
)
@click.option(
    "--capture-fd",
    is_flag=True,
    help="Also collect what is written to descriptors 1 and 2 in any other way, such as by libraries in C.",
)
@click.argument("command", metavar="COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
def run(capture_fd: bool, command: tuple[str, ...]) -> None:
    """Run a command in a step, and collect its logs.

    A step starts this instead of COMMAND. All Python processes below it log to the step's stream: records and prints,
    each with the id and the rank of its process.

    The output and the reaction to signals are the command's own. Without a step, or without ZenML, the command runs
    and is not collected.

    Exit code: the command's own; 126 if it cannot be run, 127 if it does not exist. If a signal kills it, the same
    signal kills this command.
    """
    from composite_logstore.launch import command as launch

    sys.exit(launch.run(list(command), capture_fd))
