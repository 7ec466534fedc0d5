"""Names and numbers in messages: names are quoted, and guessed where an unknown one was meant to be a known one."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known name, or an empty text if no name is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def quoted(names: Iterable[str]) -> str:
    """Return names as a list in a sentence: `'a', 'b'`."""
    return ", ".join(f"'{name}'" for name in names)


def counted(number: int, noun: str) -> str:
    """Return a number of things, such as `1 event` or `1,200 events`."""
    several = f"{noun.removesuffix('y')}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else several}"


def command(*arguments: str) -> str:
    """Return a command of `composite-logstore` as somebody types it, with names quoted where a shell needs that."""
    return shlex.join(("composite-logstore", *arguments))
