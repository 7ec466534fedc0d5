"""Joins a process to the logs of the step that started it, and threads to the logs of the step that runs."""

from __future__ import annotations

import contextvars
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import UUID

from composite_logstore import zenml
from composite_logstore.capture.open_streams import VARIABLE, Board, OpenStream, Reference, current, here
from composite_logstore.capture.process import PID, ProcessCapture, attributes, note_joined
from composite_logstore.handler import logging_left_alone
from composite_logstore.inert import InertError, described
from composite_logstore.service import tell

if TYPE_CHECKING:
    from composite_logstore.log_store import CompositeLogStore

logger = logging.getLogger(__name__)

JOIN_SECONDS = 120.0
"""How long a process waits for a ZenML that can be reached before it continues without: on a machine that starts many
processes at once, its answers take long. One that cannot be reached is given up after 5 s."""

Result = TypeVar("Result")


class Joined:
    """This process's part in a step's stream.

    Attributes:
        stream_id: The id of the stream.
    """

    def __init__(self, store: CompositeLogStore, stream: OpenStream, board: Board) -> None:
        """Begin.

        Args:
            store: The log store.
            stream: The stream.
            board: Tells which streams are open in the process that runs the step.
        """
        self._store = store
        self._board = board
        self._lock = threading.Lock()
        self._origin = store.join_stream(stream)
        self.stream_id = stream.id

    def take(self, record: logging.LogRecord, given: dict[str, Any] | None = None) -> None:
        """Collect a record. Never raises, and never waits for a backend.

        Args:
            record: The record.
            given: The attributes of the process that logged it, this one's if not given.
        """
        found = self._board.follow(self.stream_id, self._store.id)
        if found is not None:
            with self._lock:
                if found.id != self.stream_id:
                    self._origin, self.stream_id = self._store.join_stream(found), found.id
        # Imported with the log store, and not before.
        from composite_logstore.capture.lines import hand_on

        own = attributes() if given is None else given
        source = own.get(PID), record.thread
        hand_on(record, self._store.emit, self._origin, record, own, source=source)

    def flush(self) -> None:
        """Deliver what was collected by now, as the log store's `flush` does."""
        self._store.flush()

    def after_fork_in_child(self) -> None:
        """Replace the lock, which another thread may have held during the fork."""
        self._lock = threading.Lock()


def find(text: str) -> Joined:
    """Return this process's part in the stream that the environment variable names.

    Raises:
        LookupError: There is no such stream, or it cannot be told which one of several is meant.
        NoAnswerError: ZenML cannot be reached.
    """
    from composite_logstore.capture import zenml_handler
    from composite_logstore.catalog.errors import asking_zenml
    from composite_logstore.log_store import CompositeLogStore, existing_stream, inherited_store, opened_store

    reference = Reference.parse(text)
    if reference is None:
        raise LookupError(f"the environment variable {VARIABLE} names no stream")
    board = Board(reference.board)
    streams = board.streams() or []
    step, is_ambiguous = current(streams)
    stream = next((stream for stream in streams if stream.id == reference.stream_id), None) or step
    if stream is None and reference.stream_id is None:
        raise LookupError("several steps run in the process that started this one, which may belong to any of them")
    store = inherited_store(reference.store_id)
    if store is None or stream is None:
        with asking_zenml():
            try:
                store = opened_store(reference.store_id)
                if stream is None and reference.stream_id is not None:
                    # The step has ended, or there is no board on this machine.
                    stream = existing_stream(store.id, reference.stream_id)
            except KeyError:
                store = None
    if stream is None or not isinstance(store, CompositeLogStore):
        raise LookupError("the step's log store, or its stream, no longer exists")
    # What is collected here does not come through ZenML's handler.
    zenml_handler.has_warned = True
    if is_ambiguous and stream.source != "step":
        _warn("Several steps run in the process that started this one, so its logs become logs of the run.")
    return Joined(store, stream, board)


class _Joining:
    """How this process joins, once."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.joined: Joined | None = None
        self.has_failed_for = ""

    def after_fork_in_child(self) -> None:
        """Replace locks that another thread may have held during the fork."""
        self.lock = threading.RLock()
        if self.joined is not None:
            self.joined.after_fork_in_child()

    def join(self) -> UUID | None:
        """Join, as the public function does."""
        with self.lock:
            if self.joined is not None:
                return self.joined.stream_id
            text = os.environ.get(VARIABLE, "")
            if not text or text == self.has_failed_for:
                return None
            if here.is_told_by_this_process():
                found, _ = current(here)
                return found.id if found else None
            if is_below_run():
                reference = Reference.parse(text)
                return reference.stream_id if reference else None
            self.joined = find_in_time(text)
            if self.joined is None:
                self.has_failed_for = text
                return None
            note_joined()
            from composite_logstore.log_store import adopting

            # In a forked process, the threads that its parent adopts are collected here.
            adopting.detach()
            ProcessCapture(self.joined.take).attach()
            _flush_at_the_end_of_a_pool(self.joined)
            return self.joined.stream_id


_joining = _Joining()
os.register_at_fork(after_in_child=_joining.after_fork_in_child)


def join() -> UUID | None:
    """Collect what this process logs and prints from now on, as logs of the step that started it.

    For a process that a step has started in any way: with `subprocess`, `multiprocessing`, a launcher of distributed
    training, or a pool. It finds the step's stream through the environment. Records of all threads are collected, with
    the attributes `process.pid` and, if there is one, `zenml.log.rank`. When that step has ended and another one runs
    in the process that started this one, the records become the other one's. A further call does nothing, nor does one
    in the step's own process, or in a program that no step has started.

    Returns:
        The id of ZenML's `LogsResponse`; None if there is no stream to join. It never raises: if ZenML cannot be
        reached, it warns once, and the program continues.
    """
    try:
        return _joining.join()
    except Exception as error:
        _warn(f"This process cannot join the logs of its step: {described(error)}. It continues without them.")
        return None


def is_below_run() -> bool:
    """Return whether `composite-logstore run` collects from this process."""
    sender = getattr(sys.modules.get("_composite_logstore_sender"), "sender", None)
    return bool(getattr(sender, "is_connected", False))


def find_in_time(text: str) -> Joined | None:
    """Return what `find` does, None after a warning if it fails or takes longer than `JOIN_SECONDS`."""
    found: list[Joined] = []
    failures: list[str] = []
    with logging_left_alone() if logging.root.handlers else nullcontext():
        # Here, since an import may take long. A program that has not configured logging gets what ZenML
        # configures, as in the step's own process.
        import composite_logstore.catalog.errors
        import composite_logstore.log_store  # noqa: F401

    def look() -> None:
        try:
            found.append(find(text))
        except Exception as error:
            failures.append(str(error) if isinstance(error, LookupError | InertError) else described(error))

    # A daemon: a ZenML server that does not answer keeps no process from ending.
    thread = threading.Thread(target=look, name="composite-logstore join", daemon=True)
    thread.start()
    thread.join(JOIN_SECONDS)
    if found:
        return found[0]
    why = failures[0] if failures else f"ZenML has not answered within {JOIN_SECONDS:.0f} s"
    _warn(f"This process cannot join the logs of its step: {why.rstrip('.')}. It continues without them.")
    return None


def _flush_at_the_end_of_a_pool(joined: Joined) -> None:
    """Have `multiprocessing` flush when a process of it ends: its processes skip the exit handlers."""
    from multiprocessing import process, util

    if process.parent_process() is not None:
        # After what the program itself does at that point, which has a higher priority.
        util.Finalize(None, joined.flush, exitpriority=-100)


def _warn(text: str) -> None:
    tell(logger.warning, text)


class _InContext(Generic[Result]):
    """A function that logs to the stream that was active where it was made."""

    def __init__(self, function: Callable[..., Result]) -> None:
        self._function = function
        self._context: contextvars.Context | None = contextvars.copy_context()
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *arguments: Any, **keywords: Any) -> Result:
        # A context can be entered only once at a time, but several threads may run the function.
        assert self._context is not None
        return self._context.copy().run(self._run, *arguments, **keywords)

    def _run(self, *arguments: Any, **keywords: Any) -> Result:
        context = zenml.active_context()
        if context is not None:
            # While one thread hands over a record, ZenML disables the context, and would lose the records of others.
            own = copy(context)
            own._disabled = False
            zenml.activate(own)
        return self._function(*arguments, **keywords)

    def __reduce__(self) -> Any:
        # A context stays in its process.
        return _Elsewhere, (self._function,)


class _Elsewhere(Generic[Result]):
    """The same function in another process, which joins the step's stream before it runs the function."""

    def __init__(self, function: Callable[..., Result]) -> None:
        self._function = function
        functools.update_wrapper(self, function, updated=())

    def __call__(self, *arguments: Any, **keywords: Any) -> Result:
        join()
        return self._function(*arguments, **keywords)

    def __reduce__(self) -> Any:
        return _Elsewhere, (self._function,)


def in_context(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return a function that logs to the step's stream, in whichever thread or process an executor runs it.

    A thread that a step starts has no logging context of ZenML, so ZenML loses what it logs and prints. In a
    process, the function calls `join()` first.

    Examples:
        >>> with ThreadPoolExecutor() as pool:
        ...     pool.map(in_context(evaluate), batches)

    Args:
        function: The function. For an executor of processes it has to be one that can be pickled.
    """
    return _InContext(function)
