"""The ports of a backend, which its exporter and its reader implement, and the ways an export can end.

A backend is a package with a `ChildConfig` (see `child_config.py`), registered in the entry-point group
`composite_logstore.backends`. It imports only the names that `composite_logstore` itself lists.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import SecretStr

from composite_logstore.bounds import Bounds
from composite_logstore.event import HIGHEST
from composite_logstore.secret_forms import SHORTEST, forms

if TYPE_CHECKING:
    from zenml.models import LogsResponse

    from composite_logstore.event import LogEvent, Stream
    from composite_logstore.zenml import LogEntry, LogsEntriesFilter


class ExportError(Exception):
    """An export did not deliver the whole batch. Raise one of its subclasses.

    Users see the message, so it says what is wrong and how to fix it, and contains no secret.
    """


class RetryableError(ExportError):
    """The backend did not take the batch, but may take it later."""

    def __init__(self, message: str, retry_after_seconds: float | None = None, smaller_may_pass: bool = False) -> None:
        """Say what happened.

        Args:
            message: What happened.
            retry_after_seconds: The pause before a retry, in seconds, if the backend asks for one.
            smaller_may_pass: Whether the size of the batch may be the cause: the export timed out, or broke off while
                it sent or waited. Leave it out for causes other than size, such as a refused connection. If the error
                repeats, the batch is split, unless `retry_after_seconds` is given.
        """
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.smaller_may_pass = smaller_may_pass


class RejectedError(ExportError):
    """The backend will never take some of these events, and has taken the others."""

    def __init__(
        self,
        message: str,
        count: int | None = None,
        shortened: int = 0,
        events: Sequence[LogEvent] | None = None,
    ) -> None:
        """Say why.

        Args:
            message: The reason, in a few words: `stats()` counts rejections by reason.
            count: How many events were rejected. Leave it out if the backend rejected the batch as a whole: it is
                then split until the invalid events are alone.
            shortened: How many events of the batch had to be shortened.
            events: Which events of the batch were rejected, if the backend says it; `count` is then their number, and
                need not be given. They are kept, and can be sent again. If a backend says how many events it rejects
                but not which, all events of the batch are kept, as events that it may have taken.
        """
        super().__init__(message)
        self.count = len(events) if count is None and events is not None else count
        self.shortened = shortened
        self.events = events


class TooLargeError(ExportError):
    """The batch has too many events or bytes for one request. It is split and tried again."""


class UnavailableError(ExportError):
    """The backend can take no event until a cause such as a wrong key or a missing bucket is fixed."""


UNENCODABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""The errors that an invalid event may cause while it is encoded. Raise `RejectedError` then: a retry would not help.

Events captured by this package can always be encoded, but one copied from another program's archive may be invalid.
Other errors, such as `MemoryError`, are not the event's fault.
"""


class Exporter(Protocol):
    """The write port: delivers a child's events to its backend. Only one thread uses it.

    It may also have an attribute `schedule_delay_millis`, which replaces the child's setting of that name, in
    milliseconds: for backends that know their best delay only once they are connected. None keeps the setting.
    """

    def export(self, batch: Sequence[LogEvent]) -> int:
        """Deliver the batch, in its order, or raise.

        The exporter does not retry. It should give up before the child's `export_timeout_millis`.

        Args:
            batch: At least one event, all of one writer, in journal order, of one stream or several.

        Returns:
            How many of the events had to be shortened.

        Raises:
            RetryableError: The backend may take the same batch later.
            RejectedError: The backend will never take some events, or the batch as a whole.
            TooLargeError: The batch has to be split.
            UnavailableError: The backend can take no event until a cause is fixed.
        """

    def end_stream(self, stream: Stream) -> None:
        """Learn that the stream has ended, and that all its events have been exported or given up."""

    def close(self) -> None:
        """Release connections and files. The last call, made once."""


_LONGEST_WRITER = 64


class Event(NamedTuple):
    """The identity of an entry, by which duplicates are dropped and order is restored."""

    writer: str
    sequence: int

    @classmethod
    def of(cls, writer: Any, sequence: Any) -> Event | None:
        """Return the identity of a record from its attributes, None if no writer can have written them.

        Args:
            writer: The value of `zenml.log.writer`, of any type. This package's writers have 15 hexadecimal digits.
            sequence: The value of `zenml.log.sequence`, of any type.
        """
        if type(writer) is str and type(sequence) is int and 0 <= sequence <= HIGHEST:
            return cls(writer, sequence) if 0 < len(writer) <= _LONGEST_WRITER and writer.isascii() else None
        return None


class ReadEntry(NamedTuple):
    """One entry of a page.

    Attributes:
        entry: The entry that ZenML shows. Its `id` is the event's `log.record.uid`.
        event: The entry's identity, made by `Event.of`. None if another program wrote it.
    """

    entry: LogEntry
    event: Event | None

    @property
    def size(self) -> int:
        """How many bytes its message takes, with about those of the names around it."""
        entry = self.entry
        message = entry.message
        names = len(entry.name or "") + len(entry.filename or "") + len(entry.module or "")
        return names + (len(message) if message.isascii() else len(message.encode("utf-8", "replace")))


def checked_entry(read: ReadEntry) -> ReadEntry:
    """Return an entry as a reader should: without its event's identity if no event can have it."""
    return read if read.event is None else ReadEntry(read.entry, Event.of(*read.event))


@dataclass(frozen=True)
class PageRequest:
    """A page to read.

    Attributes:
        logs: The stream, as ZenML knows it.
        direction: `newer` reads from the oldest entry towards the newest, `older` the other way.
        token: The reader's own token for where the previous page in this direction ended. None begins at the oldest
            entry (`newer`) or at the newest (`older`).
        limit: The most entries to return.
        filter: Which entries to return. A reader that cannot apply the filter raises `ValueError`.
        most_bytes: The most bytes of all entries together, None for any number. An entry that is larger is a page by
            itself.
    """

    logs: LogsResponse
    direction: Literal["newer", "older"]
    token: str | None
    limit: int
    filter: LogsEntriesFilter
    most_bytes: int | None = None

    def is_too_large(self, size: int) -> bool:
        """Return whether so many bytes are too many for the page."""
        return self.most_bytes is not None and size > self.most_bytes

    def fitting(self, entries: Sequence[ReadEntry]) -> Sequence[ReadEntry]:
        """Return those entries with which the page is full: `limit` ones, or as many as `most_bytes` allow.

        Args:
            entries: What follows the token in the direction, oldest first.
        """
        is_newer = self.direction == "newer"
        size, number = 0, 0
        for read in islice(entries if is_newer else reversed(entries), self.limit):
            size += read.size
            if self.is_too_large(size) and number:
                break
            number += 1
        return entries[:number] if is_newer else entries[len(entries) - number :]


@dataclass(frozen=True)
class Page:
    """A page that was read.

    Attributes:
        entries: The entries, oldest first in both directions.
        older: The token that continues before the first entry. None if nothing is older, or if the backend cannot
            read in that direction.
        newer: The token that continues after the last entry. None if an empty page is the end, or if the backend
            cannot read in that direction.

    A page may have fewer entries than requested, or none, and still have a token in its direction: a reader searches a
    limited amount of data for each page, and the request bounds its bytes.
    """

    entries: Sequence[ReadEntry] = field(default_factory=list)
    older: str | None = None
    newer: str | None = None


class Reader(Protocol):
    """The read port: answers one page at a time. It runs on ZenML's server, and imports only packages that exist there.

    Attributes:
        max_page_size: The most entries of one page.
        in_order: Whether it yields the entries of one writer in the order of their sequence, except for events that
            were sent twice, and for clocks that were set back.
    """

    max_page_size: int
    in_order: bool

    def read(self, request: PageRequest) -> Page:
        """Read one page.

        Raises:
            ValueError: The token or a filter cannot be used.
            zenml.exceptions.LogStoreUnavailableError: The backend cannot be reached.
            zenml.exceptions.LogStoreRateLimitError: The backend asks for a pause.
            zenml.exceptions.LogStoreError: The backend refused, or its answer is not valid.
            zenml.exceptions.DoesNotExistException: The stream does not exist.
        """

    def close(self) -> None:
        """Release connections, but not objects that ZenML's server shares between requests."""


PAGES = "pages"
"""The scan format of readers whose records can be compared, but only as events."""

BACKFILLED = "zenml.log.backfilled"
"""The attribute of an event that was copied to a child after later events of its writer: it is not a duplicate."""


class Scanned(NamedTuple):
    """Consecutive records of a stream, in columns: one object for each of millions of records would be too slow.

    Attributes:
        writer: The writer that numbered them, empty if another program wrote them.
        sequences: Their sequence numbers, empty if another program wrote them. A `range` is compared and copied
            faster than other sequences.
        times: When they were logged, in nanoseconds since the epoch.
        contents: The records in the backend's own format. Two equal ones have the same content.
        arrived: When the backend got them, in nanoseconds since the epoch, None if unknown.
        token: The reader's own token to continue after them. None if they end within something that it reads as a
            whole.
    """

    writer: str
    sequences: Sequence[int]
    times: Sequence[int]
    contents: Sequence[Any]
    arrived: int | None
    token: str | None


@runtime_checkable
class Scanner(Protocol):
    """Optional for a reader: reads a whole stream fast, with every attribute of each record.

    It may have one more method, `shown_of(content)`, which returns the `shown_fields` of a record's event without
    making the event; or None, if that is not simple.

    Attributes:
        scan_format: The name of the contents' format. Contents with the same format can be compared directly.
    """

    scan_format: ClassVar[str]

    def scan(self, logs: LogsResponse, token: str | None = None) -> Iterator[Scanned]:
        """Read a stream from its oldest record to its newest, duplicates included.

        Args:
            logs: The stream, as ZenML knows it.
            token: The token at which an earlier scan ended. None begins at the oldest record.

        Raises:
            Exception: As `Reader.read` does.
        """

    def event_of(self, content: Any, stream: Stream) -> LogEvent | None:
        """Return a scanned record as an event, None if another program wrote it."""

    def entry_of(self, content: Any) -> LogEntry | None:
        """Return a record of another program as an entry, None if it cannot be one."""


@runtime_checkable
class Copier(Protocol):
    """Optional for an exporter: writes scanned records without decoding them.

    Attributes:
        scan_format: The name of the format that it writes, as in `Scanner`.
    """

    scan_format: ClassVar[str]

    def export_scanned(self, stream: Stream, scanned: Scanned) -> None:
        """Deliver records of one writer, in their order, or raise as `Exporter.export` does.

        Args:
            stream: Their stream.
            scanned: The records, without `times`, `arrived` and `token`.

        Raises:
            Exception: As `Exporter.export` does.
        """


_LOOKED_AT_CHARACTERS = 64 * 1024


def quote(text: str, hidden: object = None, most: int = Bounds.TEXT_CHARACTERS) -> str:
    """Return a text of a backend or a library as one short line without control characters and secrets.

    Args:
        text: The text.
        hidden: Secrets that must not be shown: texts, `SecretStr`, and mappings and lists of these. Each word of a
            secret with spaces, such as `Bearer …`, is hidden, too, and the password in `Basic …`, each in all forms in
            which a server may repeat it. A secret of less than 6 characters is not hidden.
        most: The most characters of the line.
    """
    words = "".join(character if character.isprintable() else " " for character in text[:_LOOKED_AT_CHARACTERS]).split()
    if len(text) > _LOOKED_AT_CHARACTERS:
        # The last word may be the beginning of a key.
        words = words[:-1]
    line = " ".join(words)
    secrets = [revealed(secret) for _, secret in texts_in([hidden])]
    keys = {key for secret in secrets for key in _keys_in(secret) if len(key) >= SHORTEST}
    shown = {form for key in keys for form in forms(key) if len(form) >= SHORTEST}
    # The longest first, since a key may be a part of another.
    for form in sorted(shown, key=len, reverse=True):
        line = line.replace(form, "***")
    return line if len(line) <= most else line[: most - 1] + "…"


def _keys_in(secret: str) -> Iterator[str]:
    """Yield a secret, its words, and what HTTP's basic authentication says with each of them."""
    for word in (secret, *secret.split()):
        yield word
        with suppress(ValueError):
            # https://www.rfc-editor.org/rfc/rfc7617#section-2
            password = b64decode(word, validate=True).decode().partition(":")[2]
            yield password
            yield from password.split()


def revealed(value: str | SecretStr) -> str:
    """Return a text that may be a secret."""
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def texts_in(values: Mapping[str, Any] | Sequence[Any]) -> Iterator[tuple[str, str | SecretStr]]:
    """Yield all texts in settings, each after its place there, such as `headers.Authorization`."""
    for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        if isinstance(value, str | SecretStr):
            yield str(key), value
        elif isinstance(value, Mapping | list | tuple):
            for place, text in texts_in(value):
                yield f"{key}.{place}", text
