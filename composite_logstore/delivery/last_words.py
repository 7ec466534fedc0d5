"""The entry by which a stream tells that one of its processes has died.

A process writes a mark to its folder when a stream ends, and another one when it ends in order itself. If a stream has
neither, the process was killed, it called `os._exit`, or its machine failed; other processes cannot tell which. So the
process that recovers the folder adds an event to the stream, which every child gets by its usual rules.

The level is ERROR: such an end is what people look for when a step has failed, and what an alert is for. It is INFO for
a process that a step has started and that has no rank: some launchers kill such workers in the ordinary course. The
events have a writer of their own, so that their sequence numbers are none of events that were delivered and never on
disk.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress

from composite_logstore.capture.process import PID, RANK
from composite_logstore.event import HIGHEST, LogEvent
from composite_logstore.plain import Plain
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.format import Process

MOST_STREAMS = 100
"""How many streams of one process get such an event: those with the latest events."""
_INT64 = (1 << 63) - 1


def add_last_words(spool: Spool, time: float) -> list[LogEvent]:
    """Add an event to each open stream of a dead process, in a segment of its own, unless the process ended in order.

    The segment is written as a whole or not at all, and says that the process has ended. So each stream gets one event,
    even if this process is killed as well. Without room on the disk it gets none.

    Args:
        spool: The folder, which this process has locked, and all lines of which were read.
        time: The time in seconds since the epoch.

    Returns:
        The events.
    """
    marks, segments = spool.reader.marks, spool.segments
    process = marks.process
    if process is None or marks.is_closed or not marks.open:
        return []
    text = _text(process)
    is_worker = process.has_joined and process.rank is None
    level = logging.INFO if is_worker else logging.ERROR
    attributes: dict[str, Plain] = {"host.name": process.host, PID: process.pid}
    if process.rank is not None:
        attributes[RANK] = process.rank
    with suppress(OSError):
        # Above all that a child has acknowledged: events may have been delivered that were never on disk.
        number = int(max([segments.next_name, *map(spool.acknowledged, spool.children)]))
        if number > HIGHEST - MOST_STREAMS:
            return []
        events = [
            LogEvent(
                stream=stream,
                writer=hashlib.sha256(spool.folder.name.encode()).hexdigest()[:15],
                number=number + place,
                sequence=0,
                # A clock may be wrong, and some backends order events by time.
                time_unix_nano=min(max(int(time * 1e9), marks.last_unix_nano + 1), _INT64),
                level=level,
                level_name=logging.getLevelName(level),
                message=text,
                logger_name="composite_logstore",
                file="",
                line=0,
                function="",
                exception=None,
                trace=None,
                attributes=attributes,
                metadata={},
                progress=False,
            )
            for place, stream in enumerate([*marks.open][-MOST_STREAMS:])
        ]
        segments.add_end(events, process)
        return events
    return []


def _text(process: Process) -> str:
    who = f"The process {process.pid} on {process.host}"
    if process.rank is not None:
        who += f" (rank {process.rank})"
    if process.is_write_ahead:
        missing = "None of its events is missing ('durability' is 'write_ahead')"
    else:
        missing = "Events of its last second may be missing ('durability' is 'spill')"
    return (
        f"{who} ended without closing its logs: it was killed, perhaps for lack of memory, it called os._exit, or its "
        f"machine failed. {missing}, unless it warned that its spool could not be used."
    )
