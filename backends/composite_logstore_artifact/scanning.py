"""The lines of an archive as records to compare and copy, most of them without parsing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import orjson

from composite_logstore import Scanned
from composite_logstore_artifact.lines import entry_of, identity_of, to_micros, to_utc


class _Times(Sequence[int]):
    """The times of lines, in nanoseconds since the epoch: looked for when they are asked for, and few are."""

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
        # That is how most of ours end.
        begin = line.rfind(b'"time_unix_nano":')
        digits = line[begin + 17 : -1] if begin > 0 else b""
        if digits.isdigit() and len(digits) < 20:
            return int(digits)
        row = _identity(line)
        return row[2] if row else 0


def scan(content: bytes, arrived: int | None) -> Iterator[Scanned]:
    """Yield what lines say of which event each is, and no more: most are not parsed.

    A writer's lines mostly follow each other, so it is known how the next one ends if it is one of them. An attribute
    cannot pass for that, since it stands in braces of its own, nor a text: in it, quotation marks are escaped.

    Args:
        content: Whole lines.
        arrived: When they were written, in nanoseconds since the epoch, if that is known.
    """
    lines = content.split(b"\n")
    begin, writer, sequence, expected = 0, "", 0, b""

    def until(end: int) -> Iterator[Scanned]:
        if begin < end:
            run = lines[begin:end]
            sequences = range(sequence - len(run), sequence) if writer else ()
            yield Scanned(writer, sequences, _Times(run), run, arrived, None)

    for place, line in enumerate(lines):
        # A line that was torn off does not end like this.
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
        # What a format would make something else of has to be written twice.
        expected = (
            b'"writer":%b,"sequence":%%d,"number":' % orjson.dumps(writer).replace(b"%", b"%%") if writer else b""
        )
    yield from until(len(lines))


def _identity(text: bytes) -> tuple[str, int, int] | None:
    """Return a line's writer (empty if another program wrote it), sequence and time; None if it is no entry."""
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
