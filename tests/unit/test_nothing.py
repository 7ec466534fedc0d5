"""A page without entries: nothing was logged, or the logs are elsewhere."""

from __future__ import annotations

import logging
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from zenml.enums import LoggingLevels
from zenml.exceptions import DoesNotExistException
from zenml.models import LogsResponse

from composite_logstore import CompositeLogStore, Page, PageRequest
from composite_logstore.reading import gaps, nothing
from composite_logstore.testing import SimulatedBackend
from composite_logstore.zenml import LogsEntriesFilter, LogsEntriesResponse, moved
from composite_logstore_artifact import artifact_stores
from composite_logstore_artifact.reader import ArtifactReader
from tests.artifact_stores import local_store
from tests.simulation import LONG_AGO, make_child, make_logs, make_store
from tests.unit.test_reading import add, messages, numbered

ABSENT = DoesNotExistException("Nothing was found for these logs.")
LATER = LONG_AGO + timedelta(days=1)


class Counted(defaultdict[str, Any]):
    """The same number for each stream."""

    def get(self, key: str, default: Any = None) -> Any:  # type: ignore[override]
        return self[key]


class ZenML:
    """What ZenML knows of a stream's step."""

    def __init__(self, metadata: dict[str, Any] | None = None, is_finished: bool = True) -> None:
        self.step = SimpleNamespace(
            pipeline_run_id=uuid4(), status=SimpleNamespace(is_finished=is_finished), run_metadata=metadata or {}
        )
        self.run = SimpleNamespace(stack=SimpleNamespace(updated=LONG_AGO), status=SimpleNamespace(is_finished=True))
        self.component = SimpleNamespace(updated=LONG_AGO)
        self.zen_store = self

    def __call__(self) -> ZenML:
        return self

    def get_run_step(self, id: Any, hydrate: bool = True) -> Any:
        return self.step

    def get_run(self, id: Any, hydrate: bool = True) -> Any:
        return self.run

    def get_stack_component(self, id: Any) -> Any:
        return self.component


@pytest.fixture
def zenml(monkeypatch: pytest.MonkeyPatch) -> ZenML:
    zenml = ZenML()
    for module in (gaps, nothing, artifact_stores):
        monkeypatch.setattr(module, "Client", zenml)
    return zenml


def logs_of_step(store: CompositeLogStore) -> LogsResponse:
    return moved(make_logs(store), step_run_id=uuid4())


def store_of(backend: SimulatedBackend, updated: Any = LONG_AGO, **child: Any) -> CompositeLogStore:
    store = make_store(make_child("primary", backend, **child), make_child("other"))
    store.updated = updated
    return store


def said(events: Any) -> dict[str, Any]:
    """Return what a step's metadata says that it logged in whichever stream."""
    return {nothing.STEP_METADATA: {"events": Counted(lambda: events)}}


@pytest.mark.parametrize("fault", [None, ABSENT])
@pytest.mark.parametrize("start", ["oldest", "newest"])
@pytest.mark.parametrize("child", [{}, {"min_level": "ERROR"}])
def test_a_step_that_logged_nothing_is_an_empty_page(
    zenml: ZenML, fault: Exception | None, start: str, child: dict[str, Any]
) -> None:
    zenml.step.run_metadata = said(0)
    backend = SimulatedBackend()
    backend.fault = fault
    store = store_of(backend, updated=LATER, **child)
    assert store.fetch(logs_of_step(store), start=start) == LogsEntriesResponse(items=[])


METADATA = [
    *map(said, (7, None, -1, "7")),
    *({nothing.STEP_METADATA: odd} for odd in (7, None, {}, {"events": 0}, {"events": {"another stream": 0}})),
    {},
]


@pytest.mark.parametrize("metadata", METADATA)
def test_logs_that_may_have_been_moved_away_are_not_called_nothing(zenml: ZenML, metadata: dict[str, Any]) -> None:
    zenml.step.run_metadata = metadata
    backend = SimulatedBackend()
    backend.fault = ABSENT
    store = store_of(backend)
    with pytest.raises(DoesNotExistException, match="Nothing was found"):
        store.fetch(logs_of_step(store))


def test_a_page_does_not_fail_because_zenml_cannot_be_asked(zenml: ZenML, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zenml, "get_run_step", lambda *_, **__: 1 / 0)
    backend = SimulatedBackend()
    store = store_of(backend)
    assert store.fetch(logs_of_step(store)).items == []
    backend.fault = ABSENT
    with pytest.raises(DoesNotExistException):
        store.fetch(logs_of_step(store))


@pytest.mark.parametrize("fault", [None, ABSENT])
@pytest.mark.parametrize("metadata", [{}, said(7)])
def test_an_empty_page_says_that_the_primary_was_changed(
    zenml: ZenML, fault: Exception | None, metadata: dict[str, Any]
) -> None:
    zenml.step.run_metadata = metadata
    backend = SimulatedBackend()
    backend.fault = fault
    store = store_of(backend, updated=LATER)
    logs = logs_of_step(store)
    first, again = store.fetch(logs), store.fetch(logs, start="oldest")
    assert first == again
    (notice,) = first.items
    assert (notice.name, notice.level) == ("composite_logstore", LoggingLevels.WARNING)
    for words in ("'primary'", "2026-01-02", "--from other"):
        assert words in notice.message


@pytest.mark.parametrize("fault", [None, ABSENT])
def test_an_empty_page_says_that_min_level_keeps_everything_away(zenml: ZenML, fault: Exception | None) -> None:
    backend = SimulatedBackend()
    backend.fault = fault
    store = store_of(backend, min_level="ERROR")
    (notice,) = store.fetch(logs_of_step(store)).items
    for words in ("'primary'", "ERROR", "'min_level'", "'other'"):
        assert words in notice.message


def test_an_empty_page_says_how_many_entries_the_step_logged(zenml: ZenML) -> None:
    zenml.step.run_metadata = said(7)
    store = store_of(SimulatedBackend())
    (notice,) = store.fetch(logs_of_step(store)).items
    assert "7 were logged" in notice.message


@pytest.mark.parametrize("given", [{"search": "x"}, {"level": "ERROR"}, {"since": LONG_AGO}])
def test_a_filter_explains_an_empty_page(zenml: ZenML, given: dict[str, Any]) -> None:
    store = store_of(SimulatedBackend(), updated=LATER, min_level="WARN")
    assert store.fetch(logs_of_step(store), filter_=LogsEntriesFilter(**given)).items == []


def test_a_step_in_progress_has_logged_nothing_yet(zenml: ZenML) -> None:
    zenml.step.status.is_finished = False
    backend = SimulatedBackend()
    store = store_of(backend, updated=LATER, min_level="WARN")
    logs = logs_of_step(store)
    assert store.fetch(logs).items == []
    add(backend, logs, 2)
    assert messages(store.fetch(logs)) == numbered(0, 2)


def test_a_page_with_entries_says_nothing_of_it(zenml: ZenML) -> None:
    backend = SimulatedBackend()
    store = store_of(backend, updated=LATER, min_level="WARN")
    logs = logs_of_step(store)
    add(backend, logs, 2)
    page = store.fetch(logs, start="oldest")
    assert messages(page) == numbered(0, 2)
    assert store.fetch(logs, after=page.after).items == []


# The archive, of which a step that was killed leaves nothing but ZenML's own records


def archive(tmp_path: Path, zenml: ZenML, has_logs: bool = True) -> ArtifactReader:
    if has_logs:
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "another.log").write_text("hello\n")
    return ArtifactReader(find=lambda logs: local_store(tmp_path), is_in_progress=lambda logs: False)


def read(reader: ArtifactReader, logs: LogsResponse) -> Page:
    return reader.read(PageRequest(logs, "newer", None, 10, LogsEntriesFilter()))


@pytest.mark.parametrize(
    "rule", [{"keep": [{"level": "ERROR"}]}, {"sample": {"ratio": 0.1}}, {"budget": {"events": 1}}]
)
def test_an_empty_page_names_the_rules_that_keep_entries_away(zenml: ZenML, rule: Any) -> None:
    store = store_of(SimulatedBackend(), **rule)
    (said,) = messages(store.fetch(logs_of_step(store)))
    assert f"'{next(iter(rule))}'" in said


def test_an_archive_that_is_where_it_was_says_that_nothing_was_logged(tmp_path: Path, zenml: ZenML) -> None:
    reader, logs = archive(tmp_path, zenml), logs_of_step(store_of(SimulatedBackend()))
    assert read(reader, logs) == Page()
    with pytest.raises(DoesNotExistException):
        list(reader.scan(logs))


@pytest.mark.parametrize("what", ["stack", "component", "no stack", "no logs there", "ZenML fails"])
def test_an_archive_that_may_have_been_moved_says_so(
    tmp_path: Path, zenml: ZenML, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    reader = archive(tmp_path, zenml, has_logs=what != "no logs there")
    if what == "stack":
        zenml.run.stack.updated = LATER
    elif what == "component":
        zenml.component.updated = LATER
    elif what == "no stack":
        zenml.run.stack = None
    elif what == "ZenML fails":
        monkeypatch.setattr(zenml, "get_run", lambda *_, **__: 1 / 0)
    with pytest.raises(DoesNotExistException, match="set 'artifact_store'"):
        read(reader, logs_of_step(store_of(SimulatedBackend())))


def test_the_metadata_of_a_step_counts_the_events_of_its_own_streams() -> None:
    store = store_of(SimulatedBackend())
    steps = [uuid4(), uuid4()]
    for place, step in enumerate(steps):
        logs = logs_of_step(store)
        origin = store.register_origin(str(logs.id), logs, {"zenml.step.run.id": str(step)})
        for event in range(3 * place):
            store.emit(origin, _record(event))
        metadata = store.get_step_run_metadata(SimpleNamespace(step_run_id=step))  # type: ignore[arg-type]
        assert metadata[nothing.STEP_METADATA] == {"events": {str(logs.id): 3 * place}}
        store.deregister_origin(origin)


def _record(number: int) -> Any:
    return logging.LogRecord("train", logging.INFO, "/code/train.py", 1, f"m{number}", (), None)
