"""The log store: it connects ZenML's contract with the writer and with reading."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID, uuid4

from zenml.log_stores.artifact.artifact_log_store import ArtifactLogStore, prepare_logs_uri
from zenml.log_stores.base_log_store import BaseLogStore, BaseLogStoreOrigin
from zenml.logger import get_logger
from zenml.stack.stack_validator import StackValidator

from composite_logstore import secret_references
from composite_logstore.capture.record import note
from composite_logstore.config import CompositeLogStoreConfig, UnknownChild
from composite_logstore.delivery.account import ChildStats
from composite_logstore.delivery.writer import Writer
from composite_logstore.delivery.writers import writer_of
from composite_logstore.event import Stream
from composite_logstore.handler import RecordHandler
from composite_logstore.reading import nesting
from composite_logstore.reading.pages import Pages
from composite_logstore.spool.settings import check_spool, spool_problem, spool_settings

if TYPE_CHECKING:
    from zenml.config.step_run_info import StepRunInfo
    from zenml.metadata.metadata_types import MetadataType
    from zenml.models import LogsEntriesFilter, LogsEntriesResponse, LogsResponse
    from zenml.stack import Stack

logger = get_logger(__name__)


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
                "zenml.log.id": str(log_model.id),
                "zenml.log.source": log_model.source,
                "zenml.log_store.id": str(log_store.id),
                "zenml.log_store.name": log_store.name,
            }
        )
        super().__init__(name, log_store, log_model, metadata)
        assert isinstance(log_store, CompositeLogStore)
        artifact_store_id = log_model.artifact_store_id or _active_artifact_store_id()
        self.stream: Stream = log_store.writer.stream(log_model.id, metadata, artifact_store_id)


class CompositeLogStore(BaseLogStore):
    """A log store that sends every record to all its children and reads from its primary.

    Building one is cheap, starts nothing and touches no disk: ZenML's server builds one for each page.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> CompositeLogStore:
        """Choose the class by the settings, since ZenML looks at a log store's class when it opens a stream."""
        is_served = getattr(kwargs.get("config"), "serve_from_artifact_store", False)
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
            writer = self._writer or self.writer
            writer.append(origin.stream, note(record, metadata))  # type: ignore[attr-defined]
        except Exception as error:
            logger.debug("A record could not be captured: %s", error)

    def deregister_origin(self, origin: BaseLogStoreOrigin, blocking: bool = True) -> None:
        """Deregister an origin, and flush if it is the last one. The flush does not hold the store's lock.

        Args:
            origin: The origin.
            blocking: Whether to wait for the flush.
        """
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
        self.writer.end_stream(cast(CompositeLogStoreOrigin, origin).stream)

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
            self.deregister_origin(origin)

    def cleanup(self) -> None:
        """Flush. The store can be used afterwards."""
        self.flush()

    def stats(self) -> dict[str, dict[str, Any]]:
        """Return the account of this process's events, for each enabled child's name.

        Returns:
            `state`; the numbers of events that are `accepted`, `delivered`, `rejected`, `dropped`, `pending`,
            `shortened`; `rejected_reasons` (a reason → a number); `last_error`. At every moment
            `accepted = delivered + rejected + dropped + pending`.
        """
        return {name: asdict(stats) for name, stats in self._stats().items()}

    def _stats(self) -> dict[str, ChildStats]:
        return self.writer.stats()

    # Reading

    def place(self, logs_id: UUID) -> dict[str, Any]:
        """Return the fields of ZenML's `LogsRequest` that say where a new stream is stored.

        Args:
            logs_id: The id of the stream.
        """
        return {"log_store_id": self.id}

    def has(self, logs: LogsResponse) -> bool:
        """Return whether a stream belongs to this log store."""
        return logs.log_store_id == self.id

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
        pages = Pages(self.id, self.config, self.user, self.resolve_limit)
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
            for child in self.config.enabled_children:
                if self.config.serve_from_artifact_store and child.name == self.config.primary:
                    why_not = child.unservable(stack.artifact_store)
                    if why_not:
                        return False, f"log store '{self.name}', child '{child.name}': {why_not}"
                try:
                    if isinstance(child, UnknownChild):
                        child.create_exporter()
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

        Args:
            info: The step.
        """
        self.writer.summaries.add(info.step_run_id)
        return self._summary("the end of the step, before its last events are flushed")

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
            }
            for name, stats in self._stats().items()
        }


@ArtifactLogStore.register
class ServedLogStore(CompositeLogStore):
    """A log store with `serve_from_artifact_store`: ZenML's server reads its streams without this package.

    For an instance of `ArtifactLogStore`, ZenML tells its server the artifact store and the path of a stream, instead
    of the log store. ZenML checks for that class nowhere else.
    """

    def place(self, logs_id: UUID) -> dict[str, Any]:
        """Return the fields of ZenML's `LogsRequest` for a stream in the active stack's artifact store.

        Args:
            logs_id: The id of the stream.
        """
        from zenml.client import Client

        artifact_store = Client().active_stack.artifact_store
        return {"uri": prepare_logs_uri(artifact_store, logs_id), "artifact_store_id": artifact_store.id}

    def has(self, logs: LogsResponse) -> bool:
        """Return whether a stream belongs to this log store, or is in an artifact store, so that it may belong."""
        return super().has(logs) or (logs.log_store_id is None and logs.artifact_store_id is not None)


def pinned(requirements: Iterable[str]) -> set[str]:
    """Return the requirements, with this package pinned to the running version."""
    own = "composite-logstore"
    return {f"{wish}=={version(own)}" if wish.split("[")[0] == own else wish for wish in requirements}


def open_stream(
    store: CompositeLogStore, pipeline_run_id: UUID | str, step_id: UUID | str | None, source: str
) -> tuple[LogsResponse, dict[str, Any]]:
    """Return a stream of a run or a step, created if need be, and its attributes as ZenML gives them.

    Raises:
        KeyError: The run or the step does not exist.
        ValueError: The step belongs to another run.
    """
    from zenml.client import Client
    from zenml.models import LogsRequest
    from zenml.utils.logging_utils import get_run_log_metadata, get_step_log_metadata

    client = Client()
    run = client.get_pipeline_run(pipeline_run_id, allow_name_prefix_match=False)
    metadata = get_run_log_metadata(run)
    id = uuid4()
    request = LogsRequest(id=id, project=run.project_id, source=source, **store.place(id))
    collection = run.log_collection
    if step_id is None:
        request.pipeline_run_id = run.id
    else:
        step = client.get_run_step(UUID(str(step_id)))
        if step.pipeline_run_id != run.id:
            raise ValueError(f"step '{step.name}' does not belong to run '{run.name}'; pass the id of its run")
        metadata.update(get_step_log_metadata(step))
        request.step_run_id = step.id
        collection = step.log_collection
    for logs in collection or []:
        place = (request.source, request.log_store_id, request.artifact_store_id)
        if (logs.source, logs.log_store_id, logs.artifact_store_id) == place:
            return logs, metadata
    return client.zen_store.create_logs(request), metadata


def _active_artifact_store_id() -> UUID | None:
    """Return the id of the active stack's artifact store, None if it cannot be found out."""
    from zenml.client import Client

    try:
        return Client().active_stack.artifact_store.id
    except Exception:
        return None
