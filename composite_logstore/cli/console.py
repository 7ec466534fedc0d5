"""Prints the lines and tables of the commands, in ZenML's colours.

Rich is imported where something is drawn: help needs none of it, and loads in half of the time.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click

from composite_logstore.catalog.errors import ArgumentError, NoAnswerError, OperationError
from composite_logstore.inert import inert, inert_json, paragraph
from composite_logstore.line_breaks import fill

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from composite_logstore.catalog.differences import Difference

_UNBOUNDED = 10_000
# Words up to this many characters are not divided in a table that fits, such as the names of children and of writers.
_WORD = 16

output_option = click.option(
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="The format: for people, or for programs.",
)

dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Make all checks, show what would be done, and change nothing."
)

yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")

NOTHING_CHANGED = "This was a dry run: nothing has changed."


def resume(anew: bool) -> str:
    """Return how to resume an operation that saves its progress, which `--anew` would discard."""
    return f"Run the same command {'without --anew' if anew else 'again'} to resume."


class Program(click.Group):
    """The whole command line. Its errors, too, fit the terminal."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command.

        Raises:
            click.ClickException: The call is wrong, or the operation has failed.
        """
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            # ZenML's own console would have to import ZenML.
            from rich.console import Console

            before = "Error: "
            text = _filled(before + error.format_message(), Console(stderr=True)).removeprefix(before)
            error.format_message = lambda: text  # type: ignore[method-assign]
            raise


class NoAnswer(click.ClickException):
    """ZenML or a backend gives no answer."""

    exit_code = 3


class Unanswered(click.ClickException):
    """A question has no answer: there is no terminal, and the input has ended."""

    def __init__(self) -> None:
        super().__init__("This question cannot be answered: there is no terminal. '--yes' answers it with yes.")


class Command(click.Command):
    """A command that turns the errors of operations into those of a command line.

    The parameters of a command have the names of the operation's parameters, so that an `ArgumentError` finds the
    option or argument at fault.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        """Create the command.

        Args:
            args: As of `click.Command`.
            examples: Calls that the help shows, without the name of the program.
            kwargs: As of `click.Command`.
        """
        super().__init__(*args, **kwargs)
        self.examples = examples

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters; among them those that every command has, as it has `--help`."""
        own = len(self.params)
        return [*self.params, *_VERBOSITY, *super().get_params(ctx)[own:]]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, whose lines are not wrapped, so that people can copy them."""
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}composite-logstore {example}\n")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.

        Raises:
            click.ClickException: The operation has failed.
        """
        try:
            with _logs_on_stderr():
                return super().invoke(ctx)
        except OperationError as error:
            if _is_set(ctx, _VERBOSE):
                _say_where(error)
            self._fail(ctx, error)

    def _fail(self, ctx: click.Context, cause: OperationError) -> NoReturn:
        try:
            raise cause
        except ArgumentError as error:
            at_fault = next((one for one in self.params if one.name == error.argument), None)
            hint = None
            if isinstance(at_fault, click.Argument):
                # Without what says that it may be left out or repeated.
                hint = f"'{at_fault.make_metavar(ctx).strip('[]').removesuffix('...')}'"
            raise click.BadParameter(str(error), ctx, at_fault, hint) from None
        except NoAnswerError as error:
            raise NoAnswer(str(error)) from None
        except OperationError as error:
            raise click.ClickException(str(error)) from None


@contextmanager
def _logs_on_stderr() -> Iterator[None]:
    """Have ZenML's logging handler write to stderr instead of stdout, where results are.

    ZenML sets up its handler when the first operation imports it, and may log at once, for example that the server has
    another release. So this looks for the handler before each record.
    """
    moved: list[tuple[logging.StreamHandler[Any], Any]] = []
    make = logging.getLogRecordFactory()

    def made(*args: Any, **kwargs: Any) -> logging.LogRecord:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and type(handler.stream).__module__ == "zenml.logger":
                moved.append((handler, handler.stream))
                handler.stream = sys.stderr
        return make(*args, **kwargs)

    logging.setLogRecordFactory(made)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
        for handler, stream in moved:
            handler.stream = stream


_QUIET, _VERBOSE = "quiet", "verbose"


def _note(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[f"{__name__}.{param.name}"] = value
    if value and param.name == _VERBOSE:
        logger = logging.getLogger("composite_logstore")
        ctx.call_on_close(partial(logger.setLevel, logger.level))
        logger.setLevel(logging.DEBUG)


def _is_set(ctx: click.Context | None, name: str) -> bool:
    return bool(ctx and ctx.meta.get(f"{__name__}.{name}"))


def is_quiet() -> bool:
    """Return whether the present command is to print neither progress nor hints."""
    return _is_set(click.get_current_context(silent=True), _QUIET)


_VERBOSITY = (
    click.Option(
        ["-q", "--quiet"],
        is_flag=True,
        expose_value=False,
        callback=_note,
        help="Print neither progress nor hints: only results, warnings and errors.",
    ),
    click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        callback=_note,
        help="Print details to stderr, such as where an error comes from.",
    ),
)


def _say_where(error: BaseException) -> None:
    """Print where an error comes from: classes and places, since its causes' messages may contain a secret."""
    cause: BaseException | None = error
    # A program may have made two exceptions each other's cause.
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        click.echo(inert(f"{type(cause).__module__}.{type(cause).__qualname__}", ""), err=True)
        for frame in traceback.extract_tb(cause.__traceback__):
            click.echo(inert(f"    {frame.filename}:{frame.lineno} in {frame.name}", ""), err=True)
        cause = cause.__cause__ or cause.__context__


def status(text: str) -> AbstractContextManager[Any]:
    """Show on a terminal that work is in progress, until the end of the block."""
    return nullcontext() if is_quiet() else console(stderr=True).status(text)


def console(stderr: bool = False) -> Console:
    """Return a console as wide as the terminal; without a terminal lines are not wrapped."""
    from rich.console import Console
    from zenml.console import zenml_custom_theme

    console = Console(theme=zenml_custom_theme, stderr=stderr)
    if not console.is_terminal:
        console.width = _UNBOUNDED
    return console


def say(text: str, style: str = "") -> None:
    """Print a line. Markup is not interpreted, and control characters are escaped.

    Args:
        text: The line.
        style: Its style in ZenML's theme. A line of style `info` is a hint, which a quiet command leaves out.
    """
    if style == "info" and is_quiet():
        return
    _print(console(), text, style)


def warn(text: str) -> None:
    """Print a warning to stderr."""
    _print(console(stderr=True), text, "warning")


def _print(out: Console, text: str, style: str) -> None:
    out.print(_filled(paragraph(text), out), style=style, soft_wrap=True, markup=False, highlight=False)


def _filled(text: str, out: Console) -> str:
    return fill(text, out.width) if out.is_terminal else text


def ask(question: str, abort: bool = False) -> bool:
    """Ask a question, and return whether the answer is yes.

    Args:
        question: The question.
        abort: Whether the answer no ends the command.

    Raises:
        Unanswered: There is no terminal, and no input.
    """
    try:
        text = _filled(f"{paragraph(question)} [y/N]:", console(stderr=True))
        answer = click.confirm(text, show_default=False, prompt_suffix=" ", err=True)
    except click.Abort as error:
        # Click tells Ctrl-C and the end of the input apart in the context of its exception alone.
        if isinstance(error.__context__, EOFError):
            raise Unanswered from None
        raise
    if abort and not answer:
        raise click.Abort
    return answer


def show_differences(differences: Iterable[Difference], stderr: bool = False) -> None:
    """Print differences in settings, below the name of each child: `-` what was set, and `+` what is set afterwards."""
    out, of = console(stderr), None
    for one in differences:
        if one.child != of:
            of = one.child
            out.print(
                paragraph(f"child '{of}':" if of else "log store:"), soft_wrap=True, markup=False, highlight=False
            )
        for sign, value, style in (("-", one.before, "red"), ("+", one.after, "green")):
            if value is not None:
                line = inert(f"  {sign} {one.setting}: {value}", "")
                out.print(line, style=style, soft_wrap=True, markup=False, highlight=False)


def say_json(value: Any, indent: int | None = None) -> None:
    """Print a value as JSON: on one line, or with its levels indented by so many blanks."""
    click.echo(json.dumps(value, indent=indent) if indent else inert_json(value))


def say_yaml(text: str) -> None:
    """Print a text that is YAML."""
    click.echo(inert(text, "\n"), nl=False)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> None:
    """Print a table in ZenML's style, with some columns of numbers."""
    out = console()
    out.print(table(columns, rows, numbers, out.width))


class View(NamedTuple):
    """A table with lines below it.

    Attributes:
        columns: The names of the columns.
        rows: The cells of each row.
        numbers: The columns that contain numbers.
        lines: The lines.
    """

    columns: Sequence[str]
    rows: Iterable[Sequence[str]]
    numbers: Sequence[str]
    lines: Iterable[str]


def show_in_turn(views: Iterable[View], in_place: bool) -> None:
    """Print views as they come.

    Args:
        views: The views.
        in_place: Whether each one takes the place of the one before. Without a terminal they follow each other.
    """
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    out = console()
    with Live(console=out, auto_refresh=False) if in_place and out.is_terminal else nullcontext() as live:
        for view in views:
            lines = (Text(paragraph(line)) for line in view.lines)
            shown = Group(table(view.columns, view.rows, view.numbers, out.width), *lines)
            if live is not None:
                live.update(shown, refresh=True)
            else:
                out.print(shown)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str], width: int) -> Table:
    """Return a table in ZenML's style.

    Args:
        columns: The names of the columns.
        rows: The cells of each row.
        numbers: The columns that contain numbers.
        width: How many characters fit into a line.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    headers, shown = [column.upper() for column in columns], [[inert(cell, "") for cell in row] for row in rows]
    widths, padding = _widths(headers, shown, [column in numbers for column in columns], width)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, padding, 0, 0), show_edge=False, header_style="bold")
    for column, header, width in zip(columns, headers, widths, strict=True):
        table.add_column(header, justify="right" if column in numbers else "left", width=width, overflow="fold")
    for row in shown:
        table.add_row(*map(Text, row))
    return table


def age(seconds: float) -> str:
    """Return an age in words, such as `3 h`."""
    seconds = max(0.0, seconds)
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _widths(
    headers: Sequence[str], rows: Sequence[Sequence[str]], is_number: Sequence[bool], width: int
) -> tuple[list[int], int]:
    """Return how wide each column is, and how many blanks follow it, so that a table fits.

    Headers are wrapped first, then texts, the widest first; then the blanks go; and only then short names are divided,
    headers, and at last numbers.
    """
    from rich.cells import cell_len

    columns: list[Sequence[str]] = list(zip(*rows, strict=True)) if rows else [()] * len(headers)
    widest = [max(map(cell_len, column), default=1) for column in columns]
    words = [max(map(cell_len, header.split()), default=0) for header in headers]
    longest = [max((cell_len(word) for cell in column for word in cell.split()), default=1) for column in columns]
    numbers = [cells if one else 1 for cells, one in zip(widest, is_number, strict=True)]
    names = [max(cells, min(word, _WORD)) for cells, word in zip(numbers, longest, strict=True)]
    widths = [min(max(cell_len(header), cells), width) for header, cells in zip(headers, widest, strict=True)]
    readable = list(map(max, words, names))
    one_blank, two_blanks = (width - blanks * len(headers) + blanks for blanks in (1, 2))
    # A column has one blank before the next one anyway. A second one divides no word, and no cell that would fit.
    padding = int(sum(readable) <= two_blanks and not two_blanks < sum(widths) <= one_blank)
    room = two_blanks if padding else one_blank
    for least in (list(map(max, words, widest)), readable, numbers, [1] * len(headers)):
        while sum(widths) > room:
            reducible = [place for place, now in enumerate(widths) if now > least[place]]
            if not reducible:
                break
            widths[max(reducible, key=lambda place: widths[place])] -= 1
    return widths, padding
