"""The source of time, threads and chance for the core. Tests replace it with a simulated one."""

from __future__ import annotations

import contextvars
import random
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any


class Ended(BaseException):
    """Ends a thread: a simulated one, or one that the process's end cannot wait for."""


class Signal:
    """Wakes the one thread that waits for it.

    `threading.Event.set` is Python code, and a Ctrl-C in the middle of it can leave its lock held for ever.
    `SimpleQueue.put` is one C call.
    """

    def __init__(self) -> None:
        self._given: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Wake the thread, now or when it waits next. A Ctrl-C or a signal handler may interrupt this."""
        if self._given.empty():
            self._given.put(None)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is set, and unset it.

        Args:
            seconds: How long to wait at most; for ever if not given.

        Returns:
            Whether it was set.
        """
        try:
            # Settings may ask for more than the system can wait. All callers wait in a loop.
            self._given.get(timeout=seconds if seconds is None else min(max(0.0, seconds), threading.TIMEOUT_MAX))
        except Empty:
            return False
        return True


class Clock:
    """Real time, threads and chance."""

    # freezegun and its like replace `time.monotonic` in every module with a clock that stands still, so that all waits
    # would last for ever. They replace neither this function nor attributes of classes.
    _clock_gettime = staticmethod(time.clock_gettime)

    def now(self) -> float:
        """Return a time in seconds that never goes back, even if the user's code replaces Python's clocks."""
        return self._clock_gettime(time.CLOCK_MONOTONIC)

    def time(self) -> float:
        """Return the seconds since the epoch, by the system's clock, which may step back or ahead."""
        return self._clock_gettime(time.CLOCK_REALTIME)

    def signal(self) -> Signal:
        """Return a signal that one thread can wait for."""
        return Signal()

    def condition(self, lock: Any) -> threading.Condition:
        """Return a condition that threads can wait for under the lock."""
        return threading.Condition(lock)

    def random(self, name: str) -> Callable[[], float]:
        """Return a function that returns random numbers from 0 to 1, for the child of that name."""
        return random.random

    def start(self, run: Callable[[], None], name: str) -> None:
        """Run a function in a daemon thread, which does not keep the process from ending.

        The thread has no ZenML logging context, so nothing that it logs becomes an event.

        Raises:
            RuntimeError: The system has no room for a thread, or the interpreter is ending.
        """
        threading.Thread(target=contextvars.Context().run, args=(run,), name=name, daemon=True).start()


current = Clock()
"""The clock of the writers that are created from now on."""
