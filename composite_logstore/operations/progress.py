"""How operations tell their callers how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias
from uuid import UUID

from composite_logstore.catalog.runs import RunStream


@dataclass
class Progress:
    """How far an operation is. Its `progress` callback gets the same object each time.

    Attributes:
        runs: How many runs the operation goes through, None while unknown.
        runs_done: How many of them are done.
        stream: The run and stream that it is working on, empty before the first.
        checking: The names of the children that it checks, empty while it checks none.
        events: How many events it has read.
        notice: A sentence for people, such as that the operation resumes an earlier one; empty in most calls.
        waiting: A sentence for people on what the operation waits for; empty in most calls.
    """

    runs: int | None = None
    runs_done: int = 0
    stream: str = ""
    checking: tuple[str, ...] = ()
    events: int = 0
    notice: str = ""
    waiting: str = ""


ProgressCallback: TypeAlias = Callable[[Progress], None]


class Reporter:
    """Keeps an operation's progress, and passes each change on."""

    def __init__(self, callback: ProgressCallback | None) -> None:
        """Create one for a callback, or for nobody."""
        self._progress = Progress()
        self._callback = callback
        self._runs: set[UUID] = set()

    def expect(self, runs: int) -> None:
        """Note how many runs there are."""
        self._progress.runs = runs
        self._pass_on()

    def begin(self, stream: RunStream) -> None:
        """Note that the work on a stream begins."""
        self._progress.runs_done = len(self._runs)
        self._progress.stream = f"{stream.run_name} {stream.label}"
        self._runs.add(stream.run_id)
        self._pass_on()

    def count(self, events: int) -> None:
        """Note that so many more events were read."""
        self._progress.events += events
        self._pass_on()

    @contextmanager
    def checking(self, children: Iterable[str]) -> Iterator[None]:
        """Note that children are checked until the end of the block."""
        self._progress.checking = tuple(children)
        self._pass_on()
        try:
            yield
        finally:
            self._progress.checking = ()
            self._pass_on()

    def notice(self, text: str) -> None:
        """Say something to people."""
        self._progress.notice = text
        self._pass_on()
        self._progress.notice = ""

    def wait(self, text: str) -> None:
        """Tell people what the operation waits for."""
        self._progress.waiting = text
        self._pass_on()
        self._progress.waiting = ""

    def _pass_on(self) -> None:
        if self._callback is not None:
            self._callback(self._progress)
