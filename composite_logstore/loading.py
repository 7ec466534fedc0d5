"""Makes forks wait while a backend is loaded: a forked process can never import a module that was half imported.

Python takes a lock for each module while it is imported. A forked process inherits the lock, but not the thread that
would release it, so an import of that module there waits for ever. Workers load their backend's client libraries (gRPC
takes half a second) with the first event, and a program may fork at any moment.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from composite_logstore.clock import Clock

LONGEST_SECONDS = 2.0
"""How long a fork waits for a backend at most, in seconds since it began to load: its first export may hang."""

_CLOCK = Clock()


# The threads that are loading a backend, and since when. They do not wait for each other.
_began: dict[int, float] = {}
# Held during a fork, so that no thread begins to load. Reentrant, since a signal handler may fork.
_changed = threading.Condition(threading.RLock())


@contextmanager
def loading() -> Iterator[None]:
    """Make forks of this process wait while the calling thread imports a backend's modules."""
    thread = threading.get_ident()
    with _changed:
        _began[thread] = _CLOCK.now()
    try:
        yield
    finally:
        with _changed:
            # A process that the backend has forked meanwhile has no such entry.
            _began.pop(thread, None)
            _changed.notify_all()


def _seconds_left() -> float:
    """Return how long a fork still has to wait, in seconds."""
    # The module that this thread loads may itself fork.
    began = max((at for thread, at in _began.items() if thread != threading.get_ident()), default=None)
    return 0.0 if began is None else began + LONGEST_SECONDS - _CLOCK.now()


def _before_fork() -> None:
    _changed.acquire()
    while (seconds := _seconds_left()) > 0:
        _changed.wait(seconds)


def _after_fork_in_parent() -> None:
    # The lock is not held if a Ctrl-C has interrupted `_before_fork`, or if this module was imported during the fork.
    with suppress(RuntimeError):
        _changed.release()


def _after_fork_in_child() -> None:
    global _changed
    _changed = threading.Condition(threading.RLock())
    _began.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
