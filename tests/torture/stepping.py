"""A wall clock that steps, in the place of the one that Python tells the time by. The monotonic clock never does."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable

_true_time, _true_time_ns = time.time, time.time_ns
_offset_nanos = 0

last_words: list[Callable[[], None]] = []
"""What a process does when everything that was imported after `install` has had its end."""


def install() -> None:
    """Have this process, and those that it forks, tell the time by a clock that can be stepped.

    Before anything else is imported: some remember `time.time` as the value of an argument.
    """
    time.time = lambda: _true_time() + _offset_nanos / 1e9
    time.time_ns = lambda: _true_time_ns() + _offset_nanos
    # Handlers are called the last one first.
    atexit.register(lambda: [speak() for speak in last_words])


def step(seconds: float) -> None:
    """Set the clock of this process forward, or back if negative."""
    global _offset_nanos
    _offset_nanos += int(seconds * 1e9)
