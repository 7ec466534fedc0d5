"""The bar that shows the progress of an operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from composite_logstore.cli.console import ask, console, is_quiet, warn
from composite_logstore.inert import inert

if TYPE_CHECKING:
    from composite_logstore.operations import Progress


class Bars(RichProgress):
    """A bar over runs, with the number of events read and events per second."""

    def __init__(self, operation: str, is_shown: bool = True, say: Callable[[str], None] = warn) -> None:
        """Create the bar of an operation; it is shown on a terminal alone.

        Args:
            operation: Its description while there is no stream.
            is_shown: Whether to show the bar; notices are printed in any case.
            say: Prints what the operation waits for.
        """
        out = console(stderr=True)
        columns: tuple[ProgressColumn, ...] = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            _Events(),
            TimeRemainingColumn(),
        )
        super().__init__(
            *columns, console=out, transient=True, disable=not (is_shown and out.is_terminal) or is_quiet()
        )
        self._operation = operation
        self._say = say
        self._bar = self.add_task(operation, total=None, events=0)

    def show(self, progress: Progress) -> None:
        """Show how far the operation is, and print its notices. It is the operation's `progress` callback."""
        for text, say in ((progress.notice, warn), (progress.waiting, self._say)):
            if text:
                self.stop()
                say(text)
        self.start()
        work = f"checking {', '.join(progress.checking)}" if progress.checking else progress.stream
        # A value of None leaves it as it is.
        self.update(
            self._bar,
            total=progress.runs,
            completed=progress.runs_done,
            description=inert(work, "") or self._operation,
            events=progress.events,
        )

    def ask(self, question: str, abort: bool = False) -> bool:
        """Take the bar off the screen until the next call of `show`, and ask as `console.ask` does."""
        self.stop()
        return ask(question, abort)


class _Events(ProgressColumn):
    def render(self, task: Task) -> Text:
        events = task.fields["events"]
        if not events:
            return Text()
        rate = events / task.elapsed if task.elapsed else 0
        return Text(f"{events:,} events, {rate:,.0f}/s")
