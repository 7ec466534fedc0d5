"""Which streams an operation works on: those of one run, of a range of time, or all of the active project."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from uuid import UUID

from composite_logstore.catalog.runs import RunStream, count_runs, find_run, streams_of_project, streams_of_run
from composite_logstore.operations.progress import Reporter
from composite_logstore.spool.settings import spool_root


@dataclass(frozen=True)
class Selection:
    """Which streams to work on; without any value all streams of the active project.

    Attributes:
        run: The name or id of a run; then the other two have no effect.
        since: Only runs still active at or after this time.
        until: Only runs that began at or before this time.
    """

    run: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def streams(self, collectors: Collection[UUID | None], report: Reporter) -> Iterator[RunStream]:
        """Yield the selected streams that one of these log stores collected.

        Raises:
            ArgumentError: There is no such run.
            NoAnswerError: ZenML cannot be reached.
        """
        if self.run is not None:
            found = streams_of_run(find_run(self.run))
        else:
            report.expect(count_runs(self.since, self.until))
            found = streams_of_project(since=self.since, until=self.until)
        for stream in found:
            report.begin(stream)
            if stream.collector in collectors:
                yield stream


def state_folder(operation: str) -> Path:
    """Return the folder in which an operation saves its progress."""
    return spool_root(None).parent / operation
