"""Where the core takes time, threads and chance from, so that tests can put simulated ones in their place."""

from __future__ import annotations

import contextvars
import random
import threading
import time
from collections.abc import Callable
from typing import Any


class Clock:
    """The real ones."""

    def now(self) -> float:
        """Return the time in seconds, which never goes back."""
        return time.monotonic()

    def event(self) -> threading.Event:
        """Return a flag that a thread can wait for."""
        return threading.Event()

    def condition(self, lock: Any) -> threading.Condition:
        """Return a condition that threads can wait for under the lock."""
        return threading.Condition(lock)

    def random(self, name: str) -> Callable[[], float]:
        """Return what gives numbers from 0 to 1 to the child of that name."""
        return random.random

    def start(self, run: Callable[[], None], name: str) -> None:
        """Run something in a thread that does not keep the process from ending.

        It has no ZenML logging context, so nothing that is logged in it ever becomes an event.
        """
        threading.Thread(target=contextvars.Context().run, args=(run,), name=name, daemon=True).start()


current = Clock()
"""The clock of the writers that are created from now on."""
