"""The log store: it connects ZenML's contract with the writer and with reading."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID, uuid5

from zenml.log_stores.artifact.artifact_log_store import ArtifactLogStore, prepare_logs_uri
from zenml.log_stores.base_log_store import BaseLogStore, BaseLogStoreOrigin
from zenml.logger import get_logger
from zenml.stack.stack_validator import StackValidator

from composite_logstore import secret_references, zenml
from composite_logstore.capture import zenml_handler
from composite_logstore.capture.lines import hand_on, is_printing, settle, unsettled, watch_prints
from composite_logstore.capture.open_streams import OpenStream, current, here
from composite_logstore.capture.process import ProcessCapture
from composite_logstore.capture.record import LOGGER_NAME, PRINTED, Note, note
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.delivery.writer import Writer
from composite_logstore.delivery.writers import writer_of
from composite_logstore.event import Stream
from composite_logstore.handler import RecordHandler
from composite_logstore.reading import nesting
from composite_logstore.reading.nothing import STEP_METADATA
from composite_logstore.reading.pages import Pages
from composite_logstore.reading.ranks import with_rank_shown
from composite_logstore.service import tell
from composite_logstore.spool.settings import check_spool, spool_problem, spool_settings

if TYPE_CHECKING:
    from zenml.config.step_run_info import StepRunInfo
    from zenml.metadata.metadata_types import MetadataType
    from zenml.models import LogsResponse
    from zenml.stack import Stack

    from composite_logstore.zenml import LogsEntriesFilter, LogsEntriesResponse

logger = get_logger(__name__)

_STREAMS = UUID("5d0f9a52-7c0d-4f0a-8a55-1f7c3f6b9e08")


class CompositeLogStoreOrigin(BaseLogStoreOrigin):
    """The origin of a stream's records.

    Attributes:
        stream: The stream, as this process's writer sees it.
    """

    def __init__(self, name: str, log_store: BaseLogStore, log_model: LogsResponse, metadata: dict[str, Any]) -> None:
        """Register the stream with the writer. Never raises: ZenML does not guard it."""
        # The attributes that ZenML's own log stores write, so that saved queries keep working.
        metadata.update(
            {
                **zenml.named(metadata),
                "zenml.log.id": str(log_model.id),
                "zenml.log.source": log_model.source,
                "zenml.log_store.id": str(log_store.id),
                "zenml.log_store.name": log_store.name,
            }
        )
        super().__init__(name, log_store, log_model, metadata)
        assert isinstance(log_store, CompositeLogStore)
        if log_store.config.join_lines:
            watch_prints()
        artifact_store_id = log_model.artifact_store_id or _active_artifact_store_id()
        self.stream: Stream = log_store.writer.stream(log_model.id, metadata, artifact_store_id)


@cache
def _warn_without_gil() -> None:
    """Warn, once in a process, if this Python runs without its global interpreter lock, which the journal relies on."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        tell(
            logger.warning,
            "composite-logstore does not support a Python that runs without its global interpreter lock: events may be "
            "lost, and a child may stop. Set PYTHON_GIL=1, or use an ordinary build.",
        )


class CompositeLogStore(BaseLogStore):
    """A log store that sends every record to all its children and reads from its primary.

    Building one is cheap, starts nothing and touches no disk: ZenML's server builds one for each page.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> CompositeLogStore:
        """Choose the class by the settings, since ZenML looks at a log store's class when it opens a stream."""
        zenml.warn_if_untested(partial(tell, logger.warning))
        _warn_without_gil()
        config = kwargs.get("config")
        if isinstance(config, CompositeLogStoreConfig):
            # Before ZenML builds further components, which may resolve secrets.
            config.watch_secrets()
        is_served = getattr(config, "serve_from_artifact_store", False)
        return super().__new__(ServedLogStore if is_served and cls is CompositeLogStore else cls)

    _writer: Writer | None = None
    _active: tuple[RecordHandler, BaseLogStoreOrigin] | None = None

    @property
    def config(self) -> CompositeLogStoreConfig:
        """The configuration."""
        return cast(CompositeLogStoreConfig, self._config)

    @property
    def origin_class(self) -> type[CompositeLogStoreOrigin]:
        """The class of the origins."""
        return CompositeLogStoreOrigin

    @property
    def writer(self) -> Writer:
        """This process's writer for the component, shared by all its instances."""
        if self._writer is None:
            self._writer = writer_of(self.id, self.config)
        return self._writer

    # Writing

    def emit(
        self, origin: BaseLogStoreOrigin, record: logging.LogRecord, metadata: dict[str, Any] | None = None
    ) -> None:
        """Capture a record and hand it to every child. Never raises, and never waits for a backend.

        Args:
            origin: The origin of the record.
            record: The record.
            metadata: More attributes of this record.
        """
        try:
            said = note(record, metadata)
            name = said[LOGGER_NAME]
            # Any type may have its own `__eq__`, which may raise.
            if type(name) is str and name in PRINTED:
                self._emit_printed(cast(CompositeLogStoreOrigin, origin), said)
            else:
                if unsettled:
                    settle()
                (self._writer or self.writer).append(origin.stream, said)  # type: ignore[attr-defined]
        except Exception as error:
            logger.debug("A record could not be captured: %s", error)

    def _emit_printed(self, origin: CompositeLogStoreOrigin, said: Note) -> None:
        """Capture a record of the logger `stdout` or `stderr`."""
        if is_printing():
            self.writer.write(origin.stream, said)
        else:
            if unsettled:
                settle()
            self.writer.append(origin.stream, said)
        if not zenml_handler.has_warned:
            self._watch_handler(origin)

    def register_origin(self, name: str, log_model: LogsResponse, metadata: dict[str, Any]) -> BaseLogStoreOrigin:
        """Register an origin, and tell the processes that this one starts which stream they may join.

        Args:
            name: The name of the origin.
            log_model: The stream.
            metadata: Attributes of all its records.
        """
        origin = cast(CompositeLogStoreOrigin, super().register_origin(name, log_model, metadata))
        stream = origin.stream
        _origins[stream.id] = origin
        source = str(log_model.source)
        here.opened(OpenStream(stream.id, source, stream.artifact_store_id, self.id, stream.metadata))
        if self.config.adopt_threads:
            adopting.attach()
        return origin

    def join_stream(self, stream: OpenStream) -> CompositeLogStoreOrigin:
        """Return an origin of a stream that another process has opened.

        Args:
            stream: The stream. It has what an origin needs of ZenML's model.
        """
        return self.origin_class(str(stream.id), self, cast(Any, stream), dict(stream.metadata))

    def deregister_origin(self, origin: BaseLogStoreOrigin, blocking: bool = True) -> None:
        """Deregister an origin, and flush if it is the last one. The flush does not hold the store's lock.

        Args:
            origin: The origin.
            blocking: Whether to wait for the flush.
        """
        # Nothing may have been printed since the handler was removed.
        self._watch_handler(origin)
        self._deregister(origin, blocking)

    def _watch_handler(self, origin: BaseLogStoreOrigin) -> None:
        """Warn in the logs, too, where people notice that records of their loggers are missing."""
        if warning := zenml_handler.warn_if_gone(logger):
            self.writer.append(cast(CompositeLogStoreOrigin, origin).stream, note(warning))

    def _deregister(self, origin: BaseLogStoreOrigin, blocking: bool = True) -> None:
        with self._lock:
            if self._origins.get(origin.name) is not origin:
                return
            del self._origins[origin.name]
            is_last = not self._origins
        self._release_origin(origin)
        if is_last:
            self.flush(blocking)
            self._publish_summaries(blocking)

    def _release_origin(self, origin: BaseLogStoreOrigin) -> None:
        stream = cast(CompositeLogStoreOrigin, origin).stream
        here.closed(stream.id)
        _origins.pop(stream.id, None)
        self.writer.end_stream(stream)

    def flush(self, blocking: bool = True) -> None:
        """Deliver all events captured by now.

        Waits at most `flush_limit_millis` while children make progress, gives up on a child after
        `flush_timeout_millis` without progress, and does not wait for an unavailable child.

        Args:
            blocking: Whether to wait.
        """
        if self._writer is not None:
            self._writer.flush(self.config.flush_timeout_millis / 1000, self.config.flush_limit_millis / 1000, blocking)

    def activate(self, pipeline_run_id: UUID | str, step_id: UUID | str | None = None, source: str = "step") -> UUID:
        """Collect what this process logs from now on, as logs of a run or of one of its steps.

        For code outside of ZenML's own logging context, such as a process that a step has started. Collects every
        record that reaches the root logger, whose level stays as it is.

        Args:
            pipeline_run_id: The id of the run.
            step_id: The id of the run's step, if the logs are the step's.
            source: The name of the stream. An existing stream of this log store with that name is continued.

        Returns:
            The id of ZenML's `LogsResponse`.

        Raises:
            KeyError: The run or the step does not exist.
            ValueError: The step belongs to another run, or the log store is collecting already.
        """
        with self._lock:
            if self._active is not None:
                raise ValueError(f"log store '{self.name}' is collecting already; call deactivate() first")
            logs, metadata = open_stream(self, pipeline_run_id, step_id, source)
            origin = cast(CompositeLogStoreOrigin, self.register_origin(str(logs.id), logs, metadata))
            handler = RecordHandler(self.writer, origin.stream)
            self._active = (handler, origin)
            handler.attach()
            return logs.id

    def deactivate(self) -> None:
        """Stop collecting, and flush. Does nothing unless `activate` was called."""
        with self._lock:
            active, self._active = self._active, None
        if active is not None:
            handler, origin = active
            handler.detach()
            handler.close()
            self._deregister(origin)

    def cleanup(self) -> None:
        """Flush. The store can be used afterwards."""
        self.flush()

    def stats(self) -> dict[str, dict[str, Any]]:
        """Return the account of this process's events, for each enabled child's name.

        Returns:
            `state`; the numbers of events that are `accepted`, `delivered`, `rejected`, `dropped`, `withheld`,
            `pending`, `shortened`, `rejected_not_kept`; `rejected_reasons`, `withheld_reasons` and `redacted` (a reason
            or name → a number); `last_error`. At every moment
            `accepted = delivered + rejected + dropped + withheld + pending`.
        """
        return {name: asdict(stats) for name, stats in self.writer.stats().items()}

    # Reading

    def place(self, logs_id: UUID) -> dict[str, Any]:
        """Return the fields of ZenML's `LogsRequest` that say where a new stream is stored."""
        return {"log_store_id": self.id}

    def has(self, logs: LogsResponse) -> bool:
        """Return whether a stream belongs to this log store."""
        return logs.log_store_id == self.id

    @zenml.paged(with_rank_shown)
    def fetch(
        self,
        logs_model: LogsResponse,
        start: str | None = None,
        limit: int | None = None,
        before: str | None = None,
        after: str | None = None,
        filter_: LogsEntriesFilter | None = None,
    ) -> LogsEntriesResponse:
        """Return a page of a stream's entries, oldest first, from the primary.

        The message of an entry that has a rank begins with it, since ZenML's entries have no place for one. Searches do
        not find it.

        Args:
            logs_model: The stream.
            start: Where to begin, at the `oldest` or the `newest` entry; the newest if not given.
            limit: The most entries to return.
            before: A cursor towards older entries, from a previous page.
            after: A cursor towards newer entries, from a previous page.
            filter_: Which entries to return.

        Raises:
            ValueError: The arguments are wrong, or the stream does not belong to this log store.
            DoesNotExistException: The primary does not have the stream.
            LogStoreError: Neither the primary nor a fallback can be read. A `LogStoreUnavailableError` or a
                `LogStoreRateLimitError` if a retry may help.
        """
        if not self.has(logs_model):
            raise ValueError(
                "logs_model.log_store_id does not match the id of the log store. These entries were collected by "
                "another log store, which is the one that can read them back."
            )
        pages = Pages(self.id, self.config, self.user, self.updated, partial(zenml.resolve_limit, self))
        with nesting.page(self.id):
            return pages.fetch(logs_model, start, limit, before, after, filter_)

    # As a component of a stack

    @property
    def validator(self) -> StackValidator:
        """Checks, before a run, that this machine can use each enabled child, and the spool if it is required."""

        def check(stack: Stack) -> tuple[bool, str]:
            settings = spool_settings(self.id, self.config)
            if settings and settings.write_ahead:
                try:
                    check_spool(settings)
                except OSError as error:
                    why = spool_problem(error, settings)
                    return False, f"log store '{self.name}', 'durability' is write_ahead: {why}"
            try:
                _ = self.config.chosen_delivery
            except ValueError as error:
                return False, f"log store '{self.name}': {error}"
            for child in self.config.enabled_children:
                if self.config.serve_from_artifact_store and child.name == self.config.primary:
                    why_not = child.unservable(stack.artifact_store)
                    if why_not:
                        return False, f"log store '{self.name}', child '{child.name}': {why_not}"
                try:
                    secret_references.check(child)
                    child.check()
                except Exception as error:
                    return False, f"log store '{self.name}', child '{child.name}': {error}"
            if twice := self.config.doubled(stack.artifact_store):
                return False, f"log store '{self.name}', {twice}"
            return True, ""

        return StackValidator(custom_validation_function=cast("Callable[[Stack], tuple[bool, str]]", check))

    @property
    def requirements(self) -> set[str]:
        """The packages for images of remote steps: this one, with the extras of the enabled children."""
        return pinned({"composite-logstore"}.union(*(child.requirements for child in self.config.enabled_children)))

    def get_step_run_metadata(self, info: StepRunInfo) -> dict[str, MetadataType]:
        """Return the delivery summary of this process's events, as of the step's end.

        ZenML asks before the last flush, so some events are still pending. After it, the summary is published again.
        """
        self.writer.summaries.add(info.step_run_id)
        return {
            **self._summary("the end of the step, before its last events are flushed"),
            STEP_METADATA: {"events": self.writer.events_of_step(info.step_run_id)},
        }

    def _publish_summaries(self, is_flushed: bool) -> None:
        """Publish the delivery summary after the last flush. ZenML merges it into the step's metadata."""

        def summary() -> dict[str, MetadataType]:
            if not is_flushed:
                self.flush()
            return self._summary("the last flush")

        self.writer.summaries.publish(summary)

    def _summary(self, as_of: str) -> dict[str, MetadataType]:
        return {
            f"log_store.{name}": {
                "as_of": as_of,
                "state": stats.state,
                "delivered": stats.delivered,
                "pending": stats.pending,
                "dropped": stats.dropped,
                "rejected": stats.rejected,
                "withheld": stats.withheld,
            }
            for name, stats in self.writer.stats().items()
        }


@ArtifactLogStore.register
class ServedLogStore(CompositeLogStore):
    """A log store with `serve_from_artifact_store`: ZenML's server reads its streams without this package.

    For an instance of `ArtifactLogStore`, ZenML tells its server the artifact store and the path of a stream, instead
    of the log store. ZenML checks for that class nowhere else.
    """

    def place(self, logs_id: UUID) -> dict[str, Any]:
        """Return the fields of ZenML's `LogsRequest` for a stream in the active stack's artifact store."""
        from zenml.client import Client

        artifact_store = Client().active_stack.artifact_store
        return {"uri": prepare_logs_uri(artifact_store, logs_id), "artifact_store_id": artifact_store.id}

    def has(self, logs: LogsResponse) -> bool:
        """Return whether a stream belongs to this log store, or is in an artifact store, so that it may belong."""
        return super().has(logs) or (logs.log_store_id is None and logs.artifact_store_id is not None)


# The origins of this process. A forked process has its parent's.
_origins: dict[UUID, CompositeLogStoreOrigin] = {}


def _adopt(record: logging.LogRecord) -> None:
    """Collect a record of a thread without a logging context for the one step that runs in this process."""
    stream, _ = current(here.visible())
    if stream is None or stream.source != "step":
        return
    store = inherited_store(stream.store_id)
    if not isinstance(store, CompositeLogStore) or not store.config.adopt_threads:
        return
    if stream.id not in _origins:
        # The step began after this process was forked.
        _origins[stream.id] = store.join_stream(stream)
    hand_on(record, store.emit, _origins[stream.id], record)


adopting = ProcessCapture(_adopt)


def pinned(requirements: Iterable[str]) -> set[str]:
    """Return the requirements, with this package pinned to the running version."""
    own = "composite-logstore"
    return {f"{wish}=={version(own)}" if wish.split("[")[0] == own else wish for wish in requirements}


def open_stream(
    store: CompositeLogStore, pipeline_run_id: UUID | str, step_id: UUID | str | None, source: str
) -> tuple[LogsResponse, dict[str, Any]]:
    """Return a stream of a run or a step, created if need be, and its attributes as ZenML gives them.

    Processes that ask for the same stream at once get the same one.

    Raises:
        KeyError: The run or the step does not exist.
        ValueError: The step belongs to another run.
    """
    from zenml.client import Client

    client = Client()
    run = client.get_pipeline_run(pipeline_run_id, allow_name_prefix_match=False)
    metadata = zenml.run_attributes(run)
    collection, step = run.log_collection, None
    if step_id is not None:
        step = client.get_run_step(UUID(str(step_id)))
        if step.pipeline_run_id != run.id:
            raise ValueError(f"step '{step.name}' does not belong to run '{run.name}'; pass the id of its run")
        metadata.update(zenml.step_attributes(step, run))
        collection = step.log_collection
    # Another process that looks for the stream now, and does not find it either, chooses the same id.
    id = uuid5(_STREAMS, f"{store.id} {run.id} {step.id if step else None} {source}")
    place = store.place(id)
    for logs in collection or []:
        wanted = (source, place.get("log_store_id"), place.get("artifact_store_id"))
        if (logs.source, logs.log_store_id, logs.artifact_store_id) == wanted:
            return logs, metadata
    try:
        return zenml.create_logs(client.zen_store, id, run, step, source, place), metadata
    except Exception as error:
        # How ZenML refuses an id that exists depends on its server.
        try:
            return client.zen_store.get_logs(id), metadata
        except KeyError:
            raise error from None


def existing_stream(store_id: UUID, id: UUID) -> OpenStream:
    """Return a stream of a log store as ZenML knows it, with its attributes.

    Raises:
        KeyError: The stream does not exist.
    """
    from zenml.client import Client

    client = Client()
    logs = client.zen_store.get_logs(id)
    metadata: dict[str, Any] = {}
    run_id, step = logs.pipeline_run_id, None
    if logs.step_run_id is not None:
        step = client.get_run_step(logs.step_run_id)
        run_id = step.pipeline_run_id
    if run_id is not None:
        run = client.get_pipeline_run(run_id)
        metadata = zenml.run_attributes(run) | (zenml.step_attributes(step, run) if step else {})
    return OpenStream(logs.id, logs.source, logs.artifact_store_id, store_id, metadata)


def inherited_store(id: UUID) -> BaseLogStore | None:
    """Return the log store with this id if this process has it, as a forked one has its parent's."""
    return next((origin.log_store for origin in list(_origins.values()) if origin.log_store.id == id), None)


def opened_store(id: UUID) -> BaseLogStore:
    """Return the log store with this id, as ZenML knows it, for a process that may be killed at any time.

    Raises:
        KeyError: The log store does not exist.
    """
    from zenml.client import Client
    from zenml.stack import StackComponent
    from zenml.utils import source_utils

    try:
        source_utils.get_source_root()
    except RuntimeError:
        # `python -c` has no main file, without which ZenML loads no component.
        source_utils.set_custom_source_root(os.getcwd())
    store = cast(BaseLogStore, StackComponent.from_model(Client().zen_store.get_stack_component(id)))
    if isinstance(store, CompositeLogStore) and store.config.durability == "spill":
        # A launcher or a pool may kill a process at any time, and the last words matter.
        store._config = store.config.model_copy(update={"durability": "write_ahead"})
    return store


def _active_artifact_store_id() -> UUID | None:
    """Return the id of the active stack's artifact store, None if it cannot be found out."""
    from zenml.client import Client

    try:
        return Client().active_stack.artifact_store.id
    except Exception:
        return None
