"""The lock of a process's folder, which dies with the process.

`flock` locks an open file, and the system releases it when the last descriptor of that open file is closed, however the
process ends. Three facts follow, and this module relies on each:

- A process that gets the lock of a folder knows that the folder's process is dead. It need not compare process ids, or
  guess from the age of a file.
- A forked process inherits the descriptors, so it closes them at once: otherwise the lock would outlive the parent
  (test_spool.py::test_a_forked_process_does_not_keep_its_parent_s_lock).
- A program may close all descriptors and open files of its own under the same numbers. So a lock remembers the
  identity of its file, and does not close a descriptor that belongs to another file
  (test_spool_taken_away.py::test_a_program_that_closes_all_descriptors_and_opens_files_of_its_own).

Two files are locked: `owner.lock` in the folder, and the folder itself where the file system can do that (NFS cannot).
The lock of the folder counts where somebody has deleted `owner.lock`.

A third file, `delivery.lock`, is in the folders of processes that let an agent deliver. The holder of its lock, the
process itself or an agent, delivers the folder's events while the process writes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from composite_logstore.spool.private_folder import PrivateFolder, identity_of

LOCK = "owner.lock"
DELIVERY_LOCK = "delivery.lock"
NEW_DELIVERY_LOCK = "delivery.lock.new"
AGENT = "agent"
"""The folder, beside those of the log stores, whose `owner.lock` the machine's agent holds."""
_POLL_SECONDS = 0.01
# Descriptor → the identity of the file that it had when it was locked.
_held: dict[int, tuple[int, int]] = {}


def lock_file(descriptor: int) -> bool:
    """Lock an open file until it is closed.

    Returns:
        Whether it is locked now; False if another process holds the lock.

    Raises:
        OSError: The file system cannot lock it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(folder: PrivateFolder, name: str, seconds: float) -> Iterator[int]:
    """Hold the lock of a file for a while, against other threads and processes. The file is made if it is missing.

    Args:
        folder: The folder of the file.
        name: The name of the file.
        seconds: How long to wait for the lock, about.

    Yields:
        The file's descriptor, for reading and writing.

    Raises:
        BlockingIOError: Another process or thread holds the lock for longer.
        OSError: The file cannot be made, opened or locked.
    """
    for _ in range(1 + int(seconds / _POLL_SECONDS)):
        descriptor = _opened_lock(folder, name)
        try:
            # The file may have been exchanged before it was locked.
            if lock_file(descriptor):
                if folder.has(name, identity_of(os.fstat(descriptor))):
                    yield descriptor
                    return
            else:
                time.sleep(_POLL_SECONDS)
        finally:
            # A process that was forked meanwhile has a copy of the descriptor, and closing this one would not do.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
    raise BlockingIOError(errno.EAGAIN, "another process holds its lock", str(folder.path / name))


def _opened_lock(folder: PrivateFolder, name: str) -> int:
    try:
        return folder.create_file(name)
    except FileExistsError:
        return folder.open_file(name, os.O_RDWR)


def hold(descriptor: int) -> None:
    """Have a file closed in forked processes, whose copies would keep it locked, and by `release_all`.

    Call this before the file is locked: another thread may fork at any moment.
    """
    _held[descriptor] = identity_of(os.fstat(descriptor))


def let_go(descriptor: int) -> None:
    """Close a file that `hold` was called for, unless the descriptor belongs to another file by now."""
    identity = _held.pop(descriptor, None)
    with contextlib.suppress(OSError):
        if identity is not None and identity_of(os.fstat(descriptor)) == identity:
            os.close(descriptor)


def release_all() -> None:
    """Release all locks of this process, as its end does."""
    for descriptor in list(_held):
        let_go(descriptor)


os.register_at_fork(after_in_child=release_all)


def _unlock(descriptor: int) -> None:
    """Release a lock of this process, also if a process that was just forked still has a copy of the descriptor."""
    with contextlib.suppress(OSError):
        if _held.get(descriptor) == identity_of(os.fstat(descriptor)):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    let_go(descriptor)


def _is_in(folder: PrivateFolder, name: str, descriptor: int) -> bool:
    identity = _held.get(descriptor)
    try:
        return identity is not None and folder.has(name, identity) and identity_of(os.fstat(descriptor)) == identity
    except OSError:
        return False


class FolderLock:
    """A folder's lock, held by this process.

    Attributes:
        file: The descriptor that holds the lock of `owner.lock`.
        guard: The descriptor that holds the lock of the folder itself, None if the folder could not be locked.
    """

    def __init__(self, file: int, guard: int | None) -> None:
        """Use `acquire`."""
        self.file = file
        self.guard = guard

    @classmethod
    def acquire(cls, folder: PrivateFolder, is_own: bool = False) -> FolderLock | None:
        """Lock a folder.

        Args:
            folder: The folder.
            is_own: Whether the folder is this process's own, so that a missing `owner.lock` is made.

        Returns:
            None if another process holds the lock.

        Raises:
            OSError: The folder cannot be locked.
        """
        file = None
        guard = os.dup(folder.fd)
        hold(guard)
        kept: tuple[int, ...] = ()
        try:
            try:
                is_guarded: bool | None = lock_file(guard)
            except OSError:
                # NFS locks only what is open for writing.
                is_guarded = None
            file = _opened(folder, is_own, is_guarded)
            if file is None:
                return None
            hold(file)
            # The file may have been exchanged before it was locked.
            if not lock_file(file) or not folder.has(LOCK, identity_of(os.fstat(file))):
                return None
            kept = (file, guard) if is_guarded else (file,)
            return cls(file, guard if is_guarded else None)
        except FileExistsError:
            return None
        finally:
            for descriptor in (file, guard):
                if descriptor is not None and descriptor not in kept:
                    let_go(descriptor)

    def release(self) -> None:
        """Release the lock. Call this once: afterwards its descriptors may belong to another lock."""
        for descriptor in self._descriptors():
            _unlock(descriptor)

    def is_in(self, folder: PrivateFolder) -> bool:
        """Say whether this is still the folder's lock: its file is in place, and the descriptor still belongs to it."""
        return _is_in(folder, LOCK, self.file)

    def has_renewed(self, folder: PrivateFolder) -> bool:
        """Lock a folder again whose `owner.lock` was taken away.

        Returns:
            Whether the folder is locked; False if another process was quicker, and so has taken it over.
        """
        new = FolderLock.acquire(folder, is_own=True)
        if new is None:
            return False
        lost = set(self._descriptors())
        self.file, self.guard = new.file, new.guard if new.guard is not None else self.guard
        for descriptor in lost - set(self._descriptors()):
            let_go(descriptor)
        return True

    def restore_rights(self, path: Path) -> None:
        """Give the user alone all rights in the folder, and others none.

        Args:
            path: The folder, which `guard` is another name of.

        Raises:
            OSError: That is not possible.
        """
        if self.guard is not None and self.guard in _held:
            os.fchmod(self.guard, 0o700)
        else:
            os.chmod(path, 0o700)

    def _descriptors(self) -> Iterator[int]:
        yield self.file
        if self.guard is not None:
            yield self.guard


def _opened(folder: PrivateFolder, is_own: bool, is_guarded: bool | None) -> int | None:
    """Open `owner.lock`. Make a missing one again if the folder itself is locked, or is this process's own.

    Args:
        folder: The folder.
        is_own: Whether it is this process's own.
        is_guarded: Whether this process has locked the folder itself, None if the file system cannot do that.

    Returns:
        The descriptor, None if another process has locked the folder itself.
    """
    try:
        return folder.open_file(LOCK, os.O_RDWR)
    except (FileNotFoundError, PermissionError):
        if not is_own and is_guarded is None:
            raise
        if not is_own and not is_guarded:
            return None
    if folder.status(LOCK) is not None:
        # Not a file that a spool makes. It is renamed now, and set aside later.
        folder.rename(LOCK, f"{LOCK}-{secrets.token_hex(4)}")
    return folder.create_file(LOCK)


class DeliveryLock:
    """The lock of a folder's delivery, held by this process."""

    def __init__(self, file: int) -> None:
        """Use `create` or `acquire`."""
        self._file = file

    @classmethod
    def create(cls, folder: PrivateFolder) -> DeliveryLock:
        """Make the file, in place of anything that has its name. It gets the name once it is locked.

        Raises:
            OSError: It cannot be made or locked.
        """
        folder.make_way(NEW_DELIVERY_LOCK)
        file = folder.create_file(NEW_DELIVERY_LOCK)
        hold(file)
        try:
            if not lock_file(file):
                raise OSError(errno.EAGAIN, "another process holds its lock", str(folder.path / NEW_DELIVERY_LOCK))
            folder.put(NEW_DELIVERY_LOCK, DELIVERY_LOCK)
        except BaseException:
            let_go(file)
            raise
        return cls(file)

    @classmethod
    def acquire(cls, folder: PrivateFolder) -> DeliveryLock | None:
        """Lock the file of a folder.

        Returns:
            None if another process holds the lock.

        Raises:
            FileNotFoundError: The folder has no such file: its process does not let others deliver.
            OSError: The file cannot be locked, or is not to be trusted.
        """
        file = folder.open_file(DELIVERY_LOCK, os.O_RDWR)
        hold(file)
        lock = None
        try:
            # The file may have been exchanged before it was locked.
            if lock_file(file) and folder.has(DELIVERY_LOCK, identity_of(os.fstat(file))):
                lock = cls(file)
            return lock
        finally:
            if lock is None:
                let_go(file)

    def is_in(self, folder: PrivateFolder) -> bool:
        """Say whether this is still the folder's lock: its file is in place, and the descriptor still belongs to it."""
        return _is_in(folder, DELIVERY_LOCK, self._file)

    def release(self) -> None:
        """Release the lock. Call this once: afterwards its descriptor may belong to another lock."""
        _unlock(self._file)


def is_alive(folder: Path) -> bool:
    """Say whether the process that a folder belongs to is alive.

    Raises:
        OSError: The lock cannot be opened, or is not to be trusted.
    """
    with PrivateFolder.open(folder.parent) as home, home.open_folder(folder.name) as opened:
        lock = FolderLock.acquire(opened)
    if lock is not None:
        lock.release()
    return lock is None


def agent_works(root: Path) -> bool:
    """Say whether an agent works: it holds the lock of its folder. Never raises.

    Args:
        root: The folder that has a folder for each log store.
    """
    file = None
    try:
        with PrivateFolder.open(root / AGENT) as folder:
            file = folder.open_file(LOCK, os.O_RDONLY)
        # A shared lock, so that no process that looks takes another one that looks for the agent.
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # A process that was forked meanwhile has a copy of the descriptor, and would keep every agent away.
        fcntl.flock(file, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        if file is not None:
            os.close(file)
    return False


class Watch:
    """Notices that the process of a folder has died: its lock is free.

    The file stays open, so that each look is one or two calls of the system. A look holds the lock for that moment,
    and does not prove that the folder can be taken over: the file may have been exchanged.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder's lock.

        Raises:
            OSError: It cannot be opened, or is not to be trusted.
        """
        with PrivateFolder.open(folder.parent) as home, home.open_folder(folder.name) as opened:
            self._file = opened.open_file(LOCK, os.O_RDWR)

    def has_died(self) -> bool:
        """Say whether no process holds the lock now.

        Raises:
            OSError: The file system cannot tell now.
        """
        if not lock_file(self._file):
            return False
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return True

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def made_at(home: PrivateFolder, name: str, status: os.stat_result) -> float:
    """Return when a folder was made, in seconds since the epoch: the time of its `owner.lock`, or its own without one.

    Args:
        home: The folder that it is in.
        name: Its name.
        status: What the system knows of it.
    """
    with contextlib.suppress(OSError):
        return os.stat(f"{name}/{LOCK}", dir_fd=home.fd, follow_symlinks=False).st_mtime
    return status.st_mtime
