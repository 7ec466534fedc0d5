"""What of a spool cannot be read, and where it is kept: in the folder `damaged` beside those of the processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from composite_logstore.spool.private_folder import KnownFolder, PrivateFolder

_DAMAGED = "damaged"


class Damage(NamedTuple):
    """A piece of a spool that cannot be read.

    Attributes:
        path: The file.
        offset: Where in the file it begins.
        length: How many bytes it has, 0 if none is worth keeping; None for the whole file.
        why: What is wrong, in words.
        lines: How many lines it may have been.
    """

    path: Path
    offset: int
    length: int | None
    why: str
    lines: int = 1

    def continued_by(self, other: Damage) -> Damage | None:
        """Return both as one if the other one is that of the next line, otherwise None."""
        if not self.length or not other.length:
            return None
        if (self.path, self.why, self.offset + self.length) != (other.path, other.why, other.offset):
            return None
        return self._replace(length=self.length + other.length, lines=self.lines + other.lines)


def set_aside(process: KnownFolder, damages: Sequence[Damage]) -> list[tuple[Damage, Path]]:
    """Move damaged pieces out of a folder, so that they are not met again.

    Returns:
        Each of them, and the file that keeps it: its own one if it could not be moved.
    """
    kept = [(damage, damage.path) for damage in damages]
    if any(damage.length != 0 for damage in damages):
        with contextlib.suppress(OSError), process.open() as folder, _opened(folder.path.parent) as aside:
            for place, damage in enumerate(damages):
                if damage.length != 0:
                    with contextlib.suppress(OSError):
                        kept[place] = damage, aside.path / _moved(folder, damage, aside)
    return kept


def _opened(component: Path) -> PrivateFolder:
    with PrivateFolder.open(component) as home:
        return home.open_or_make_folder(_DAMAGED)


def _moved(folder: PrivateFolder, damage: Damage, aside: PrivateFolder) -> str:
    """Move a damaged piece, and return the name of the file that has it now."""
    name = f"{folder.path.name}-{damage.path.name}"
    if damage.length is None:
        name = aside.free_name(name)
        folder.rename(damage.path.name, name, aside)
        return name
    with os.fdopen(folder.open_file(damage.path.name, os.O_RDWR), "r+b") as file:
        file.seek(damage.offset)
        data = file.read(damage.length)
        try:
            descriptor = aside.open_file(name, os.O_WRONLY | os.O_APPEND)
        except (FileNotFoundError, PermissionError):
            name = aside.free_name(name)
            descriptor = aside.create_file(name)
        with os.fdopen(descriptor, "ab") as kept:
            kept.write(data if data.endswith(b"\n") else data + b"\n")
        file.seek(damage.offset)
        file.write(b"\n" * len(data))
    return name


def damaged(component: Path) -> list[Path]:
    """Return the files that keep the damaged pieces of a log store's spools.

    Args:
        component: The folder of the log store.
    """
    with contextlib.suppress(OSError), PrivateFolder.open(component) as home, home.open_folder(_DAMAGED) as folder:
        return [folder.path / name for name in folder.names()]
    return []


def remove_damaged(component: Path, name: str) -> None:
    """Remove a file that keeps damaged pieces, or the folder that was in place of a spool's file.

    Args:
        component: The folder of the log store.
        name: The name of the file.

    Raises:
        OSError: It cannot be removed.
    """
    with PrivateFolder.open(component) as home, home.open_folder(_DAMAGED) as folder:
        folder.remove(name)
        if not folder.is_folder(name):
            folder.unlink(name)
