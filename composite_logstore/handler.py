"""Records straight from Python's `logging`: for programs that are no ZenML pipelines, and for `store.activate()`."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4, uuid5

from composite_logstore.capture.record import note

if TYPE_CHECKING:
    from composite_logstore.config import ChildConfig, CompositeLogStoreConfig
    from composite_logstore.delivery.writer import Writer
    from composite_logstore.event import Stream

_PROGRAMS = UUID("7c1f0a4e-5a53-4f0e-9d0e-2f6c5c0b6a11")

# Where exporters and what they build on run. What is logged there is about the delivery of records: as records
# of their own these would never come to an end.
_OWN_THREADS = ("composite-logstore ", "fsspecIO")


class _NoLock:
    """What `logging` takes for a handler's lock."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: object) -> None:
        pass


class RecordHandler(logging.Handler):
    """Hands each record to a stream of a writer. Waits for no backend, and raises for no record."""

    def __init__(self, writer: Writer, stream: Stream, level: int | str = logging.NOTSET) -> None:
        """Prepare; it gets no records before it is attached to a logger.

        Args:
            writer: The writer.
            stream: The stream that the records belong to.
            level: Records below this level are left alone.
        """
        super().__init__(level)
        self._writer = writer
        self._stream = stream
        self._found: dict[logging.Logger, tuple[int, int]] = {}

    def createLock(self) -> None:
        """Have a lock that locks nothing: `emit` needs none, and a flush that held one would keep others from logging.

        None would say so, too, but Python 3.13 enters the lock of each handler without looking.
        """
        self.lock = _NoLock()  # type: ignore[assignment]

    def emit(self, record: logging.LogRecord) -> None:
        """Capture a record, unless it is about the delivery of others.

        Args:
            record: The record.
        """
        is_own = record.name.startswith("composite_logstore")
        if is_own or (record.threadName or "").startswith(_OWN_THREADS):
            return
        try:
            self._writer.append(self._stream, note(record))
        except Exception:
            self.handleError(record)

    def attach(self, logger: logging.Logger | str | None = None, level: int | str | None = None) -> None:
        """Have a logger pass its records on to this handler. Once more does nothing more.

        Args:
            logger: The logger or its name; the root logger if not given.
            level: The level from which on the logger is to pass records on. It is only ever lowered, and
                for all of the logger's handlers. As it is if not given.
        """
        logger = _logger(logger)
        if self in logger.handlers:
            return
        found = logger.level
        if level is not None and _number(level) < logger.getEffectiveLevel():
            logger.setLevel(level)
        self._found[logger] = (found, logger.level)
        logger.addHandler(self)

    def detach(self, logger: logging.Logger | str | None = None) -> None:
        """Have a logger pass on nothing more, and give it back the level at which `attach` found it.

        A level that somebody has set since is left as it is.

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

    It works in any Python program, and from a dictionary of `logging.config`.
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
        """Prepare; nothing is opened and no thread is started before the first record.

        Args:
            program: The program's name: the stream's `zenml.log_store.name`. What one process leaves on disk
                is delivered by the next one with the same name and settings.
            children: The children, with the settings that they have in a log store.
            level: Records below this level are left alone.
            attributes: Attributes of all records, beside those that a log store gives them.
            stream_id: The stream's `zenml.log.id`; a new one if not given.
            settings: Those of the log store: `durability`, `flush_timeout_millis` and so on, but `primary`
                and `fetch_fallback`, since a handler reads nothing.

        Raises:
            ValueError: A setting is wrong. The message names the child, the setting and the fix.
        """
        with _root_logger_left_alone():
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
        # Empty when it is closed. To take something from a list is one step, whoever does so at once.
        self._used: list[Writer] = [writer]
        self._is_exiting = False
        # After the writers' own, so that it runs before it. That one delivers what can be, within 3 s; and last of
        # all `logging` flushes its handlers.
        atexit.register(self._exit)

    @property
    def stream_id(self) -> UUID:
        """The id of the records' stream: their `zenml.log.id`."""
        return self._stream.id

    def stats(self) -> dict[str, dict[str, Any]]:
        """Return, for each enabled child's name, what became of this process's events, as the log store does."""
        return {name: asdict(stats) for name, stats in self._writer.stats().items()}

    def flush(self) -> None:
        """Deliver what there is now, for at most `flush_limit_millis`, as the log store does."""
        if not self._is_exiting:
            config = self._config
            self._writer.flush(config.flush_timeout_millis / 1000, config.flush_limit_millis / 1000)

    def emit(self, record: logging.LogRecord) -> None:
        """Capture a record, unless it is about the delivery of others. A closed handler is opened again.

        Args:
            record: The record.
        """
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
        """Detach from the loggers it was attached to, end the stream, and deliver what there is.

        What cannot be delivered now is on disk, for the next handler or process of the program. Threads and
        connections are given back, unless another handler of the program needs them. With `durability` `memory` they
        go on until it is delivered.
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


def _number(level: int | str) -> int:
    """Return a level's number.

    Raises:
        ValueError: There is no such level.
    """
    # `logging` has no public function for this before Python 3.11.
    return logging.Handler(level).level


@contextmanager
def _root_logger_left_alone() -> Iterator[None]:
    """Undo what importing ZenML does to the root logger: its level, and handlers that print."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
