"""The lines and positions of the spool, as bytes. This module opens no file and keeps no state.

A line is a checksum (CRC-32, 8 hexadecimal digits), a space, a JSON value and a line break. There are five kinds:

    {"format": 2, "positions": ["a.settled"], "process": [...]}     the header, the first line of each segment
    {"stream": id, "artifact_store_id": id, "attributes": {...}}    a stream, before its first event in a segment
    [stream's id, writer, number, sequence, ...]                    an event: the fields of `LogEvent`
    {"ended": stream's id}                                          a mark: the stream gets no more events
    {"closed": true}                                                a mark: the process has ended in order

The header has the fields of `Process`, in format 2. A mark comes after the events that it is about. It has no number.
Events that are logged all the same may follow it: a stream is open again only after another line of the stream itself
without a mark behind it. Format 1 has no marks.

Each line has its own checksum, so a damaged line hides no other. A checksum proves nothing about who wrote a line, so
`decode_event` also checks the type and the range of each field.

A line of a file of rejected events has everything that is known of one of them:

    {"rejected": time, "reason": text, "number": k, "among": n, "stream": {...}, "event": [...]}

A position is the lowest number that a child has not acknowledged, as 20 digits and a checksum.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

import orjson

from composite_logstore.event import HIGHEST, WRITER, ExceptionInfo, LogEvent, Stream, TraceContext
from composite_logstore.inert import described
from composite_logstore.plain import plain_mapping
from composite_logstore.spool.streams import Streams

FORMAT = 2
READABLE = (1, FORMAT)
"""The formats that are read: segments of an earlier release may wait on disk."""
LINE_BYTES = 64 * 1024 * 1024
"""The longest line. An event that needs more is shortened."""
ABRIDGED_BYTES = LINE_BYTES // 64
"""How long each text of such an event may be, and its attributes together."""
POSITION = re.compile(r"[a-z0-9_-]+\.settled")
POSITION_BYTES = 30
DUE = "due"
"""The name of the file that says which events an agent delivers without waiting for fuller batches."""
_PIECE_BYTES = 1 << 16
_NUMBERED = re.compile(rb'[0-9a-f]{8} \["[^"]*","[^"]*",([0-9]{1,20}),')
_HEX = re.compile(r"[0-9a-f]{1,32}"), re.compile(r"[0-9a-f]{1,16}")
_INT64 = 1 << 63
_FIELDS = len(LogEvent._fields)
_MOST_HOST = 300
_EXCEPTION = LogEvent._fields.index("exception")
# The types of the fields before the exception. Compared by `type`, since `isinstance(True, int)` holds.
_TYPES = [str, str, int, int, int, int, str, str, str, str, int, str]


class UnstorableEventError(ValueError):
    """An event cannot be written as a line, however much room there is."""


class EventTooLongError(UnstorableEventError):
    """An event needs more bytes than a line may have."""


# Lines


def encode_line(payload: bytes) -> bytes:
    """Return a JSON value as a line."""
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def decode_line(line: bytes) -> Any:
    """Return the JSON value of a line, None if the line is damaged."""
    try:
        payload = line[9:-1]
        if line[-1:] == b"\n" and int(line[:8], 16) == zlib.crc32(payload):
            return orjson.loads(payload)
    except ValueError:
        pass
    return None


def read_line(file: BinaryIO, most_zeros: int) -> tuple[int, bytes]:
    """Read the next line.

    Args:
        file: The segment.
        most_zeros: After how many zeros to stop: the rest of an allocated segment is zeros.

    Returns:
        The number of zeros before the line, and the line; an empty one at the end of the file, or after too many zeros.
    """
    zeros = 0
    while zeros <= most_zeros:
        piece = file.readline(_PIECE_BYTES)
        line = piece.lstrip(b"\0")
        zeros += len(piece) - len(line)
        if line or not piece:
            is_whole = line.endswith(b"\n") or len(piece) < _PIECE_BYTES
            return zeros, line if is_whole else line + file.readline(LINE_BYTES - len(line))
    return zeros, b""


class Process(NamedTuple):
    """Which process has written a segment.

    Attributes:
        host: The name of its host.
        pid: Its id there.
        rank: Its rank among the processes of a distributed training, None if it has none.
        is_write_ahead: Whether each event was on disk before `emit` returned, rather than within a second.
        has_joined: Whether it is one of the processes that a step has started, and not the one that runs the step.
    """

    host: str
    pid: int
    rank: int | None
    is_write_ahead: bool
    has_joined: bool


def encode_header(children: Iterable[str], process: Process | None = None) -> bytes:
    """Return the first line of a segment, which names the files of the children's positions, and the process."""
    header = {"format": FORMAT, "positions": [position_name(child) for child in children]}
    return encode_line(orjson.dumps(header if process is None else {**header, "process": list(process)}))


def process_in_header(header: dict[str, Any]) -> Process | None:
    """Return which process a header's value names, None if it names none."""
    fields = header.get("process")
    if type(fields) is not list or len(fields) != len(Process._fields):
        return None
    host, pid, rank, *flags = fields
    numbers = (pid, 0 if rank is None else rank)
    if type(host) is not str or [*map(type, (*numbers, *flags))] != [int, int, bool, bool]:
        return None
    if len(host) > _MOST_HOST or not all(0 <= number < _INT64 for number in numbers):
        return None
    return Process(host, pid, rank, *flags)


def positions_in_header(line: bytes) -> list[str] | None:
    """Return the names of the files of positions that a segment's first line lists, None if it is no such line."""
    header = decode_line(line)
    names = header.get("positions") if isinstance(header, dict) else None
    if not isinstance(names, list):
        return None
    return [name for name in names if isinstance(name, str) and POSITION.fullmatch(name)]


class Ended(NamedTuple):
    """The mark that a stream gets no more events, unless it is registered again.

    Attributes:
        stream: The stream.
    """

    stream: Stream


@dataclass(frozen=True)
class Closed:
    """The mark that the process has ended in order."""


def encode_mark(mark: Ended | Closed) -> bytes:
    """Return a mark as a line."""
    return encode_line(orjson.dumps({"ended": str(mark.stream.id)} if isinstance(mark, Ended) else {"closed": True}))


def decode_mark(value: dict[str, Any], stream_of: Callable[[Any], Stream | None]) -> Ended | Closed | None:
    """Return the mark in a line's value, None if it is none.

    Args:
        value: The value.
        stream_of: Returns the stream with an id, None if the id is not valid.
    """
    if "ended" in value:
        stream = stream_of(value["ended"])
        return Ended(stream) if stream else None
    return Closed() if value.get("closed") is True else None


def encode_stream(stream: Stream) -> bytes:
    """Return a stream as a line."""
    return encode_line(orjson.dumps(_as_value(stream)))


def _as_value(stream: Stream) -> dict[str, Any]:
    return {
        "stream": str(stream.id),
        "artifact_store_id": str(stream.artifact_store_id) if stream.artifact_store_id else None,
        "attributes": stream.attributes,
    }


# Events


def encode_event(event: LogEvent, stream: str) -> bytes:
    """Return an event as a line.

    Raises:
        UnstorableEventError: JSON cannot express a value of the event.
    """
    try:
        return encode_line(_as_json(event, stream))
    except Exception as error:
        raise UnstorableEventError(described(error)) from error


def _as_json(event: LogEvent, stream: str) -> bytes:
    error, trace = event.exception, event.trace
    if error is None and trace is None:
        return orjson.dumps((stream, *event[1:]))
    fields = event._asdict()
    fields["stream"] = stream
    fields["exception"] = error and tuple(error)
    # Trace ids have 128 bits, JSON's integers 64.
    fields["trace"] = trace and (f"{trace.trace_id:x}", f"{trace.span_id:x}", trace.flags)
    return orjson.dumps(list(fields.values()))


def decode_event(value: list[Any], stream_of: Callable[[Any], Stream | None]) -> LogEvent | None:
    """Return the event in a line's value, None if a field has a type or a value that no event has.

    Args:
        value: The value, which becomes that of the event's fields.
        stream_of: Returns the stream with an id, None if the id is not valid.
    """
    # One event takes about 3 µs: an agent reads those of all processes of a machine.
    if len(value) != _FIELDS or [*map(type, value[:_EXCEPTION])] != _TYPES:
        return None
    id, writer, number, sequence, time, level, *_, line, _, error, trace, attributes, metadata, progress = value
    is_valid = (
        _is_writer(writer)
        and 0 <= number <= HIGHEST
        and 0 <= sequence <= HIGHEST
        and -_INT64 <= time < _INT64
        and -_INT64 <= level < _INT64
        and -_INT64 <= line < _INT64
        and (error is None or _is_exception(error))
        and (trace is None or _is_trace(trace))
        and type(attributes) is dict
        and type(metadata) is dict
        and (type(progress) is bool or (type(progress) is int and 1 < progress <= HIGHEST))
    )
    stream = stream_of(id) if is_valid else None
    if stream is None:
        return None
    value[0] = stream
    if error is not None:
        value[_EXCEPTION] = ExceptionInfo(*error)
    if trace is not None:
        value[_EXCEPTION + 1] = TraceContext(int(trace[0], 16), int(trace[1], 16), trace[2])
    if attributes or metadata:
        # Bounds the depth, as capture does.
        value[-3:-1] = plain_mapping(attributes), plain_mapping(metadata)
    return LogEvent._make(value)


@lru_cache(maxsize=100)
def _is_writer(text: str) -> bool:
    return WRITER.fullmatch(text) is not None


class RejectedEvent(NamedTuple):
    """An event that a backend has rejected for good.

    Attributes:
        event: The event as it was logged.
        reason: Why the backend rejected it.
        time_unix_nano: When, in nanoseconds since the epoch.
        number: How many events of its export the backend rejected.
        among: Among how many they are: more than `number` if the backend did not say which ones it rejected.
    """

    event: LogEvent
    reason: str
    time_unix_nano: int
    number: int = 1
    among: int = 1

    @property
    def is_certain(self) -> bool:
        """Whether this very event was rejected, rather than one of several."""
        return self.number >= self.among


def encode_rejected(rejected: RejectedEvent) -> bytes:
    """Return a rejected event as a line.

    Raises:
        UnstorableEventError: JSON cannot express a value of the event.
    """
    event = rejected.event
    value = {
        "rejected": rejected.time_unix_nano,
        "reason": rejected.reason,
        "number": rejected.number,
        "among": rejected.among,
        "stream": _as_value(event.stream),
    }
    try:
        known = orjson.dumps(value)
        return encode_line(b'%b,"event":%b}' % (known[:-1], _as_json(event, str(event.stream.id))))
    except Exception as error:
        raise UnstorableEventError(described(error)) from error


def decode_rejected(line: bytes, streams: Streams) -> RejectedEvent | None:
    """Return the rejected event of a line, None if the line is damaged, or has a value that no such line has.

    Args:
        line: The line.
        streams: The streams that other lines name. It learns that of this line.
    """
    value = decode_line(line)
    if not isinstance(value, dict):
        return None
    reason, stream, fields = (value.get(name) for name in ("reason", "stream", "event"))
    numbers: list[Any] = [value.get(name) for name in ("rejected", "number", "among")]
    if type(reason) is not str or type(stream) is not dict or type(fields) is not list or not fields:
        return None
    if any(type(number) is not int or not 0 <= number <= _INT64 for number in numbers):
        return None
    if stream.get("stream") != fields[0] or not streams.learned(stream, is_scan=True):
        return None
    event = decode_event(fields, streams.of)
    return RejectedEvent(event, reason, *numbers) if event else None


def number_in(line: bytes) -> int | None:
    """Return the number of the event in a line without decoding the line, None if it does not look like an event."""
    found = _NUMBERED.match(line)
    return int(found[1]) if found else None


def _is_exception(value: Any) -> bool:
    return type(value) is list and [*map(type, value)] == [str, str, str]


def _is_trace(value: Any) -> bool:
    if type(value) is not list or [*map(type, value)] != [str, str, int]:
        return False
    trace_id, span_id = _HEX
    return bool(trace_id.fullmatch(value[0]) and span_id.fullmatch(value[1])) and 0 <= value[2] < 256


# Positions


def position_name(child: str) -> str:
    """Return the name of the file of a child's position."""
    return f"{child}.settled"


def encode_position(number: int) -> bytes:
    """Return a position as bytes. The checksum keeps a damaged position from hiding events that must be delivered."""
    text = f"{number:020d}".encode()
    return b"%b %08x\n" % (text, zlib.crc32(text))


def decode_position(data: bytes) -> int | None:
    """Return the position in some bytes, None if they are damaged."""
    text = data[:20]
    if not text.isdigit() or data != encode_position(int(text)):
        return None
    return int(text) if int(text) <= HIGHEST else None
