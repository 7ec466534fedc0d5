"""Simulated time and threads: hours of outages in milliseconds, the same way each time."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

from composite_logstore import clock


class _Task:
    def __init__(self, name: str) -> None:
        self.name = name
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.until: float | None = None
        self.thread: threading.Thread | None = None


class SimulatedClock(clock.Clock):
    """A clock that stands still while anything is being done, and jumps when everything waits.

    Its threads are real ones, of which one runs at a time: it runs until it waits, for time to pass or for
    another thread. So a log store runs as it is, but in simulated time and in an order that the seed alone
    decides. Use it as a context: the log stores that are built inside live by it.

        with SimulatedClock() as clock:
            store = ...
            store.emit(origin, record)
            clock.advance(3600)
    """

    def __init__(self, seed: int = 0) -> None:
        """Begin at 1000 seconds.

        Args:
            seed: Decides the order of threads that could all go on, and the jitter of retries.
        """
        self._seed = seed
        self._now = 1000.0
        self._test = _Task("test")
        self._tasks: dict[int, _Task] = {}
        self._killed: list[_Task] = []
        self._is_over = False

    def __enter__(self) -> SimulatedClock:
        """Let the log stores that are built from now on live by this clock."""
        self._tasks[threading.get_ident()] = self._test
        self._real, clock.current = clock.current, self
        return self

    def __exit__(self, *_: object) -> None:
        """End the simulated threads, whatever they wait for."""
        clock.current = self._real
        self._is_over = True
        for task in [*self._tasks.values(), *self._killed]:
            if task.thread is not None:
                task.turn.release()
                task.thread.join()

    # For tests and simulated backends

    def advance(self, seconds: float) -> None:
        """Let so much time pass, and everything happen that happens in it."""
        self.wait_until(lambda: False, seconds)

    def wait_until(self, ready: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until something is true.

        Args:
            ready: Tells whether it is.
            seconds: How long to wait at most; without end if not given.

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

    @property
    def threads(self) -> list[str]:
        """The names of the simulated threads that there are."""
        return [task.name for task in self._tasks.values() if task is not self._test]

    def kill(self) -> None:
        """Let the simulated threads do nothing any more, as if their process had been killed."""
        for thread in [thread for thread, task in self._tasks.items() if task is not self._test]:
            self._killed.append(self._tasks.pop(thread))

    # What the log store uses

    def now(self) -> float:
        """Return the simulated time in seconds."""
        return self._now

    def signal(self) -> Any:
        """Return what a simulated thread can wait for."""
        return _Signal(self)

    def condition(self, lock: Any) -> Any:
        """Return a condition that simulated threads can wait for under the lock."""
        return _Condition(self, lock)

    def random(self, name: str) -> Callable[[], float]:
        """Return numbers that depend on the seed and on the child's name alone."""
        return random.Random(f"{self._seed} {name}").random

    def start(self, run: Callable[[], None], name: str) -> None:
        """Run something in a simulated thread. It begins when the thread that starts it waits."""
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
        """Return the task that goes on now. The test itself goes on when nothing else can."""
        while True:
            others = [task for task in self._tasks.values() if task is not self._test and self._can_go_on(task)]
            if others:
                return min(others, key=self._place)
            if self._can_go_on(self._test):
                return self._test
            times = [task.until for task in self._tasks.values() if task.until is not None]
            if not times:
                raise RuntimeError(f"everything waits for ever: {', '.join(t.name for t in self._tasks.values())}")
            self._now = min(times)

    def _place(self, task: _Task) -> float:
        """Return a number by which tasks are ordered: of two, the seed decides, whatever a third one does."""
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
        # As `threading.Condition` does it: a reentrant lock is released however often it is held.
        held = self._lock._release_save()
        try:
            return self._clock.wait_until(lambda: self._notified != before, timeout)
        finally:
            self._lock._acquire_restore(held)
