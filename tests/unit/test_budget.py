"""A child's budget: how much of it is spent, what happens when it is used up, and who knows of it."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from composite_logstore import CompositeLogStore, CompositeLogStoreConfig, RetryableError
from composite_logstore.config import _warn
from composite_logstore.delivery import budgets
from composite_logstore.event import LogEvent, total_size
from composite_logstore.processing.budget import NOTICE, ONE_IN, REASON, Budget, OwnAccount, Spent, Told, in_words
from composite_logstore.processing.processor import Processed
from composite_logstore.processing.settings import BudgetSettings
from composite_logstore.spool import charges
from composite_logstore.spool.charges import SharedAccount
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from composite_logstore.testing.events import make_events, make_stream
from tests.simulation import Machine, make_child, make_logs, make_store


@pytest.fixture(autouse=True)
def _nothing_spent() -> Iterator[None]:
    yield
    budgets._accounts.clear()


class Child:
    """A budget, and what its worker would do with it."""

    def __init__(
        self,
        clock: SimulatedClock,
        account: Any = None,
        told: Told | None = None,
        elsewhere: tuple[str, ...] = ("all",),
        **settings: Any,
    ) -> None:
        self.warnings: list[str] = []
        self.account = account or OwnAccount()
        self.settings = BudgetSettings(**settings)
        self.budget = Budget(self.settings, self.account, told or Told(), clock, self.warnings.append, elsewhere)

    def attempt(self, events: list[LogEvent]) -> Processed:
        batch = Processed(list(events))
        self.budget.process(batch)
        return batch

    def export(self, events: list[LogEvent]) -> Processed:
        batch = self.attempt(events)
        self.budget.commit(batch)
        return batch


def texts(batch: Processed) -> list[str]:
    return [event.message for event in batch.events if NOTICE not in event.attributes]


def notices(batch: Processed) -> list[LogEvent]:
    return [event for event in batch.events if NOTICE in event.attributes]


def numbered(count: int, first: int = 0, **changes: Any) -> list[LogEvent]:
    return make_events([f"event {number}" for number in range(first, first + count)], first=first, **changes)


# What happens when it is used up


def test_stop_exports_the_budget_and_one_notice(clock: SimulatedClock) -> None:
    child = Child(clock, events=3, per="day", then="stop")
    batch = child.export(numbered(10))
    assert texts(batch) == ["event 0", "event 1", "event 2"]
    (notice,) = notices(batch)
    assert notice.number == 3
    assert notice.level == logging.WARNING
    assert "3 events a day" in notice.message
    assert "'all'" in notice.message
    assert batch.withheld == {REASON: 6}
    assert len(batch.events) + batch.withheld.total() == 10


def test_warnings_only_exports_warnings_and_errors_whatever_the_budget_is(clock: SimulatedClock) -> None:
    child = Child(clock, events=2, then="warnings_only")
    levels = (logging.INFO, logging.INFO, logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, 25, 30)
    batch = child.export(numbered(8, levels=levels))
    assert texts(batch) == ["event 0", "event 1", "event 4", "event 5", "event 7"]
    assert batch.withheld == {REASON: 2}


def test_sample_exports_the_same_one_in_a_hundred_everywhere(clock: SimulatedClock) -> None:
    events = numbered(20_000)
    first, second = Child(clock, events=1, then="sample"), Child(clock, events=1, then="sample")
    one = texts(first.export(events))
    # Another process, in other batches, with a retry.
    other: list[str] = []
    for begin in range(0, len(events), 777):
        second.attempt(events[begin : begin + 777])
        other += texts(second.export(events[begin : begin + 777]))
    assert 0.8 < len(one) * ONE_IN / len(events) < 1.2
    # The place of the notice differs by nothing: it is the first event that is withheld.
    assert one == other


def test_bytes_are_those_of_the_events_and_the_one_that_uses_up_the_rest_is_exported(clock: SimulatedClock) -> None:
    events = numbered(10)
    most = total_size(events[:4]) + 1
    child = Child(clock, bytes=most, then="stop")
    assert texts(child.export(events)) == [f"event {number}" for number in range(5)]
    exact = Child(clock, bytes=total_size(events[:4]), then="stop")
    assert texts(exact.export(events)) == [f"event {number}" for number in range(4)]


def test_whichever_limit_is_reached_first_counts(clock: SimulatedClock) -> None:
    events = numbered(10)
    assert len(texts(Child(clock, events=2, bytes=10**9, then="stop").export(events))) == 2
    assert len(texts(Child(clock, events=9, bytes=1, then="stop").export(events))) == 1


# Periods


def test_a_new_minute_begins_a_new_budget(clock: SimulatedClock) -> None:
    child = Child(clock, events=2, per="minute", then="stop")
    assert len(texts(child.export(numbered(5)))) == 2
    clock.step(59)
    assert len(texts(child.export(numbered(5, first=5)))) == 0
    clock.step(1)
    assert len(texts(child.export(numbered(5, first=10)))) == 2


def test_days_are_those_of_utc(clock: SimulatedClock) -> None:
    child = Child(clock, events=2, per="day", then="stop")
    clock.step(86_399)
    assert len(texts(child.export(numbered(5)))) == 2
    assert len(texts(child.export(numbered(5, first=5)))) == 0
    clock.step(1)
    assert len(texts(child.export(numbered(5, first=10)))) == 2


@pytest.mark.parametrize("per", ["day", "minute"])
def test_a_clock_that_steps_back_finds_what_was_spent(clock: SimulatedClock, tmp_path: Path, per: str) -> None:
    for account in (OwnAccount(), SharedAccount(tmp_path, "a", OwnAccount(), pytest.fail)):
        child = Child(clock, account, events=2, per=per, then="stop")
        seconds = 86_400 if per == "day" else 60
        child.export(numbered(2))
        clock.step(seconds)
        child.export(numbered(1, first=2))
        clock.step(-seconds)
        assert texts(child.export(numbered(5, first=3))) == []
        clock.step(seconds)
        assert len(texts(child.export(numbered(5, first=8)))) == 1


def test_each_run_has_a_budget(clock: SimulatedClock) -> None:
    child = Child(clock, events=3, per="run", then="stop")
    run = {"zenml.pipeline.run.id": "0a6e1d0e-0000-4000-8000-000000000001"}
    steps = [make_stream(**run), make_stream(**run)]
    other, outside = make_stream(**{"zenml.pipeline.run.id": "a name/../with\0 anything" * 50}), make_stream()
    batch: list[LogEvent] = []
    for stream in (steps[0], other, steps[1], outside):
        batch += numbered(2, first=len(batch), stream=stream)
    exported = child.export(batch)
    assert texts(exported) == [f"event {number}" for number in (0, 1, 2, 3, 4, 6, 7)]
    assert exported.withheld == {}
    (notice,) = notices(exported)
    assert notice.stream is steps[1]
    clock.step(86_400)
    assert texts(child.export(numbered(2, first=8, stream=steps[0]))) == []


# Retries


def test_a_retry_spends_nothing_even_in_a_later_minute(clock: SimulatedClock) -> None:
    child = Child(clock, events=3, per="minute", then="stop")
    events = numbered(3)
    child.attempt(events)
    clock.step(60)
    assert texts(child.attempt(events)) == texts(child.export(events)) == ["event 0", "event 1", "event 2"]
    assert texts(child.export(numbered(3, first=3))) == ["event 3", "event 4", "event 5"]


def test_the_pieces_of_a_batch_spend_what_the_batch_has_spent(clock: SimulatedClock) -> None:
    child = Child(clock, events=5, then="stop")
    events = numbered(8)
    whole = child.attempt(events)
    pieces = [child.export(events[:2]), child.attempt(events[2:]), child.export(events[2:6]), child.export(events[6:])]
    del pieces[1]
    assert [text for piece in pieces for text in texts(piece)] == texts(whole)
    assert sum(piece.withheld.total() for piece in pieces) == whole.withheld.total() == 2


def test_events_over_the_budget_profit_from_a_new_minute(clock: SimulatedClock) -> None:
    child = Child(clock, events=2, per="minute", then="stop")
    events = numbered(4)
    assert child.attempt(events).withheld.total() == 1
    clock.step(60)
    assert texts(child.export(events)) == [f"event {number}" for number in range(4)]


# What is said


def test_a_process_warns_once_at_80_and_once_at_100_percent_of_each_period(clock: SimulatedClock) -> None:
    told, account = Told(), OwnAccount()
    child = Child(clock, account, told, events=100, per="minute", then="stop")
    again = Child(clock, account, told, events=100, per="minute", then="stop")
    child.export(numbered(79))
    assert child.warnings == []
    child.export(numbered(1, first=79))
    again.export(numbered(1, first=80))
    assert [("80 %" in warning, "100 events a minute" in warning) for warning in child.warnings] == [(True, True)]
    child.export(numbered(50, first=81))
    again.export(numbered(50, first=131))
    assert len(child.warnings) == 2
    assert "is used up" in child.warnings[1]
    assert "'all'" in child.warnings[1]
    assert again.warnings == []
    clock.step(60)
    child.export(numbered(200, first=200))
    assert len(child.warnings) == 3


def test_each_stream_has_one_notice_in_each_period_even_after_retries(clock: SimulatedClock) -> None:
    child = Child(clock, events=1, per="minute", then="stop")
    streams = make_stream(), make_stream()
    one = numbered(4, stream=streams[0])
    assert [event.number for event in notices(child.attempt(one))] == [1]
    assert [event.number for event in notices(child.export(one))] == [1]
    both = [*numbered(2, first=4, stream=streams[0]), *numbered(2, first=6, stream=streams[1])]
    assert [event.number for event in notices(child.export(both))] == [6]
    clock.step(60)
    assert [event.number for event in notices(child.export(numbered(3, first=8, stream=streams[0])))] == [9]


def test_a_notice_has_the_identity_and_the_time_of_the_event_that_it_replaces_and_nothing_else(
    clock: SimulatedClock,
) -> None:
    event = numbered(1, first=7, attributes={"key": "private"}, metadata={"more": "private"}, message="private")[0]
    child = Child(clock, events=1, then="stop")
    child.export(numbered(1))
    (notice,) = notices(child.export([event]))
    assert (notice.uid, notice.sequence, notice.stream) == (event.uid, event.sequence, event.stream)
    assert notice.time_unix_nano == event.time_unix_nano
    assert "private" not in repr(notice._replace(stream=None))  # type: ignore[arg-type]


def test_without_another_complete_child_nothing_is_promised(clock: SimulatedClock) -> None:
    child = Child(clock, events=1, then="stop", elsewhere=())
    (notice,) = notices(child.export(numbered(2)))
    assert "'" not in notice.message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"events": 100_000, "per": "day"}, "100,000 events a day"),
        ({"events": 1, "per": "run"}, "1 event a run"),
        ({"bytes": 5_000_000, "events": 2, "per": "minute"}, "2 events or 5,000,000 bytes a minute"),
    ],
)
def test_a_budget_in_words(settings: dict[str, Any], words: str) -> None:
    assert in_words(BudgetSettings(**settings)) == words


# Settings


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"events": 0}, ["'budget.events'", "'enabled'"]),
        ({"bytes": -1}, ["'budget.bytes'", "'enabled'"]),
        ({}, ["'budget'", "'budget.events'", "'budget.bytes'"]),
        ({"events": 5, "per": "week"}, ["'budget.per'", "'run', 'day' or 'minute'"]),
        ({"events": 5, "then": "panic"}, ["'budget.then'", "'warnings_only', 'sample' or 'stop'"]),
        ({"events": "many"}, ["'budget.events'"]),
        ({"event": 5}, ["'budget.event'", "did you mean 'events'", "are: events, bytes, per, then"]),
        (5, ["'budget'"]),
    ],
)
def test_a_wrong_budget_is_refused_with_the_field_and_the_fix(budget: Any, words: list[str]) -> None:
    make_child("a")
    raw = {"name": "a", "type": "artifact", "budget": budget}
    with pytest.raises(ValidationError) as refusal:
        CompositeLogStoreConfig(primary="a", children=[raw])  # type: ignore[list-item]
    assert all(word in str(refusal.value) for word in ["child 'a'", *words]), str(refusal.value)


def test_in_memory_a_registration_says_that_each_process_has_its_own_budget(caplog: pytest.LogCaptureFixture) -> None:
    child = make_child("live", budget={"events": 5})
    for durability, said in (("spill", 0), ("memory", 1)):
        caplog.clear()
        config = CompositeLogStoreConfig(
            primary="live",
            children=[child, make_child("archive")],
            durability=durability,  # type: ignore[arg-type]
        )
        config.is_valid  # noqa: B018
        assert sum("'live'" in record.getMessage() for record in caplog.records) == said


def test_a_registration_warns_if_no_child_would_have_everything(caplog: pytest.LogCaptureFixture) -> None:
    for other, said in (({"budget": {"bytes": 5}}, 1), ({"budget": {"bytes": 5}, "enabled": False}, 1), ({}, 0)):
        caplog.clear()
        _warn.cache_clear()
        children = [make_child("live", budget={"events": 5}), make_child("archive", **other)]
        CompositeLogStoreConfig(primary="live", children=children).is_valid  # type: ignore[arg-type] # noqa: B018
        assert sum("each child has a 'budget'" in record.getMessage() for record in caplog.records) == said


# The file that processes share


def test_the_file_has_mode_0600_and_the_folder_0700(tmp_path: Path) -> None:
    account = SharedAccount(tmp_path / "store", "a", OwnAccount(), pytest.fail)
    account.charge("day-2026-01-01", lambda spent: Spent(1, 2))
    (file,) = (tmp_path / "store" / "budgets").iterdir()
    assert file.name == "a.day-2026-01-01"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def _charge(folder: Path, times: int) -> None:
    account = SharedAccount(folder, "a", OwnAccount(), lambda _: os._exit(1))
    for _ in range(times):
        account.charge("run-1", lambda spent: Spent(spent.events + 1, spent.bytes + 10))
    os._exit(0)


def test_many_processes_charge_at_once_and_no_charge_is_lost(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_charge, args=(tmp_path, 100)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    account = SharedAccount(tmp_path, "a", OwnAccount(), pytest.fail)
    assert account.charge("run-1", lambda spent: spent) == Spent(400, 4000)


@pytest.mark.parametrize("data", [b"", b"0", b"\0" * 51, b"9" * 51, b"%020d %020d 00000000\n" % (5, 5), b"x" * 5000])
def test_a_damaged_file_counts_as_nothing_spent(tmp_path: Path, data: bytes) -> None:
    account = SharedAccount(tmp_path, "a", OwnAccount(), pytest.fail)
    account.charge("day-1", lambda spent: spent)
    (tmp_path / "budgets" / "a.day-1").write_bytes(data)
    fresh = SharedAccount(tmp_path, "a", OwnAccount(), pytest.fail)
    assert fresh.charge("day-1", lambda spent: Spent(spent.events + 1, 1)) == Spent(1, 1)
    assert SharedAccount(tmp_path, "a", OwnAccount(), pytest.fail).charge("day-1", lambda s: s) == Spent(1, 1)


def test_a_file_that_cannot_be_used_is_told_once_and_the_process_counts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    account = SharedAccount(tmp_path, "a", OwnAccount(), told.append)
    more = lambda spent: Spent(spent.events + 1, 0)  # noqa: E731
    account.charge("day-1", more)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "budgets").rename(tmp_path / "away")
    (tmp_path / "budgets").symlink_to(tmp_path / "elsewhere")
    assert [account.charge("day-1", more).events for _ in range(3)] == [2, 3, 4]
    assert len(told) == 1
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "budgets").unlink()
    assert account.charge("day-1", more).events == 5
    assert len(told) == 2


def test_a_process_that_is_stopped_under_the_lock_delays_nobody_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charges, "_LOCK_SECONDS", 0.0)
    told: list[str] = []
    account = SharedAccount(tmp_path, "a", OwnAccount(), told.append)
    account.charge("day-1", lambda spent: Spent(1, 1))
    with (tmp_path / "budgets" / "a.day-1").open("rb") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        assert account.charge("day-1", lambda spent: Spent(spent.events + 1, 1)).events == 2
    assert account.charge("day-1", lambda spent: Spent(spent.events + 1, 1)).events == 3
    assert len(told) == 2


def test_the_files_of_old_periods_are_removed_and_those_of_other_children_stay(tmp_path: Path) -> None:
    other = SharedAccount(tmp_path, "a-b", OwnAccount(), pytest.fail)
    other.charge("minute-0", lambda spent: Spent(1, 1))
    account = SharedAccount(tmp_path, "a", OwnAccount(), pytest.fail)
    account.charge("run-1", lambda spent: Spent(1, 1))
    for minute in range(30):
        account.charge(f"minute-{minute}", lambda spent: Spent(1, 1))
        os.utime(tmp_path / "budgets" / f"a.minute-{minute}", (minute, minute))
    names = {path.name for path in (tmp_path / "budgets").iterdir()}
    assert {"a-b.minute-0", "a.run-1", "a.minute-29"} <= names
    assert len(names) <= 2 + 11


# The whole log store


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "budget" in record.getMessage()]


def test_the_account_adds_up_and_the_archive_has_everything(clock: SimulatedClock, tmp_path: Path) -> None:
    archive, live = SimulatedBackend(), SimulatedBackend()
    store = make_store(
        make_child("archive", archive),
        make_child("live", live, budget={"events": 10, "per": "day", "then": "stop"}),
        durability="spill",
        spool_directory=str(tmp_path),
    )
    log(store, 25)
    stats = store.stats()
    assert stats["archive"]["delivered"] == 25
    assert (stats["live"]["delivered"], stats["live"]["withheld"], stats["live"]["pending"]) == (11, 14, 0)
    assert stats["live"]["withheld_reasons"] == {REASON: 14}
    assert stats["live"]["state"] == "healthy"
    assert "'archive'" in live.received[-1].message


def log(store: CompositeLogStore, count: int) -> None:
    origin = store.register_origin("step", make_logs(store), {})
    for number in range(count):
        store.emit(origin, logging.LogRecord("train", 20, "/code/train.py", 1, f"event {number}", (), None))
    store.flush()


@pytest.mark.parametrize(("durability", "total"), [("spill", 10), ("write_ahead", 10), ("memory", 20)])
def test_processes_share_a_budget_unless_all_is_in_memory(
    clock: SimulatedClock, tmp_path: Path, durability: str, total: int
) -> None:
    machine = Machine(clock, tmp_path, durability, live={"budget": {"events": 10, "then": "stop"}})
    for _ in range(2):
        machine.start()
        machine.log(*map(str, range(20)))
        machine.store.flush()
        machine.die()
        # Another process knows nothing of this one's memory.
        budgets._accounts.clear()
    sent = [event for event in machine.backends["live"].received if NOTICE not in event.attributes]
    assert len(sent) == total


def test_a_writer_that_follows_another_one_in_the_process_continues_with_its_budget(clock: SimulatedClock) -> None:
    live = SimulatedBackend()
    id = None
    for most in (10, 12):
        store = make_store(make_child("live", live, budget={"events": most, "then": "stop"}), id=id)
        id = store.id
        log(store, 20)
    assert sum(NOTICE not in event.attributes for event in live.received) == 12


def test_repeats_at_the_end_of_a_stream_are_charged_too(clock: SimulatedClock) -> None:
    live = SimulatedBackend()
    for most, expected in ((2, 2), (1, 1)):
        live.received.clear()
        store = make_store(
            make_child(
                "live", live, collapse_repeats={"window_millis": 600_000}, budget={"events": most, "then": "stop"}
            )
        )
        origin = store.register_origin("step", make_logs(store), {})
        for _ in range(5):
            store.emit(origin, logging.LogRecord("train", 20, "/code/train.py", 1, "again", (), None))
            clock.advance(1)
        store.deregister_origin(origin)
        clock.advance(10)
        assert sum(NOTICE not in event.attributes for event in live.received) == expected
        stats = store.stats()["live"]
        assert stats["delivered"] + stats["withheld"] == stats["accepted"] == 5
        assert sum(stats["withheld_reasons"].values()) == stats["withheld"]
        assert 0 not in stats["withheld_reasons"].values()


def test_repeats_shown_at_the_end_of_a_stream_are_counted_once_however_many_rules_there_are(
    clock: SimulatedClock,
) -> None:
    live = SimulatedBackend()
    rules = [{"message": f"^rule {number}$"} for number in range(30)]
    store = make_store(make_child("live", live, drop=rules, collapse_repeats={"window_millis": 600_000}))
    origin = store.register_origin("step", make_logs(store), {})
    for message in [*(f"rule {number}" for number in range(30)), *["again"] * 5]:
        store.emit(origin, logging.LogRecord("train", 20, "/code/train.py", 1, message, (), None))
        clock.advance(1)
    store.deregister_origin(origin)
    clock.advance(10)
    stats = store.stats()["live"]
    assert (stats["delivered"], stats["withheld"], stats["accepted"]) == (2, 33, 35)
    assert sum(stats["withheld_reasons"].values()) == 33


def test_what_is_copied_spends_nothing() -> None:
    processor = make_child("live", budget={"events": 1, "then": "stop"}).create_processor()
    assert len(processor.process(numbered(5)).events) == 5


def test_a_retry_after_an_outage_is_charged_once(clock: SimulatedClock, tmp_path: Path) -> None:
    live = SimulatedBackend()
    store = make_store(
        make_child("live", live, budget={"events": 10, "then": "stop"}),
        durability="spill",
        spool_directory=str(tmp_path),
    )
    live.fault = RetryableError("away")
    origin = store.register_origin("step", make_logs(store), {})
    for number in range(8):
        store.emit(origin, logging.LogRecord("train", 20, "/code/train.py", 1, f"event {number}", (), None))
    clock.advance(600)
    live.fault = None
    clock.advance(600)
    assert len(live.received) == 8
    account = SharedAccount(tmp_path / str(store.id), "live", OwnAccount(), pytest.fail)
    assert account.charge("day-2026-01-01", lambda spent: spent).events == 8


def test_what_a_dead_process_left_is_charged_again_so_a_crash_counts_too_much_rather_than_too_little(
    clock: SimulatedClock, tmp_path: Path
) -> None:
    machine = Machine(clock, tmp_path, "write_ahead", live={"budget": {"events": 100, "then": "stop"}})
    machine.backends["live"].fault = RetryableError("away")
    machine.start()
    machine.log(*map(str, range(30)))
    clock.advance(30)
    machine.die()
    machine.backends["live"].fault = None
    machine.start()
    machine.log("last")
    machine.store.flush()
    clock.advance(60)
    delivered = {event.message for event in machine.backends["live"].received}
    assert delivered == {*map(str, range(30)), "last"}
    account = SharedAccount(tmp_path / str(machine.id), "live", OwnAccount(), pytest.fail)
    assert 31 <= account.charge("day-2026-01-01", lambda spent: spent).events <= 61
