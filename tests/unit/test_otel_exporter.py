"""Children of type `otel`: what becomes of an event, and of what an exporter of the SDK answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from composite_logstore import CompositeLogStoreConfig, OtelExporter, RetryableError, TooLargeError, UnavailableError
from composite_logstore.event import ExceptionInfo, TraceContext
from composite_logstore.testing import make_event, make_events
from composite_logstore_otel.config import OtelChildConfig
from tests import line_exporter
from tests.otel_sdk import LogRecordExporter, LogRecordExportResult, ReadableLogRecord, resource_of

RESOURCE = {"service.name": "train"}
logger = logging.getLogger(__name__)


class Recording(LogRecordExporter):
    """Keeps what it gets; does what it is told."""

    def __init__(self, answer: Callable[[], Any] = lambda: LogRecordExportResult.SUCCESS) -> None:
        self.answer = answer
        self.records: list[ReadableLogRecord] = []
        self.ended = 0

    def export(self, batch: Sequence[ReadableLogRecord]) -> Any:
        self.records.extend(batch)
        return self.answer()

    def shutdown(self) -> None:
        self.ended += 1

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which packages are imported, with one that has an exporter."""
    folder = tmp_path / "site"
    folder.mkdir()
    line_exporter.install(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def otel_child(**settings: Any) -> OtelChildConfig:
    return OtelChildConfig(**{"name": "any", "type": "otel", **settings})


def registered(child: dict[str, Any]) -> CompositeLogStoreConfig:
    """What ZenML does where a log store is registered."""
    children = [{"name": "archive", "type": "artifact"}, {"name": "any", "type": "otel", **child}]
    config = CompositeLogStoreConfig(primary="archive", children=children)
    assert config.is_valid
    return config


# What a record carries


def test_a_record_carries_all_of_its_event() -> None:
    exporter = Recording()
    event = make_event(
        "hello",
        level=logging.WARNING,
        level_name="WARNING",
        exception=ExceptionInfo("ValueError", "out of range", "Traceback"),
        trace=TraceContext(2**127 + 1, 2**63 + 1, 1),
        attributes={"own": {"nested": [1, None]}, "zenml.log.source": "mine"},
        metadata={"given": "to emit"},
    )
    assert OtelExporter(exporter, RESOURCE).export([event]) == 0

    (readable,) = exporter.records
    record = readable.log_record
    assert (record.body, record.timestamp, record.observed_timestamp) == ("hello", *[event.time_unix_nano] * 2)
    assert record.severity_number is not None
    assert (record.severity_number.value, record.severity_text) == (13, "WARN")
    assert (record.trace_id, record.span_id, record.trace_flags) == (2**127 + 1, 2**63 + 1, 1)
    assert resource_of(readable).attributes["service.name"] == "train"
    attributes = dict(record.attributes or {})
    assert attributes["logger.name"] == "train"
    assert attributes["own"] == {"nested": [1, None]}
    assert attributes["exception.type"] == "ValueError"
    assert attributes["code.file.path"] == "/code/train.py"
    assert attributes["given"] == "to emit"
    # The stream's own go before what a record brings along.
    assert attributes["zenml.log.source"] == "step"
    assert attributes["log.record.uid"] == event.uid
    assert attributes["zenml.log.sequence"] == event.sequence


def test_a_record_without_a_span_has_none() -> None:
    exporter = Recording()
    OtelExporter(exporter, RESOURCE).export([make_event()])
    assert (exporter.records[0].log_record.trace_id, exporter.records[0].log_record.span_id) == (0, 0)


def test_records_of_all_loggers_are_of_one_scope_so_that_none_overtakes_another() -> None:
    exporter = Recording()
    events = [make_event(logger_name=name) for name in ("train", "stdout", "train")]
    OtelExporter(exporter, RESOURCE).export(events)
    assert len({readable.instrumentation_scope for readable in exporter.records}) == 1
    assert [dict(r.log_record.attributes or {})["logger.name"] for r in exporter.records] == [
        "train",
        "stdout",
        "train",
    ]


def test_every_level_has_a_severity() -> None:
    exporter = Recording()
    OtelExporter(exporter, RESOURCE).export([make_event(level=level) for level in (0, 5, 10, 25, 50, 1_000)])
    numbers = [readable.log_record.severity_number for readable in exporter.records]
    assert [number.value for number in numbers if number is not None] == [0, 0, 5, 12, 21, 24]


# Answers


def test_a_failure_is_tried_again_and_says_what_the_exporter_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> LogRecordExportResult:
        logger.error("code: %s, key: %s", 401, "top-secret")
        logger.info("not worth it")
        return LogRecordExportResult.FAILURE

    caplog.set_level("INFO")
    exporter = OtelExporter(Recording(fail), RESOURCE, hidden=["top-secret"])
    with pytest.raises(RetryableError, match=r"^the exporter reports a failure: code: 401, key: \*\*\*$"):
        exporter.export([make_event()])
    assert [record.getMessage() for record in caplog.records] == ["not worth it"]


def test_what_is_logged_at_other_times_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    exporter = OtelExporter(Recording(), RESOURCE)
    exporter.export([make_event()])
    logger.error("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_an_exporter_that_raises_is_tried_again_and_its_text_is_not_shown() -> None:
    def fail() -> None:
        raise ConnectionError("https://user:top-secret@backend")

    with pytest.raises(RetryableError, match=r"^the exporter raised ConnectionError$"):
        OtelExporter(Recording(fail), RESOURCE).export([make_event()])


@pytest.mark.parametrize("answer", [None, "SUCCESS", 0])
def test_an_answer_that_is_not_success_is_a_failure(answer: object) -> None:
    with pytest.raises(RetryableError):
        OtelExporter(Recording(lambda: answer), RESOURCE).export([make_event()])


def test_more_events_than_the_exporter_takes_are_split() -> None:
    exporter = OtelExporter(Recording(), RESOURCE, max_batch_size=2)
    with pytest.raises(TooLargeError):
        exporter.export(make_events(["a", "b", "c"]))
    assert exporter.export(make_events(["a", "b"])) == 0


def test_a_batch_of_many_megabytes_is_split_and_one_event_is_shortened() -> None:
    recording = Recording()
    exporter = OtelExporter(recording, RESOURCE)
    with pytest.raises(TooLargeError):
        exporter.export(make_events(["x" * 800_000] * 8))
    assert exporter.export([make_event("x" * 5_000_000)]) == 1
    assert "[shortened by" in str(recording.records[-1].log_record.body)
    assert exporter.export([make_event("x" * 20_000)]) == 0
    assert recording.records[-1].log_record.body == "x" * 20_000


def test_it_is_shut_down_once() -> None:
    recording = Recording()
    exporter = OtelExporter(recording, RESOURCE)
    exporter.close()
    exporter.close()
    assert recording.ended == 1


# Settings


def test_an_exporter_is_found_by_its_entry_point_and_by_its_class_path(site: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("lines", "own_line_exporter.LineExporter", "own_line_exporter:LineExporter")):
        path = tmp_path / str(number)
        child = otel_child(exporter=name, arguments={"path": str(path)}, service_name="mine")
        child.check()
        assert child.create_exporter().export([make_event()]) == 0
        line = json.loads(path.read_text())
        assert (line["body"], line["resource"]["service.name"]) == ("hello", "mine")
        assert child.requirements == {"composite-logstore", "own-line-exporter"}


def test_an_environment_that_is_no_unicode_is_replaced_by_what_an_exporter_can_encode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=\udcff")
    exporter = Recording()
    assert OtelExporter(exporter, RESOURCE).export([make_event()]) == 0
    assert resource_of(exporter.records[0]).attributes["team"] == "?"


def test_the_service_is_that_of_the_settings_then_the_variables_then_zenml_s(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def service(**settings: Any) -> str:
        path = tmp_path / "lines"
        path.unlink(missing_ok=True)
        child = otel_child(exporter="lines", arguments={"path": str(path)}, **settings)
        child.create_exporter().export([make_event()])
        return str(json.loads(path.read_text())["resource"]["service.name"])

    assert service() == "zenml"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "of the variable")
    assert service() == "of the variable"
    assert service(service_name="of the settings") == "of the settings"


MISTAKES = {
    "a name that there is not": ({"exporter": "consol"}, "no exporter 'consol' here (did you mean 'console'?)"),
    "an entry point that cannot be imported": (
        {"exporter": "missing"},
        "'missing' cannot be imported, since 'no_such_module' is missing; install the package",
    ),
    "a module that there is not": ({"exporter": "no_such.Class"}, "'no_such.Class' cannot be imported"),
    "a class that there is not": ({"exporter": "own_line_exporter.Other"}, "'own_line_exporter' has no class 'Other'"),
    "a class that is no exporter": ({"exporter": "pathlib.Path"}, "is no LogRecordExporter"),
    "an unfinished class": ({"exporter": "own_line_exporter.Unfinished"}, "Unfinished lacks 'export'"),
    "no class": ({"exporter": "own_line_exporter.install"}, "is no LogRecordExporter"),
    "an argument that there is not": (
        {"exporter": "lines", "arguments": {"path": "/top-secret", "tokn": "top-secret"}},
        "'arguments': got an unexpected keyword argument 'tokn'; those of LineExporter are: path, token",
    ),
    "an argument that is missing": ({"exporter": "lines"}, "missing a required argument: 'path'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_where_the_log_store_is_registered(mistake: str, site: Path) -> None:
    settings, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=r"child 'any': '(exporter|arguments)': ") as raised:
        registered(settings)
    assert words in str(raised.value)
    assert "top-secret" not in str(raised.value)
    # And the same from where a run is started, and where the child is used.
    with pytest.raises(ValueError, match=r"'(exporter|arguments)': "):
        otel_child(**settings).check()
    with pytest.raises(UnavailableError, match=r"'(exporter|arguments)': "):
        otel_child(**settings).create_exporter()


def test_a_server_without_the_exporter_s_package_loads_the_log_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZENML_SERVER", "1")
    config = registered({"exporter": "of_another_machine"})
    with pytest.raises(UnavailableError, match="'exporter': there is no exporter 'of_another_machine' here"):
        config.child("any").create_exporter()


def test_arguments_that_the_exporter_refuses_make_the_child_unavailable(site: Path) -> None:
    child = otel_child(exporter="lines", arguments={"path": "/x", "token": "unusable"})
    with pytest.raises(
        UnavailableError, match=r"^'arguments': LineExporter cannot be created with them \(ValueError\)"
    ):
        child.create_exporter()


def test_arguments_are_not_shown() -> None:
    child = otel_child(exporter="console", arguments={"headers": {"key": "top-secret"}})
    assert "top-secret" not in repr(child)
    assert "top-secret" not in str(child)


def test_references_in_arguments_are_known_to_zenml(site: Path) -> None:
    config = registered({"exporter": "lines", "arguments": {"path": "/x", "token": "Bearer {{secret.token}}"}})
    assert {(reference.name, reference.key) for reference in config.required_secrets} == {("secret", "token")}


def test_it_cannot_be_read(site: Path) -> None:
    with pytest.raises(ValueError, match="children of type 'otel' cannot be read"):
        CompositeLogStoreConfig(primary="any", children=[{"name": "any", "type": "otel", "exporter": "console"}])
