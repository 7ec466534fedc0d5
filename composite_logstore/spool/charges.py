"""What a child's budget was charged on this machine: one small file for each period, which all processes share.

    <log store's folder>/budgets/<child>.<period>        the numbers of events and bytes, with a checksum

A process holds the lock of the file (`flock`) while it reads and writes the numbers. It writes them in one call of the
system, so a killed process leaves the old numbers or the new ones. After a power failure the file may be empty or
older. Then fewer events count as spent than were: better too many events than none.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from composite_logstore.processing.budget import Charge, OwnAccount, Spent
from composite_logstore.spool.lock import locked
from composite_logstore.spool.private_folder import PrivateFolder

_FOLDER = "budgets"
_FORMAT = re.compile(rb"([0-9]{20}) ([0-9]{20}) ([0-9a-f]{8})\n")
_BYTES = 51
# How many files of a child are kept for each kind of period. A clock that steps back finds the numbers of earlier ones.
_KEPT = {"run": 1_000, "day": 10, "minute": 10}
_LOCK_SECONDS = 1.0
"""How long to wait for a process that holds the lock: it may be stopped while it does."""


class SharedAccount:
    """Counts what all processes of this machine have charged for one child; while it cannot, what this one has."""

    def __init__(self, component: Path, child: str, own: OwnAccount, warn: Callable[[str], None]) -> None:
        """Make no file yet.

        Args:
            component: The folder of the log store.
            child: The child's name.
            own: Where to count while the file cannot be used.
            warn: Warns the user.
        """
        self._is_shared = True
        self._warn = warn
        self._folder = component / _FOLDER
        self._child = child
        self._own = own

    def charge(self, period: str, charge: Charge) -> Spent:
        """See `Account`."""

        def newest(own: Spent) -> Spent:
            # What was charged while the file could not be used is in `own` alone.
            try:
                spent = self._charge(period, lambda shared: charge(Spent(*map(max, own, shared))))
            except OSError as error:
                self._note(error)
                return charge(own)
            self._note(None)
            return spent

        return self._own.charge(period, newest)

    def _note(self, error: OSError | None) -> None:
        """Warn once when the numbers cannot be shared, and once when they can again."""
        was_shared, self._is_shared = self._is_shared, error is None
        if error and was_shared:
            why = error.strerror or error
            self._warn(f"the budget in {self._folder} cannot be shared: {why}; each process counts its own events.")
        elif not error and not was_shared:
            self._warn(f"the budget in {self._folder} can be shared again.")

    def _charge(self, period: str, charge: Charge) -> Spent:
        with (
            PrivateFolder.make(self._folder) as folder,
            locked(folder, f"{self._child}.{period}", _LOCK_SECONDS) as file,
        ):
            data = os.pread(file, _BYTES, 0)
            before = _decoded(data)
            spent = charge(before)
            if spent != before:
                os.pwrite(file, _encoded(spent), 0)
            if not data:
                self._forget(folder, period.partition("-")[0])
            return spent

    def _forget(self, folder: PrivateFolder, kind: str) -> None:
        """Remove the files of the oldest periods of a kind, if there are too many."""
        names = [name for name in folder.names() if name.startswith(f"{self._child}.{kind}-")]
        changed = {name: status.st_mtime_ns for name in names if (status := folder.status(name)) is not None}
        for name in sorted(changed, key=changed.__getitem__)[: -_KEPT[kind]]:
            with suppress(OSError):
                folder.unlink(name)


def _encoded(spent: Spent) -> bytes:
    text = f"{spent.events:020d} {spent.bytes:020d}".encode()
    return b"%b %08x\n" % (text, zlib.crc32(text))


def _decoded(data: bytes) -> Spent:
    found = _FORMAT.fullmatch(data)
    if not found or int(found[3], 16) != zlib.crc32(data[:41]):
        return Spent()
    return Spent(int(found[1]), int(found[2]))
