"""How each living process says its children are: one small file for each process, beside the folders of the spool.

    <log store's folder>/status/<writer>        one line with a checksum, as `format` describes it

The process writes the line again and again, in place and in one call of the system, and holds the lock of the file
(`flock`) until its end, however it ends. So an unlocked file belongs to a dead process. A reader that
comes in the middle of a write finds a wrong checksum, and reads again.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from composite_logstore.event import WRITER
from composite_logstore.spool.format import decode_line, encode_line
from composite_logstore.spool.lock import hold, let_go, lock_file
from composite_logstore.spool.private_folder import PrivateFolder, identity_of

_FOLDER = "status"
_MOST_BYTES = 1 << 20
_MOST_FILES = 1_000
_KEPT_SECONDS = 86_400.0
"""How long the file of a dead process is kept."""
_ATTEMPTS = 5


class StatusFile:
    """The file of this process's writer."""

    def __init__(self, component: Path, writer: str) -> None:
        """Make no file yet.

        Args:
            component: The folder of the log store.
            writer: The writer's name.
        """
        self._folder = component / _FOLDER
        self._writer = writer
        self._file: int | None = None
        self._identity = (0, 0)
        self._is_removed = False

    def write(self, status: dict[str, Any]) -> None:
        """Write the process's status, in place of the last one. Does nothing once the file was removed.

        Raises:
            OSError: It cannot be written now.
        """
        if self._is_removed:
            return
        line = encode_line(orjson.dumps(status))
        if len(line) > _MOST_BYTES:
            return
        with PrivateFolder.make(self._folder) as folder:
            if self._file is None or not self._is_ours(folder):
                self._open(folder)
            if self._file is not None:
                os.pwrite(self._file, line, 0)

    def _is_ours(self, folder: PrivateFolder) -> bool:
        """Return whether the file is in place, and the descriptor still belongs to it: a program may close all."""
        try:
            is_open = self._file is not None and identity_of(os.fstat(self._file)) == self._identity
        except OSError:
            is_open = False
        if is_open and folder.has(self._writer, self._identity):
            return True
        if is_open and self._file is not None:
            let_go(self._file)
        self._file = None
        return False

    def _open(self, folder: PrivateFolder) -> None:
        _forget_the_dead(folder)
        folder.make_way(self._writer)
        file = folder.create_file(self._writer)
        hold(file)
        if not lock_file(file):
            # A reader looks whether it is locked. The next attempt makes another one.
            let_go(file)
            return
        self._file, self._identity = file, identity_of(os.fstat(file))

    def remove(self) -> None:
        """Remove the file for good, at the end of its process."""
        self._is_removed = True
        with contextlib.suppress(OSError), PrivateFolder.open(self._folder) as folder:
            if self._file is not None and self._is_ours(folder):
                folder.unlink(self._writer)
                let_go(self._file)
        self._file = None
        with contextlib.suppress(OSError):
            # Unless others have files there.
            os.rmdir(self._folder)


class Said(NamedTuple):
    """The file of one process.

    Attributes:
        writer: The process's writer.
        is_alive: Whether the process is alive.
        status: What it said last, None if that cannot be read. Nothing in it is checked.
    """

    writer: str
    is_alive: bool
    status: Any


def read_statuses(component: Path) -> list[Said]:
    """Return what the processes of a log store said last, dead or alive.

    Args:
        component: The folder of the log store.

    Raises:
        OSError: The folder cannot be read, or is not to be trusted.
    """
    try:
        folder = PrivateFolder.open(component / _FOLDER)
    except FileNotFoundError:
        return []
    with folder:
        return [Said(name, *said) for name in _names(folder) if (said := _read(folder, name)) is not None]


def _names(folder: PrivateFolder) -> list[str]:
    return [name for name in folder.names() if WRITER.fullmatch(name)][:_MOST_FILES]


def _read(folder: PrivateFolder, name: str) -> tuple[bool, Any] | None:
    """Return whether the owner of a file is alive, and what the file says; None if it is gone, or still empty."""
    try:
        file = folder.open_file(name, os.O_RDWR)
    except OSError:
        return None
    try:
        for _ in range(_ATTEMPTS):
            data = os.pread(file, _MOST_BYTES, 0)
            line, _, _ = data.partition(b"\n")
            status = decode_line(line + b"\n")
            if status is not None:
                break
        return (not lock_file(file), status) if data else None
    except OSError:
        return None
    finally:
        # This unlocks it, too.
        os.close(file)


def _forget_the_dead(folder: PrivateFolder) -> None:
    """Remove the files of processes that died a day ago, and more if there are too many."""
    found = sorted(_changed(folder))
    surplus = len(found) - _MOST_FILES // 2
    for place, (changed, name) in enumerate(found):
        if place < surplus or time.time() - changed > _KEPT_SECONDS:
            said = _read(folder, name)
            if said is None or not said[0]:
                with contextlib.suppress(OSError):
                    folder.unlink(name)


def _changed(folder: PrivateFolder) -> Iterator[tuple[float, str]]:
    for name in folder.names():
        status = folder.status(name)
        if status is not None and WRITER.fullmatch(name):
            yield status.st_mtime, name
