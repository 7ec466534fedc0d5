"""How operations tell their callers how far they are."""

from __future__ import annotations

from collections.abc import Callable
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
        events: How many events it has read.
        notice: A sentence for people, such as that the operation resumes an earlier one; empty in most calls.
    """

    runs: int | None = None
    runs_done: int = 0
    stream: str = ""
    events: int = 0
    notice: str = ""


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

    def notice(self, text: str) -> None:
        """Say something to people."""
        self._progress.notice = text
        self._pass_on()
        self._progress.notice = ""

    def _pass_on(self) -> None:
        if self._callback is not None:
            self._callback(self._progress)
