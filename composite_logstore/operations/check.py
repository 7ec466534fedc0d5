"""Checks whether each child of a log store works, by writing and reading a test event."""

from __future__ import annotations

import secrets as random_numbers
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Literal
from uuid import UUID, uuid5

from composite_logstore import clock, secret_references, zenml
from composite_logstore.backend import (
    Exporter,
    PageRequest,
    ReadEntry,
    RejectedError,
    RetryableError,
    TooLargeError,
    UnavailableError,
)
from composite_logstore.catalog.errors import asking_zenml
from composite_logstore.catalog.stores import RegisteredStore, find_store
from composite_logstore.child_config import ChildConfig
from composite_logstore.event import LogEvent, Stream
from composite_logstore.spool.settings import check_spool, spool_problem, spool_settings

if TYPE_CHECKING:
    from zenml.models import LogsResponse

STEPS = ("settings", "secrets", "write", "read", "clock")
"""The steps of a check, in order."""

Result = Literal["ok", "fixed", "warning", "problem", "unknown"]

FIND_SECONDS = 60.0
"""How long to look for the test event: Datadog takes a while until it finds an event."""
_LOOK_SECONDS = 1.0
# Enough for a step that only asks ZenML, or that sends one small request.
_STEP_SECONDS = 30.0
# Backends tell their time in whole seconds.
_CLOCKS_AGREE_SECONDS = 5.0
_NEWEST = 100


@dataclass(frozen=True)
class Finding:
    """The finding of one step of a check.

    Attributes:
        what: The name of the step.
        result: The result; only a `problem` means that the child does not work. `fixed`: something was created that
            was missing in the backend.
        message: A description, without a full stop.
        advice: What people can do about it.
        seconds: How long the step took.
    """

    what: str
    result: Result
    message: str = ""
    advice: str = ""
    seconds: float = 0.0


class ChildCheck:
    """Checks one child, step by step, in a thread of its own, so that a backend that hangs does not delay the others.

    Attributes:
        child: The child's settings.
        findings: The findings so far.
        is_over: Whether the check has ended.
        ends_by: The time by which the present step has to end, in seconds of the monotonic clock.
        doing: The name of the present step.
    """

    def __init__(
        self, store: RegisteredStore, child: ChildConfig, artifact_store_id: UUID | None, fix: bool = False
    ) -> None:
        """Prepare the check.

        Args:
            store: The log store.
            child: The child's settings, with references to secrets.
            artifact_store_id: The artifact store of the active stack, for a child that names none.
            fix: Whether to create what is missing in the backend, before the test event is written.
        """
        self.child = child
        self.findings: list[Finding] = []
        self.is_over = False
        self.ends_by = 0.0
        self.doing = ""
        self._fix = fix
        self._store = store
        self._clock = clock.current
        self._changed = self._clock.condition(threading.RLock())
        self._config = child
        self._artifact_store_id = artifact_store_id
        self._event = _test_event(store, artifact_store_id)

    @property
    def is_healthy(self) -> bool:
        """Whether the child works."""
        return not any(finding.result == "problem" for finding in self.findings)

    def start(self) -> None:
        """Start the thread."""
        self.ends_by = self._clock.now() + _STEP_SECONDS
        self._clock.start(self._run, f"composite-logstore check {self.child.name}")

    def wait(self) -> None:
        """Wait until the check has ended; a step that takes too long ends it with a problem."""
        with self._changed:
            while not self.is_over:
                seconds = self.ends_by - self._clock.now()
                if seconds > 0:
                    self._changed.wait(seconds)
                    continue
                self.is_over = True
                late = "it has not returned and cannot be interrupted"
                advice = "find out whether something between this machine and the backend swallows requests"
                self.findings.append(Finding(self.doing, "problem", late, advice, _STEP_SECONDS))

    def _run(self) -> None:
        export_seconds = self.child.export_timeout_millis / 1000 + 1
        steps: Sequence[tuple[str, float, Callable[[], Iterator[Finding]]]] = (
            ("settings", _STEP_SECONDS, self._settings),
            ("secrets", _STEP_SECONDS, self._secrets),
            ("write", _STEP_SECONDS + 3 * export_seconds, self._prepare_and_write),
            ("read", _STEP_SECONDS + FIND_SECONDS, self._read),
            ("clock", _STEP_SECONDS, self._clocks),
        )
        for what, seconds, step in steps:
            begin = self._clock.now()
            with self._changed:
                self.doing, self.ends_by = what, begin + seconds
            try:
                found = list(step())
            except (Exception, SystemExit) as error:
                # Only the error's class: its message may contain a secret.
                found = [Finding(what, "problem", f"it fails with {type(error).__name__}", "report it as a bug")]
            took = self._clock.now() - begin
            with self._changed:
                if self.is_over:
                    return
                self.findings += [replace(finding, seconds=finding.seconds or took) for finding in found]
                self.is_over = not self.is_healthy or what == steps[-1][0]
                if self.is_over:
                    self._changed.notify_all()
                    return

    # The steps

    def _settings(self) -> Iterator[Finding]:
        try:
            secret_references.check(self.child)
            self.child.check_registration()
            self.child.check()
        except (UnavailableError, ValueError) as error:
            yield Finding("settings", "problem", *_cut(error))
            return
        fields = [f"'{field}'" for field in secret_references.clear_text_fields(self.child)]
        if fields:
            message = f"{', '.join(fields)}: written in clear text, which ZenML stores and shows unchanged"
            yield Finding("settings", "warning", message, "put it into a ZenML secret, and refer to the secret")
        else:
            yield Finding("settings", "ok")

    def _secrets(self) -> Iterator[Finding]:
        try:
            self._config = secret_references.resolve(self.child)
        except UnavailableError as error:
            yield Finding("secrets", "problem", *_cut(error))
            return
        has_any = any(True for _ in secret_references.references(self.child))
        yield Finding("secrets", "ok" if has_any else "unknown", "" if has_any else "the child refers to no secret")

    def _prepare_and_write(self) -> Iterator[Finding]:
        try:
            if (missing := self._config.unprepared()) and self._fix:
                yield Finding("write", "fixed", self._config.prepare())
            elif missing:
                yield Finding("write", "warning", missing, "run this command with --fix")
        except UnavailableError as error:
            # Whether the backend can be reached is found out by the test event.
            if self._fix:
                yield Finding("write", "warning", *_cut(error))
        yield from self._write()

    def _write(self) -> Iterator[Finding]:
        exporter: Exporter | None = None
        try:
            exporter = self._config.create_exporter()
            # The time to load the libraries is not the backend's.
            begin = self._clock.now()
            exporter.export([self._event])
            seconds = self._clock.now() - begin
            exporter.end_stream(self._event.stream)
        except RetryableError as error:
            yield Finding("write", "problem", *_cut(error, "check that it runs and that this machine can reach it"))
        except UnavailableError as error:
            yield Finding("write", "problem", *_cut(error))
        except (RejectedError, TooLargeError) as error:
            yield Finding("write", "problem", *_cut(error, "look into the backend's own logs"))
        else:
            yield Finding("write", "ok", seconds=seconds)
        finally:
            if exporter is not None:
                exporter.close()

    def _read(self) -> Iterator[Finding]:
        from zenml.exceptions import DoesNotExistException

        from composite_logstore.reading.keyset import KeysetReader
        from composite_logstore.zenml import LogStoreError, LogStoreRateLimitError

        if self._config.unreadable:
            yield Finding("read", "unknown", self._config.unreadable)
            return
        logs = logs_of_checks(self._store.store.id, self._artifact_store_id)
        end = self._clock.now() + FIND_SECONDS
        awake = self._clock.signal()
        reader = None
        excuse = f"the test event was written but not found within {FIND_SECONDS:.0f} s"
        try:
            reader = self._config.create_reader()
            while self._clock.now() < end:
                try:
                    found = self._found(reader.read(_newest(logs)).entries)
                    if found is not None and found.event is None and isinstance(reader, KeysetReader):
                        lost = "it came back without 'zenml.log.writer' and 'zenml.log.sequence', or with other values"
                        yield Finding("read", "problem", lost, "let no processor of the collector change attributes")
                        return
                    if found is not None:
                        yield Finding("read", "ok")
                        return
                except DoesNotExistException:
                    pass
                except LogStoreRateLimitError as error:
                    excuse = str(error)
                awake.wait(_LOOK_SECONDS)
        except (LogStoreError, UnavailableError, ValueError) as error:
            yield Finding("read", "problem", *_cut(error, "check that these settings allow reading"))
            return
        finally:
            if reader is not None:
                reader.close()
        yield Finding("read", "problem", excuse, self._config.absence)

    def _found(self, entries: Sequence[ReadEntry]) -> ReadEntry | None:
        # A log store behind a `component` child may give entries ids of its own.
        uid = self._event.uid
        found = (read for read in entries if str(read.entry.id) == uid or read.entry.message.endswith(uid))
        return next(found, None)

    def _clocks(self) -> Iterator[Finding]:
        begin = time.time()
        try:
            theirs = self._config.backend_time()
        except Exception:
            theirs = None
        if theirs is None:
            yield Finding("clock", "unknown", "the backend does not tell its time")
            return
        end = time.time()
        # The backend cuts off fractions of a second: half a second on average.
        ahead = theirs.timestamp() + 0.5 - (begin + end) / 2
        text = f"{abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
        if abs(ahead) - (end - begin) / 2 <= _CLOCKS_AGREE_SECONDS:
            yield Finding("clock", "ok", text)
        else:
            advice = "set the clock that is wrong: events get wrong times, and a backend may refuse them as too old"
            yield Finding("clock", "warning", f"the backend's clock is {text}", advice)


def _cut(error: Exception, advice: str = "") -> tuple[str, str]:
    """Split the message of an error into what is wrong and what to do, which a semicolon separates."""
    message, semicolon, own = str(error).rpartition("; ")
    return (message, own.rstrip(".")) if semicolon else (str(error).rstrip("."), advice)


# The test event

_SOURCE = "check"


def _test_event(store: RegisteredStore, artifact_store_id: UUID | None) -> LogEvent:
    writer = random_numbers.token_hex(8)[:15]
    stream = Stream(
        _stream_id(store.store.id),
        {
            "zenml.log.id": str(_stream_id(store.store.id)),
            "zenml.log.source": _SOURCE,
            "zenml.log_store.id": str(store.store.id),
            "zenml.log_store.name": store.name,
        },
        artifact_store_id,
    )
    now = time.time_ns() // 1000 * 1000
    event = LogEvent(
        stream, writer, 0, 0, now, 20, "INFO", "", "composite_logstore.check", "", 0, "", None, None, {}, {}, False
    )
    return event._replace(message=f"composite-logstore check of log store '{store.name}' {event.uid}")


def _stream_id(store_id: UUID) -> UUID:
    """Return the id of the stream of a log store's checks: always the same, so that an archive has one such stream."""
    return uuid5(store_id, "composite-logstore check")


def logs_of_checks(store_id: UUID, artifact_store_id: UUID | None = None) -> LogsResponse:
    """Return the stream of a log store's checks in ZenML's form."""
    # Some log stores only look for events after the stream was created.
    created = datetime.now(timezone.utc).replace(tzinfo=None) - timedelta(hours=1)
    return zenml.make_logs(
        _stream_id(store_id), _SOURCE, created, log_store_id=store_id, artifact_store_id=artifact_store_id
    )


def _newest(logs: LogsResponse) -> PageRequest:
    from composite_logstore.zenml import LogsEntriesFilter

    return PageRequest(logs, "older", None, _NEWEST, LogsEntriesFilter())


# The operation


@dataclass(frozen=True)
class StoreCheck:
    """The result of checking a log store.

    Attributes:
        store: The log store.
        children: The check of each child.
        spool: The finding about the spool's folder, None if the log store has no spool.
    """

    store: RegisteredStore
    children: list[ChildCheck]
    spool: Finding | None

    @property
    def is_healthy(self) -> bool:
        """Whether all children work, and the spool too."""
        return all(one.is_healthy for one in self.children) and (self.spool is None or self.spool.result != "problem")


def check(store: str, children: Sequence[str] = (), fix: bool = False) -> StoreCheck:
    """Check each child of a log store: settings, secrets, a test event written and read back, and the clock.

    The test events go to a stream of their own, which belongs to no run. Takes about a minute if a backend does not
    show the test event.

    Examples:
        >>> result = check("logs")
        >>> [(one.child.name, one.is_healthy) for one in result.children]
        [('archive', True), ('live', True)]

    Args:
        store: The log store's name or id.
        children: The names of the children to check, disabled ones too; all enabled children if empty.
        fix: Whether to create what is missing in a backend, such as an index template.

    Raises:
        ArgumentError: There is no such log store or child.
        NoAnswerError: ZenML cannot be reached.
    """
    found = find_store(store)
    chosen = [found.child(name, "children") for name in children] or found.config.enabled_children
    with asking_zenml():
        from zenml.client import Client

        artifact_store_id = Client().active_stack_model.components["artifact_store"][0].id  # type: ignore[index]
    return StoreCheck(found, check_children(found, chosen, artifact_store_id, fix), _check_spool(found))


def check_children(
    found: RegisteredStore, children: Sequence[ChildConfig], artifact_store_id: UUID, fix: bool = False
) -> list[ChildCheck]:
    """Check children of a log store at the same time, and return what was found when all checks have ended.

    Args:
        found: The log store.
        children: The children.
        artifact_store_id: The artifact store of the stack that the children are to work for.
        fix: Whether to create what is missing in a backend.
    """
    checks = [ChildCheck(found, child, artifact_store_id, fix) for child in children]
    for one in checks:
        one.start()
    for one in checks:
        one.wait()
    return checks


def _check_spool(found: RegisteredStore) -> Finding | None:
    settings = spool_settings(found.store.id, found.config)
    if settings is None:
        return None
    try:
        check_spool(settings)
    except OSError as error:
        message, advice = _cut(OSError(spool_problem(error, settings)))
        # With `spill` the events then stay in memory.
        return Finding("spool", "problem" if settings.write_ahead else "warning", message, advice)
    return Finding("spool", "ok")
