"""Scans the lines of an archive for comparing and copying, most of them without parsing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import orjson

from composite_logstore import Scanned
from composite_logstore_artifact.lines import entry_of, identity_of, to_micros, to_utc


class _Times(Sequence[int]):
    """The times of lines, in nanoseconds since the epoch. They are parsed on access, and few are accessed."""

    def __init__(self, lines: Sequence[bytes]) -> None:
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...

    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        if isinstance(place, slice):
            return _Times(self._lines[place])
        line = self._lines[place]
        # Most lines that our exporter writes end like this.
        begin = line.rfind(b'"time_unix_nano":')
        digits = line[begin + 17 : -1] if begin > 0 else b""
        if digits.isdigit() and len(digits) < 20:
            return int(digits)
        row = _identity(line)
        return row[2] if row else 0


def scan(content: bytes, arrived: int | None) -> Iterator[Scanned]:
    """Yield consecutive lines with the identity of their events.

    A writer's lines mostly follow each other, so the scan expects how the next line ends, and parses it only if it ends
    otherwise. This cannot confuse two lines: an attribute with these keys stands in braces of its own, and in a text
    quotation marks are escaped.

    Args:
        content: Whole lines.
        arrived: When the lines were written, in nanoseconds since the epoch; None if that is not known.
    """
    lines = content.split(b"\n")
    begin, writer, sequence, expected = 0, "", 0, b""

    def until(end: int) -> Iterator[Scanned]:
        if begin < end:
            run = lines[begin:end]
            sequences = range(sequence - len(run), sequence) if writer else ()
            yield Scanned(writer, sequences, _Times(run), run, arrived, None)

    for place, line in enumerate(lines):
        # A torn line does not end with a brace after these keys.
        if expected and line.startswith(expected % sequence, line.rfind(b'"writer":"')) and line.endswith(b"}"):
            sequence += 1
            continue
        row = _identity(line)
        if row is not None and begin < place and (row[0] == writer) and (not writer or row[1] == sequence):
            sequence += 1
            continue
        yield from until(place)
        begin = place
        if row is None:
            begin, expected = place + 1, b""
            continue
        writer, sequence = row[0], row[1] + 1
        # A percent sign in the writer's name has to be doubled in a format.
        expected = (
            b'"writer":%b,"sequence":%%d,"number":' % orjson.dumps(writer).replace(b"%", b"%%") if writer else b""
        )
    yield from until(len(lines))


def _identity(text: bytes) -> tuple[str, int, int] | None:
    """Return a line's writer (empty if another program wrote it), number and time; None if it is no entry."""
    if not text:
        return None
    try:
        fields = orjson.loads(text)
    except ValueError:
        fields = None
    event, entry = identity_of(fields), None
    if event is not None and type(fields.get("time_unix_nano")) is int:
        return event.writer, event.sequence, fields["time_unix_nano"]
    if (entry := entry_of(text)) is None:
        return None
    timestamp = to_utc(entry.timestamp)
    micros = to_micros(timestamp) if timestamp else 0
    return (event.writer, event.sequence, micros * 1000) if event else ("", 0, micros * 1000)
