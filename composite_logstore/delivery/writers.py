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
"""How much of it may go to exporters that need an executor. Later events have the rest."""

_writers: dict[tuple[UUID, str], Writer] = {}
_writers_lock = threading.RLock()  # a signal handler may log, for the first time, while the first writer is made


def writer_of(component_id: UUID, config: CompositeLogStoreConfig) -> Writer:
    """Return this process's writer for a component.

    ZenML may build a component more than once in a process. All instances with the same settings share one writer,
    so that a child has one queue and one order. Instances built after an update of the component get a new writer.
    """
    key = (component_id, config.model_dump_json())
    with _writers_lock:
        if key not in _writers:
            # If this fails, the next writer tries again.
            with suppress(Exception):
                _offer_metrics()
            _writers.setdefault(key, Writer(component_id, config))
        return _writers[key]


# How many handlers use each writer; and the writers that no handler uses any more, but that have not ended.
_users: Counter[Writer] = Counter()
_unneeded: set[Writer] = set()


def use(component_id: UUID, config: CompositeLogStoreConfig) -> Writer:
    """Return the writer as `writer_of` does, for a handler that gives it back with `release`."""
    with _writers_lock:
        writer = writer_of(component_id, config)
        _users[writer] += 1
        return writer


def release(writer: Writer) -> None:
    """End a writer that no handler uses any more, now or, if its events cannot wait on disk, at a later release.

    Args:
        writer: A writer that `use` has returned.
    """
    with _writers_lock:
        _users[writer] -= 1
        if _users[writer] > 0:
            return
        del _users[writer]
        for component_id, settings in _forget(writer):
            # Under another key: the next `use` makes a new writer, and the process's exit still closes this one.
            _writers[component_id, f"{settings} {writer.writer_id}"] = writer
        _unneeded.add(writer)
        unneeded = list(_unneeded)
    for writer in unneeded:
        try:
            if writer.end():
                with _writers_lock:
                    _forget(writer)
                    _unneeded.discard(writer)
        except Exception as error:
            tell(logger.debug, "A writer could not be ended: %s", described(error))


def _forget(writer: Writer) -> list[tuple[UUID, str]]:
    """Remove a writer from those of this process. Returns the keys that it had."""
    keys = [key for key, other in _writers.items() if other is writer]
    for key in keys:
        del _writers[key]
    return keys


@lru_cache(maxsize=1)
def _offer_metrics() -> None:
    metrics.observe(lambda: [child for writer in list(_writers.values()) for child in writer.observed()])


_seconds_left = EXIT_SECONDS


def _deliver_with_executors() -> None:
    """Deliver events from before the end of the main thread, while exporters can still use executors.

    `concurrent.futures` shuts its executors down before any exit handler runs. Without them s3fs, for one, cannot even
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


def _after_fork_in_child() -> None:
    global _writers_lock
    _writers_lock = threading.RLock()
    _each(Writer.after_fork_in_child)


def _each(do: Callable[[Writer], None]) -> None:
    """Call a function for every writer, even if it raises for another one."""
    for writer in list(_writers.values()):
        try:
            do(writer)
        except Exception as error:
            tell(logger.debug, "A writer could not be closed, or carried over a fork: %s", described(error))


# The order of these registrations matters; tests/integration/test_process_end.py and tests/unit/test_fork.py hold it.
#
# 1. `weakref` runs all finalizers, such as s3fs's, in one exit handler, which it registers with the first of them. Exit
#    handlers run in the reverse order, so this finalizer makes sure that `_close_all` is registered later and runs
#    earlier, while backends' connections are still open.
weakref.finalize(CompositeLogStoreConfig, bool)
atexit.register(_close_all)
# 2. These handlers, too, run in the reverse order, before the exit handlers. `concurrent.futures.thread` registers its
#    own on import, hence the import above, and this one has to run before it. No public function runs that early: even
#    a thread that joins the main thread learns of its end only after the executors have.
with suppress(AttributeError, RuntimeError):
    threading._register_atexit(_deliver_with_executors)  # type: ignore[attr-defined]
# 3. `loading` and `spool.lock` register on import, so earlier. Handlers before a fork run in the reverse order: first
#    the inbox is made, then the fork waits for backends that are being loaded. Handlers in the forked process run in
#    this order: it lets go of the locks of its parent's spools, then its writers begin anew.
os.register_at_fork(
    before=lambda: _each(Writer.before_fork),
    after_in_parent=lambda: _each(Writer.after_fork_in_parent),
    after_in_child=_after_fork_in_child,
)
