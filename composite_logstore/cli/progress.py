"""The bar that shows the progress of an operation."""

from __future__ import annotations

from collections.abc import Callable

from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from composite_logstore.cli.console import ask, console, warn
from composite_logstore.inert import inert
from composite_logstore.operations.progress import Progress


class Bars(RichProgress):
    """A bar over runs, with the number of events read and events per second."""

    def __init__(self, operation: str, notice: Callable[[str], None] = warn) -> None:
        """Create the bar of an operation; it is shown on a terminal alone.

        Args:
            operation: Its description until the first stream.
            notice: Prints the operation's notices.
        """
        out = console(stderr=True)
        columns: tuple[ProgressColumn, ...] = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            _Events(),
            TimeRemainingColumn(),
        )
        super().__init__(*columns, console=out, transient=True, disable=not out.is_terminal)
        self._notice = notice
        self._bar = self.add_task(operation, total=None, events=0)

    def show(self, progress: Progress) -> None:
        """Show how far the operation is, and print its notices. It is the operation's `progress` callback."""
        if progress.notice:
            self.stop()
            self._notice(progress.notice)
        self.start()
        # A value of None leaves it as it is.
        self.update(
            self._bar,
            total=progress.runs,
            completed=progress.runs_done,
            description=inert(progress.stream, "") or None,
            events=progress.events,
        )

    def ask(self, question: str, abort: bool = False) -> bool:
        """Take the bar off the screen until the next call of `show`, and ask as `console.ask` does."""
        self.stop()
        return ask(question, abort)


class _Events(ProgressColumn):
    def render(self, task: Task) -> Text:
        events = task.fields["events"]
        rate = events / task.elapsed if task.elapsed else 0
        return Text(f"{events:,} events, {rate:,.0f}/s")
