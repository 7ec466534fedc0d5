"""The numbers of progress bars, on every way of an event: to disk, through a fork, and to the backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from composite_logstore import LogEvent
from composite_logstore.capture.frames import Message, decode, encode_message
from composite_logstore.delivery.recovery import RecoveredJournal
from composite_logstore.operations.inventory import ChildBacklog
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.format import decode_event, decode_line, encode_event
from composite_logstore.testing import SimulatedClock, make_logs, make_stream
from composite_logstore_artifact.encoding import encode
from composite_logstore_artifact.lines import event_of
from composite_logstore_datadog.encoding import StreamEncoder
from tests.artifact_stores import FolderArchive
from tests.events import SECOND, WRITER, make_events
from tests.simulation import make_child

BAR = (1 << 52) + 1
STREAM = make_stream()


def update(message: str = " 50%|##  |", progress: Any = BAR, **changes: Any) -> LogEvent:
    (event,) = make_events([message], STREAM, levels=[40], progress=progress, **changes)
    return event._replace(logger_name="stderr", file="", line=0, function="")


@pytest.mark.parametrize("progress", [False, True, 2, BAR])
def test_a_spool_gives_back_the_number(progress: Any) -> None:
    event = update(progress=progress)
    read = decode_event(decode_line(encode_event(event, str(STREAM.id))), lambda _: STREAM)
    assert read == event
    assert type(read.progress) is type(progress)  # type: ignore[union-attr]


@pytest.mark.parametrize("progress", [0, 1, -2, 1 << 63, 2.0, "2", None])
def test_a_spool_s_line_with_another_number_is_damaged(progress: Any) -> None:
    value = decode_line(encode_event(update(), str(STREAM.id)))
    value[-1] = progress
    assert decode_event(value, lambda _: STREAM) is None


@pytest.mark.parametrize("progress", [False, True, BAR])
def test_a_forked_process_sends_the_number(progress: Any) -> None:
    event = update(progress=progress)
    read = decode(True, encode_message(Message(STREAM.id, None, None, event)))
    assert isinstance(read, Message)
    assert read.event is not None
    assert read.event.progress == progress


def test_an_archive_gives_back_the_number() -> None:
    assert event_of(encode(update()), STREAM) == update()
    assert b"progress_bar" not in encode(update(progress=False))


@pytest.mark.parametrize("value", [b"0", b"1", b"-5", b"true", b'"2"', b"null", b"1e999"])
def test_an_archive_s_line_with_another_number_updates_no_bar(value: bytes) -> None:
    line = encode(update()).replace(b'"progress_bar":%d' % BAR, b'"progress_bar":' + value)
    event = event_of(line, STREAM)
    assert event is None or event.progress is False


def test_a_line_of_an_earlier_version_s_archive_is_an_update_by_its_text() -> None:
    line = encode(update("\r 50%|##  |", progress=True))
    assert b"progress_bar" not in line
    event = event_of(line, STREAM)
    assert event is not None
    assert event.progress is True


def test_datadog_gets_the_number_as_an_attribute() -> None:
    encoder = StreamEncoder(STREAM, {})
    assert b'"zenml.log.progress_bar":%d' % BAR in encoder.encode(update())
    assert b"progress_bar" not in encoder.encode(update(progress=False))


def bars_of_a_second() -> list[LogEvent]:
    events = make_events([f"{number}" for number in range(8)], STREAM, levels=[40], step_nanos=SECOND // 10)
    return [event._replace(logger_name="stderr", progress=2 + place % 2) for place, event in enumerate(events)]


def test_of_a_dead_process_s_bars_the_last_update_of_each_is_delivered(tmp_path: Path) -> None:
    dead = Spool.create(tmp_path, WRITER, ["live"])
    for event in bars_of_a_second():
        dead.segments.append(event, lambda _: True)
    dead.abandon()
    with SimulatedClock() as clock:
        spool = Spool.recover(dead.folder)
        assert spool is not None
        (delivery,) = RecoveredJournal(spool, {"live": make_child("live", progress="latest")}, clock).deliveries
        spool.close()
    assert delivery.stats().pending == 2
    backlog = ChildBacklog("live", make_child("live", progress="latest"), "", 0)
    for event in bars_of_a_second():
        backlog.count(event)
    assert backlog.events == 2


def test_a_thinned_archive_need_not_have_the_updates_of_another_one(tmp_path: Path) -> None:
    from composite_logstore.parity.compare import compare
    from composite_logstore.parity.scan import open_source

    children = [
        FolderArchive(name=name, type="artifact", root=str(tmp_path / name), is_file=True, progress=progress)  # type: ignore[arg-type]
        for name, progress in (("all", "all"), ("live", "latest"))
    ]
    events = bars_of_a_second()
    for child, held in zip(children, (events, events[-2:]), strict=True):
        exporter = child.create_exporter()
        exporter.export(held)
        exporter.close()
    result = compare(make_logs(STREAM), "", [open_source(child) for child in children])
    assert [child.missing for child in result.children.values()] == [0, 0]
