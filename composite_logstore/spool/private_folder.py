"""Folders in which no other user may write, and the files in them, opened so that no link leads elsewhere.

Other users may be able to write beside the spool, as in a `spool_directory` of mode 1777. So each folder and file is
checked after it is opened, when nobody can exchange it any more: it must belong to this user, no other user may be able
to write to it, and a file must be a regular one. Names are looked up in the open folder (`dir_fd`), so its parents
cannot be exchanged either. The tests are those of test_spool_trust.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import secrets
import stat
from itertools import count, takewhile
from pathlib import Path
from typing import NamedTuple

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK, opening a pipe would wait for its other end.
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

CLOCK_STEP_SECONDS = 2.0
"""How coarse the times of a file system may be, by which a change of a folder is noticed."""


class UntrustedError(PermissionError):
    """A folder or a file that another user may have written.

    Attributes:
        fix: What the user can do about it, in words; empty if that is not known.
    """

    def __init__(self, path: Path, why: str, fix: str = "") -> None:
        """Say what is wrong.

        Args:
            path: The folder or file.
            why: What is wrong with it, in words.
            fix: What the user can do about it, in words.
        """
        super().__init__(errno.EPERM, why, str(path))
        self.fix = fix


def fix_of(error: BaseException) -> str:
    """Return what the user can do about an error, to follow the reason in a message; empty if that is not known."""
    return f"; {error.fix}" if isinstance(error, UntrustedError) and error.fix else ""


class PrivateFolder:
    """An open folder. Use it as a context manager, which closes it.

    Attributes:
        path: Its path when it was opened.
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
            UntrustedError: It belongs to another user, or others can write in it.
            OSError: It cannot be opened.
        """
        return cls._checked(path, path, None)

    @classmethod
    def make(cls, path: Path) -> PrivateFolder:
        """Open a folder. Make it if it does not exist, and its parents.

        Raises:
            UntrustedError: It belongs to another user, or others can write in it.
            OSError: It cannot be made or opened.
        """
        try:
            return cls.open(path)
        except FileNotFoundError:
            missing = takewhile(lambda parent: not parent.exists(), path.parents)
            for folder in reversed([path, *missing]):
                with contextlib.suppress(FileExistsError):
                    os.close(_made(folder, None))
            return cls.open(path)

    @classmethod
    def _checked(cls, path: Path, name: str | Path, above: int | None) -> PrivateFolder:
        try:
            fd = os.open(name, _FOLDER, dir_fd=above)
        except OSError as error:
            # With O_NOFOLLOW the system reports these for a link too.
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
        """Its device and its number there: they tell it from any other folder, and stay when it is moved."""
        return identity_of(os.fstat(self.fd))

    def names(self) -> list[str]:
        """Return the names of the files and folders in it, in order."""
        return sorted(os.listdir(self.fd))

    def status(self, name: str) -> os.stat_result | None:
        """Return the status of a file or folder in it, None if it has none of this name."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open_folder(self, name: str) -> PrivateFolder:
        """Open a folder in it.

        Raises:
            UntrustedError: It belongs to another user, or others can write in it.
            OSError: It cannot be opened.
        """
        return self._checked(self.path / name, name, self.fd)

    def make_folder(self, name: str) -> PrivateFolder:
        """Make a folder in it.

        Raises:
            OSError: It cannot be made, or the name is taken.
        """
        return PrivateFolder(self.path / name, _made(name, self.fd))

    def open_or_make_folder(self, name: str) -> PrivateFolder:
        """Open a folder in it. Make it if it does not exist.

        Raises:
            UntrustedError: It belongs to another user, or others can write in it.
            OSError: It cannot be made or opened.
        """
        with contextlib.suppress(FileExistsError):
            return self.make_folder(name)
        return self.open_folder(name)

    def open_file(self, name: str, flags: int) -> int:
        """Open a file in it.

        Args:
            name: Its name.
            flags: The flags of `os.open`.

        Returns:
            A descriptor.

        Raises:
            UntrustedError: It is not a regular file of this user, or others can write to it; or it is opened for
                writing, and has another name too (a hard link).
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
                    # The umask may have removed rights.
                    os.fchmod(fd, 0o600)
            _check_file(path, os.fstat(fd), is_written=(flags & os.O_ACCMODE) != os.O_RDONLY)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def create_file(self, name: str) -> int:
        """Create a file in it, for reading and writing.

        Returns:
            A descriptor.

        Raises:
            OSError: It cannot be created, or the name is taken.
        """
        return self.open_file(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def rename(self, name: str, to: str, other: PrivateFolder | None = None) -> None:
        """Rename a file or folder in it, and replace one of the new name.

        Args:
            name: The name.
            to: The new name.
            other: The folder to move it to, this one if not given.

        Raises:
            OSError: It cannot be renamed.
        """
        os.rename(name, to, src_dir_fd=self.fd, dst_dir_fd=(other or self).fd)

    def has(self, name: str, identity: tuple[int, int]) -> bool:
        """Say whether it has a file or folder of this name and this identity."""
        status = self.status(name)
        return status is not None and identity_of(status) == identity

    def is_folder(self, name: str) -> bool:
        """Say whether it has a folder of this name, not a link to one."""
        status = self.status(name)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def free_name(self, name: str) -> str:
        """Return the name if it is free, otherwise the name with the lowest number that makes it free."""
        names = (name if number == 1 else f"{name}-{number}" for number in count(1))
        return next(name for name in names if self.status(name) is None)

    def make_way(self, name: str) -> None:
        """Free a name for one of the spool's own files: remove a file, rename a folder.

        Raises:
            OSError: That is not possible.
        """
        if self.is_folder(name):
            # Not a folder that a spool makes. The process that recovers the spool sets it aside.
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
        """Remove a file, if it exists.

        Raises:
            OSError: It cannot be removed, or is a folder.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def remove(self, name: str) -> None:
        """Remove a folder with all its contents, as far as that is possible."""
        if not self.is_folder(name):
            # `os.fwalk` would wait for a pipe to be opened.
            return
        with contextlib.suppress(OSError, RecursionError):
            for _, folders, files, fd in os.fwalk(name, topdown=False, dir_fd=self.fd):
                for file in files:
                    with contextlib.suppress(OSError):
                        os.unlink(file, dir_fd=fd)
                for folder in folders:
                    # `os.fwalk` lists a link to a folder as a folder.
                    for remove in (os.rmdir, os.unlink):
                        with contextlib.suppress(OSError):
                            remove(folder, dir_fd=fd)
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=self.fd)


class KnownFolder(NamedTuple):
    """A folder that was open before. Its identity tells it from another folder at the same path.

    Attributes:
        path: Its path.
        identity: Its device, and its number there.
    """

    path: Path
    identity: tuple[int, int]

    def open(self) -> PrivateFolder:
        """Open it.

        Raises:
            FileNotFoundError: It is no longer at its path, though another folder may be.
            OSError: It cannot be opened.
        """
        folder = PrivateFolder.open(self.path)
        if folder.identity == self.identity:
            return folder
        os.close(folder.fd)
        raise FileNotFoundError(errno.ENOENT, "the folder was moved or removed", str(self.path))


_NO_FILE = "it is not a regular file"
_ELSEWHERE = "set 'spool_directory' to another folder"


def identity_of(status: os.stat_result) -> tuple[int, int]:
    """Return the device of a file or folder and its number there, which tell it from any other."""
    return status.st_dev, status.st_ino


def has_unsafe_rights(status: os.stat_result) -> bool:
    """Say whether others may write in a folder, or its own user may not use it."""
    return bool(status.st_mode & _OTHERS_WRITE) or status.st_mode & stat.S_IRWXU != stat.S_IRWXU


def _made(name: str | Path, above: int | None) -> int:
    """Make a folder that only this user can use, whatever the umask is, and return its descriptor."""
    os.mkdir(name, 0o700, dir_fd=above)
    try:
        fd = os.open(name, _FOLDER, dir_fd=above)
    except PermissionError:
        # The umask has removed even this user's rights.
        os.chmod(name, 0o700, dir_fd=above)
        fd = os.open(name, _FOLDER, dir_fd=above)
    with contextlib.suppress(OSError):
        # Some file systems have no modes. `_check_folder` decides about theirs.
        os.fchmod(fd, 0o700)
    return fd


def _check_folder(path: Path, fd: int) -> None:
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        denied = os.strerror(errno.EACCES)
        why = f"{denied}; it belongs to user {_user(status.st_uid)}, this process to user {_user(os.geteuid())}"
        raise UntrustedError(path, why, _ELSEWHERE)
    if _has_rights_of_fs_group(status):
        _remove_group_rights(fd)
        status = os.fstat(fd)
    if status.st_mode & _OTHERS_WRITE:
        why = f"others can write in it (mode {stat.S_IMODE(status.st_mode):o})"
        raise UntrustedError(path, why, f"check its contents and `chmod 700 {path}`, or {_ELSEWHERE}")


def _has_rights_of_fs_group(status: os.stat_result) -> bool:
    """Say whether a folder has the mode that Kubernetes gives to all folders of a volume with an `fsGroup`."""
    mode = status.st_mode
    is_so = mode & stat.S_ISGID and mode & stat.S_IWGRP and not mode & stat.S_IWOTH
    return bool(is_so) and status.st_gid in (os.getegid(), *os.getgroups())


def _remove_group_rights(fd: int) -> None:
    """Remove the rights of the volume's group from a folder and its files: only this user needs them."""
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
        raise UntrustedError(path, f"others can write to it (mode {stat.S_IMODE(status.st_mode):o})")
    if is_written and status.st_nlink > 1:
        raise UntrustedError(path, "it has another name too (a hard link)")


def _user(uid: int) -> str:
    try:
        return f"'{pwd.getpwuid(uid).pw_name}'"
    except KeyError:
        return f"{uid}"
