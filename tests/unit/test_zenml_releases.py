"""What differs between ZenML's releases, on whichever is installed; where it can be, by simulating another."""

from __future__ import annotations

import ast
import inspect
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import zenml as zenml_itself
from zenml import models
from zenml.enums import LoggingLevels
from zenml.log_stores.base_log_store import BaseLogStore
from zenml.utils import logging_utils
from zenml.utils.time_utils import utc_now

from composite_logstore import clock, zenml
from composite_logstore.capture import process
from composite_logstore.testing import SimulatedClock
from composite_logstore.zenml import LogEntry, older
from tests.simulation import make_child, make_store

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for folder in ("composite_logstore", "backends")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "zenml" not in path.parts
]

LOGS = zenml.make_logs(uuid4(), "step", utc_now())


@pytest.fixture
def other_release(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Names are looked up again in the test, and once more after it."""

    def forget() -> None:
        zenml._returns_pages.cache_clear()
        for name in zenml._PLACES:
            vars(zenml).pop(name, None)

    forget()
    yield
    monkeypatch.undo()
    forget()


def of_lists(self: Any, logs_model: Any, limit: int, start_time: Any = None, end_time: Any = None) -> Any:
    """The signature from 0.93.3 to 0.96."""


def of_first_lists(self: Any, logs_model: Any, start_time: Any = None, end_time: Any = None, limit: int = 20000) -> Any:
    """The signature before 0.93.3."""


def of_pages(self: Any, logs_model: Any, start: Any = None, limit: Any = None, filter_: Any = None) -> Any:
    """The signature from 0.97 on."""


# Names


def test_each_name_is_there() -> None:
    assert [name for name in zenml.__all__ if not hasattr(zenml, name)] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_else_imports_what_moved(path: Path) -> None:
    """Import it from `composite_logstore.zenml`, in tests too."""
    moved = {place.partition(":")[::2] for places in zenml._PLACES.values() for place in places}
    moved |= {("zenml.utils.logging_utils", name) for name in ("LoggingContext", "get_step_log_metadata")}
    names = {name.partition(".")[0] for _, name in moved} - {"StackComponent"}
    found = [
        f"line {node.lineno}: {alias.name}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "zenml"
        for alias in node.names
        if alias.name in names
    ]
    assert found == []


@pytest.mark.usefixtures("other_release")
@pytest.mark.parametrize("name", ["LogEntry", "LogsEntriesFilter", "LogsEntriesResponse"])
def test_what_a_newer_release_lacks_is_named_with_the_releases_that_have_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zenml_itself, "__version__", "0.123.4")
    monkeypatch.setattr(BaseLogStore, "fetch", of_pages)
    monkeypatch.delattr(models, name, raising=False)
    with pytest.raises(ImportError) as raised:
        exec(f"from composite_logstore.zenml import {name}")
    for word in (name, "0.123.4", zenml.OLDEST_TESTED, zenml.NEWEST_TESTED):
        assert word in str(raised.value)


@pytest.mark.usefixtures("other_release")
def test_a_release_without_pages_gets_what_it_lacks_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseLogStore, "fetch", of_lists)
    monkeypatch.delattr(models, "LogsEntriesFilter", raising=False)
    assert zenml.LogsEntriesFilter is older.LogsEntriesFilter


def test_a_wrong_name_is_no_matter_of_releases() -> None:
    with pytest.raises(AttributeError, match="LogEnrty"):
        getattr(zenml, "LogEnrty")  # noqa: B009


# Newer releases


@pytest.mark.parametrize(
    ("version", "warns"),
    [
        (zenml.OLDEST_TESTED, False),
        (zenml.NEWEST_TESTED, False),
        (f"{zenml.NEWEST_TESTED}.post1", False),
        (f"{zenml.NEWEST_TESTED}.dev0", False),
        ("0.98.1", True),
        ("0.99.0", True),
        ("0.100.0", True),
        ("1.0.0rc1", True),
    ],
)
def test_a_newer_release_is_warned_of_once_where_a_log_store_is_made(
    version: str, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(zenml_itself, "__version__", version)
    monkeypatch.setattr(zenml, "_has_warned", False)
    logging.getLogger("composite_logstore").propagate = True
    for _ in range(3):
        make_store(make_child("live"))
    said = [record.getMessage() for record in caplog.records if zenml.NEWEST_TESTED in record.getMessage()]
    assert len(said) == warns
    assert all(version in text for text in said)


def test_importing_looks_nothing_up() -> None:
    program = "import sys, composite_logstore.zenml; sys.exit('zenml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


# Lists


def entry(number: int) -> LogEntry:
    begun = datetime(2026, 1, 1, tzinfo=timezone.utc)
    return LogEntry(message=f"{number}", level=LoggingLevels.INFO, timestamp=begun + timedelta(seconds=number))


class Stream:
    """A stream of so many entries that is read in pages."""

    def __init__(self, number: int, size: int = 10, seconds: float = 0.0) -> None:
        self.entries = [entry(place) for place in range(number)]
        self.size = size
        self.seconds = seconds
        self.asked: list[Any] = []
        self.failing_from: int | None = None

    def fetch(
        self,
        logs_model: Any,
        start: Any = None,
        limit: Any = None,
        before: Any = None,
        after: Any = None,
        filter_: Any = None,
    ) -> Any:
        assert logs_model is LOGS
        assert before is None
        assert (start == "oldest") != (after is not None)
        self.asked.append((limit, filter_))
        clock.current.advance(self.seconds)  # type: ignore[attr-defined]
        begin = int(after or 0)
        if self.failing_from is not None and begin >= self.failing_from:
            raise older.LogStoreUnavailableError("the backend is down.")
        end = min(begin + self.size, len(self.entries))
        return zenml.LogsEntriesResponse(items=self.entries[begin:end], after=str(end))


@pytest.fixture(params=[of_lists, of_first_lists], ids=["0.93.3", "0.93.0"])
def signature(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """That of `fetch` in a release of lists, with a clock that only moves when it is told to."""
    monkeypatch.setattr(BaseLogStore, "fetch", request.param)
    with SimulatedClock():
        yield request.param


def listed(stream: Stream, *arguments: Any, **keywords: Any) -> list[LogEntry]:
    """What `fetch` of a log store with this one stream returns."""
    return older.listed(Stream.fetch)(stream, *arguments, **keywords)


def texts(entries: list[LogEntry]) -> list[str]:
    return [one.message for one in entries]


def test_a_list_is_the_whole_stream_oldest_first(signature: Callable[..., Any]) -> None:
    stream = Stream(35)
    assert listed(stream, LOGS, limit=1000) == stream.entries
    assert listed(Stream(0), LOGS, limit=5) == []


@pytest.mark.parametrize("limit", [1, 9, 10, 11, 34])
def test_a_list_that_is_not_all_ends_with_an_entry_that_says_so(limit: int, signature: Callable[..., Any]) -> None:
    stream = Stream(35)
    *entries, last = listed(stream, logs_model=LOGS, limit=limit)
    assert entries == stream.entries[:limit]
    assert str(limit) in last.message
    assert (last.name, last.level, last.timestamp) == (
        "composite_logstore",
        LoggingLevels.WARNING,
        entries[-1].timestamp,
    )
    assert listed(Stream(35), LOGS, limit=limit)[-1].id == last.id


def test_a_list_of_exactly_the_limit_says_nothing(signature: Callable[..., Any]) -> None:
    assert len(listed(Stream(30), LOGS, limit=30)) == 30
    assert len(listed(Stream(30), LOGS, limit=31)) == 30


def test_the_times_become_a_filter(signature: Callable[..., Any]) -> None:
    stream = Stream(1)
    since, until = entry(0).timestamp, entry(5).timestamp
    listed(stream, LOGS, limit=7, start_time=since, end_time=until)
    ((limit, filter_), *_) = stream.asked
    assert (limit, filter_.since, filter_.until) == (7, since, until)


def test_the_arguments_have_the_places_of_the_release(signature: Callable[..., Any]) -> None:
    stream = Stream(35)
    names = list(inspect.signature(signature).parameters)[2:]
    values: dict[str, Any] = {"limit": 3, "start_time": entry(0).timestamp, "end_time": entry(9).timestamp}
    listed(stream, LOGS, *(values[name] for name in names))
    ((limit, filter_), *_) = stream.asked
    assert (limit, filter_.since, filter_.until) == tuple(values.values())


def test_a_slow_stream_is_listed_for_a_bounded_time(signature: Callable[..., Any]) -> None:
    stream = Stream(1000, seconds=6.0)
    *entries, last = listed(stream, LOGS, limit=1000)
    assert len(stream.asked) * stream.seconds < older.LONGEST_SECONDS + stream.seconds
    assert entries == stream.entries[: len(entries)]
    assert entries
    assert f"{older.LONGEST_SECONDS:.0f} s" in last.message


def test_a_list_has_a_bounded_size(signature: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(older, "MOST_CHARACTERS", 15)
    *entries, last = listed(Stream(1000), LOGS, limit=1000)
    assert len(entries) == 20
    assert last.name == "composite_logstore"


def test_what_was_read_before_a_failure_is_listed(signature: Callable[..., Any]) -> None:
    stream = Stream(100)
    stream.failing_from = 20
    *entries, last = listed(stream, LOGS, limit=1000)
    assert entries == stream.entries[:20]
    assert "the backend is down" in last.message


def test_a_stream_that_cannot_be_read_at_all_raises(signature: Callable[..., Any]) -> None:
    stream = Stream(100)
    stream.failing_from = 0
    with pytest.raises(older.LogStoreUnavailableError):
        listed(stream, LOGS, limit=1000)


@pytest.mark.parametrize("limit", [0, -1, True])
def test_a_limit_is_a_positive_number(limit: Any, signature: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="limit"):
        listed(Stream(1), LOGS, limit=limit)


def test_an_entry_is_listed_as_zenml_is_to_show_it(
    signature: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(entry: LogEntry) -> LogEntry:
        return entry.model_copy(update={"message": f"[{entry.message}]"})

    monkeypatch.setattr(zenml, "_returns_pages", lambda: False)
    fetch: Any = zenml.paged(show)(Stream.fetch)
    assert texts(fetch(Stream(12), LOGS, limit=11))[:-1] == [f"[{number}]" for number in range(11)]
    assert texts(fetch.pages(Stream(2), LOGS, start="oldest").items) == ["0", "1"]


def test_a_page_of_a_list_has_no_cursors(signature: Callable[..., Any]) -> None:
    class Theirs:
        def fetch(self, logs_model: Any, limit: int, start_time: Any = None, end_time: Any = None) -> Any:
            return [entry(number) for number in range(35)][:limit]

    page = older.page_of_list(Theirs(), LOGS, "oldest", 20)  # type: ignore[arg-type]
    assert texts(page.items) == [str(number) for number in range(20)]
    assert page.before is page.after is None
    for wanted in ({"after": "20"}, {"before": "20"}, {"filter_": older.LogsEntriesFilter(search="1")}):
        with pytest.raises(ValueError, match=r"cursors|search"):
            older.page_of_list(Theirs(), LOGS, **wanted)  # type: ignore[arg-type]


# Streams


def test_a_stream_is_described_without_asking_zenml() -> None:
    ids = {"log_store_id": uuid4(), "artifact_store_id": uuid4()}
    logs = zenml.make_logs(uuid4(), "client", utc_now(), uri="s3://logs/1", **ids)
    assert (logs.source, logs.uri) == ("client", "s3://logs/1")
    assert {name: getattr(logs, name) for name in ids} == ids
    other = zenml.moved(logs, log_store_id=None, step_run_id=uuid4())
    assert other.log_store_id is None
    assert other.step_run_id is not None
    assert logs.log_store_id == ids["log_store_id"]
    assert logs.step_run_id is None
    assert other.artifact_store_id == ids["artifact_store_id"]


def test_the_attributes_of_older_releases_get_the_present_names_too() -> None:
    old = {"pipeline.run.id": "1", "step.run.name": "train", "source": "step"}
    new = {"zenml.pipeline.run.id": "1", "zenml.step.run.name": "train"}
    assert zenml.named(old) == old | new
    assert zenml.named(new) == new
    assert zenml.named({"step.run.id": "1"}) == {"step.run.id": "1", "zenml.step.run.id": "1"}
    assert zenml.named({}) == {}


@pytest.mark.parametrize("of_step", [False, True])
def test_a_release_without_a_request_for_streams_adds_them_to_the_run_or_the_step(
    of_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, Any, Any]] = []

    def update(kind: str, id: Any, change: Any) -> None:
        made.extend((kind, id, request) for request in change.add_logs)

    zen_store: Any = SimpleNamespace(
        update_run=lambda run_id, run_update: update("run", run_id, run_update),
        update_run_step=lambda step_run_id, step_run_update: update("step", step_run_id, step_run_update),
        get_logs=lambda id: ("logs", id),
    )
    run: Any = SimpleNamespace(id=uuid4(), project_id=uuid4())
    step: Any = SimpleNamespace(id=uuid4())
    # Other releases' models want other fields.
    monkeypatch.setattr(models, "LogsRequest", lambda **fields: SimpleNamespace(**fields))
    monkeypatch.setattr(models, "PipelineRunUpdate", lambda **fields: SimpleNamespace(**fields))
    monkeypatch.setattr(models, "StepRunUpdate", lambda **fields: SimpleNamespace(**fields))
    id, store_id = uuid4(), uuid4()
    found = zenml.create_logs(zen_store, id, run, step if of_step else None, "rank 1", {"log_store_id": store_id})
    ((kind, owner, request),) = made
    assert found == ("logs", id)
    assert (kind, owner) == (("step", step.id) if of_step else ("run", run.id))
    assert (request.id, request.source, request.log_store_id) == (id, "rank 1", store_id)


# Writing


class FirstContext:
    """The logging context of 0.93.0: `emit` gets a record alone."""

    got: list[Any] = []  # noqa: RUF012

    @classmethod
    def emit(cls, record: Any) -> None:
        cls.got.append(record)


class EarlyContext:
    """That of 0.93.3 to 0.94."""

    got: list[Any] = []  # noqa: RUF012

    @classmethod
    def emit(cls, record: Any, metadata: Any = None) -> None:
        cls.got.append(record)


class PresentContext:
    got: list[Any] = []  # noqa: RUF012

    @classmethod
    def dispatch(cls, record: Any, metadata: Any = None) -> None:
        cls.got.append(record)

    def emit(self, record: Any, metadata: Any = None) -> None:
        raise AssertionError("not every record passes here")


@pytest.mark.parametrize("context", [FirstContext, EarlyContext, PresentContext])
def test_every_record_passes_the_function_that_is_wrapped(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "dispatch" if context is PresentContext else "emit"
    monkeypatch.setattr(context, name, vars(context)[name])
    context.got = []
    passed: list[Any] = []

    def wrap(dispatch: Any) -> Any:
        if getattr(dispatch, "is_wrapped", False):
            return dispatch

        def wrapped(record: Any, metadata: Any = None) -> None:
            passed.append(record)
            dispatch(record, metadata)

        wrapped.is_wrapped = True  # type: ignore[attr-defined]
        return wrapped

    # For so long only, since whatever pytest prints may pass the context of the installed release.
    with monkeypatch.context() as patched:
        patched.setattr(logging_utils, "LoggingContext", context)
        for _ in range(3):
            zenml.wrap_dispatch(wrap)
    getattr(context, name)("a record")
    assert passed == context.got == ["a record"]


@pytest.mark.usefixtures("other_release")
def test_the_active_context_of_the_first_release_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextvars import ContextVar

    variable: ContextVar[Any] = ContextVar("active_logging_context", default=None)
    monkeypatch.setattr(BaseLogStore, "fetch", of_first_lists)
    context: Any = FirstContext()
    with monkeypatch.context() as patched:
        patched.setattr(logging_utils, "LoggingContext", FirstContext)
        patched.setattr(logging_utils, "active_logging_context", variable, raising=False)
        assert zenml.active_context() is None
        assert not process.has_context()
        zenml.activate(context)
        assert zenml.active_context() is context
        assert process.has_context()
