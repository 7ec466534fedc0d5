"""How far each child is: one file a child, with the number below which the child has acknowledged all events.

The file `due` of a process that lets an agent deliver has the same form: its number says below which events the agent
delivers without waiting for fuller batches.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from composite_logstore.spool.format import (
    DUE,
    POSITION_BYTES,
    decode_position,
    encode_position,
    position_name,
)
from composite_logstore.spool.mapped import NEW, Mapped
from composite_logstore.spool.private_folder import KnownFolder, PrivateFolder


class Positions:
    """The positions of a spool.

    A process maps the positions of its own spool, since it writes one after each export. Those of another process's
    spool it opens each time: it may recover a hundred of them, and each mapping needs a file descriptor.

    Attributes:
        children: The names of the children that have a position.
    """

    def __init__(self, folder: KnownFolder, children: Iterable[str]) -> None:
        """Map nothing.

        Args:
            folder: The spool's folder.
            children: The names of the children that have a position.
        """
        self.children = sorted(children)
        self._folder = folder
        # The name of a file → the file.
        self._mapped: dict[str, Mapped] = {}

    def create(self, folder: PrivateFolder, with_due: bool) -> None:
        """Make and map the positions of all children, each 0.

        Args:
            folder: The spool's folder, wherever it is.
            with_due: Whether to make the file `due`, too.

        Raises:
            OSError: A position cannot be made.
        """
        for name in [*map(position_name, self.children), *([DUE] if with_due else [])]:
            self._mapped[name] = _created(folder, name, 0)

    def of(self, child: str) -> int:
        """Return the number below which the child has acknowledged all events, 0 if that is not known.

        Raises:
            OSError: The position cannot be read now.
        """
        return self._read(position_name(child))

    @property
    def due(self) -> int:
        """The number below which all events are due; 0 if there is none.

        Raises:
            OSError: It cannot be read now.
        """
        return self._read(DUE)

    def _read(self, name: str) -> int:
        if name in self._mapped:
            return decode_position(self._mapped[name].memory[:]) or 0
        with self._folder.open() as folder:
            return _position_in(folder, name) or 0

    def demand(self, before: int) -> None:
        """Have all events with numbers below `before` be due. Does nothing without a file `due` of this process."""
        if DUE in self._mapped:
            self._mapped[DUE].memory[:] = encode_position(before)

    def write(self, child: str, number: int) -> bool:
        """Note the number below which the child has acknowledged all events.

        Returns:
            Whether that may be news.

        Raises:
            OSError: The position cannot be written.
        """
        position = encode_position(number)
        name = position_name(child)
        if name in self._mapped:
            memory = self._mapped[name].memory
            if memory[:] == position:
                return False
            memory[:] = position
            return True
        with self._folder.open() as folder:
            is_there = folder.status(name) is not None
            file = folder.open_file(name, os.O_WRONLY) if is_there else folder.create_file(name)
            with os.fdopen(file, "wb") as opened:
                opened.write(position)
        return True

    def reset(self, child: str) -> None:
        """Make the child's position 0, and add the child if it has none.

        Raises:
            OSError: The position cannot be made.
        """
        with self._folder.open() as folder:
            _created(folder, NEW, 0).memory.close()
            folder.put(NEW, position_name(child))
        if child not in self.children:
            self.children = sorted([*self.children, child])

    def files(self) -> list[tuple[str, tuple[int, int]]]:
        """Return the name and the identity of each mapped file. Needs no lock: `list` is one C call."""
        return [(name, position.identity) for name, position in list(self._mapped.items())]

    def mend(self, folder: PrivateFolder) -> None:
        """Restore the mapped files that were moved or removed. Their bytes are still in memory.

        Raises:
            OSError: A file cannot be made now.
        """
        for name, position in list(self._mapped.items()):
            self._mapped[name] = position.restored(folder, name)

    def close(self) -> None:
        """Unmap all."""
        for position in self._mapped.values():
            position.memory.close()
        self._mapped.clear()


def read_position(folder: PrivateFolder, child: str) -> int | None:
    """Return a child's position, None if its file is missing, damaged or not to be trusted.

    Raises:
        OSError: The file cannot be read now. To take that for no position would deliver everything again.
    """
    return _position_in(folder, position_name(child))


def _position_in(folder: PrivateFolder, name: str) -> int | None:
    try:
        with os.fdopen(folder.open_file(name, os.O_RDONLY), "rb") as file:
            return decode_position(file.read(POSITION_BYTES + 1))
    except (FileNotFoundError, PermissionError):
        return None


def _created(folder: PrivateFolder, name: str, number: int) -> Mapped:
    position = Mapped.create(folder, name, POSITION_BYTES)
    position.memory[:] = encode_position(number)
    return position
