"""All writers of this process: one for each component and its settings, over forks and to the process's end."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  (see the end of this file)
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from uuid import UUID

from zenml.logger import get_logger

from composite_logstore import clock
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.delivery import metrics
from composite_logstore.delivery.writer import Writer
from composite_logstore.inert import described
from composite_logstore.service import tell

logger = get_logger(__name__)

EXIT_SECONDS = 3.0
"""How long the process's own exit may take: ZenML's local deployer kills after 5 s."""
_WITH_EXECUTORS_SECONDS = 2.0
"""How much of it is for what needs an executor. What is logged later still has the rest."""

_writers: dict[tuple[UUID, str], Writer] = {}
_writers_lock = threading.RLock()  # a signal handler may log, for the first time, while the first writer is made


def writer_of(component_id: UUID, config: CompositeLogStoreConfig) -> Writer:
    """Return this process's writer for a component.

    ZenML may build a component more than once in a process. All instances with the same settings share
    one writer, so that a child has one queue and one order; after an update of the component new
    instances get a new one.
    """
    key = (component_id, config.model_dump_json())
    with _writers_lock:
        if key not in _writers:
            # The next writer offers them again.
            with suppress(Exception):
                _offer_metrics()
            _writers.setdefault(key, Writer(component_id, config))
        return _writers[key]


# How many use a writer, of those that can end; and what nobody uses any more, but has not ended.
_users: Counter[Writer] = Counter()
_unneeded: list[Writer] = []


def use(component_id: UUID, config: CompositeLogStoreConfig) -> Writer:
    """Return the writer as `writer_of` does, for somebody who gives it back with `release`."""
    with _writers_lock:
        writer = writer_of(component_id, config)
        _users[writer] += 1
        return writer


def release(writer: Writer) -> None:
    """Have a writer end, if nobody uses it any more: now, or when its events are delivered and another one is released.

    Args:
        writer: One that `use` has returned.
    """
    with _writers_lock:
        _users[writer] -= 1
        if _users[writer] > 0:
            return
        del _users[writer]
        for component_id, settings in _forget(writer):
            # The next `use` makes a new writer, and the process's end still closes this one.
            _writers[component_id, f"{settings} {writer.writer_id}"] = writer
        _unneeded.append(writer)
        unneeded = list(_unneeded)
    for writer in unneeded:
        try:
            has_ended = writer.end()
        except Exception as error:
            tell(logger.debug, "A writer could not be ended: %s", described(error))
            continue
        if has_ended:
            with _writers_lock:
                _forget(writer)
                if writer in _unneeded:
                    _unneeded.remove(writer)


def _forget(writer: Writer) -> list[tuple[UUID, str]]:
    """Take a writer from those of this process. Returns the keys under which it was there."""
    keys = [key for key, other in _writers.items() if other is writer]
    for key in keys:
        del _writers[key]
    return keys


@lru_cache(maxsize=1)
def _offer_metrics() -> None:
    metrics.observe(lambda: [child for writer in list(_writers.values()) for child in writer.observed()])


_seconds_left = EXIT_SECONDS


def _deliver_with_executors() -> None:
    """Deliver what was logged by the end of the main thread, as long as exporters can use executors.

    `concurrent.futures` shuts its executors down before any exit handler runs, and without them s3fs, say, cannot even
    look up a host.
    """
    global _seconds_left
    began = clock.current.now()
    end = began + _WITH_EXECUTORS_SECONDS
    try:
        _each(lambda writer: writer.flush(seconds := max(0.0, end - clock.current.now()), seconds))
    finally:
        _seconds_left = EXIT_SECONDS - (clock.current.now() - began)


def _close_all() -> None:
    end = clock.current.now() + _seconds_left
    _each(lambda writer: writer.close(max(0.0, end - clock.current.now())))


def _before_fork() -> None:
    _each(Writer.before_fork)


def _after_fork_in_parent() -> None:
    _each(Writer.after_fork_in_parent)


def _after_fork_in_child() -> None:
    global _writers_lock
    _writers_lock = threading.RLock()
    _each(Writer.after_fork_in_child)


def _each(do: Callable[[Writer], None]) -> None:
    """Do something with every writer: what fails with one must not cost another anything."""
    for writer in list(_writers.values()):
        try:
            do(writer)
        except Exception as error:
            tell(logger.debug, "A writer could not be closed, or carried over a fork: %s", described(error))


# What backends use is taken apart at the process's end by finalizers such as s3fs has: all in one exit handler, which
# is registered with the first of them. Handlers are called the last one first, so ours has to be the later one.
weakref.finalize(CompositeLogStoreConfig, bool)
atexit.register(_close_all)
# Nothing public runs earlier: a thread that waits for the main thread's end is not told of it before the executors are.
# These handlers are called the last one first as well, and that of `concurrent.futures` is registered on its import.
with suppress(AttributeError, RuntimeError):
    threading._register_atexit(_deliver_with_executors)  # type: ignore[attr-defined]
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
