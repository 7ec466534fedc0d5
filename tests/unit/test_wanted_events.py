"""Which events a child gets: one rule on its configuration, and the same answer wherever it is asked."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from composite_logstore import LogEvent
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.journal import Journal
from composite_logstore.delivery.recovery import RecoveredJournal
from composite_logstore.operations.inventory import ChildBacklog
from composite_logstore.parity.backfill import Backfill
from composite_logstore.parity.compare import compare
from composite_logstore.parity.ledger import open_ledger
from composite_logstore.parity.scan import open_source
from composite_logstore.parity.sender import Sender
from composite_logstore.reading.gaps import shows_all
from composite_logstore.spool.folder import Spool
from composite_logstore.testing import SimulatedClock, make_logs, make_stream
from composite_logstore.zenml import LogsEntriesFilter
from tests.artifact_stores import FolderArchive
from tests.events import SECOND, WRITER, make_capture, make_events

SETTINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "NOTSET": {"min_level": "NOTSET"},
    "INFO": {"min_level": "INFO"},
    "ERROR": {"min_level": "ERROR"},
    "latest": {"progress": "latest"},
    "latest INFO": {"progress": "latest", "min_level": "INFO"},
    "latest ERROR": {"progress": "latest", "min_level": "ERROR"},
}
KINDS = {
    "debug": (logging.DEBUG, False),
    "info": (logging.INFO, False),
    "between": (25, False),
    "error": (logging.ERROR, False),
    "debug update": (logging.DEBUG, True),
    "error update": (logging.ERROR, True),
}
# Of four events of a kind, two in each second: how many the child gets.
TABLE = {
    "all": (4, 4, 4, 4, 4, 4),
    "NOTSET": (4, 4, 4, 4, 4, 4),
    "INFO": (0, 4, 4, 4, 0, 4),
    "ERROR": (0, 0, 0, 4, 0, 4),
    "latest": (4, 4, 4, 4, 2, 2),
    "latest INFO": (0, 4, 4, 4, 2, 2),
    "latest ERROR": (0, 0, 0, 4, 0, 0),
}
CASES = [
    pytest.param(settings, kind, number, id=f"{settings}, {kind}")
    for settings, numbers in TABLE.items()
    for kind, number in zip(KINDS, numbers, strict=True)
]


def events_of(kind: str) -> list[LogEvent]:
    level, is_update = KINDS[kind]
    events = make_events(
        [f"\r{number}%" if is_update else f"{number}" for number in range(4)],
        make_stream(),
        levels=[level],
        step_nanos=SECOND // 2,
        progress=is_update,
    )
    return [event._replace(logger_name="stderr", file="", line=0) for event in events]


def archive(name: str, root: Path, settings: dict[str, Any]) -> FolderArchive:
    return FolderArchive(name=name, type="artifact", root=str(root / name), is_file=True, **settings)


def by_the_journal(child: FolderArchive, events: list[LogEvent], folder: Path) -> int:
    journal = Journal([child])
    for event in events:
        journal.append(
            events[0].stream,
            make_capture(
                event.message,
                event.level,
                time_unix_nano=event.time_unix_nano,
                progress=event.progress,
                logger_name=event.logger_name,
            ),
        )
    journal.hand_out()
    assert journal.deliveries[0].stats().accepted == len(journal.deliveries[0].queue)
    return len(journal.deliveries[0].queue)


def by_recovery(child: FolderArchive, events: list[LogEvent], folder: Path) -> int:
    dead = Spool.create(folder, WRITER, [child.name])
    for event in events:
        dead.segments.append(event, lambda _: True)
    dead.abandon()
    with SimulatedClock() as clock:
        spool = Spool.recover(dead.folder)
        assert spool is not None
        (delivery,) = RecoveredJournal(spool, {child.name: child}, clock).deliveries
        spool.close()
    return delivery.stats().pending


def by_the_account_of_a_segment(child: FolderArchive, events: list[LogEvent], folder: Path) -> int | None:
    delivery = Delivery(child, lambda: 0)
    if child.is_thinned:
        # Of each second the second update is the latest.
        delivery.progress_bars.in_spool.update(event.number for event in events[1::2] if event.progress)
    kinds = Counter((event.level, event.progress) for event in events)
    wanted = delivery.count_wanted(kinds, 0, len(events) - 1)
    assert wanted == sum(delivery.wants(event) is not None for event in events)
    return wanted


def by_the_inventory(child: FolderArchive, events: list[LogEvent], folder: Path) -> int:
    backlog = ChildBacklog(child.name, child, "", 0)
    for event in events:
        backlog.count(event)
    return backlog.events


@pytest.mark.parametrize("user", [by_the_journal, by_recovery, by_the_account_of_a_segment, by_the_inventory])
@pytest.mark.parametrize(("settings", "kind", "number"), CASES)
def test_a_delivery_gets_what_the_settings_say(
    user: Callable[..., int], settings: str, kind: str, number: int, tmp_path: Path
) -> None:
    assert user(archive("child", tmp_path, SETTINGS[settings]), events_of(kind), tmp_path / "spool") == number


@pytest.mark.parametrize(("settings", "kind", "number"), CASES)
def test_backfill_and_comparison_expect_what_certainly_arrives(
    settings: str, kind: str, number: int, tmp_path: Path
) -> None:
    number = number if number == 4 else 0
    source, target = archive("a", tmp_path, {}), archive("b", tmp_path, SETTINGS[settings])
    events = events_of(kind)
    logs, stream = make_logs(events[0].stream), events[0].stream
    exporter = source.create_exporter()
    exporter.export(events)
    exporter.close()

    result = compare(logs, "", [open_source(source), open_source(target)])
    assert {name: child.missing for name, child in result.children.items()} == {"a": 0, "b": number}
    with (
        open_ledger(tmp_path / "ledgers", UUID(int=7), "b", 0.0) as ledger,
        closing(Sender(target, ledger)) as sender,
    ):
        copied = Backfill(open_source(source), open_source(target), sender).copy(logs, stream)
    assert (copied.copied, copied.unwanted) == (number, 4 - number)
    result = compare(logs, "", [open_source(source), open_source(target)])
    assert [child.differences for child in result.children.values()] == [0, 0]


def test_updates_that_a_thinned_child_got_differ_from_no_other_childs(tmp_path: Path) -> None:
    source, target = archive("a", tmp_path, {}), archive("b", tmp_path, SETTINGS["latest"])
    events = events_of("error update")
    ordinary = [event._replace(message="hot", progress=False, number=4, sequence=4) for event in events[:1]]
    for child, held in (
        (source, [*events, *ordinary]),
        (target, [events[1]._replace(level=20, level_name="INFO"), ordinary[0]._replace(message="cold")]),
    ):
        exporter = child.create_exporter()
        exporter.export(held)
        exporter.close()
    result = compare(make_logs(events[0].stream), "", [open_source(source), open_source(target)])
    assert [(child.missing, child.different) for child in result.children.values()] == [(0, 0), (0, 1)]
    assert [(named.writer, named.sequence) for named in result.differences] == [(WRITER, 4)]


@pytest.mark.parametrize("settings", SETTINGS)
def test_gaps_are_shown_of_children_that_get_everything(settings: str, tmp_path: Path) -> None:
    child = archive("child", tmp_path, SETTINGS[settings])
    assert shows_all(child, LogsEntriesFilter()) == child.wants_all == (settings == "all")
    assert not shows_all(child, LogsEntriesFilter(search="a"))


def test_a_text_of_two_lines_is_no_update_of_a_progress_bar(tmp_path: Path) -> None:
    source, target = archive("a", tmp_path, {}), archive("b", tmp_path, SETTINGS["latest"])
    events = [event._replace(message="one\r\ntwo", progress=False) for event in events_of("error")]
    exporter = source.create_exporter()
    exporter.export(events)
    exporter.close()
    result = compare(make_logs(events[0].stream), "", [open_source(source), open_source(target)])
    assert result.children["b"].missing == 4
