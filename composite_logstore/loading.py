"""Makes forks wait while a backend is loaded: a forked process can never import a module that was half imported.

Python takes a lock for each module while it is imported. A forked process inherits the lock, but not the thread that
would release it, so an import of that module there waits for ever. Workers load their backend's client libraries (gRPC
takes half a second) with the first event, and a program may fork at any moment.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from composite_logstore.clock import Clock

LONGEST_SECONDS = 2.0
"""How long a fork waits for a backend at most, in seconds since it began to load: its first export may hang."""

_CLOCK = Clock()


class _Loading:
    """The threads that are loading a backend, and since when. They do not wait for each other."""

    def __init__(self) -> None:
        # Held during a fork, so that no thread begins to load. Reentrant, since a signal handler may fork.
        self.changed = threading.Condition(threading.RLock())
        self.began: dict[int, float] = {}
        self.fork = threading.local()

    def seconds_left(self) -> float:
        """Return how long a fork still has to wait, in seconds."""
        # The module that this thread loads may itself fork.
        began = max((at for thread, at in self.began.items() if thread != threading.get_ident()), default=None)
        return 0.0 if began is None else began + LONGEST_SECONDS - _CLOCK.now()


_now = _Loading()


@contextmanager
def loading() -> Iterator[None]:
    """Make forks of this process wait while the calling thread imports a backend's modules."""
    here, thread = _now, threading.get_ident()
    with here.changed:
        here.began[thread] = _CLOCK.now()
    try:
        yield
    finally:
        with here.changed:
            del here.began[thread]
            here.changed.notify_all()


def _before_fork() -> None:
    _now.changed.acquire()
    _now.fork.is_under_way = True
    while (seconds := _now.seconds_left()) > 0:
        _now.changed.wait(seconds)


def _after_fork_in_parent() -> None:
    if getattr(_now.fork, "is_under_way", False):
        _now.fork.is_under_way = False
        _now.changed.release()


def _after_fork_in_child() -> None:
    global _now
    _now = _Loading()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
