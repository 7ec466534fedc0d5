"""What a process says of its children about once a second, for `composite-logstore status`."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from composite_logstore.clock import Clock
from composite_logstore.delivery.account import ChildStats
from composite_logstore.plain import shorten
from composite_logstore.spool.status_files import StatusFile

REPORT_SECONDS = 1.0
"""How long to wait at least between two reports, and before the first one: many processes live for less."""
RATE_SECONDS = 10.0
"""Over how long a time rates are measured."""
_MOST_ERROR_BYTES = 500
_NUMBERS = ("delivered", "rejected", "dropped", "withheld", "pending")


class Status:
    """The reports of one writer. Only the thread for housekeeping calls it, and the end of the process."""

    def __init__(self, component: Path, writer: str, clock: Clock) -> None:
        """Report nothing yet.

        Args:
            component: The folder of the log store.
            writer: The writer's name.
            clock: The source of time.
        """
        self._file = StatusFile(component, writer)
        self._clock = clock
        self._began = clock.time()
        # When the last reports were made, on the clock that never goes back and since the epoch, and what they said.
        self._earlier: deque[tuple[float, float, dict[str, int]]] = deque()

    def report(
        self, accounts: Mapping[str, ChildStats], oldest: Iterable[tuple[str, int]], recovered: Sequence[str]
    ) -> None:
        """Write how the children are.

        Args:
            accounts: A child's name → its account.
            oldest: A child's name, and when an event that waits for it was logged, in nanoseconds since the epoch.
            recovered: The names of the folders of dead processes whose events this one delivers.

        Raises:
            OSError: It cannot be written now.
        """
        now, time = self._clock.now(), self._clock.time()
        last = self._earlier[-1][2] if self._earlier else {}
        while self._earlier and now - self._earlier[0][0] > RATE_SECONDS:
            self._earlier.popleft()
        if not self._earlier:
            # Nothing has happened for long.
            self._earlier.append((now - REPORT_SECONDS, time - REPORT_SECONDS, last))
        self._earlier.append((now, time, {name: account.delivered for name, account in accounts.items()}))
        times: dict[str, int] = {}
        for name, nanos in oldest:
            times[name] = min(nanos, times.get(name, nanos))
        _, since, before = self._earlier[0]
        self._file.write(
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "began": self._began,
                "written": time,
                "since": since,
                "recovered": list(recovered),
                "children": {
                    name: {
                        **_said(account),
                        "delivered_since": max(0, account.delivered - before.get(name, 0)),
                        "oldest": times.get(name),
                    }
                    for name, account in accounts.items()
                },
            }
        )

    def end(self) -> None:
        """Report nothing more."""
        self._file.remove()


def _said(account: ChildStats) -> dict[str, Any]:
    error = account.last_error
    return {
        "state": account.state,
        **{name: getattr(account, name) for name in _NUMBERS},
        "redacted": sum(account.redacted.values()),
        "last_error": error and shorten(error, _MOST_ERROR_BYTES),
    }
