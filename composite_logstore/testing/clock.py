"""Simulated time and threads: tests run through hours of outages in milliseconds, in a reproducible order."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

from composite_logstore import clock

_BEGAN = 1_767_225_600
"""The simulated clock begins at this time, the first second of 2026 in UTC, in seconds since the epoch."""


class _Task:
    def __init__(self, name: str) -> None:
        self.name = name
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.until: float | None = None
        self.thread: threading.Thread | None = None


class SimulatedClock(clock.Clock):
    """A clock that stands still while a thread works, and jumps ahead when all threads wait.

    Its threads are real ones, but only one runs at a time, until it waits for a time or for another thread. So a log
    store runs unchanged, but in simulated time, and only the seed decides the order of its threads. Use the clock as a
    context: it applies to the log stores that are built inside.

        with SimulatedClock() as clock:
            store = ...
            store.emit(origin, record)
            clock.advance(3600)
    """

    def __init__(self, seed: int = 0) -> None:
        """Begin at 1000 seconds.

        Args:
            seed: Decides which of several ready threads runs next, and the jitter of retries.
        """
        self._seed = seed
        self._now = 1000.0
        self._epoch = _BEGAN - self._now
        self._test = _Task("test")
        self._tasks: dict[int, _Task] = {}
        self._killed: list[_Task] = []
        self._is_over = False

    def __enter__(self) -> SimulatedClock:
        """Use this clock for all log stores that are built from now on."""
        self._tasks[threading.get_ident()] = self._test
        self._real, clock.current = clock.current, self
        return self

    def __exit__(self, *_: object) -> None:
        """End all simulated threads."""
        clock.current = self._real
        self._is_over = True
        for task in [*self._tasks.values(), *self._killed]:
            if task.thread is not None:
                task.turn.release()
                task.thread.join()

    # For tests and simulated backends

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass, in which all threads do their work."""
        self.wait_until(lambda: False, seconds)

    def wait_until(self, ready: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until a condition is true.

        Args:
            ready: Returns whether it is true.
            seconds: How long to wait at most, in simulated seconds; for ever if not given.

        Returns:
            Whether it is true.
        """
        if self._is_over:
            raise clock.Ended
        task = self._tasks[threading.get_ident()]
        task.ready = ready
        task.until = None if seconds is None else self._now + seconds
        self._hand_on(task)
        return ready()

    def step(self, seconds: float) -> None:
        """Let the system's clock step ahead or, by a negative number, back: `time` does, and `now` does not."""
        self._epoch += seconds

    @property
    def threads(self) -> list[str]:
        """The names of the simulated threads."""
        return [task.name for task in self._tasks.values() if task is not self._test]

    def kill(self) -> None:
        """Stop the simulated threads where they are, as if their process had been killed."""
        for thread in [thread for thread, task in self._tasks.items() if task is not self._test]:
            self._killed.append(self._tasks.pop(thread))

    # What the log store uses

    def now(self) -> float:
        """Return the simulated time in seconds."""
        return self._now

    def time(self) -> float:
        """Return the simulated time in seconds since the epoch; at first it is midnight in UTC."""
        return self._epoch + self._now

    def signal(self) -> Any:
        """Return a signal that one simulated thread can wait for."""
        return _Signal(self)

    def condition(self, lock: Any) -> Any:
        """Return a condition that simulated threads can wait for under the lock."""
        return _Condition(self, lock)

    def random(self, name: str) -> Callable[[], float]:
        """Return a function whose random numbers depend only on the seed and the child's name."""
        return random.Random(f"{self._seed} {name}").random

    def start(self, run: Callable[[], None], name: str) -> None:
        """Run a function in a simulated thread. It begins when the current thread waits."""
        task = _Task(name)

        def body() -> None:
            task.turn.acquire()
            try:
                if not self._is_over:
                    run()
            except clock.Ended:
                pass
            finally:
                self._tasks.pop(threading.get_ident(), None)
                if not self._is_over:
                    self._next().turn.release()

        # A real thread, in the context that the real clock gives to threads.
        task.thread = threading.Thread(target=body, name=name, daemon=True)
        task.thread.start()
        self._tasks[task.thread.ident or 0] = task

    def _hand_on(self, task: _Task) -> None:
        if not self._is_over:
            successor = self._next()
            if successor is task:
                return
            successor.turn.release()
            task.turn.acquire()
        if self._is_over:
            raise clock.Ended

    def _next(self) -> _Task:
        """Return the task that runs next: the test itself only if no other task is ready."""
        while True:
            others = [task for task in self._tasks.values() if task is not self._test and self._can_go_on(task)]
            if others:
                return min(others, key=self._place)
            if self._can_go_on(self._test):
                return self._test
            times = [task.until for task in self._tasks.values() if task.until is not None]
            if not times:
                raise RuntimeError(f"all threads wait for ever: {', '.join(t.name for t in self._tasks.values())}")
            self._now = min(times)

    def _place(self, task: _Task) -> float:
        """Return a number that orders ready tasks. The order of two tasks does not depend on a third one."""
        return random.Random(f"{self._seed} {task.name} {self._now}").random()

    def _can_go_on(self, task: _Task) -> bool:
        return task.ready() or (task.until is not None and task.until <= self._now)


class _Signal:
    def __init__(self, clock: SimulatedClock) -> None:
        self._clock = clock
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def wait(self, seconds: float | None = None) -> bool:
        was_set = self._clock.wait_until(lambda: self._is_set, seconds)
        self._is_set = False
        return was_set


class _Condition:
    def __init__(self, clock: SimulatedClock, lock: Any) -> None:
        self._clock = clock
        self._lock = lock
        self._notified = 0

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def notify_all(self) -> None:
        self._notified += 1

    def wait(self, timeout: float | None = None) -> bool:
        before = self._notified
        # Like `threading.Condition`: a reentrant lock may be held several times, and is released completely.
        held = self._lock._release_save()
        try:
            return self._clock.wait_until(lambda: self._notified != before, timeout)
        finally:
            self._lock._acquire_restore(held)
