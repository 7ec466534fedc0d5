"""What people, disks and tidy-up jobs do to the folders of a spool, and which events are destroyed with it."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path

# The messages of `tests.crashing`, as they are in a segment.
_NAME = re.compile(rb'"([\w~+-]+/\w+/\d+) \d+ x*')
_WRITER = re.compile(r"[0-9a-f]{15}")


class Destruction:
    """Destroys something now and then, and remembers what.

    Attributes:
        harm: A writer → what was done to its folder, in words.
        counted: How many times each was done.
        times: How many times events may have been destroyed.
    """

    def __init__(self, spool: Path, graves: Path, is_dead: Callable[[str], bool]) -> None:
        """Prepare.

        Args:
            spool: The spool of all log stores.
            graves: Where links to removed files are kept: a process may write to them until it sees that they are gone.
            is_dead: Says whether the writer is known to be dead. A segment that somebody writes to is not touched, or
                nobody could tell what was destroyed.
        """
        self.harm: dict[str, list[str]] = {}
        self.counted: Counter[str] = Counter()
        self.times = 0
        self._spool = spool
        self._graves = graves
        self._is_dead = is_dead
        self._excused: set[str] = set()
        self._all = (
            self._delete_spare,
            self._delete_positions,
            self._change_position,
            self._truncate_segment,
            self._change_segment,
            self._remove,
        )

    def destroy(self, rand: random.Random) -> None:
        """Do something to some folder, if there is one."""
        way = rand.choice(self._all)
        folders = sorted(folder for folder in self._spool.glob("*/*") if _WRITER.fullmatch(folder.name))
        if way in (self._truncate_segment, self._change_segment):
            folders = [folder for folder in folders if self._is_dead(folder.name)]
        if folders:
            folder = rand.choice(folders)
            # It may be done with at any moment, and go.
            with contextlib.suppress(FileNotFoundError):
                self.harm.setdefault(folder.name, []).append(way(folder, rand))
                self.counted[way.__name__.strip("_").replace("_", " ")] += 1

    def excused(self) -> set[str]:
        """Return the names of the events that were destroyed, delivered or not."""
        for file in self._graves.rglob("*"):
            if file.is_file():
                self._excuse(file.read_bytes())
        return self._excused

    def _excuse(self, content: bytes) -> None:
        self._excused.update(name.decode() for name in _NAME.findall(content))

    # Each returns what it has done, in words.

    def _delete_spare(self, folder: Path, rand: random.Random) -> str:
        (folder / "spare").unlink()
        return "its spare was deleted"

    def _delete_positions(self, folder: Path, rand: random.Random) -> str:
        positions = sorted(folder.glob("*.settled"))
        for position in positions[: rand.randint(1, len(positions) or 1)]:
            position.unlink()
        return "positions were deleted"

    def _change_position(self, folder: Path, rand: random.Random) -> str:
        position = rand.choice(sorted(folder.glob("*.settled")) or [folder / "none"])
        return _change(position, rand.randrange(30), 1, rand)

    def _truncate_segment(self, folder: Path, rand: random.Random) -> str:
        segment, content = _segment(folder, rand)
        end = rand.randrange(len(content) + 1)
        self._excuse(content[content.rfind(b"\n", 0, end) + 1 :])
        self.times += 1
        os.truncate(segment, end)
        return f"{segment.name} was cut at {end} of {len(content)}"

    def _change_segment(self, folder: Path, rand: random.Random) -> str:
        segment, content = _segment(folder, rand)
        begin, length = rand.randrange(len(content)), rand.choice([1, 1, 8, 1000])
        end = min(begin + length, len(content))
        # If the end of a line is hit, the next line is one with it.
        line_end = content.find(b"\n", content.find(b"\n", end - 1) + 1)
        self._excuse(content[content.rfind(b"\n", 0, begin) + 1 : line_end if line_end >= 0 else None])
        self.times += 1
        return _change(segment, begin, end - begin, rand)

    def _remove(self, folder: Path, rand: random.Random) -> str:
        grave = self._graves / f"{folder.name}-{self.times}"
        grave.mkdir(parents=True)
        self.times += 1
        for attempt in count():
            for file in sorted(folder.glob("*")):
                with contextlib.suppress(FileNotFoundError):
                    (grave / f"{attempt}-{file.name}").hardlink_to(file)
                    file.unlink()
            # Whoever uses it may have made a new file meanwhile.
            with contextlib.suppress(OSError):
                folder.rmdir()
            if not folder.exists():
                break
        return "it was removed"


def _segment(folder: Path, rand: random.Random) -> tuple[Path, bytes]:
    """Return some segment, and what has been written of it."""
    segment = rand.choice(sorted(folder.glob("*.log")) or [folder / "none"])
    content = segment.read_bytes().rstrip(b"\0")
    if not content:
        raise FileNotFoundError(segment)
    return segment, content


def _change(file: Path, begin: int, length: int, rand: random.Random) -> str:
    with file.open("r+b") as opened:
        opened.seek(begin)
        content = opened.read(length)
        opened.seek(begin)
        opened.write(bytes(byte ^ rand.randrange(1, 256) for byte in content))
    return f"{file.name} was changed from {begin} to {begin + length}"
