"""Escape sequences: some children keep them, others get texts without them, and all hold the same events."""

from __future__ import annotations

import logging
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from composite_logstore import LogEvent, RetryableError
from composite_logstore.ansi import without_escapes
from composite_logstore.child_types import backends
from composite_logstore.event import ExceptionInfo, stripped
from composite_logstore.parity.backfill import Backfill
from composite_logstore.parity.compare import compare
from composite_logstore.parity.ledger import open_ledger
from composite_logstore.parity.scan import open_source
from composite_logstore.parity.sender import Sender
from composite_logstore.testing import SimulatedBackend, SimulatedClock, make_logs, make_stream
from tests.artifact_stores import FolderArchive
from tests.events import make_events
from tests.simulation import Machine, make_child, make_store
from tests.simulation import make_logs as logs_of

COLOURED = "\x1b[1;31mERROR\x1b[0m the \x1b]8;;https://a\x1b\\loss\x1b]8;;\x1b\\ is \x9b32mNaN\x9bm\x1b(B"
PLAIN = "ERROR the loss is NaN"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (COLOURED, PLAIN),
        ("no escapes", "no escapes"),
        ("\x1b[38;5;105ma\x1b[38:2::1:2:3mb\x1b[m", "ab"),
        ("\x1b[2K\x1b[1A\x1b[?25lx", "x"),
        ("\x1b]0;title\x07x", "x"),
        ("100 %\x1b", "100 %"),
        ("\x1b]unfinished\nnext", "]unfinished\nnext"),
        ("\x1bP1$r\x1b\\x\x1b7\x1bMy", "xy"),
        ("", ""),
    ],
)
def test_a_text_without_escapes(text: str, plain: str) -> None:
    assert without_escapes(text) == plain


def test_the_defaults_of_the_backends() -> None:
    found = {name: backends()[name].load().model_fields["ansi"].default for name in backends()}
    names = ("artifact", "cloudwatch", "component", "datadog", "elasticsearch", "otel", "otlp")
    own = {name: found[name] for name in names}
    stripping = {"cloudwatch", "datadog", "elasticsearch", "otlp"}
    assert own == {name: "strip" if name in stripping else "keep" for name in own}


def test_a_child_gets_texts_as_it_asks_and_levels_and_identity_are_the_same() -> None:
    keep, strip = SimulatedBackend(), SimulatedBackend()
    store = make_store(make_child("keep", keep), make_child("strip", strip, ansi="strip"))
    origin = store.register_origin("step", logs_of(store), {})
    try:
        raise ValueError(COLOURED)
    except ValueError:
        exc_info: Any = sys.exc_info()
    for level, said in ((logging.INFO, COLOURED), (logging.WARNING, "plain"), (logging.ERROR, "\x1b[31m")):
        store.emit(origin, logging.LogRecord("train", level, "/code/train.py", 1, said, (), exc_info))
    store.flush()
    assert keep.messages == [COLOURED, "plain", "\x1b[31m"]
    assert strip.messages == [PLAIN, "plain", ""]
    for kept, plain in zip(keep.received, strip.received, strict=True):
        assert (kept.uid, kept.level, kept.sequence, kept.time_unix_nano) == (
            plain.uid,
            plain.level,
            plain.sequence,
            plain.time_unix_nano,
        )
        assert kept.exception is not None
        assert kept.exception.message == COLOURED
        assert plain.exception is not None
        assert plain.exception.message == PLAIN
        assert "\x1b" not in plain.text
    assert store.stats()["strip"] == store.stats()["keep"]


def test_what_is_sent_again_or_recovered_is_stripped_too(tmp_path: Path) -> None:
    with SimulatedClock() as clock:
        machine = Machine(clock, tmp_path, "spill", a={"ansi": "strip"}, b={})
        for backend in machine.backends.values():
            backend.fault = "refused"
        machine.start()
        machine.log(COLOURED)
        clock.advance(2)
        machine.die()
        for backend in machine.backends.values():
            backend.fault = None
            backend.faults = [RetryableError("busy")]
        machine.start()
        machine.log("next")
        clock.advance(120)
        assert sorted(machine.backends["a"].messages) == sorted([PLAIN, "next"])
        assert sorted(machine.backends["b"].messages) == sorted([COLOURED, "next"])


@pytest.fixture
def events() -> list[LogEvent]:
    events = make_events([COLOURED, "plain", f"\x1b[2m{COLOURED}"], make_stream())
    return [*events[:2], events[2]._replace(exception=ExceptionInfo("ValueError", COLOURED, COLOURED))]


@pytest.fixture
def archives(tmp_path: Path) -> tuple[FolderArchive, FolderArchive]:
    return (
        FolderArchive(name="keep", type="artifact", root=str(tmp_path / "keep"), is_file=True),
        FolderArchive(name="strip", type="artifact", root=str(tmp_path / "strip"), is_file=True, ansi="strip"),
    )


def export(child: FolderArchive, events: list[LogEvent]) -> None:
    exporter = child.create_exporter()
    exporter.export(events)
    exporter.close()


def test_children_that_differ_in_escapes_alone_hold_the_same_events(
    archives: tuple[FolderArchive, FolderArchive], events: list[LogEvent]
) -> None:
    keep, strip = archives
    export(keep, events)
    export(strip, [stripped(event) for event in events])
    result = compare(make_logs(events[0].stream), "", [open_source(keep), open_source(strip)])
    assert [child.differences for child in result.children.values()] == [0, 0]


def test_children_that_differ_in_more_do_not(
    archives: tuple[FolderArchive, FolderArchive], events: list[LogEvent]
) -> None:
    keep, strip = archives
    export(keep, events)
    export(strip, [*(stripped(event) for event in events[:2]), stripped(events[2])._replace(message="other")])
    result = compare(make_logs(events[0].stream), "", [open_source(keep), open_source(strip)])
    assert [child.different for child in result.children.values()] == [0, 1]


@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_copy_has_what_its_child_would_have_got(
    archives: tuple[FolderArchive, FolderArchive], events: list[LogEvent], tmp_path: Path, is_reversed: bool
) -> None:
    source, target = reversed(archives) if is_reversed else archives
    export(source, [stripped(event) for event in events] if is_reversed else events)
    logs, stream = make_logs(events[0].stream), events[0].stream
    with (
        open_ledger(tmp_path / "ledgers", UUID(int=7), target.name, 0.0) as ledger,
        closing(Sender(target, ledger)) as sender,
    ):
        backfill = Backfill(open_source(source), open_source(target), sender)
        assert backfill.copy(logs, stream).copied == len(events)
    (copied,) = (path.read_text() for path in (tmp_path / "strip").rglob("*.log"))
    assert "\\u001b" not in copied
    result = compare(logs, "", [open_source(source), open_source(target)])
    assert [child.differences for child in result.children.values()] == [0, 0]
