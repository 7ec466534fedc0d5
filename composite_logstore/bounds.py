"""The most that an answer of a backend may be, in one place."""

from __future__ import annotations

from typing import ClassVar

_MIB = 1024 * 1024


class Bounds:
    """What goes beyond these is not read, or not believed: a backend may answer anything.

    Attributes:
        HEAD_BYTES: Of an answer over HTTP: all that comes before its body, informational responses and all.
        EXPORT_BYTES: Of the body of an answer to an export, and over gRPC of the message.
        PAGE_BYTES: Of the body of an answer to a search. As objects it takes up to 45 times as much memory.
        SEARCH_BYTES: Of all answers that one page takes.
        SEARCHES: How many searches one page takes.
        SEARCH_SECONDS: How long all searches that one page takes may take.
        OBJECTS: How many objects of one stream an artifact store lists.
        INDEX_BYTES: Of what is known of an archive, in the file beside it.
        STORE_SECONDS: How long an artifact store may take for one request of a reader.
        GUEST_SECONDS: How long an answer may take where code of others sends the request, and sets no time.
        WAIT_SECONDS: How long a backend can ask to be left alone: it may be mended much sooner than it believes.
        TEXT_CHARACTERS: Of what a backend says, where it is repeated.
    """

    HEAD_BYTES: ClassVar[int] = 64 * 1024
    EXPORT_BYTES: ClassVar[int] = 64 * 1024
    PAGE_BYTES: ClassVar[int] = 4 * _MIB
    SEARCH_BYTES: ClassVar[int] = 32 * _MIB
    SEARCHES: ClassVar[int] = 100
    SEARCH_SECONDS: ClassVar[float] = 30.0
    OBJECTS: ClassVar[int] = 100_000
    INDEX_BYTES: ClassVar[int] = 64 * _MIB
    STORE_SECONDS: ClassVar[float] = 60.0
    GUEST_SECONDS: ClassVar[float] = 60.0
    WAIT_SECONDS: ClassVar[float] = 3600.0
    TEXT_CHARACTERS: ClassVar[int] = 200
