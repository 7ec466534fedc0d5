"""Where the core takes time, threads and chance from, so that tests can put simulated ones in their place."""

from __future__ import annotations

import contextvars
import random
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any


class Ended(BaseException):
    """Ends a simulated thread, whatever it does. No thread of the real clock meets it."""


class Signal:
    """Wakes the one thread that waits for it.

    `threading.Event` is Python code, and a Ctrl-C in the middle of its `set` can leave its lock held for
    ever. A `SimpleQueue` does what it does in one call.
    """

    def __init__(self) -> None:
        """Begin unset."""
        self._given: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Wake the thread, now or when it waits next. Safe wherever a Ctrl-C or a signal handler may come."""
        if self._given.empty():
            self._given.put(None)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is set, and unset it.

        Args:
            seconds: How long to wait at most; without end if not given.

        Returns:
            Whether it was set.
        """
        try:
            # Settings may ask for more than the system can wait: whoever waits looks again.
            self._given.get(timeout=seconds if seconds is None else min(max(0.0, seconds), threading.TIMEOUT_MAX))
        except Empty:
            return False
        return True


class Clock:
    """The real ones."""

    # freezegun and its like put a clock that stands in the place of `time.monotonic`, in every module that has it. All
    # waits would go on for ever. They leave this function alone, and what is an attribute of a class.
    _clock_gettime = staticmethod(time.clock_gettime)

    def now(self) -> float:
        """Return the time in seconds, which never goes back, whatever the user's code does with Python's clocks."""
        return self._clock_gettime(time.CLOCK_MONOTONIC)

    def signal(self) -> Signal:
        """Return what a thread can wait for."""
        return Signal()

    def condition(self, lock: Any) -> threading.Condition:
        """Return a condition that threads can wait for under the lock."""
        return threading.Condition(lock)

    def random(self, name: str) -> Callable[[], float]:
        """Return what gives numbers from 0 to 1 to the child of that name."""
        return random.random

    def start(self, run: Callable[[], None], name: str) -> None:
        """Run something in a thread that does not keep the process from ending.

        It has no ZenML logging context, so nothing that is logged in it ever becomes an event.

        Raises:
            RuntimeError: No thread can be started: there is a limit, or the interpreter is ending.
        """
        threading.Thread(target=contextvars.Context().run, args=(run,), name=name, daemon=True).start()


current = Clock()
"""The clock of the writers that are created from now on."""
