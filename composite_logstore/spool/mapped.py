"""Small files that are mapped into memory, so that writing to them is a copy and no call of the system."""

from __future__ import annotations

import errno
import mmap
import os
from typing import NamedTuple

from composite_logstore.spool.private_folder import PrivateFolder, identity_of

NEW = "spare.new"
"""The name of a file until it is complete."""


class Mapped(NamedTuple):
    """A mapped file.

    Attributes:
        memory: Its bytes.
        identity: What tells the file from another one of the same name.
    """

    memory: mmap.mmap
    identity: tuple[int, int]

    @classmethod
    def create(cls, folder: PrivateFolder, name: str, size: int) -> Mapped:
        """Make a file of zeros, in place of anything that has its name, and map it.

        Args:
            folder: Where to make it.
            name: Its name.
            size: Its size in bytes. All of them are allocated.

        Raises:
            OSError: There is no room on the disk, or the file cannot be made.
        """
        folder.make_way(name)
        file = folder.create_file(name)
        try:
            _allocate(file, size)
            return cls(mmap.mmap(file, size), identity_of(os.fstat(file)))
        except BaseException:
            folder.unlink(name)
            raise
        finally:
            os.close(file)

    def grown(self, folder: PrivateFolder, name: str, size: int) -> Mapped:
        """Return the same file with more bytes, and release the present mapping.

        Args:
            folder: Its folder.
            name: Its name there.
            size: How many bytes it is to have. All of them are allocated.

        Raises:
            OSError: There is no room on the disk, or the file is gone. The present mapping stays.
        """
        file = folder.open_file(name, os.O_RDWR)
        try:
            _allocate(file, size, len(self.memory))
            grown = Mapped(mmap.mmap(file, size), identity_of(os.fstat(file)))
        finally:
            os.close(file)
        self.memory.close()
        return grown

    def restored(self, folder: PrivateFolder, name: str) -> Mapped:
        """Return the file, or another one with its bytes and its name if it was moved or removed.

        Raises:
            OSError: There is no room on the disk, or the file cannot be made.
        """
        if folder.has(name, self.identity):
            return self
        new = Mapped.create(folder, NEW, len(self.memory))
        new.memory[:] = self.memory[:]
        folder.put(NEW, name)
        return new


def _allocate(file: int, size: int, before: int = 0) -> None:
    """Have the disk reserve all bytes: a full disk would otherwise kill the process (SIGBUS) when it writes to one."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, before, size - before)
            return
        except OSError as error:
            # Some C libraries do not emulate it where the file system cannot do it.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    while before < size:
        before += os.pwrite(file, bytes(min(1 << 20, size - before)), before)
