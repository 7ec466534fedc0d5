"""The bars that show the progress of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from composite_logstore.cli.console import ask, console, is_quiet, warn
from composite_logstore.inert import inert
from composite_logstore.names import counted

if TYPE_CHECKING:
    from composite_logstore.delivery.account import ChildStats
    from composite_logstore.operations import Progress
    from composite_logstore.operations.inventory import LogStore


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


class DrainBars(RichProgress):
    """A bar for each child in the folder that is being drained."""

    def __init__(self) -> None:
        """Create the bars; they are shown on a terminal alone."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        out = console()
        super().__init__(*columns, console=out, transient=True, disable=not out.is_terminal or is_quiet())
        self._shown: dict[str, TaskID] = {}

    def show(self, store: LogStore, accounts: dict[str, ChildStats]) -> None:
        """Show how the children stand. It is the operation's `progress` callback."""
        if not accounts:
            for task in self._shown.values():
                self.remove_task(task)
            self._shown.clear()
        for child, account in accounts.items():
            if child not in self._shown:
                self._shown[child] = self.add_task(inert(f"{store.label}: {child}", ""), total=account.accepted)
            self.update(self._shown[child], completed=account.accepted - account.pending)


class _Events(ProgressColumn):
    def render(self, task: Task) -> Text:
        events = task.fields["events"]
        if not events:
            return Text()
        rate = events / task.elapsed if task.elapsed else 0
        return Text(f"{counted(events, 'event')}, {rate:,.0f}/s")
