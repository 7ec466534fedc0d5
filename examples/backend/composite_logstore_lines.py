"""A backend of the composite log store: JSON lines, one file for each stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from zenml.exceptions import DoesNotExistException

from composite_logstore import (
    UNENCODABLE,
    ChildConfig,
    Event,
    LogEvent,
    Page,
    PageRequest,
    ReadEntry,
    RejectedError,
    RetryableError,
    Stream,
    UnavailableError,
)
from composite_logstore.zenml import LogEntry, LogStoreUnavailableError


class LinesChildConfig(ChildConfig):
    """Writes JSON lines to local files."""

    readable: ClassVar[bool] = True
    default_batch_size: ClassVar[int] = 500
    requirements: ClassVar[frozenset[str]] = frozenset({"composite-logstore-lines"})

    directory: str = Field(min_length=1)

    @property
    def is_local(self) -> bool:
        return True

    def create_exporter(self) -> LinesExporter:
        return LinesExporter(Path(self.directory))

    def create_reader(self) -> LinesReader:
        return LinesReader(Path(self.directory))


class LinesExporter:
    """Appends each stream's events to a file of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def export(self, batch: Sequence[LogEvent]) -> int:
        streams: dict[Stream, list[str]] = {}
        try:
            for event in batch:
                # The newline comes first, so that a line that was cut off by a full disk spoils only itself.
                streams.setdefault(event.stream, []).append("\n" + json.dumps(to_fields(event)))
        except UNENCODABLE as error:
            # The delivery then halves the batch until it has found the event, which alone is lost.
            raise RejectedError(f"an event cannot be encoded ({type(error).__name__})") from None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for stream, lines in streams.items():
                with (self._directory / f"{stream.id}.jsonl").open("a", encoding="ascii") as file:
                    file.write("".join(lines))
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise UnavailableError(f"cannot write there ({error.strerror}); check 'directory'") from None
        except OSError as error:
            raise RetryableError(f"could not write ({error.strerror})") from None
        return 0

    def end_stream(self, stream: Stream) -> None:
        pass

    def close(self) -> None:
        pass


def to_fields(event: LogEvent) -> dict[str, object]:
    """Return the event under the names of ZenML's `LogEntry`, and what tells a copy from the original."""
    time = datetime.fromtimestamp(0, timezone.utc) + timedelta(microseconds=event.time_unix_nano // 1000)
    return {
        "id": event.uid,
        "writer": event.writer,
        "sequence": event.sequence,
        "timestamp": time.isoformat(),
        "level": max(0, min(event.level // 10 * 10, 50)),
        "name": event.logger_name,
        "message": event.text,
        "filename": event.file or None,
        "lineno": event.line or None,
        "attributes": {**event.stream.attributes, **event.details},
    }


class LinesReader:
    """Reads a stream's file. A token is the number of the line at which a page goes on."""

    max_page_size = 10_000
    in_order = True

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, request: PageRequest) -> Page:
        wanted = request.filter
        if wanted.since or wanted.until:
            raise ValueError("A child of type 'lines' cannot filter by time: leave out `since` and `until`.")
        try:
            lines = (self._directory / f"{request.logs.id}.jsonl").read_text(encoding="ascii").split("\n")
        except FileNotFoundError:
            raise DoesNotExistException("Nothing was written for these logs.") from None
        except OSError as error:
            raise LogStoreUnavailableError(f"Cannot read there ({error.strerror}); check 'directory'.") from None
        if request.direction == "newer":
            numbers = range(int(request.token or 0), len(lines))
        else:
            numbers = range(int(request.token or len(lines)) - 1, -1, -1)
        found: list[tuple[int, ReadEntry]] = []
        for number in numbers:
            read = to_entry(lines[number])
            if read is None or (wanted.search and wanted.search not in read.entry.message):
                continue
            if wanted.level and (read.entry.level is None or read.entry.level.value < wanted.level.value):
                continue
            found.append((number, read))
            if len(found) == request.limit:
                break
        found.sort(key=lambda item: item[0])
        if not found:
            return Page()
        first, last = found[0][0], found[-1][0]
        return Page([read for _, read in found], older=str(first) if first > 1 else None, newer=str(last + 1))

    def close(self) -> None:
        pass


def to_entry(line: str) -> ReadEntry | None:
    """Return a line as ZenML shows it, None if it is not whole."""
    try:
        fields = json.loads(line)
        return ReadEntry(LogEntry.model_validate(fields), Event(fields["writer"], fields["sequence"]))
    except ValueError:
        return None
