"""Which streams are open in the process that runs a step, told to the processes that it starts.

Theory of operation
===================

A process that a step starts has to find the step's stream. All that it surely inherits is the environment, so the
step's process sets one variable while a stream is open, and restores it afterwards. It names the log store and the
stream by their ids, which is no secret, and a file, the board.

The environment of a process stays as it was at its start, but a pool may outlive the step that started it. Therefore
the board tells at any time which streams are open: a small file that is replaced as a whole, in a folder that only its
user can change. A process looks at it before each record, which costs one `stat`. On another machine, or once the
step's process is gone, there is no board: then the process stays with the stream that it has.

A process that is forked inherits the stream itself and needs no variable; but its pool may outlive the step, too. It
reads the same board.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import orjson

from composite_logstore.plain import plain_mapping

VARIABLE = "COMPOSITE_LOGSTORE_STREAM"
"""The environment variable that names the stream for the processes that a step starts."""

_BOARD = "streams"
_PREFIX = "composite-logstore-step-"
_MOST_REMOVED = 1_000
_NEW_SECONDS = 60.0
_MOST_BYTES = 1 << 20
# The sources of the streams that a process may join, the most fitting first: ZenML's names for a step's own logs, for
# those of a dynamic pipeline's function, and for those of the process that started the run.
_SOURCES = ("step", "orchestrator", "client")


class OpenStream(NamedTuple):
    """A stream that is open in the process that runs a step.

    Attributes:
        id: The id of ZenML's `LogsResponse`.
        source: Its source.
        artifact_store_id: The artifact store of the active stack, None if unknown.
        store_id: The log store that collects it.
        metadata: Its attributes.
    """

    id: UUID
    source: str
    artifact_store_id: UUID | None
    store_id: UUID
    metadata: dict[str, Any]


def current(streams: Iterable[OpenStream]) -> tuple[OpenStream | None, bool]:
    """Return the stream to which a record without a logging context belongs, and whether several steps are running.

    It is the step's, if one step is running. If none or several are, it is the run's, if there is one.
    """
    by_source: dict[str, list[OpenStream]] = {}
    for stream in streams:
        by_source.setdefault(stream.source, []).append(stream)
    found = next((by_source[source][0] for source in _SOURCES if len(by_source.get(source, ())) == 1), None)
    return found, len(by_source.get("step", ())) > 1


class Reference(NamedTuple):
    """What the variable says.

    Attributes:
        store_id: The log store.
        stream_id: The stream; None if several steps were running and the run has no stream.
        board: The path of the board.
    """

    store_id: UUID
    stream_id: UUID | None
    board: str

    @classmethod
    def parse(cls, text: str) -> Reference | None:
        """Return the reference, None if the text is none."""
        parts = text.split(":", 2)
        with suppress(ValueError):
            if len(parts) == 3:
                return cls(UUID(parts[0]), UUID(parts[1]) if parts[1] else None, parts[2])
        return None

    def __str__(self) -> str:
        return f"{self.store_id}:{self.stream_id or ''}:{self.board}"


class Board:
    """The open streams of another process, as it has written them down."""

    def __init__(self, path: str) -> None:
        """Prepare to read; nothing is opened."""
        self._path = path
        self._version: tuple[int, ...] = ()
        self._streams: list[OpenStream] | None = None

    def streams(self) -> list[OpenStream] | None:
        """Return the open streams, None if nobody can tell any more."""
        try:
            found = os.stat(self._path)
        except (OSError, ValueError):
            return None
        version = found.st_ino, found.st_mtime_ns, found.st_size
        if version != self._version:
            self._streams = _read(self._path) if found.st_uid == os.geteuid() else None
            self._version = version
        return self._streams

    def follow(self, id: UUID, store_id: UUID) -> OpenStream | None:
        """Return the step's stream that takes the place of one that has ended; None if that one is still right.

        A last record that arrives between two steps belongs to the step that has ended.

        Args:
            id: The stream.
            store_id: Its log store, which has to collect the other stream, too.
        """
        streams = self.streams()
        if streams is None or any(stream.id == id for stream in streams):
            return None
        found, _ = current(streams)
        return found if found and found.source == _SOURCES[0] and found.store_id == store_id else None


def _read(path: str) -> list[OpenStream] | None:
    try:
        with open(path, "rb") as file:
            items = orjson.loads(file.read(_MOST_BYTES))
        return [
            OpenStream(
                UUID(item["id"]),
                str(item["source"]),
                UUID(item["artifact_store_id"]) if item["artifact_store_id"] else None,
                UUID(item["store_id"]),
                dict(item["metadata"]),
            )
            for item in items
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _remove_boards_of_dead_processes() -> None:
    """Remove what processes that were killed have left behind. A living one holds a lock on its folder."""
    for path in list(Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"))[:_MOST_REMOVED]:
        with suppress(OSError):
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                found = os.fstat(folder)
                # A folder that was just made is about to be locked.
                if found.st_uid == os.geteuid() and time.time() - found.st_mtime > _NEW_SECONDS:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
            finally:
                os.close(folder)


class OpenStreams:
    """The open streams of this process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._streams: dict[UUID, OpenStream] = {}
        self._folder: str | None = None
        self._lock_held: int | None = None
        # What the variable was before this process set it, and what it was set to.
        self._before: str | None = None
        self._own: str | None = None
        # In a forked process: the streams that were open at the fork, and the parent's board.
        self._inherited: frozenset[UUID] = frozenset()
        self._board: Board | None = None

    def __iter__(self) -> Iterator[OpenStream]:
        with self._lock:
            return iter(list(self._streams.values()))

    def opened(self, stream: OpenStream) -> None:
        """Tell the processes that this one starts that a stream is open. Never raises."""
        with self._lock:
            self._streams[stream.id] = stream
            self._tell()

    def closed(self, id: UUID) -> None:
        """Tell that a stream has ended. Never raises."""
        with self._lock:
            if self._streams.pop(id, None) is not None:
                self._tell()

    def visible(self) -> list[OpenStream]:
        """Return the open streams; in a forked process, those of its parent until it has its own."""
        streams = list(self)
        return streams or (self._board.streams() if self._board else None) or []

    def is_told_by_this_process(self) -> bool:
        """Return whether this process itself runs what the variable names."""
        return self._is_own(os.environ.get(VARIABLE))

    def follow(self, id: UUID, store_id: UUID) -> OpenStream | None:
        """Return, in a forked process, what `Board.follow` returns for a stream that was open at the fork."""
        board = self._board
        return board.follow(id, store_id) if board is not None and id in self._inherited else None

    def _tell(self) -> None:
        """Write the board, then set the variable: a process that is started in between finds either on the board."""
        path = ""
        with suppress(Exception):
            path = self._write()
        value = os.environ.get(VARIABLE)
        if not self._is_own(value):
            self._before = value
        if self._streams:
            found, _ = current(self._streams.values())
            store_id = (found or next(iter(self._streams.values()))).store_id
            self._own = str(Reference(store_id, found.id if found else None, path))
            self._set_variable(self._own)
        elif self._is_own(value):
            self._set_variable(self._before)

    def _is_own(self, value: str | None) -> bool:
        """Return whether this process has set the variable, even if an earlier value was restored since."""
        if value is None:
            return False
        return value == self._own or (self._folder is not None and value.endswith(f":{self._folder}/{_BOARD}"))

    @staticmethod
    def _set_variable(value: str | None) -> None:
        if value is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = value

    def _write(self) -> str:
        if self._folder is None:
            _remove_boards_of_dead_processes()
            self._folder = tempfile.mkdtemp(prefix=_PREFIX)
            # Held until this process and those that it has forked have ended.
            with suppress(OSError):
                self._lock_held = os.open(self._folder, os.O_RDONLY)
                fcntl.flock(self._lock_held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif not os.path.isdir(self._folder):
            # Somebody tidies up temporary folders. Others know this one by its name.
            os.mkdir(self._folder, 0o700)
        board = Path(self._folder) / _BOARD
        part = board.with_suffix(".part")
        content = [
            {
                "id": str(stream.id),
                "source": stream.source,
                "artifact_store_id": str(stream.artifact_store_id) if stream.artifact_store_id else None,
                "store_id": str(stream.store_id),
                "metadata": plain_mapping(stream.metadata),
            }
            for stream in self._streams.values()
        ]
        part.write_bytes(orjson.dumps(content))
        part.replace(board)
        return str(board)

    def remove(self) -> None:
        """Remove the board, at the end of the process."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if self._lock_held is not None:
            os.close(self._lock_held)
            self._lock_held = None

    def after_fork_in_child(self) -> None:
        """Begin without own streams: the parent's board tells which ones are open."""
        inherited = frozenset(self._streams) or self._inherited
        board = Board(f"{self._folder}/{_BOARD}") if self._folder else self._board
        self.__init__()  # type: ignore[misc]
        self._inherited, self._board = inherited, board


here = OpenStreams()
"""Those of this process."""

# The exit handlers run in the reverse order: the writers, which are imported later, deliver first.
atexit.register(here.remove)
os.register_at_fork(after_in_child=here.after_fork_in_child)
