"""Events of level WARNING and above do not wait for a fuller batch: of a killed process they matter most."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from composite_logstore import CompositeLogStore, RetryableError
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.states import Export, Wait
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from tests.events import make_events
from tests.simulation import make_child, make_logs, make_store

INFO, WARNING, ERROR = logging.INFO, logging.WARNING, logging.ERROR


class Process:
    """A process with one child, which waits for ten seconds, as a remote archive does."""

    def __init__(self, clock: SimulatedClock, disk: Path, durability: str = "memory", **settings: Any) -> None:
        self.clock, self.backend = clock, SimulatedBackend()
        child = {"schedule_delay_millis": 10_000, **settings.pop("child", {})}
        self.store: CompositeLogStore = make_store(
            make_child("archive", self.backend, **child),
            durability=durability,
            spool_directory=str(disk),
            **settings,
        )
        self.origin = self.store.register_origin("step", make_logs(self.store), {})
        self.log("first")
        clock.advance(12)
        assert self.backend.messages == ["first"]

    def log(self, message: str, level: Any = INFO, name: str = "train") -> None:
        path = "" if name in ("stdout", "stderr") else "/code/train.py"
        self.store.emit(self.origin, logging.LogRecord(name, level, path, 1, message, (), None))

    @property
    def arrived(self) -> list[str]:
        """What the backend has, a moment later."""
        self.clock.advance(0.01)
        return self.backend.messages[1:]


@pytest.fixture(params=["memory", "spill", "write_ahead"])
def process(clock: SimulatedClock, tmp_path: Path, request: pytest.FixtureRequest) -> Process:
    return Process(clock, tmp_path, request.param)


@pytest.mark.parametrize("level", [WARNING, ERROR, logging.CRITICAL, 35])
def test_an_urgent_event_is_exported_at_once_with_all_before_it(process: Process, level: int) -> None:
    process.log("epoch 1")
    assert process.arrived == []
    process.log("out of memory", level)
    assert process.arrived == ["epoch 1", "out of memory"]


@pytest.mark.parametrize("level", [INFO, logging.DEBUG, 29, 0, None, "ERROR", True])
def test_other_events_wait_for_a_fuller_batch(process: Process, level: Any) -> None:
    process.log("epoch 1", level)
    process.clock.advance(9.9)
    assert process.arrived == []
    process.clock.advance(0.2)
    assert process.arrived == ["epoch 1"]


def test_urgent_events_cause_at_most_one_export_a_second(process: Process) -> None:
    before = process.backend.exports
    for number in range(100):
        process.log(f"m{number}", ERROR)
        process.clock.advance(0.1)
    assert 10 <= process.backend.exports - before <= 11
    # None waits for longer than that second.
    process.clock.advance(1)
    assert process.arrived == [f"m{number}" for number in range(100)]


def test_the_next_urgent_event_waits_out_the_second_and_no_longer(process: Process) -> None:
    process.log("one", ERROR)
    assert process.arrived == ["one"]
    process.log("two", ERROR)
    process.clock.advance(0.9)
    assert process.arrived == ["one"]
    process.clock.advance(0.1)
    assert process.arrived == ["one", "two"]


def test_a_burst_of_urgent_events_in_one_moment_is_one_export_and_the_rest_after_a_second(process: Process) -> None:
    before = process.backend.exports
    for number in range(300):
        process.log(f"m{number}", WARNING)
    process.clock.advance(1.1)
    assert len(process.arrived) == 300
    assert process.backend.exports - before <= 2


def test_the_update_of_a_progress_bar_is_not_urgent_though_zenml_calls_it_an_error(process: Process) -> None:
    process.log("\r 10%|#", ERROR, "stderr")
    process.clock.advance(5)
    assert process.arrived == []
    process.log("broken\n", ERROR, "stderr")
    assert process.arrived == ["\r 10%|#", "broken"]


def test_the_level_that_counts_is_that_of_the_event(clock: SimulatedClock, tmp_path: Path) -> None:
    process = Process(clock, tmp_path, stderr_level="detect")
    process.log("INFO:root:fine\n", ERROR, "stderr")
    process.clock.advance(5)
    assert process.arrived == []
    process.log("ERROR:root:broken\n", ERROR, "stderr")
    assert process.arrived == ["INFO:root:fine", "ERROR:root:broken"]


def test_an_urgent_event_below_the_childs_min_level_is_none_of_its(clock: SimulatedClock, tmp_path: Path) -> None:
    process = Process(clock, tmp_path, child={"min_level": None})
    quiet = SimulatedBackend()
    store = make_store(make_child("quiet", quiet, min_level="ERROR", schedule_delay_millis=10_000))
    origin = store.register_origin("step", make_logs(store), {})
    for level in (ERROR, WARNING):
        store.emit(origin, logging.LogRecord("train", level, "/code/train.py", 1, "m", (), None))
        process.clock.advance(0.01)
    assert quiet.exports == 1


def test_an_outage_is_not_hurried(process: Process) -> None:
    process.backend.fault = RetryableError("refused", retry_after_seconds=60)
    before = process.backend.exports
    for _ in range(50):
        process.log("broken", ERROR)
        process.clock.advance(1)
    assert process.backend.exports - before <= 2


def test_a_child_with_the_usual_delay_keeps_it(clock: SimulatedClock, tmp_path: Path) -> None:
    process = Process(clock, tmp_path, child={"schedule_delay_millis": 1_000})
    process.log("broken", ERROR)
    process.clock.advance(0.9)
    assert process.arrived == []
    process.clock.advance(0.1)
    assert process.arrived == ["broken"]


def test_each_waiting_event_is_looked_at_once() -> None:
    delivery = Delivery(make_child("archive", schedule_delay_millis=10_000), lambda: 0)
    events = make_events(["m"] * 500)
    for place, event in enumerate(events):
        delivery.queue.append(event)
        assert delivery.next(0) == Wait(10.0, events=1_000 - place - 1, urgent=True)
    urgent = make_events(["broken"], first=500, level=ERROR)
    delivery.queue.extend(urgent)
    assert delivery.next(0.5) == Export(events + urgent)
