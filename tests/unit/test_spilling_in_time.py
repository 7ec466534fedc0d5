"""With `spill` an event is on disk within a second of the clock, even if threads are late or the disk is slow."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from composite_logstore.delivery import space
from composite_logstore.delivery.schedule import Schedule
from composite_logstore.delivery.space import Space
from composite_logstore.event import LogEvent
from composite_logstore.spool import segments
from composite_logstore.spool.folder import Spool, bytes_used
from composite_logstore.spool.format import encode_event
from composite_logstore.spool.segments import SEGMENT_BYTES, Segments
from composite_logstore.testing import SimulatedClock
from tests.events import make_events
from tests.simulation import Machine


class BusyMachine(SimulatedClock):
    """A machine on which threads that wait for a time are woken too late.

    Attributes:
        late: By how many seconds.
        whose: The threads that are.
    """

    late = 0.0
    whose = ""

    def wait_until(self, ready: Callable[[], bool], seconds: float | None = None) -> bool:
        is_of_them = self.whose in self._name and self._name != "test"
        return super().wait_until(ready, seconds if seconds is None or not is_of_them else seconds + self.late)

    @property
    def _name(self) -> str:
        return self._tasks[threading.get_ident()].name


@pytest.fixture
def clock() -> Iterator[BusyMachine]:
    with BusyMachine() as clock:
        yield clock


@pytest.fixture
def ages(clock: BusyMachine, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """How old each event was when it was written, by its message: the time at which it was logged."""
    found: dict[str, float] = {}

    def noting(event: LogEvent, stream: str) -> bytes:
        found[event.message] = clock.now() - float(event.message)
        return encode_event(event, stream)

    monkeypatch.setattr(segments, "encode_event", noting)
    return found


def log_for(machine: Machine, clock: BusyMachine, seconds: float, every: float = 0.01) -> None:
    end = clock.now() + seconds
    while clock.now() < end:
        machine.log(f"{clock.now():.6f}")
        clock.advance(every)


@pytest.mark.parametrize("late", [0.0, 0.02, 0.05, 0.1, 0.15])
def test_an_event_is_on_disk_within_a_second_even_if_ticks_are_late(
    tmp_path: Path, clock: BusyMachine, ages: dict[str, float], late: float
) -> None:
    clock.late, clock.whose = late, "composite-logstore spool"
    machine = Machine(clock, tmp_path, "spill", a={})
    machine.backends["a"].fault = "refused"
    machine.start()
    log_for(machine, clock, 10)
    clock.advance(2)
    assert len(ages) >= 990
    assert max(ages.values()) <= 1.0


def test_the_later_ticks_are_the_earlier_events_are_written(
    tmp_path: Path, clock: BusyMachine, ages: dict[str, float]
) -> None:
    clock.whose = "composite-logstore spool"
    machine = Machine(clock, tmp_path, "spill", a={})
    machine.backends["a"].fault = "refused"
    machine.start()
    for late in range(0, 50, 5):
        clock.late = late / 100
        log_for(machine, clock, 2)
    clock.advance(2)
    assert max(ages.values()) <= 1.0
    # Once ticks are punctual, events are written later again.
    clock.late = 0
    log_for(machine, clock, 60, every=0.1)
    ages.clear()
    log_for(machine, clock, 5, every=0.1)
    assert min(ages.values()) >= 0.6


def test_threads_that_log_write_events_if_the_keeper_does_not_run(
    tmp_path: Path, clock: BusyMachine, ages: dict[str, float]
) -> None:
    machine = Machine(clock, tmp_path, "spill", a={})
    machine.backends["a"].fault = "refused"
    machine.start()
    log_for(machine, clock, 2)
    clock.late, clock.whose = 3600, "composite-logstore spool"
    log_for(machine, clock, 0.2)
    ages.clear()
    # The thread that logs the 512th event numbers all events before it.
    for _ in range(20):
        for _ in range(512):
            machine.log(f"{clock.now():.6f}")
        clock.advance(0.1)
    assert max(ages.values()) <= 1.1
    assert len({age for age in ages.values() if age >= 0}) > 1


def test_events_after_a_pause_wait_as_long_as_others(
    tmp_path: Path, clock: BusyMachine, ages: dict[str, float]
) -> None:
    machine = Machine(clock, tmp_path, "spill", a={})
    machine.backends["a"].fault = "refused"
    machine.start()
    for _ in range(5):
        machine.log(f"{clock.now():.6f}")
        clock.advance(100.03)
    assert len(ages) == 5
    assert all(0.7 <= age <= 1.0 for age in ages.values())


SLOW: dict[str, tuple[Any, str]] = {
    "to allocate a segment": (Segments, "prepare"),
    "to close and remove segments": (Segments, "tidy"),
    "to look at the other processes' folders": (space, "bytes_used"),
    "to look after the folder": (Spool, "standing"),
}


@pytest.mark.parametrize("what", SLOW)
def test_an_event_is_on_disk_within_a_second_even_if_the_disk_is_slow(
    tmp_path: Path, clock: BusyMachine, ages: dict[str, float], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    owner, name = SLOW[what]
    real = getattr(owner, name)

    def slow(*arguments: Any) -> Any:
        clock.advance(5)
        return real(*arguments)

    monkeypatch.setattr(owner, name, slow)
    machine = Machine(clock, tmp_path, "spill", a={})
    machine.backends["a"].fault = "refused"
    machine.start()
    log_for(machine, clock, 20)
    assert len(ages) >= 1_800
    assert max(ages.values()) <= 1.0


# Ages


def tick(schedule: Schedule, start: float, end: float, next_number: int) -> None:
    """Tick every 0.1 s, never late, and the last time at the end."""
    now = start
    while now < end:
        now = min(end, now + schedule.tick(next_number, now, has_folder=True))
    schedule.tick(next_number, end, has_folder=True)


def test_an_event_is_taken_to_be_as_old_as_possible() -> None:
    schedule = Schedule()
    schedule.woken(10.0)
    for now, next_number in ((10.0, 1), (10.1, 5), (10.2, 9)):
        schedule.tick(next_number, now, has_folder=True)
    tick(schedule, 10.3, 10.79, 9)
    assert schedule.due == 0
    # An event between 10.0 and 10.1 may have been logged at 10.0.
    schedule.tick(9, 10.8, has_folder=True)
    assert schedule.due == 5
    assert schedule.age(10.8) == pytest.approx(0.7)
    schedule.tick(9, 10.85, has_folder=True)
    assert schedule.due == 5
    schedule.tick(9, 10.9, has_folder=True)
    assert schedule.due == 9
    # After a tick that is ages late, all events are due.
    schedule.tick(20, 50.0, has_folder=True)
    assert schedule.due == 20


def test_ages_start_anew_after_a_pause() -> None:
    schedule = Schedule()
    schedule.woken(10.0)
    schedule.tick(3, 10.0, has_folder=True)
    schedule.rest(3)
    schedule.tick(3, 500.0, has_folder=True)
    assert schedule.due == 0
    # If `woken` was not called, an event is new when it is seen first.
    tick(schedule, 500.1, 599.9, 3)
    tick(schedule, 600.0, 600.7, 4)
    assert schedule.due <= 3
    schedule.tick(4, 600.81, has_folder=True)
    assert schedule.due == 4


# Bytes on disk


def test_bytes_are_counted_while_folders_appear_and_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        left = Spool.create(tmp_path, f"{number:015x}", ["a"])
        left.segments.append(make_events(["event"])[0], lambda size: True)
        left.abandon()
    whole = bytes_used(tmp_path)
    listdir, stat = os.listdir, os.stat

    def vanishing(path: Any) -> Any:
        found = listdir(path)
        if str(path).endswith("1"):
            shutil.rmtree(path)
        if path == tmp_path:
            shutil.rmtree(tmp_path / f"{0:015x}", ignore_errors=True)
        return found

    monkeypatch.setattr(os, "listdir", vanishing)
    assert bytes_used(tmp_path) == whole * 4 // 6
    (tmp_path / f"{2:015x}" / "owner.lock").unlink()
    (tmp_path / f"{3:015x}").rename(tmp_path / "elsewhere")
    assert 0 < bytes_used(tmp_path) < whole
    monkeypatch.setattr(os, "stat", lambda path, **options: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert bytes_used(tmp_path) == 0
    monkeypatch.setattr(os, "stat", stat)
    assert bytes_used(tmp_path / "nothing") == 0


def test_bytes_are_seldom_counted_while_much_is_free(
    tmp_path: Path, clock: BusyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []
    used = 0

    def counted(component: Path) -> int:
        looks.append(component)
        return used

    monkeypatch.setattr(space, "bytes_used", counted)
    room = Space(tmp_path, 1 << 30, clock)
    assert room.look()
    assert all(room.take(SEGMENT_BYTES) for _ in range(16))
    assert len(looks) == 1
    used = (1 << 30) - 10 * SEGMENT_BYTES
    assert [room.take(SEGMENT_BYTES) for _ in range(3)] == [True] * 3
    # Little is free now, so they are counted each time.
    assert len(looks) == 4
    used = (1 << 30) - 1
    assert not room.take(SEGMENT_BYTES)
    assert room.is_exceeded


def test_the_oldest_events_make_room_if_there_are_too_many_bytes(tmp_path: Path, clock: BusyMachine) -> None:
    """A process may exceed the bound by its first segment, which it takes before it has counted."""
    machine = Machine(clock, tmp_path, "write_ahead", a={})
    machine.backends["a"].fault = "refused"
    for _ in range(5):
        machine.start(spool_max_bytes=17_000_000)
        machine.log(*["x" * 1_000_000] * 4)
        clock.advance(2)
        assert bytes_used(next(tmp_path.iterdir())) <= 17_000_000
        machine.die()
