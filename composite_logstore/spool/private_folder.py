"""Folders that nobody else may write in, and the files in them, opened so that no link leads elsewhere.

The spool may lie where others can write beside it, as in a `spool_directory` of mode 1777. What is opened here is
therefore looked at once it is open, when nobody can exchange it any more: a folder has to be one's own and writable for
nobody else, a file besides a regular one. Names are looked up in the open folder, so none of its parents can be
exchanged either.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import secrets
import stat
from itertools import count
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A pipe without a writer is opened at once, and then refused.
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class UntrustedError(PermissionError):
    """A folder or a file that somebody else may have written.

    Attributes:
        fix: What mends it.
    """

    def __init__(self, path: Path, why: str, fix: str = "") -> None:
        """Say what is wrong.

        Args:
            path: The folder or file.
            why: What is wrong with it, in words.
            fix: What mends it.
        """
        super().__init__(errno.EPERM, why, str(path))
        self.fix = fix


class PrivateFolder:
    """An open folder. Use it as a context, which closes it.

    Attributes:
        path: Where it was found.
        fd: Its descriptor.
    """

    def __init__(self, path: Path, fd: int) -> None:
        """Use `open` or `make`."""
        self.path = path
        self.fd = fd

    @classmethod
    def open(cls, path: Path) -> PrivateFolder:
        """Open a folder.

        Raises:
            UntrustedError: It is not one's own, or others can write in it.
            OSError: It cannot be opened.
        """
        return cls._checked(path, path, None)

    @classmethod
    def make(cls, path: Path) -> PrivateFolder:
        """Open a folder; make it if there is none, and the folders above that are missing.

        Raises:
            UntrustedError: It is not one's own, or others can write in it.
            OSError: It cannot be made or opened.
        """
        try:
            return cls.open(path)
        except FileNotFoundError:
            missing = path.parent
            above = []
            while not missing.exists():
                above.append(missing)
                missing = missing.parent
            for folder in reversed(above):
                with contextlib.suppress(FileExistsError):
                    os.close(_made(folder, None))
            with contextlib.suppress(FileExistsError):
                os.close(_made(path, None))
            return cls.open(path)

    @classmethod
    def _checked(cls, path: Path, name: str | Path, above: int | None) -> PrivateFolder:
        try:
            fd = os.open(name, _FOLDER, dir_fd=above)
        except OSError as error:
            # What is said of a link, too.
            if error.errno in (errno.ENOTDIR, errno.ELOOP) and path.is_symlink():
                raise UntrustedError(path, "it is a link", _ELSEWHERE) from error
            raise
        try:
            _check_folder(path, fd)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd)

    def __enter__(self) -> PrivateFolder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    @property
    def identity(self) -> tuple[int, int]:
        """What tells it from any other folder, wherever it is moved."""
        return identity_of(os.fstat(self.fd))

    def names(self) -> list[str]:
        """Return the names of what is in it, in order."""
        return sorted(os.listdir(self.fd))

    def status(self, name: str) -> os.stat_result | None:
        """Return what the system knows of something in it, None if there is no such thing."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open_folder(self, name: str) -> PrivateFolder:
        """Open a folder in it.

        Raises:
            UntrustedError: It is not one's own, or others can write in it.
            OSError: It cannot be opened.
        """
        return self._checked(self.path / name, name, self.fd)

    def make_folder(self, name: str) -> PrivateFolder:
        """Make a folder in it.

        Raises:
            OSError: It cannot be made, or there is one.
        """
        return PrivateFolder(self.path / name, _made(name, self.fd))

    def open_file(self, name: str, flags: int) -> int:
        """Open a file in it.

        Args:
            name: Its name.
            flags: What `os.open` takes.

        Returns:
            A descriptor.

        Raises:
            UntrustedError: It is not a regular file of one's own, or others can write it; or it is to be written, and
                has another name besides.
            OSError: It cannot be opened.
        """
        path = self.path / name
        try:
            fd = os.open(name, flags | _FILE, 0o600, dir_fd=self.fd)
        except OSError as error:
            status = self.status(name)
            if status is not None and not stat.S_ISREG(status.st_mode):
                raise UntrustedError(path, _NO_FILE) from error
            raise
        try:
            if flags & os.O_EXCL:
                with contextlib.suppress(OSError):
                    # Whatever the umask says.
                    os.fchmod(fd, 0o600)
            _check_file(path, os.fstat(fd), is_written=(flags & os.O_ACCMODE) != os.O_RDONLY)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def create_file(self, name: str) -> int:
        """Create a file in it, for reading and writing.

        Args:
            name: Its name.

        Returns:
            A descriptor.

        Raises:
            OSError: It cannot be created, or there is something of that name.
        """
        return self.open_file(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def rename(self, name: str, to: str, other: PrivateFolder | None = None) -> None:
        """Rename something in it, and replace what has that name.

        Args:
            name: Its name.
            to: The new name.
            other: The folder to move it to.

        Raises:
            OSError: It cannot be renamed.
        """
        os.rename(name, to, src_dir_fd=self.fd, dst_dir_fd=(other or self).fd)

    def has(self, name: str, identity: tuple[int, int]) -> bool:
        """Say whether something in it has this name and this identity."""
        status = self.status(name)
        return status is not None and identity_of(status) == identity

    def is_folder(self, name: str) -> bool:
        """Say whether something in it is a folder, and no link to one."""
        status = self.status(name)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def free_name(self, name: str) -> str:
        """Return a name, with a number behind it if something has that name."""
        names = (name if number == 1 else f"{name}-{number}" for number in count(1))
        return next(name for name in names if self.status(name) is None)

    def make_way(self, name: str) -> None:
        """Free a name for one of the spool's own files: remove a file, rename a folder.

        Raises:
            OSError: That is not possible.
        """
        if self.is_folder(name):
            # It is not what a spool makes, so the process that recovers the spool sets it aside.
            self.rename(name, f"{name}-{secrets.token_hex(4)}")
        else:
            self.unlink(name)

    def put(self, name: str, to: str) -> None:
        """Give one of the spool's own files its name, in place of anything that has it.

        Raises:
            OSError: That is not possible.
        """
        if self.is_folder(to):
            self.make_way(to)
        self.rename(name, to)

    def unlink(self, name: str) -> None:
        """Remove a file, if it is there.

        Raises:
            OSError: It cannot be removed, or is a folder.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def remove(self, name: str) -> None:
        """Remove a folder with all that is in it, as far as that can be done."""
        status = self.status(name)
        if status is None or not stat.S_ISDIR(status.st_mode):
            # The walk would wait for a pipe.
            return
        with contextlib.suppress(OSError, RecursionError):
            for _, folders, files, fd in os.fwalk(name, topdown=False, dir_fd=self.fd):
                for file in files:
                    with contextlib.suppress(OSError):
                        os.unlink(file, dir_fd=fd)
                for folder in folders:
                    # A link to a folder counts as a folder.
                    for take_away in (os.rmdir, os.unlink):
                        with contextlib.suppress(OSError):
                            take_away(folder, dir_fd=fd)
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=self.fd)


class KnownFolder:
    """A folder that was open before, by its path and by what tells it from another folder at that path.

    Attributes:
        path: Its path.
        identity: Its device, and its number there.
    """

    def __init__(self, path: Path, identity: tuple[int, int]) -> None:
        """Take note of a folder.

        Args:
            path: Its path.
            identity: Its device, and its number there.
        """
        self.path = path
        self.identity = identity

    def open(self) -> PrivateFolder:
        """Open it.

        Raises:
            FileNotFoundError: It is no longer at its path, though another folder may be.
            OSError: It cannot be opened.
        """
        folder = PrivateFolder.open(self.path)
        try:
            if folder.identity != self.identity:
                raise FileNotFoundError(errno.ENOENT, "somebody has taken the folder away", str(self.path))
        except BaseException:
            os.close(folder.fd)
            raise
        return folder


_NO_FILE = "it is not a regular file"
_ELSEWHERE = "set 'spool_directory' to another folder"


def shown(path: str | Path) -> str:
    """Return a path as it can be shown: whoever makes a file gives it any name."""
    return str(path) if str(path).isprintable() else ascii(str(path))[1:-1]


def identity_of(status: os.stat_result) -> tuple[int, int]:
    """Return what tells a file or folder from any other: its device, and its number there."""
    return status.st_dev, status.st_ino


def has_unsafe_rights(status: os.stat_result) -> bool:
    """Say whether others may write in a folder, or its own user may not use it."""
    return bool(status.st_mode & _OTHERS_WRITE) or status.st_mode & stat.S_IRWXU != stat.S_IRWXU


def _made(name: str | Path, above: int | None) -> int:
    """Make a folder that nobody else can use, whatever the umask says, and return its descriptor."""
    os.mkdir(name, 0o700, dir_fd=above)
    try:
        fd = os.open(name, _FOLDER, dir_fd=above)
    except PermissionError:
        # The umask takes even one's own rights.
        os.chmod(name, 0o700, dir_fd=above)
        fd = os.open(name, _FOLDER, dir_fd=above)
    with contextlib.suppress(OSError):
        # Where a file system has no modes of its own, `_check_folder` says what they are.
        os.fchmod(fd, 0o700)
    return fd


def _check_folder(path: Path, fd: int) -> None:
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        denied = os.strerror(errno.EACCES)
        why = f"{denied}; it belongs to user {_user(status.st_uid)}, this process to user {_user(os.geteuid())}"
        raise UntrustedError(path, why, _ELSEWHERE)
    if _is_of_a_volume_s_group(status):
        _take_back(fd)
        status = os.fstat(fd)
    if status.st_mode & _OTHERS_WRITE:
        why = f"others can write in it (mode {stat.S_IMODE(status.st_mode):o})"
        raise UntrustedError(path, why, f"see what is in it and `chmod 700 {path}`, or {_ELSEWHERE}")


def _is_of_a_volume_s_group(status: os.stat_result) -> bool:
    """Say whether a folder has the rights that Kubernetes gives to all of a volume, for `fsGroup`, as it is mounted."""
    mode = status.st_mode
    is_so = mode & stat.S_ISGID and mode & stat.S_IWGRP and not mode & stat.S_IWOTH
    return bool(is_so) and status.st_gid in (os.getegid(), *os.getgroups())


def _take_back(fd: int) -> None:
    """Take from the group what it was given: its members have the volume, but no business with these files."""
    for name in os.listdir(fd):
        with contextlib.suppress(OSError):
            file = os.open(name, os.O_RDONLY | _FILE, dir_fd=fd)
            try:
                status = os.fstat(file)
                if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                    os.fchmod(file, 0o600)
            finally:
                os.close(file)
    os.fchmod(fd, 0o700)


def _check_file(path: Path, status: os.stat_result, is_written: bool) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UntrustedError(path, _NO_FILE)
    if status.st_uid != os.geteuid():
        raise UntrustedError(path, f"it belongs to user {_user(status.st_uid)}")
    if status.st_mode & _OTHERS_WRITE:
        raise UntrustedError(path, f"others can write it (mode {stat.S_IMODE(status.st_mode):o})")
    if is_written and status.st_nlink > 1:
        raise UntrustedError(path, "it has another name elsewhere")


def _user(uid: int) -> str:
    try:
        return f"'{pwd.getpwuid(uid).pw_name}'"
    except KeyError:
        return f"{uid}"
