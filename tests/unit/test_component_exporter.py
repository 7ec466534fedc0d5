"""What a log store without an exporter of its own is given for each event."""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from typing import Any, cast

from hypothesis import example, given
from hypothesis import strategies as st

from composite_logstore_component.exporter import EmittingExporter
from tests.events import make_events


class Recording:
    """Looks like a log store, and remembers the records that it is given."""

    name = "recording"

    def __init__(self) -> None:
        self.records: list[logging.LogRecord] = []

    def register_origin(self, *_: Any) -> Any:
        return type("Origin", (), {"metadata": {}})()

    def emit(self, origin: Any, record: logging.LogRecord, metadata: dict[str, Any]) -> None:
        self.records.append(record)

    def flush(self, blocking: bool) -> None:
        pass


def emitted(time_unix_nano: int) -> logging.LogRecord:
    store = Recording()
    exporter = EmittingExporter(cast("Any", store))
    exporter._origin = store.register_origin  # type: ignore[method-assign]
    exporter.export([make_events(["hello"])[0]._replace(time_unix_nano=time_unix_nano)])
    (record,) = store.records
    return record


# From 2038 on, floats are further apart than half a microsecond.
@given(st.integers(0, 2**31 * 1_000_000 - 1).map(lambda micros: micros * 1000))
@example(1_795_808_654_954_000_000)
def test_a_record_is_as_late_as_its_event_in_microseconds_and_in_milliseconds(time_unix_nano: int) -> None:
    record = emitted(time_unix_nano)
    micros = time_unix_nano // 1000
    # OpenTelemetry's handler takes the whole nanoseconds, formatters and ZenML's handlers a `datetime`.
    assert int(record.created * 1e9) // 1000 == micros
    moment = datetime.fromtimestamp(record.created, timezone.utc)
    assert int(moment.timestamp()) == time_unix_nano // 1_000_000_000
    assert moment.microsecond == micros % 1_000_000
    assert record.msecs == micros // 1000 % 1000
