"""What a backend is: the ports that its exporter and its reader fill, and the ways an export can end.

A backend is a package with a `ChildConfig` (see `config.py`), named in the entry-point group
`composite_logstore.backends`. It imports only what `composite_logstore` itself lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import SecretStr

from composite_logstore.bounds import Bounds

if TYPE_CHECKING:
    from zenml.models import LogEntry, LogsEntriesFilter, LogsResponse

    from composite_logstore.event import LogEvent, Stream


class ExportError(Exception):
    """An export did not deliver the whole batch. Raise one of its subclasses.

    The message is shown to people, so it says what is wrong and what would mend it, and holds no
    secret.
    """


class RetryableError(ExportError):
    """The backend did not take the batch this time; the same batch may be taken later."""

    def __init__(self, message: str, retry_after_seconds: float | None = None, smaller_may_pass: bool = False) -> None:
        """Say what happened.

        Args:
            message: What happened.
            retry_after_seconds: When the backend asks to be tried again, if it says so.
            smaller_may_pass: Whether the size of the batch may be the cause: the export timed out, or broke off while
                it sent or waited. Leave it out for what has certainly nothing to do with size, such as a connection
                that is refused. If it happens again, fewer events are tried; where `retry_after_seconds` is given,
                they are not.
        """
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.smaller_may_pass = smaller_may_pass


class RejectedError(ExportError):
    """The backend will never take some of these events; it has taken the others."""

    def __init__(self, message: str, count: int | None = None, shortened: int = 0) -> None:
        """Say why.

        Args:
            message: The reason, in a few words: rejections are counted by it.
            count: How many events were refused. Leave it out if the backend refused the batch as a
                whole: it is then split until the events at fault are alone.
            shortened: How many events of the batch had to be shortened.
        """
        super().__init__(message)
        self.count = count
        self.shortened = shortened


class TooLargeError(ExportError):
    """The batch has too many events or bytes for one request; it is split and tried again."""


class UnavailableError(ExportError):
    """Nothing is wrong with the events, but the backend cannot take any: a wrong key, a missing bucket."""


UNENCODABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What encoding an event may raise because of the event: one from another program's archive, say, which is copied.

Whatever was logged here can be encoded. No later try would change it, so raise `RejectedError` then. Anything else,
such as `MemoryError`, is not the event's fault.
"""


class Exporter(Protocol):
    """The write port: takes a child's events to its backend. Used by one thread alone.

    It may have an attribute `schedule_delay_millis` besides: how long events are to wait for a fuller batch from
    now on, in milliseconds, if that is known only once the backend is there. None leaves it as it is set.
    """

    def export(self, batch: Sequence[LogEvent]) -> int:
        """Deliver the batch, in its order, or raise.

        It never retries by itself. It should give up before the child's `export_timeout_millis`.

        Args:
            batch: Events of one writer, in journal order, at least one, of one stream or several.

        Returns:
            How many of the events had to be shortened.

        Raises:
            RetryableError: Try the same batch again later.
            RejectedError: Some events, or the batch as a whole, will never be taken.
            TooLargeError: Split it.
            UnavailableError: Nothing can be delivered until somebody mends something.
        """

    def end_stream(self, stream: Stream) -> None:
        """Note that the stream has ended and that all its events have been exported or given up."""

    def close(self) -> None:
        """Release connections and files. Called once, last."""


_MOST_NUMBERS = 1 << 62
_LONGEST_WRITER = 64


class Event(NamedTuple):
    """Where an entry comes from, so that a duplicate is known as one and order can be restored."""

    writer: str
    sequence: int

    @classmethod
    def of(cls, writer: Any, sequence: Any) -> Event | None:
        """Return which event a record is by what it says of itself, None if no writer can have said that.

        Args:
            writer: What it says of its writer, of whatever type. Ours have 15 hexadecimal digits.
            sequence: What it says of its number, the same.
        """
        if type(writer) is str and type(sequence) is int and 0 <= sequence < _MOST_NUMBERS:
            return cls(writer, sequence) if 0 < len(writer) <= _LONGEST_WRITER and writer.isascii() else None
        return None


class ReadEntry(NamedTuple):
    """One entry of a page.

    Attributes:
        entry: What ZenML shows. Its `id` is the event's `log.record.uid`.
        event: Which event it is, unless another program wrote it. `Event.of` makes it of what a backend says.
    """

    entry: LogEntry
    event: Event | None


@dataclass(frozen=True)
class PageRequest:
    """What to read.

    Attributes:
        logs: The stream, as ZenML knows it.
        direction: `newer` goes from the oldest entry towards the newest, `older` the other way.
        token: Where the previous page in this direction ended, as the reader itself wrote it. None
            begins at the oldest entry (`newer`) or at the newest (`older`).
        limit: The most entries to return.
        filter: What to return. A reader that cannot honour a filter raises `ValueError`.
    """

    logs: LogsResponse
    direction: Literal["newer", "older"]
    token: str | None
    limit: int
    filter: LogsEntriesFilter


@dataclass(frozen=True)
class Page:
    """What was read.

    Attributes:
        entries: Oldest first, whichever the direction.
        older: The token that continues before the first entry; None where nothing is older, or where
            the backend cannot go that way.
        newer: The token that continues after the last entry; None where an empty page is the end, or
            where the backend cannot go that way.

    A page may have fewer entries than asked for, or none, and a token in its direction all the same: a
    reader looks through so much at a time.
    """

    entries: Sequence[ReadEntry] = field(default_factory=list)
    older: str | None = None
    newer: str | None = None


class Reader(Protocol):
    """The read port: answers one page at a time. Runs on ZenML's server, so it imports what that has.

    Attributes:
        max_page_size: The most entries of one page.
        in_order: Whether the entries of one writer come in the order of their sequence, but for what was
            sent again, and for clocks that went back.
    """

    max_page_size: int
    in_order: bool

    def read(self, request: PageRequest) -> Page:
        """Read one page.

        Raises:
            ValueError: The token or a filter cannot be used.
            zenml.exceptions.LogStoreUnavailableError: The backend cannot be reached.
            zenml.exceptions.LogStoreRateLimitError: The backend asks to be left alone for a while.
            zenml.exceptions.LogStoreError: The backend refused, or its answer makes no sense.
            zenml.exceptions.DoesNotExistException: The stream is not there.
        """

    def close(self) -> None:
        """Release connections. Never closes what ZenML's server shares between requests."""


BACKFILLED = "zenml.log.backfilled"
"""The attribute of an event that was copied to a child after later ones of its writer: it is no copy of any of them."""


class Scanned(NamedTuple):
    """Records of a stream that lie one after the other, in columns: of millions there is no time for objects.

    Attributes:
        writer: Who numbered them, empty if another program wrote them.
        sequences: Their numbers, none if another program wrote them. A range is compared and copied faster than others.
        times: When they were logged, in nanoseconds since the epoch.
        contents: The records, as the backend has them. Two that are equal say the same.
        arrived: When the backend got them, in nanoseconds since the epoch, if that is known.
        token: Where to go on after them, as the reader itself wrote it; None where that is within something that
            is read as a whole.
    """

    writer: str
    sequences: Sequence[int]
    times: Sequence[int]
    contents: Sequence[Any]
    arrived: int | None
    token: str | None


@runtime_checkable
class Scanner(Protocol):
    """What a reader may offer beside pages: the whole of a stream, fast, with all that is known of each record.

    Attributes:
        scan_format: The name of the format of the contents. Those of one name can be compared as they are.
    """

    scan_format: ClassVar[str]

    def scan(self, logs: LogsResponse, token: str | None = None) -> Iterator[Scanned]:
        """Read a stream from its oldest record to its newest, copies and all.

        Args:
            logs: The stream, as ZenML knows it.
            token: Where an earlier scan ended. None begins at the oldest.

        Raises:
            Exception: As `Reader.read` does.
        """

    def event_of(self, content: Any, stream: Stream) -> LogEvent | None:
        """Return a record that was scanned as the event that it is; None if another program wrote it."""

    def entry_of(self, content: Any) -> LogEntry | None:
        """Return a record that another program wrote as an entry; None if it is none."""


@runtime_checkable
class Copier(Protocol):
    """What an exporter may offer beside batches: to write what was scanned as it is.

    Attributes:
        scan_format: The name of the format that it writes, as the `Scanner` has it.
    """

    scan_format: ClassVar[str]

    def export_scanned(self, stream: Stream, scanned: Scanned) -> None:
        """Deliver records of one writer, in their order, or raise as `Exporter.export` does.

        Args:
            stream: Their stream.
            scanned: The records. No `times`, no `arrived` and no `token` come with them.

        Raises:
            Exception: As `Exporter.export` does.
        """


_LOOKED_AT_CHARACTERS = 64 * 1024
_SHORTEST_KEY = 6


def quote(text: str, hidden: object = None, most: int = Bounds.TEXT_CHARACTERS) -> str:
    """Return what somebody else says in a form that can be shown: one short line without control characters or keys.

    Args:
        text: What is said, by a backend or a library.
        hidden: What must not be shown: texts, secrets, and mappings and lists of these. Of a text with spaces in it,
            such as `Bearer …`, no word is shown either. A text of a few characters is no key.
        most: The most characters of the line.
    """
    words = "".join(character if character.isprintable() else " " for character in text[:_LOOKED_AT_CHARACTERS]).split()
    if len(text) > _LOOKED_AT_CHARACTERS:
        # It may be the beginning of a key.
        words = words[:-1]
    line = " ".join(words)
    keys = {key for part in _texts(hidden) for key in (part, *part.split()) if len(key) >= _SHORTEST_KEY}
    # The longest first: one may be a part of another.
    for key in sorted(keys, key=len, reverse=True):
        line = line.replace(key, "***")
    return line if len(line) <= most else line[: most - 1] + "…"


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, SecretStr):
        yield value.get_secret_value()
    elif isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
