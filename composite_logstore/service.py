"""The log store's own threads: they survive every exception, and report it.

No code restarts a thread that has ended. So no unforeseen exception may end one, whether it is from a backend, a user's
logging handler, a full disk, or a mistake in this package.
"""

from __future__ import annotations

import atexit
import contextvars
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from types import FrameType
from typing import TypeAlias

from composite_logstore.clock import Clock, Ended
from composite_logstore.inert import described

FIRST_PAUSE_SECONDS = 0.1
"""How long a thread pauses after its first failure. Each further failure doubles the pause."""
LONGEST_PAUSE_SECONDS = 30.0
"""The longest pause."""
_START_SECONDS = 0.1
_MOST_STARTS_SECONDS = 10.0
"""After a hundred attempts in a row a thread that cannot be started is tried at most ten times a second: each attempt
costs `emit` some microseconds."""
_CALM_SECONDS = 60.0
"""If a thread fails again within this time, its pauses stay long, and it does not warn again."""

_PATIENCE_SECONDS = 0.1
"""For how long to ask for a lock that is not free, once every millisecond, before blocking on it."""

_END_SECONDS = 0.5
"""How long the process's end waits for threads in code that the interpreter must not unwind."""
# Parts of the names of files: Rust code is below some of the frames whose code is in them.
_NOT_TO_BE_UNWOUND = ("<frozen importlib", f"{os.sep}pydantic{os.sep}", f"{os.sep}sqlmodel{os.sep}")

Wait: TypeAlias = Callable[[], object]
"""Waits until the next step may have something to do."""


def tell(log: Callable[..., None], *arguments: object) -> None:
    """Log a message of the log store itself. Never raises, whatever the user's handlers do.

    The message is logged outside of any ZenML logging context, so it becomes no event. Never call this under a
    journal's lock: ZenML calls `emit` under the lock of a logging handler, so a thread that holds the journal's lock
    and logs can wait for ever.
    """
    with suppress(Exception):
        contextvars.Context().run(log, *arguments)


def quietly(log: Callable[..., None], text: str, do: Callable[..., object], *arguments: object) -> None:
    """Do what costs nothing if it fails, such as closing an exporter, and log the failure.

    Args:
        log: A logger's method.
        text: What to log, with a `%s` for the error.
        do: Does it.
        arguments: Its arguments.
    """
    try:
        do(*arguments)
    except Exception as error:
        tell(log, text, described(error))


@contextmanager
def patiently(lock: threading.RLock) -> Iterator[None]:
    """Hold a journal's lock, for a thread that has time. `emit` must not wait for such a thread.

    A thread that blocks on the lock gets it the moment that `emit` releases it, and then has to wait for the GIL: up to
    5 ms beside a thread that computes. Meanwhile the next `emit` waits for both (a lock convoy). So this asks for the
    lock once every millisecond, and blocks on it only if it is never free. `benchmarks.scale` would show a mistake.
    """
    end = time.monotonic() + _PATIENCE_SECONDS
    while not (is_held := lock.acquire(blocking=False)) and time.monotonic() < end:
        time.sleep(0.001)
    if not is_held:
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Service:
    """A thread that does a step, waits until there is more to do, and does the next step.

    After a step that raises, the thread pauses and does the next one. Creating a service starts nothing.

    Attributes:
        is_running: Whether the thread runs.
        has_ended: Whether it has ended for good.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], Wait | None],
        clock: Clock,
        warn: Callable[[str], None],
        note_problem: Callable[[str], None],
        longest_pause: float = LONGEST_PAUSE_SECONDS,
    ) -> None:
        """Prepare.

        Args:
            name: The thread's name.
            step: Does the present work, and returns how to wait for more. None ends the thread for good.
            clock: The source of time and threads.
            warn: Called with a warning when the thread begins to fail, and when it works again.
            note_problem: Called with the problem that keeps the thread from its work, for the children's accounts.
            longest_pause: The longest pause between failures, in seconds.
        """
        self._name = name
        self._step = step
        self._clock = clock
        self._warn = warn
        self._note_problem = note_problem
        self._longest_pause = longest_pause
        self._entering = threading.Lock()
        self.is_running = self.has_ended = False
        self._start_at = -inf
        self._failures = 0
        self._is_failing = self._has_warned = False
        self._failed_at = self._warned_at = -inf

    def start(self) -> bool:
        """Start the thread unless it runs. Never raises and logs nothing, since this is part of `emit`.

        Returns:
            False if no thread can be started; a later call tries again. True if it runs, is about to, or has ended.
        """
        if self.is_running or self.has_ended:
            return True
        if self._clock.now() < self._start_at:
            return False
        # Without a lock: a signal handler or a finalizer that logs would wait for the code that it has interrupted.
        # If two threads are started, the second one ends at once.
        try:
            self._clock.start(self._run, self._name)
        except Exception as error:
            # The limit of threads is reached, or the interpreter is ending.
            earliest = self._clock.now() - _MOST_STARTS_SECONDS
            self._start_at = max(self._start_at, earliest) + _START_SECONDS
            with suppress(Exception):
                self._note_problem(f"no thread can be started ({described(error)})")
            return False
        return True

    def _run(self) -> None:
        # The thread sets this itself: a Ctrl-C may arrive between its start and the next statement.
        with self._entering:
            if self.is_running or self.has_ended:
                return
            self.is_running = True
        try:
            while not self.has_ended:
                self._do_step()
        finally:
            with self._entering:
                self.is_running = False

    def _do_step(self) -> None:
        try:
            wait = self._step()
            self._has_worked()
            if wait is None:
                self.has_ended = True
            else:
                wait()
        except Ended:
            raise
        except BaseException as error:  # even a KeyboardInterrupt: no other code would see it
            self._has_failed(error)

    def _has_failed(self, error: BaseException) -> None:
        pause = self._longest_pause
        with suppress(Exception):
            now = self._clock.now()
            self._failures = 1 if now - self._failed_at > _CALM_SECONDS + self._longest_pause else self._failures + 1
            pause = min(FIRST_PAUSE_SECONDS * 2 ** min(self._failures - 1, 30), self._longest_pause)
            self._failed_at = now
            was_failing, self._is_failing = self._is_failing, True
            problem = f"the thread '{self._name}' failed: {described(error)}"
            self._quietly(self._note_problem, problem)
            if not was_failing and now - self._warned_at > _CALM_SECONDS:
                self._has_warned, self._warned_at = True, now
                self._quietly(self._warn, f"{problem}; it will be retried, and events are queued meanwhile.")
        # It would keep the frames of the failed step alive during the pause.
        del error
        try:
            self._clock.signal().wait(pause)
        except Exception:
            time.sleep(pause)

    def _has_worked(self) -> None:
        self._is_failing = False
        if self._has_warned:
            self._has_warned = False
            self._quietly(self._warn, f"the thread '{self._name}' works again.")

    @staticmethod
    def _quietly(do: Callable[[str], None], text: str) -> None:
        with suppress(BaseException):
            do(text)


def _end_threads() -> None:
    """End those threads of this package that would abort the process when the interpreter ends.

    Up to Python 3.13 the interpreter ends a daemon thread by `pthread_exit`, which unwinds its stack. The core of
    pydantic, which ZenML's models are made of, is written in Rust, and Rust aborts the process then (SIGABRT). So a
    thread that validates or imports at the process's end gets an exception first. Such a thread is in the middle of a
    backend's code, and not of a step under a journal's lock. Other threads are left alone. It relies on the GIL: no
    thread moves on while its frames are looked at
    (test_process_end.py::test_a_thread_that_is_in_pydantic_at_the_end_does_not_abort_the_process).
    """
    hook = threading.excepthook
    # Python would print it as an error that nothing has handled.
    threading.excepthook = lambda args: None if args.exc_type is Ended else hook(args)
    end = time.monotonic() + _END_SECONDS
    while (found := _threads_not_to_be_unwound()) and time.monotonic() < end:
        from ctypes import c_ulong, py_object, pythonapi

        for ident in found:
            pythonapi.PyThreadState_SetAsyncExc(c_ulong(ident), py_object(Ended))
        time.sleep(0.001)


def _threads_not_to_be_unwound() -> list[int]:
    frames = sys._current_frames()
    own = [
        thread for thread in threading.enumerate() if thread.daemon and thread.name.startswith("composite-logstore ")
    ]
    return [thread.ident for thread in own if thread.ident and _is_not_to_be_unwound(frames.get(thread.ident))]


def _is_not_to_be_unwound(frame: FrameType | None) -> bool:
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _NOT_TO_BE_UNWOUND):
            return True
        frame = frame.f_back
    return False


if sys.version_info < (3, 14):
    # Before `delivery.writers` registers its own, so it runs after that one.
    atexit.register(_end_threads)
