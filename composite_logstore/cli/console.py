"""Prints the lines and tables of the commands, in ZenML's colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from zenml.console import zenml_custom_theme

from composite_logstore.catalog.errors import ArgumentError, NoAnswerError, OperationError
from composite_logstore.inert import inert, inert_json, paragraph

_UNBOUNDED = 10_000

output_option = click.option(
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="The format: for people, or for programs.",
)


class NoAnswer(click.ClickException):
    """ZenML or a backend gives no answer."""

    exit_code = 3


class Command(click.Command):
    """A command that turns the errors of operations into those of a command line.

    The parameters of a command have the names of the operation's parameters, so that an `ArgumentError` finds the
    option or argument at fault.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.

        Raises:
            click.ClickException: The operation has failed.
        """
        try:
            return super().invoke(ctx)
        except ArgumentError as error:
            at_fault = next((one for one in self.params if one.name == error.argument), None)
            raise click.BadParameter(str(error), ctx, at_fault) from None
        except NoAnswerError as error:
            raise NoAnswer(str(error)) from None
        except OperationError as error:
            raise click.ClickException(str(error)) from None


def console(stderr: bool = False) -> Console:
    """Return a console as wide as the terminal; without a terminal lines are not wrapped."""
    console = Console(theme=zenml_custom_theme, stderr=stderr)
    if not console.is_terminal:
        console.width = _UNBOUNDED
    return console


def say(text: str, style: str = "") -> None:
    """Print a line. Markup is not interpreted, and control characters are escaped."""
    console().print(paragraph(text), style=style, soft_wrap=True, markup=False, highlight=False)


def warn(text: str) -> None:
    """Print a warning to stderr."""
    console(stderr=True).print(paragraph(text), style="warning", soft_wrap=True, markup=False, highlight=False)


def ask(question: str, abort: bool = False) -> bool:
    """Ask a question, and return whether the answer is yes.

    Args:
        question: The question.
        abort: Whether the answer no ends the command.
    """
    return click.confirm(paragraph(question), err=True, abort=abort)


def say_json(value: Any) -> None:
    """Print a value as JSON on one line."""
    click.echo(inert_json(value))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> None:
    """Print a table in ZenML's style.

    Args:
        columns: The names of the columns.
        rows: The cells of each row.
        numbers: The columns that contain numbers.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for column in columns:
        is_number = column in numbers
        table.add_column(column.upper(), justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for row in rows:
        table.add_row(*(Text(inert(cell, "")) for cell in row))
    console().print(table)
