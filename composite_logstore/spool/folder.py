"""The folder of one process: made, looked after, recovered, removed. The package's head explains its states."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from itertools import zip_longest
from math import inf
from pathlib import Path

from composite_logstore.event import WRITER, LogEvent
from composite_logstore.spool.account import ACCOUNT, NEW_ACCOUNT, ChildAccount, read_account, write_account
from composite_logstore.spool.damage import Damage, set_aside
from composite_logstore.spool.format import DUE, POSITION, Process, position_name, positions_in_header
from composite_logstore.spool.lock import DELIVERY_LOCK, LOCK, NEW_DELIVERY_LOCK, DeliveryLock, FolderLock, made_at
from composite_logstore.spool.mapped import NEW
from composite_logstore.spool.positions import Positions, read_position
from composite_logstore.spool.private_folder import (
    CLOCK_STEP_SECONDS,
    KnownFolder,
    PrivateFolder,
    has_unsafe_rights,
    identity_of,
)
from composite_logstore.spool.reader import GrowingReader, SegmentReader
from composite_logstore.spool.segments import SEGMENT, SPARE, Segment, Segments
from composite_logstore.spool.streams import Streams

_PROCESS = re.compile(rf"{WRITER.pattern}(-[0-9]{{1,6}})?")
_NO_EVENTS = (LOCK, DELIVERY_LOCK, NEW_DELIVERY_LOCK, ACCOUNT, NEW_ACCOUNT, DUE, SPARE, NEW)
_HIDDEN = ".hidden-"
_ABANDONED_SECONDS = 3600.0
_HEADER_BYTES = 1 << 20


class Standing(Enum):
    """What has become of a living process's folder."""

    IN_PLACE = "nothing was made or removed there since the last look"
    CHANGED = "something was made or removed there"
    GONE = "nothing is at its path, or another folder"


class Spool:
    """A process's folder: its lock, the children's positions and its segments.

    The journal's lock guards every call, except those that say that they need no lock, and all of `reader`.

    Attributes:
        folder: The path of the folder.
        lock: Its lock; None if another process may hold it.
        delivery_lock: The lock of its delivery; None if another process may hold it, or the folder has none.
        segments: The files of events, and writing to them.
        reader: Reading them.
    """

    def __init__(
        self, folder: KnownFolder, lock: FolderLock | None, children: Iterable[str], found: Iterable[Segment] = ()
    ) -> None:
        """Use `create`, `recover` or `look`.

        Args:
            folder: The folder.
            lock: Its lock, None if another process may hold it.
            children: The names of the children that have a position.
            found: The segments that were found in the folder.
        """
        self.folder = folder.path
        self.lock = lock
        self.delivery_lock: DeliveryLock | None = None
        # Whether an agent may deliver this process's events.
        self._is_shared = False
        self._known = folder
        self._positions = Positions(folder, children)
        streams = Streams()
        self.segments = Segments(folder, self._positions, streams, found)
        self.reader = SegmentReader(folder, self.segments, streams)
        # The time and the mode of the folder when all its files were in place.
        self._seen: tuple[int, int] | None = None

    @classmethod
    def create(
        cls,
        component: Path,
        writer: str,
        children: Iterable[str],
        is_shared: bool = False,
        process: Process | None = None,
    ) -> Spool:
        """Make a folder for this process.

        Args:
            component: The folder of the log store.
            writer: The writer's name.
            children: The names of its children.
            is_shared: Whether an agent may deliver its events. This process holds the lock of the delivery at first.
            process: This process, as its segments name it. If they do not, no one can tell later how it has ended.

        Raises:
            OSError: The folder cannot be written or locked.
        """
        with PrivateFolder.make(component) as home:
            # It gets its name once it is locked. Otherwise another process might recover it.
            hidden = f"{_HIDDEN}{writer}-{secrets.token_hex(4)}"
            try:
                with home.make_folder(hidden) as folder:
                    spool = cls._created(home, folder, writer, children, is_shared)
                    spool.segments.process = process
                    return spool
            except BaseException:
                home.remove(hidden)
                raise

    @classmethod
    def _created(
        cls, home: PrivateFolder, folder: PrivateFolder, writer: str, children: Iterable[str], is_shared: bool
    ) -> Spool:
        # If the name is taken, that folder was this process's, and was moved or replaced.
        known = KnownFolder(home.path / home.free_name(writer), folder.identity)
        lock = FolderLock.acquire(folder, is_own=True)
        if lock is None:
            raise OSError("another process holds its lock")
        spool = cls(known, lock, children)
        try:
            spool._positions.create(folder, with_due=is_shared)
            spool._is_shared = is_shared
            if is_shared:
                spool.delivery_lock = DeliveryLock.create(folder)
            # Folders are recovered in the order of these times. The system's own may be milliseconds apart.
            now = time.time_ns()
            os.utime(lock.file, ns=(now, now))
            home.rename(folder.path.name, spool.folder.name)
        except BaseException:
            spool.abandon()
            raise
        return spool

    @classmethod
    def recover(cls, folder: Path) -> Spool | None:
        """Take over the folder of a dead process.

        Returns:
            None if the process is alive, or another one delivers the folder's events or has removed it.

        Raises:
            OSError: The folder cannot be read, or is not to be trusted.
        """
        with PrivateFolder.open(folder.parent) as home:
            try:
                with home.open_folder(folder.name) as opened:
                    return cls._recovered(home, opened)
            except OSError:
                if home.status(folder.name) is not None:
                    raise
                return None

    @classmethod
    def _recovered(cls, home: PrivateFolder, folder: PrivateFolder) -> Spool | None:
        lock = FolderLock.acquire(folder)
        if lock is None:
            return None
        spool = None
        try:
            is_free, delivery_lock = _free_for_delivery(folder)
            # It may have been removed between being opened and being locked.
            if is_free and home.has(folder.path.name, folder.identity):
                spool = cls._found(folder, lock)
                spool.delivery_lock = delivery_lock
            elif delivery_lock is not None:
                delivery_lock.release()
        finally:
            if spool is None:
                lock.release()
        return spool

    @classmethod
    def tail(cls, folder: Path) -> Spool | None:
        """Take over the delivery of a living process's events. Its positions and its account are written from here.

        Returns:
            None if the process itself or another one delivers them.

        Raises:
            FileNotFoundError: The folder is gone, or its process does not let others deliver.
            OSError: The folder cannot be read, or is not to be trusted.
        """
        with PrivateFolder.open(folder.parent) as home, home.open_folder(folder.name) as opened:
            lock = DeliveryLock.acquire(opened)
            if lock is None:
                return None
            try:
                spool = cls._found(opened, None)
            except BaseException:
                lock.release()
                raise
            spool.delivery_lock = lock
            return spool

    def growing(self, first: int) -> GrowingReader:
        """Return what reads the folder while its process writes, from about the event with number `first` on."""
        return GrowingReader(self.reader, self._known, first)

    @property
    def delivers(self) -> bool:
        """Whether this process still holds the lock of the delivery: its file may have been removed.

        Raises:
            OSError: The folder is gone.
        """
        with self._known.open() as folder:
            return self.delivery_lock is not None and self.delivery_lock.is_in(folder)

    def inherit(self) -> bool:
        """Take over the folder whose events are delivered from here, if its process has died.

        Returns:
            Whether it has: the folder is now one that was recovered.

        Raises:
            OSError: The folder is gone, or cannot be locked.
        """
        with self._known.open() as folder:
            self.lock = FolderLock.acquire(folder)
        return self.lock is not None

    @classmethod
    def look(cls, folder: Path) -> Spool:
        """Return a folder for reading only, whether its process is dead or alive.

        Raises:
            OSError: The folder cannot be read, or is not to be trusted.
        """
        with PrivateFolder.open(folder.parent) as home, home.open_folder(folder.name) as opened:
            return cls._found(opened, None)

    @classmethod
    def _found(cls, folder: PrivateFolder, lock: FolderLock | None) -> Spool:
        names = [name for name in folder.names() if name not in _NO_EVENTS]
        files = [name for name in names if SEGMENT.fullmatch(name)]
        positions = {name for name in names if POSITION.fullmatch(name)}
        # Only a process that recovers the folder has to know whose positions are missing.
        noted = set(_noted_positions(folder, files)) if lock is not None else set()
        children = [name.removesuffix(position_name("")) for name in positions | noted]
        segments = [
            Segment(folder.path / name, int(Path(name).stem), int(Path(successor).stem) if successor else inf)
            for name, successor in zip_longest(files, files[1:])
        ]
        spool = cls(KnownFolder(folder.path, folder.identity), lock, children, segments)
        damage = spool.reader.damage
        for child in spool.children:
            name = position_name(child)
            if read_position(folder, child) is None:
                why = "damaged" if name in positions else "missing"
                damage.append(Damage(folder.path / name, 0, 0, f"{why}, so all events are delivered again"))
                if lock is not None:
                    spool.reset(child)
        for name in sorted(set(names) - set(files) - positions):
            damage.append(Damage(folder.path / name, 0, None, "it is not a file of a spool"))
        return spool

    # How far the children are

    @property
    def children(self) -> list[str]:
        """The names of the children that have a position."""
        return self._positions.children

    def acknowledged(self, child: str) -> int:
        """Return the number below which the child has acknowledged all events.

        Raises:
            OSError: That cannot be known now.
        """
        return self._positions.of(child)

    def acknowledge(self, child: str, before: float) -> None:
        """Note that the child has acknowledged all events below a number, and free what no child needs.

        The files of freed segments are removed by `segments.tidy`. Those of a living process are its own to free.

        Args:
            child: The name of the child.
            before: The number.

        Raises:
            OSError: The folder is gone, or the position cannot be written.
        """
        if self._positions.write(child, int(before)) and self.lock is not None:
            self._free()

    def _free(self) -> None:
        if self.segments.oldest() is not None:
            self.segments.free(min(map(self.acknowledged, self.children), default=inf))

    def reset(self, child: str) -> None:
        """Have the child get all events that are still there. A child without a position gets one.

        Raises:
            OSError: The position cannot be written.
        """
        self._positions.reset(child)

    # Delivery by an agent

    @property
    def due(self) -> int:
        """The number below which its process wants all events delivered without waiting for fuller batches.

        Raises:
            OSError: That cannot be known now.
        """
        return self._positions.due

    def demand(self, before: int) -> None:
        """Have an agent deliver all events below a number without waiting for fuller batches."""
        self._positions.demand(before)

    def account(self) -> dict[str, ChildAccount]:
        """Return what agents have done for each child; nothing if that is not known, damaged or not to be trusted.

        Raises:
            OSError: The account cannot be read now.
        """
        with self._known.open() as folder:
            return read_account(folder)

    def write_account(self, account: dict[str, ChildAccount]) -> None:
        """Replace the account, in one step. Only the holder of `delivery_lock` does so.

        Raises:
            OSError: It cannot be written now.
        """
        with self._known.open() as folder:
            write_account(folder, account)

    @property
    def delivers_here(self) -> bool:
        """Whether this process alone delivers the events, and writes the positions and the account."""
        return self.delivery_lock is not None or not self._is_shared

    def take_delivery(self) -> bool:
        """Lock the delivery of this process's own events, unless this process has done so.

        Returns:
            Whether it is locked; False if an agent holds the lock.

        Raises:
            OSError: It cannot be locked now.
        """
        if self.delivery_lock is None:
            with self._known.open() as folder:
                self.delivery_lock = DeliveryLock.acquire(folder)
        return self.delivery_lock is not None

    def give_delivery(self) -> None:
        """Release the lock of the delivery."""
        lock, self.delivery_lock = self.delivery_lock, None
        if lock is not None:
            lock.release()

    # The end

    def close(self) -> None:
        """Release the folder: remove it if all children have acknowledged all, else leave it to the next process.

        An agent that delivers a living process's events removes the folder itself, once the process is dead.
        """
        with contextlib.suppress(OSError):
            last = self.segments.last
            if self.delivers_here and all(self.acknowledged(child) > last for child in self.children):
                self._remove()
        self.abandon()

    def _remove(self) -> None:
        with PrivateFolder.open(self.folder.parent) as home:
            if home.has(self.folder.name, self._known.identity):
                # Renamed first, since removing takes several steps, and a process must not recover half of it.
                hidden = f"{_HIDDEN}{self.folder.name}-{secrets.token_hex(4)}"
                home.rename(self.folder.name, hidden)
                home.remove(hidden)

    def abandon(self) -> None:
        """Release the folder as it is."""
        self.segments.close()
        self._positions.close()
        self.give_delivery()
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def set_aside(self) -> list[tuple[Damage, Path]]:
        """Move damaged pieces out of the folder.

        Returns:
            Each of them, and the file that keeps it: its own one if it could not be moved.
        """
        kept = set_aside(self._known, self.reader.damage)
        self.reader.damage = []
        for damage, path in kept:
            if damage.length is None and path != damage.path:
                self.segments.remove(damage.path)
        return kept

    # Restoring

    def standing(self) -> Standing:
        """Return whether the folder is in place, with all files that belong to it. Needs no lock.

        An error of a call says little about the folder, so this compares its identity, time and mode. It looks at the
        files only if these have changed.
        """
        try:
            status = os.stat(self.folder, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return Standing.GONE
        except OSError:
            # Too many open files, for example: that says nothing about the folder.
            return Standing.IN_PLACE
        if identity_of(status) != self._known.identity:
            return Standing.GONE
        if (status.st_mtime_ns, status.st_mode) == self._seen:
            return Standing.IN_PLACE
        if has_unsafe_rights(status):
            return Standing.CHANGED
        with contextlib.suppress(OSError):
            if not self._is_whole():
                return Standing.CHANGED
            if time.time() - status.st_mtime > CLOCK_STEP_SECONDS:
                # Before that, the folder may change again without a change of its time.
                self._seen = status.st_mtime_ns, status.st_mode
        return Standing.IN_PLACE

    def _is_whole(self) -> bool:
        # This process may remove one of these files before it looks. Then `mend`, under the lock, finds nothing to do.
        mapped = [*self._positions.files(), *self.segments.files()]
        names = [segment.path.name for segment in list(self.segments.all)]
        lock = self.lock
        with self._known.open() as folder:
            return (
                all(folder.has(name, identity) for name, identity in mapped)
                and set(folder.names()).issuperset(names)
                and lock is not None
                and lock.is_in(folder)
                and self._has_delivery_lock(folder)
            )

    def _has_delivery_lock(self, folder: PrivateFolder) -> bool:
        if not self._is_shared:
            return True
        lock = self.delivery_lock
        return lock.is_in(folder) if lock is not None else folder.status(DELIVERY_LOCK) is not None

    def mend(self, in_memory: Callable[[int, float], Sequence[LogEvent]]) -> bool:
        """Restore the files of this process's folder that were moved or removed.

        Args:
            in_memory: Returns the events that are in memory, from one number to another.

        Returns:
            Whether the folder still belongs to this process.

        Raises:
            OSError: It cannot be mended now.
        """
        if self.lock is None:
            return False
        if has_unsafe_rights(os.stat(self.folder, follow_symlinks=False)):
            self.lock.restore_rights(self.folder)
        with self._known.open() as folder:
            if not self.lock.is_in(folder) and not self.lock.has_renewed(folder):
                return False
            self._positions.mend(folder)
            self.segments.mend(folder, in_memory)
            if not self._has_delivery_lock(folder):
                self._mend_delivery_lock(folder)
        return True

    def _mend_delivery_lock(self, folder: PrivateFolder) -> None:
        # The lock of a file that was taken away counts no more, so an agent that holds it has to look whether it does.
        lock = DeliveryLock.create(folder)
        if self.delivery_lock is None:
            lock.release()
        else:
            self.give_delivery()
            self.delivery_lock = lock


def _free_for_delivery(folder: PrivateFolder) -> tuple[bool, DeliveryLock | None]:
    """Return whether no process delivers a folder's events, and the lock of the delivery, if the folder has one."""
    try:
        lock = DeliveryLock.acquire(folder)
    except (FileNotFoundError, PermissionError):
        return True, None
    return lock is not None, lock


def process_folders(component: Path) -> list[Path]:
    """Return the folders of a log store's processes, dead or alive, the oldest first.

    A folder whose process died while it made or removed it has no events, and is removed after an hour.

    Args:
        component: The folder of the log store.

    Raises:
        OSError: The log store's folder cannot be read, or is not to be trusted.
    """
    try:
        home = PrivateFolder.open(component)
    except FileNotFoundError:
        return []
    found = []
    with home:
        for name in home.names():
            status = home.status(name)
            if status is None:
                continue
            made = made_at(home, name, status)
            if name.startswith(_HIDDEN) and time.time() - made > _ABANDONED_SECONDS:
                _clear(home, name)
            if _PROCESS.fullmatch(name) and (stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode)):
                found.append((made, component / name))
    return [folder for _, folder in sorted(found)]


def bytes_used(component: Path) -> int:
    """Return how many bytes the folders of a log store's processes have. They may come and go meanwhile.

    Damaged pieces do not count: they cannot give way to newer events.

    Args:
        component: The folder of the log store.

    Raises:
        OSError: That cannot be known now.
    """
    used = 0
    for name in _listed(component):
        if _PROCESS.fullmatch(name):
            folder = component / name
            for file in _listed(folder):
                with contextlib.suppress(OSError):
                    used += os.stat(folder / file, follow_symlinks=False).st_size
    return used


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            # That says nothing about the folder.
            raise
        return []


def _clear(home: PrivateFolder, name: str) -> None:
    with contextlib.suppress(OSError), home.open_folder(name) as folder:
        lock = FolderLock.acquire(folder)
        if lock is not None:
            home.remove(name)
            lock.release()


def _noted_positions(folder: PrivateFolder, segments: Iterable[str]) -> list[str]:
    """Return the names of the files of positions that the first segment with an intact header lists."""
    for name in segments:
        with contextlib.suppress(OSError):
            with os.fdopen(folder.open_file(name, os.O_RDONLY), "rb") as file:
                names = positions_in_header(file.readline(_HEADER_BYTES))
            if names is not None:
                return names
    return []
