"""The ledger of a backfill: which events were sent to a child, noted on disk after each export."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import orjson

from composite_logstore.intervals import Intervals
from composite_logstore.spool.lock import lock_file

REMEMBERED_SECONDS = 3600.0
"""Grace period, in seconds, before an event that is missing from a readable child is copied again: some backends take a
while until they show what they accepted."""


class BackfillRunsError(Exception):
    """Another process backfills the same child."""


class Ledger:
    """The events that were sent to a child. `open_ledger` opens it.

    Attributes:
        is_resumed: Whether an earlier backfill was interrupted.
        finished: The streams that the earlier backfill had finished.
    """

    def __init__(self, path: Path, since: float, *, dry_run: bool = False) -> None:
        """Read the file.

        Args:
            path: The file.
            since: Events that were sent before this time do not count, in seconds since the epoch.
            dry_run: Whether to leave the file as it is.
        """
        self._sent: dict[str, dict[str, Intervals]] = {}
        self.finished: set[str] = set()
        self.is_resumed = False
        content = path.read_bytes() if path.exists() else b""
        self._read(content, since)
        self._file = open(os.devnull if dry_run else path, "ab")  # noqa: SIM115
        if content and not content.endswith(b"\n"):
            self._file.write(b"\n")

    def _read(self, content: bytes, since: float) -> None:
        for text in content.splitlines():
            try:
                line = orjson.loads(text)
                if "complete" in line:
                    self.is_resumed = False
                    self.finished.clear()
                elif "finished" in line:
                    self.finished.add(line["finished"])
                    self.is_resumed = True
                else:
                    self.is_resumed = True
                    if line["time"] >= since:
                        for first, last in line["runs"]:
                            self.sent(line["stream"], line["writer"]).add(first, last)
            except (ValueError, KeyError, TypeError):
                # A process was killed while it wrote this line.
                continue

    def sent(self, logs_id: str, writer: str) -> Intervals:
        """Return the numbers of a writer's events of a stream that were sent."""
        return self._sent.setdefault(logs_id, {}).setdefault(writer, Intervals())

    def writers(self, logs_id: str) -> list[str]:
        """Return the writers whose events were sent, at least in part."""
        return list(self._sent.get(logs_id, {}))

    def note(self, logs_id: str, writer: str, sequences: Sequence[int]) -> None:
        """Note that these events of one writer were sent."""
        sent = Intervals()
        sent.update(sequences)
        self._write({"time": time.time(), "stream": logs_id, "writer": writer, "runs": list(sent)})

    def finish(self, logs_id: str) -> None:
        """Note that a stream was copied to its end."""
        self._write({"finished": logs_id})

    def complete(self) -> None:
        """Note that the backfill is complete: there is nothing to resume."""
        self._write({"complete": time.time()})

    def _write(self, line: dict[str, object]) -> None:
        self._file.write(orjson.dumps(line) + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextmanager
def open_ledger(
    folder: Path, store_id: UUID, child: str, since: float, is_anew: bool = False, dry_run: bool = False
) -> Iterator[Ledger]:
    """Open a child's ledger, and keep other processes on this machine from opening it.

    Args:
        folder: The folder of all ledgers.
        store_id: The log store.
        child: The child to copy to.
        since: Events that were sent before this time do not count, in seconds since the epoch.
        is_anew: Whether to discard the ledger and start over.
        dry_run: Whether to leave the file as it is, and to forget what is noted in the ledger when it is closed.

    Raises:
        BackfillRunsError: Another process has opened the ledger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{store_id}-{child}"
    with open(folder / f"{name}.lock", "a+b") as lock:
        if not lock_file(lock.fileno()):
            lock.seek(0)
            process = lock.read().decode(errors="replace") or "unknown"
            raise BackfillRunsError(
                f"another backfill to child '{child}' runs on this machine (process {process}); wait for it, or stop it"
            )
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        lock.flush()
        path = folder / f"{name}.jsonl"
        if is_anew and dry_run:
            path = Path(os.devnull)
        elif is_anew:
            path.unlink(missing_ok=True)
        ledger = Ledger(path, since, dry_run=dry_run)
        try:
            yield ledger
        finally:
            ledger.close()
