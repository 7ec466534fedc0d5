"""What a whole process logs and prints, in all of its threads; and which of a step's processes it is.

This module needs the standard library alone: `composite-logstore run` loads it into processes of any environment.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

RANK = "zenml.log.rank"
"""The attribute that says which one of the processes of a distributed training logged a record."""
PID = "process.pid"
"""The attribute with a process's id: OpenTelemetry's name."""

# The launchers' names for the rank among all processes, then the one for the rank on this machine.
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID", "LOCAL_RANK")
_MOST_DIGITS = 9
# How many records that a thread logs while it hands one over wait until it has done so.
_MOST_WAITING = 1_000

# The threads of exporters, and of libraries below them. They log about deliveries: to deliver these records, too, would
# never end.
_OWN_THREADS = ("composite-logstore ", "fsspecIO")

# How the lines begin that Ray's workers print for Ray alone: which task begins, and the state of a progress bar.
_FOR_RAY = (":job_id:", ":actor_name:", ":task_name:", '{"__magic_token__": "__ray_tqdm')

# A process and its rank; and a process and the size of its environment in which no rank was found.
_found: tuple[int, int] | None = None
_missed: tuple[int, int] | None = None
# The process that has joined the step that started it.
_joined: int | None = None


def rank() -> int | None:
    """Return this process's rank as its launcher or PyTorch tells it, None if neither does.

    Some launchers set it only after the process has begun, so it is looked for until it is found.
    """
    global _found, _missed
    process, size = os.getpid(), len(os.environ)
    if _found is not None and _found[0] == process:
        return _found[1]
    # To look takes long, and a variable that is set makes the environment larger.
    number = None if _missed == (process, size) else _rank_of_launcher()
    if number is None:
        _missed = (process, size)
        number = _rank_of_torch()
    if number is not None:
        _found = (process, number)
    return number


def _rank_of_launcher() -> int | None:
    for name in _RANKS:
        text = os.environ.get(name, "")
        # A batch job of Slurm has a rank itself, which all that it starts inherits.
        if name == "SLURM_PROCID" and os.environ.get("SLURM_NTASKS", os.environ.get("SLURM_STEP_NUM_TASKS")) == "1":
            continue
        if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS:
            return int(text)
    return None


def _rank_of_torch() -> int | None:
    """Return the rank that the program gave to `init_process_group`, as programs without a launcher do."""
    distributed = sys.modules.get("torch.distributed")
    with suppress(Exception):
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            return int(distributed.get_rank())
    return None


def attributes() -> dict[str, Any]:
    """Return the attributes of the records of this process."""
    number = rank()
    return {PID: os.getpid()} if number is None else {PID: os.getpid(), RANK: number}


def note_joined() -> None:
    """Note that this process has joined the step that started it."""
    global _joined
    _joined = os.getpid()


def has_joined() -> bool:
    """Return whether this process has joined the step that started it. The processes that it forks have not."""
    return _joined == os.getpid()


def may_be_killed() -> bool:
    """Return whether this process is killed in the ordinary course: as a worker of a `multiprocessing` pool, or of Ray.

    If a worker of Ray dies of something else, Ray tells the process that waits for its result.
    """
    multiprocessing = sys.modules.get("multiprocessing.process")
    with suppress(Exception):
        if multiprocessing is not None and multiprocessing.current_process().daemon:
            return True
    return _is_worker_of_ray()


def _is_worker_of_ray() -> bool:
    worker = sys.modules.get("ray._private.worker")
    with suppress(Exception):
        return worker is not None and bool(worker.global_worker.mode == worker.WORKER_MODE)
    return False


def is_own(record: logging.LogRecord) -> bool:
    """Return whether a record is about the delivery of records. Never raises, whatever the record's names are."""
    fields = vars(record)
    return _begins(fields.get("name"), "composite_logstore") or _begins(fields.get("threadName"), _OWN_THREADS)


def _begins(text: Any, beginnings: str | tuple[str, ...]) -> bool:
    # It may be anything, and override any method.
    return issubclass(type(text), str) and str.startswith(text, beginnings)


def has_context() -> bool:
    """Return whether ZenML itself collects what this thread logs and prints."""
    module = sys.modules.get("zenml.utils.logging_utils")
    get = getattr(getattr(module, "LoggingContext", None), "get", None)
    if get is None:
        # ZenML is not imported, or is of release 0.93.0, see composite_logstore/zenml.
        get = getattr(getattr(module, "active_logging_context", None), "get", None)
    return get is not None and get() is not None


def _is_shown(logger: logging.Logger, record: logging.LogRecord) -> bool:
    """Return whether a record reaches the root logger or, without propagation, a handler that shows it.

    Some libraries keep loggers for themselves, such as PyTorch's launcher for its events.
    """
    current: logging.Logger | None = logger
    while current is not None:
        for handler in current.handlers:
            if record.levelno >= handler.level and not isinstance(handler, logging.NullHandler):
                return True
        if not current.propagate:
            return False
        current = current.parent
    return True


class ProcessCapture:
    """Collects the records and prints of all threads of this process that have no logging context of ZenML.

    It changes neither loggers nor handlers, so that a program may configure logging before or after. It wraps the one
    method through which every logger hands a record to handlers, and the `write` of the two streams, as ZenML does.
    What a handler prints, such as `logging.StreamHandler`, is a record already, so it is no print.
    """

    def __init__(self, take: Callable[[logging.LogRecord], object]) -> None:
        """Prepare.

        Args:
            take: Takes each record in. A print is a record as ZenML makes it: the logger is `stdout` or `stderr`, and
                the record has no path.
        """
        self._take = take
        self._thread = _Thread()
        self._is_attached = False
        self._undo: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Begin to collect."""
        if self._is_attached:
            return
        self._is_attached = True
        self._wrap_loggers()
        for name, level in (("stdout", logging.INFO), ("stderr", logging.ERROR)):
            self._wrap_stream(name, level)

    def detach(self) -> None:
        """Collect nothing from now on."""
        self._is_attached = False
        while self._undo:
            self._undo.pop()()

    def _wrap_loggers(self) -> None:
        original = logging.Logger.callHandlers

        def call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
            if not self._is_attached:
                return original(logger, record)
            if _is_shown(logger, record):
                self._hand_over(record)
            before = self._thread.is_handling
            self._thread.is_handling = True
            try:
                original(logger, record)
            finally:
                self._thread.is_handling = before

        logging.Logger.callHandlers = call_handlers  # type: ignore[method-assign, assignment]

        def undo() -> None:
            # Somebody may have wrapped this one since: then it stays, and does nothing.
            if logging.Logger.callHandlers is call_handlers:
                logging.Logger.callHandlers = original  # type: ignore[method-assign]

        self._undo.append(undo)

    def _wrap_stream(self, name: str, level: int) -> None:
        stream = getattr(sys, name, None)
        original = getattr(stream, "write", None)
        if original is None:
            return

        def write(text: Any) -> Any:
            if (
                self._is_attached
                and isinstance(text, str)
                and not self._thread.is_handling
                and not (_begins(text, _FOR_RAY) and _is_worker_of_ray())
            ):
                self._hand_over(logging.LogRecord(name, level, "", 0, text, (), None, ""))
            return original(text)

        try:
            stream.write = write  # type: ignore[union-attr]
        except AttributeError:
            # A program's own stream may allow no attributes.
            return

        def undo() -> None:
            if getattr(stream, "write", None) is write:
                stream.write = original  # type: ignore[union-attr]

        self._undo.append(undo)

    def _hand_over(self, record: logging.LogRecord) -> None:
        thread = self._thread
        if thread.is_taking:
            # A value of a record logs when it is shown, or a signal handler or a finalizer does meanwhile. What the
            # records that have waited cause in turn would never end.
            if not thread.has_waited and len(thread.waiting) < _MOST_WAITING:
                thread.waiting.append(record)
            return
        thread.is_taking = True
        try:
            self._take_in(record)
            thread.has_waited = True
            while thread.waiting:
                self._take_in(thread.waiting.popleft())
        finally:
            thread.is_taking = thread.has_waited = False

    def _take_in(self, record: logging.LogRecord) -> None:
        try:
            if not is_own(record) and not has_context():
                self._take(record)
        except Exception:
            # To report it would be one more record.
            pass


class _Thread(threading.local):
    """What a thread is doing.

    Attributes:
        is_handling: Whether it is in a handler of `logging`.
        is_taking: Whether it hands over a record.
        waiting: The records that it has logged meanwhile.
        has_waited: Whether it hands over one of these.
    """

    def __init__(self) -> None:
        self.is_handling = self.is_taking = self.has_waited = False
        self.waiting: deque[logging.LogRecord] = deque()
