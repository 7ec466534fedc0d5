"""Events in memory are bounded in bytes, whatever records contain and however many children need them."""

from __future__ import annotations

import gc
import logging
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from composite_logstore.capture.record import note
from composite_logstore.delivery import spilling, worker
from composite_logstore.delivery.journal import Journal
from composite_logstore.delivery.states import Export, Wait
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from tests.deep import mostly_deep
from tests.events import make_capture, make_stream
from tests.simulation import Machine, assert_accounts_add_up, make_child

NOWHERE = Path("/nowhere")
_KIB = 1024
_MIB = 1024 * _KIB


@pytest.fixture
def traced() -> Iterator[Callable[[], int]]:
    """Return a function that tells how many more bytes of memory are in use than at the start."""
    tracemalloc.start()
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()

    def more() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    yield more
    tracemalloc.stop()


def raised(text: str) -> Any:
    try:
        raise ValueError(text)
    except ValueError as error:
        return type(error), error, error.__traceback__


def record(message: str = "m", exception: Any = None, **extra: Any) -> logging.LogRecord:
    record = logging.LogRecord("train", 20, "/code/train.py", 1, message, (), exception)
    vars(record).update(extra)
    return record


LARGE: dict[str, Callable[[int], logging.LogRecord]] = {
    "message": lambda size: record("x" * size),
    "wide characters": lambda size: record("\N{PARTY POPPER}" + "x" * (size // 4)),
    "exception": lambda size: record(exception=raised("x" * (size // 2))),
    "attribute": lambda size: record(table="x" * size),
    "nested attribute": lambda size: record(table={"rows": [["x" * 100, 3.5] for _ in range(size // 250)]}),
    "numbers": lambda size: record(table=[float(number) for number in range(size // 32)]),
    "many attributes": lambda size: record(**{f"key{number}": "x" for number in range(size // 150)}),
}


@pytest.mark.parametrize(("kind", "size"), mostly_deep([("message", 700), *((kind, 20_000) for kind in LARGE)], kept=3))
def test_memory_stays_bounded_while_a_backend_is_unreachable(
    clock: SimulatedClock, traced: Callable[[], int], kind: str, size: int
) -> None:
    machine = Machine(clock, NOWHERE, "memory", dead={}, healthy={})
    machine.backends["dead"].fault = "refused"
    store = machine.start(max_queue_bytes=_MIB)
    for number in range(3 * _MIB // size):
        store.emit(machine.origin, LARGE[kind](size))
        if number % (400_000 // size) == 0:
            clock.advance(1)
            machine.backends["healthy"].received.clear()
            machine.backends["healthy"].batches.clear()
    assert traced() < 1.5 * _MIB
    stats = store.stats()
    assert_accounts_add_up(stats)
    assert stats["dead"]["dropped"] > 0
    assert stats["dead"]["pending"] * size > 0.3 * _MIB
    assert stats["healthy"]["dropped"] == 0


def test_metadata_of_a_record_counts(clock: SimulatedClock, traced: Callable[[], int]) -> None:
    machine = Machine(clock, NOWHERE, "memory", dead={})
    machine.backends["dead"].fault = "refused"
    store = machine.start(max_queue_bytes=_MIB)
    for number in range(300):
        store.emit(machine.origin, record(), {"table": f"{number}" * 10_000})
    assert traced() < 1.5 * _MIB


@pytest.mark.parametrize("durability", ["spill", "write_ahead"])
def test_events_that_do_not_fit_into_memory_wait_on_disk(
    tmp_path: Path, clock: SimulatedClock, traced: Callable[[], int], durability: str
) -> None:
    machine = Machine(clock, tmp_path, durability, a={}, b={"max_export_batch_size": 7}, bar={"progress": "latest"})
    for backend in machine.backends.values():
        backend.fault = "refused"
    machine.start(max_queue_bytes=_MIB)
    messages = [f"{number} " + "x" * 20_000 for number in range(500)]
    for message in messages:
        machine.log(message)
    assert traced() - sum(map(len, messages)) < 1.5 * _MIB
    assert all(child["pending"] == 500 for child in machine.store.stats().values())
    for backend in machine.backends.values():
        backend.fault = None
    clock.advance(120)
    for name, backend in machine.backends.items():
        assert backend.messages == messages
        assert machine.store.stats()[name]["dropped"] == 0


@pytest.mark.parametrize("children", [1, 5])
def test_an_event_counts_once_for_any_number_of_children(clock: SimulatedClock, children: int) -> None:
    machine = Machine(clock, NOWHERE, "memory", **{f"child{number}": {} for number in range(children)})
    machine.start(max_queue_bytes=_MIB)
    machine.log(*("x" * 9_488 for _ in range(300)))
    # 10 KB each, and an eighth of the bytes is reserved for records without a number.
    assert {child["pending"] for child in machine.store.stats().values()} <= {90, 91}


def test_a_child_that_holds_a_few_old_events_costs_the_others_nothing(clock: SimulatedClock) -> None:
    machine = Machine(clock, NOWHERE, "memory", dead={"min_level": "ERROR"}, healthy={})
    machine.backends["dead"].fault = "refused"
    store = machine.start(max_queue_bytes=_MIB)
    for number in range(20):
        store.emit(machine.origin, logging.LogRecord("train", 40, "/code/train.py", 1, f"{number}", (), None))
        machine.log(*("x" * 10_000 for _ in range(20)))
        clock.advance(1)
    stats = store.stats()
    assert (stats["dead"]["dropped"], stats["dead"]["pending"]) == (0, 20)
    assert (stats["healthy"]["dropped"], stats["healthy"]["delivered"]) == (0, 420)


def test_a_child_that_wants_the_latest_progress_costs_the_others_nothing(clock: SimulatedClock) -> None:
    machine = Machine(clock, NOWHERE, "memory", dead={"progress": "latest"})
    machine.backends["dead"].fault = "refused"
    store = machine.start(max_queue_bytes=100_000)
    machine.log("first")
    for number in range(1000):
        bar = logging.LogRecord("stderr", 40, "", 0, f"\r{number}", (), None)
        bar.created = 1_700_000_000.0 + number // 100
        store.emit(machine.origin, bar)
    stats = store.stats()
    assert (stats["dead"]["dropped"], stats["dead"]["pending"]) == (0, 11)


def test_the_oldest_events_are_dropped_and_counted_at_once_if_the_disk_is_full(
    tmp_path: Path, clock: SimulatedClock
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    machine = Machine(clock, blocked, "spill", dead={}, a={})
    machine.backends["dead"].fault = "refused"
    machine.start(max_queue_bytes=_MIB)
    for number in range(400):
        machine.log(f"{number} " + "x" * 10_000)
        if number % 10 == 0:
            clock.advance(1)
    stats = machine.store.stats()
    assert_accounts_add_up(stats)
    assert stats["a"]["dropped"] == 0
    assert 50 < stats["dead"]["pending"] < 110
    machine.backends["dead"].fault = None
    clock.advance(60)
    numbers = [int(message.split()[0]) for message in machine.backends["dead"].messages]
    # The first batch was being exported.
    batch = numbers.index(next(number for place, number in enumerate(numbers) if number != place))
    assert numbers[batch:] == list(range(400 - len(numbers) + batch, 400))
    assert machine.store.stats()["dead"]["dropped"] == 400 - len(numbers)


def test_events_that_the_spool_drops_count_as_dropped_once_they_leave_memory(
    tmp_path: Path, clock: SimulatedClock
) -> None:
    machine = Machine(clock, tmp_path, "spill", dead={})
    machine.backends["dead"].fault = "refused"
    machine.start(spool_max_bytes=16 * _MIB, max_queue_bytes=8 * _MIB)
    for number in range(2000):
        machine.log(f"{number} " + "x" * 20_000)
        if number % 20 == 0:
            clock.advance(0.1)
    stats = machine.store.stats()["dead"]
    # What is in memory, and on disk.
    assert stats["pending"] < (8 + 16) * _MIB / 20_000
    assert stats["dropped"] == 2000 - stats["pending"]
    machine.backends["dead"].fault = None
    clock.advance(120)
    numbers = [int(message.split()[0]) for message in machine.backends["dead"].messages]
    # The first was being exported.
    assert numbers[1:] == list(range(2001 - len(numbers), 2000))
    assert machine.store.stats()["dead"]["dropped"] == 2000 - len(numbers)


def test_one_warning_tells_of_the_first_dropped_event_and_one_of_the_last(
    clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(worker.logger, "warning", told.append)
    machine = Machine(clock, NOWHERE, "memory", dead={}, a={})
    store = machine.start(max_queue_bytes=_MIB)
    for _ in range(2):
        machine.backends["dead"].fault = "refused"
        for _ in range(30):
            machine.log(*("x" * 10_000 for _ in range(10)))
            clock.advance(20)
        machine.backends["dead"].fault = None
        clock.advance(60)
        machine.log("x")
        clock.advance(60)
    about = [line for line in told if "dropped" in line]
    # The one of the last says how many they were.
    assert [any(map(str.isdigit, line)) for line in about] == [False, True, False, True]
    dropped = store.stats()["dead"]["dropped"]
    assert dropped > 0
    assert re.findall(r"\d+", about[-1]) == [str(dropped)]
    assert all("'dead'" in line for line in about)


def test_the_newest_event_is_kept_whatever_its_size(clock: SimulatedClock) -> None:
    machine = Machine(clock, NOWHERE, "memory", a={})
    machine.start(max_queue_bytes=1000)
    machine.log("old", "x" * 100_000)
    clock.advance(1)
    assert [len(message) for message in machine.backends["a"].messages] == [100_000]


def test_a_batch_with_enough_bytes_is_exported_at_once() -> None:
    journal = Journal([make_child("a", schedule_delay_millis=60_000)])
    [delivery] = journal.deliveries
    assert isinstance(delivery.next(0), Wait)
    journal.wake_after(1)
    journal.append(make_stream(), make_capture("first"))
    journal.wakes_done = journal.wakes_wanted
    delivery.next(0)
    journal.wake_after(1000)
    stream = make_stream()
    woken = [journal.append(stream, make_capture("x" * 100_000)) for _ in range(50)]
    assert woken.index(True) in (40, 41)
    action = delivery.next(0)
    assert isinstance(action, Export)
    assert sum(event.size for event in action.batch) <= 4 * _MIB
    # Those that did not fit have waited as long.
    delivery.exported()
    assert isinstance(delivery.next(0), Export)


def test_records_without_a_number_are_bounded(traced: Callable[[], int]) -> None:
    journal = Journal([make_child("a")], most_bytes=8 * _MIB)
    journal.append(make_stream(), make_capture())
    for delivery in journal.deliveries:
        delivery.next(0)
    journal.wake_after(100_000)
    for number in range(400):
        journal.append(make_stream(), make_capture(f"{number}" * 20_000))
        journal.append(make_stream(), note(record(table=f"{number}" * 20_000)))
    assert traced() < 9 * _MIB


def test_the_batches_of_all_children_have_at_most_half_of_the_bytes() -> None:
    journal = Journal([make_child(f"child{number}") for number in range(4)], most_bytes=8 * _MIB)
    stream = make_stream()
    for _ in range(20):
        journal.append(stream, make_capture("x" * 300_000))
    for delivery in journal.deliveries:
        action = delivery.next(10)
        assert isinstance(action, Export)
        assert sum(event.size for event in action.batch) <= _MIB


def test_ended_streams_keep_no_event_in_memory(traced: Callable[[], int]) -> None:
    backend = SimulatedBackend()
    journal = Journal([make_child("a", backend)])
    streams = [make_stream() for _ in range(300)]
    for stream in streams:
        journal.append(stream, make_capture("x" * 20_000))
        journal.end_stream(stream)
    [delivery] = journal.deliveries
    while delivery.pending:
        if isinstance(delivery.next(10), Export):
            delivery.exported()
    assert traced() < _MIB
    journal.append(streams[0], make_capture())
    [event] = journal.deliveries[0].queue
    assert event.sequence == 1


def test_events_that_are_read_back_from_the_spool_count(
    tmp_path: Path, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All children together read at most half of the allowed bytes at a time."""
    read: list[int] = []
    next_batch = spilling.next_batch

    def noted(*arguments: Any) -> Any:
        events = next_batch(*arguments)
        read.append(sum(event.size for event in events))
        return events

    monkeypatch.setattr("composite_logstore.delivery.journal.next_batch", noted)
    machine = Machine(clock, tmp_path, "spill", a={}, b={})
    for backend in machine.backends.values():
        backend.fault = "refused"
    machine.start(max_queue_bytes=_MIB)
    for _ in range(300):
        machine.log("x" * 10_000)
    for backend in machine.backends.values():
        backend.fault = None
    clock.advance(60)
    assert read
    assert max(read) <= _MIB / 4 + 11_000
