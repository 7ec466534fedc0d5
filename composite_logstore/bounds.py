"""All bounds on the answers of backends, in one place."""

from __future__ import annotations

from typing import ClassVar

_MIB = 1024 * 1024


class Bounds:
    """A backend may answer anything, so nothing beyond these bounds is read, or believed.

    Attributes:
        HEAD_BYTES: The most bytes of an HTTP answer before its body, informational responses included.
        EXPORT_BYTES: The most bytes of the body of an answer to an export; over gRPC, of the message.
        PAGE_BYTES: The most bytes of the body of an answer to a search. Parsed, it takes up to 45 times as much memory.
        ENTRIES_BYTES: The most bytes of all entries of one page together. An entry that is larger is a page by itself.
        SEARCH_BYTES: The most bytes of all answers for one page.
        SEARCHES: The most searches for one page.
        SEARCH_SECONDS: The longest time that all searches for one page may take, in seconds.
        OBJECTS: The most objects of one stream that are listed in an artifact store.
        INDEX_BYTES: The most bytes of an archive's index file.
        STORE_SECONDS: The longest time that an artifact store may take for one request of a reader, in seconds.
        GUEST_SECONDS: The longest time that an answer may take if a third-party exporter sets no timeout, in seconds.
        WAIT_SECONDS: The longest pause that a backend can ask for, in seconds: it may recover much earlier.
        TEXT_CHARACTERS: The most characters of a backend's message that are repeated.
    """

    HEAD_BYTES: ClassVar[int] = 64 * 1024
    EXPORT_BYTES: ClassVar[int] = 64 * 1024
    PAGE_BYTES: ClassVar[int] = 4 * _MIB
    ENTRIES_BYTES: ClassVar[int] = 8 * _MIB
    SEARCH_BYTES: ClassVar[int] = 32 * _MIB
    SEARCHES: ClassVar[int] = 100
    SEARCH_SECONDS: ClassVar[float] = 30.0
    OBJECTS: ClassVar[int] = 100_000
    INDEX_BYTES: ClassVar[int] = 64 * _MIB
    STORE_SECONDS: ClassVar[float] = 60.0
    GUEST_SECONDS: ClassVar[float] = 60.0
    WAIT_SECONDS: ClassVar[float] = 3600.0
    TEXT_CHARACTERS: ClassVar[int] = 200
