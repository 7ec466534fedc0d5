"""Handlers of Python's `logging`, for programs outside of ZenML's pipelines and for `store.activate()`."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4, uuid5

from composite_logstore.capture.process import is_own
from composite_logstore.capture.record import note

if TYPE_CHECKING:
    from composite_logstore.child_config import ChildConfig
    from composite_logstore.config import CompositeLogStoreConfig
    from composite_logstore.delivery.writer import Writer
    from composite_logstore.event import Stream

_PROGRAMS = UUID("7c1f0a4e-5a53-4f0e-9d0e-2f6c5c0b6a11")


class _NoLock(nullcontext[None]):
    """Looks like a lock to `logging`, and locks nothing."""

    def acquire(self) -> None:
        pass

    def release(self) -> None:
        pass


class RecordHandler(logging.Handler):
    """Hands each record to a stream of a writer. Never waits for a backend, and never raises."""

    def __init__(self, writer: Writer, stream: Stream, level: int | str = logging.NOTSET) -> None:
        """Prepare; the handler gets records once it is attached to a logger.

        Args:
            writer: The writer.
            stream: The stream that the records belong to.
            level: The handler ignores records below this level.
        """
        super().__init__(level)
        self._writer = writer
        self._stream = stream
        self._found: dict[logging.Logger, tuple[int, int]] = {}

    def createLock(self) -> None:
        """Use a lock that locks nothing: `emit` needs none, and a flush that held one would keep threads from logging.

        It cannot be None: Python 3.13 enters the lock of each handler without a check.
        """
        self.lock = _NoLock()  # type: ignore[assignment]

    def emit(self, record: logging.LogRecord) -> None:
        """Capture a record, unless it is about the delivery of records."""
        if is_own(record):
            return
        try:
            self._writer.append(self._stream, note(record))
        except Exception:
            self.handleError(record)

    def attach(self, logger: logging.Logger | str | None = None, level: int | str | None = None) -> None:
        """Add this handler to a logger, unless the logger has it already.

        Args:
            logger: The logger or its name; the root logger if not given.
            level: The logger's level is lowered to this one, which affects all of its handlers. It is never raised.
                It stays as it is if no level is given.
        """
        logger = _logger(logger)
        if self in logger.handlers:
            return
        found = logger.level
        # `logging` has no public function for a level's number before Python 3.11. A handler's raises for a wrong one.
        if level is not None and logging.Handler(level).level < logger.getEffectiveLevel():
            logger.setLevel(level)
        self._found[logger] = (found, logger.level)
        logger.addHandler(self)

    def detach(self, logger: logging.Logger | str | None = None) -> None:
        """Remove this handler from a logger, and restore the logger's level from before `attach`.

        A level that was set since then stays as it is.

        Args:
            logger: The logger or its name; the root logger if not given.
        """
        logger = _logger(logger)
        logger.removeHandler(self)
        if logger in self._found:
            found, set_to = self._found.pop(logger)
            if logger.level == set_to != found:
                logger.setLevel(found)


class CompositeHandler(RecordHandler):
    """A logging handler that sends every record to all its children, with the guarantees of the log store.

    It works in any Python program, and in a dictionary of `logging.config`.
    """

    def __init__(
        self,
        program: str,
        children: Sequence[Mapping[str, Any] | ChildConfig],
        level: int | str = logging.NOTSET,
        attributes: Mapping[str, Any] | None = None,
        stream_id: UUID | str | None = None,
        **settings: Any,
    ) -> None:
        """Prepare; connections and threads start with the first record.

        Args:
            program: The program's name, which becomes the stream's `zenml.log_store.name`. A later process with the
                same name and settings delivers the events that this one leaves on disk.
            children: The children, with the same settings as in a log store.
            level: The handler ignores records below this level.
            attributes: More attributes of all records.
            stream_id: The stream's `zenml.log.id`; a new one if not given.
            settings: The settings of a log store, such as `durability` and `flush_timeout_millis`, except `primary`
                and `fetch_fallback`: a handler reads nothing.

        Raises:
            ValueError: A setting is wrong. The message names the child, the setting and the fix.
        """
        with logging_left_alone():
            from composite_logstore.config import HandlerConfig
            from composite_logstore.delivery.writers import use
        if not program:
            raise ValueError("'program' is empty; set it to the program's name")
        self._config: CompositeLogStoreConfig = HandlerConfig(**{"children": list(children), **settings})
        id = uuid5(_PROGRAMS, program)
        self._component_id = id
        writer = use(id, self._config)
        stream_id = UUID(str(stream_id)) if stream_id else uuid4()
        metadata = {
            **(attributes or {}),
            "zenml.log.id": str(stream_id),
            "zenml.log.source": "python",
            "zenml.log_store.id": str(id),
            "zenml.log_store.name": program,
        }
        super().__init__(writer, writer.stream(stream_id, metadata, None), level)
        # Empty when the handler is closed. `list.pop` is one C call, so only one of two threads gets the writer.
        self._used: list[Writer] = [writer]
        self._is_exiting = False
        # Registered after the writers' exit handler, so it runs before that one, which delivers within 3 s. `logging`
        # flushes its handlers last: that flush then has to do nothing.
        atexit.register(self._exit)

    @property
    def stream_id(self) -> UUID:
        """The id of the records' stream, `zenml.log.id` in every backend."""
        return self._stream.id

    def stats(self) -> dict[str, dict[str, Any]]:
        """Return the account of this process's events for each enabled child's name, as a log store does."""
        return {name: asdict(stats) for name, stats in self._writer.stats().items()}

    def flush(self) -> None:
        """Deliver all records captured by now, within `flush_limit_millis`, as a log store does."""
        if not self._is_exiting:
            config = self._config
            self._writer.flush(config.flush_timeout_millis / 1000, config.flush_limit_millis / 1000)

    def emit(self, record: logging.LogRecord) -> None:
        """Capture a record, unless it is about the delivery of records. Reopens a closed handler."""
        if not self._used:
            self._open_again()
        super().emit(record)

    def _open_again(self) -> None:
        from composite_logstore.delivery.writers import use

        writer = use(self._component_id, self._config)
        self._stream = writer.stream(self._stream.id, self._stream.metadata, None)
        self._writer = writer
        self._used.append(writer)

    def close(self) -> None:
        """Detach from all loggers, end the stream, flush, and give back threads and connections.

        Records that cannot be delivered now stay on disk for the next handler or process of the program. With
        `durability` `memory`, the threads continue until they are delivered. Threads and connections that another
        handler of the program uses continue, too.
        """
        try:
            writer = self._used.pop()
        except IndexError:
            return
        for logger in list(self._found):
            self.detach(logger)
        self._writer.end_stream(self._stream)
        self.flush()
        atexit.unregister(self._exit)
        super().close()
        if not self._is_exiting:
            from composite_logstore.delivery.writers import release

            release(writer)

    def _exit(self) -> None:
        self._is_exiting = True


def _logger(logger: logging.Logger | str | None) -> logging.Logger:
    return logger if isinstance(logger, logging.Logger) else logging.getLogger(logger)


@contextmanager
def logging_left_alone() -> Iterator[None]:
    """Undo the changes that importing ZenML makes to the root logger: its level, and handlers that print."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
