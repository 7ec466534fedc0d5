"""What survives a process, with each `durability`, in simulated time. Processes that really die: tests/integration."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from composite_logstore import CompositeLogStore, writer
from composite_logstore.delivery import Wait
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from tests.simulation import assert_accounts_add_up, make_child, make_logs, make_store

SETTINGS = {"flush_timeout_millis": 5_000, "flush_limit_millis": 30_000}


@pytest.fixture
def clock() -> Iterator[SimulatedClock]:
    with SimulatedClock() as clock:
        yield clock


class Machine:
    """A machine with a disk, on which one process of a log store runs after another."""

    def __init__(self, disk: Path, durability: str, **children: dict[str, Any]) -> None:
        self.disk = disk
        self.id: UUID = uuid4()
        self.durability = durability
        self.children = children
        self.backends = {name: SimulatedBackend() for name in children}
        self.logs = None

    def start(self, **settings: Any) -> CompositeLogStore:
        self.store = make_store(
            *(make_child(name, self.backends[name], **child) for name, child in self.children.items()),
            id=self.id,
            durability=self.durability,
            spool_directory=str(self.disk),
            **{**SETTINGS, **settings},
        )
        self.origin = self.store.register_origin("step", make_logs(self.store), {})
        return self.store

    def log(self, *messages: str) -> None:
        for message in messages:
            self.store.emit(self.origin, logging.LogRecord("train", 20, "/code/train.py", 1, message, (), None))

    def die(self) -> None:
        """What the system does when a process is gone: it lets go of its locks."""
        living = self.store.writer
        for key in [key for key, value in writer._writers.items() if value is living]:
            del writer._writers[key]
        for delivery in living._journal.deliveries:
            delivery.next = lambda now: Wait(None)  # type: ignore[method-assign]
        living._adoption.stop()
        for journal in living._adoption.journals:
            for delivery in journal.deliveries:
                delivery.next = lambda now: Wait(None)  # type: ignore[method-assign]
            journal.spool.settle = lambda *_: None  # type: ignore[method-assign]
            os.close(journal.spool._lock or 0)
        for worker in living._workers:
            worker.stop()
        living._is_keeping = True
        spooling = living._journal.spooling
        if spooling and spooling.spool:
            os.close(spooling.spool._lock or 0)
            spooling.spool.settle = lambda *_: None  # type: ignore[method-assign]
            spooling.write = lambda *_, **__: None  # type: ignore[method-assign]


def test_with_write_ahead_an_event_is_on_disk_before_emit_returns(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(tmp_path, "write_ahead", a={})
    machine.start()
    machine.log(*"abc")
    machine.die()
    machine.start()
    machine.log("d")
    clock.advance(5)
    assert sorted(machine.backends["a"].messages) == list("abcd")
    assert machine.store.stats()["a"]["accepted"] == 4
    assert_accounts_add_up(machine.store.stats())


def test_with_spill_what_is_not_delivered_is_on_disk_within_a_second(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(tmp_path, "spill", a={}, dead={})
    machine.backends["dead"].fault = "refused"
    machine.start()
    machine.log(*"abc")
    clock.advance(1)
    machine.log("lost")
    machine.die()
    assert machine.backends["a"].messages == list("abc")
    machine.backends["dead"].fault = None
    machine.start()
    machine.log("d")
    clock.advance(60)
    assert sorted(machine.backends["dead"].messages) == list("abcd")
    assert machine.backends["a"].messages == list("abcd")
    assert not list(tmp_path.glob("*/*/*.log"))


def test_with_spill_healthy_children_leave_the_disk_alone(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(tmp_path, "spill", a={}, b={})
    machine.start()
    for _ in range(100):
        machine.log(*"abc")
        clock.advance(0.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("durability", ["spill", "write_ahead"])
def test_a_full_queue_loses_nothing(tmp_path: Path, clock: SimulatedClock, durability: str) -> None:
    machine = Machine(tmp_path, durability, a={"max_queue_size": 10, "max_export_batch_size": 4})
    machine.backends["a"].fault = "refused"
    machine.start()
    messages = [str(number) for number in range(500)]
    for message in messages:
        machine.log(message)
    assert machine.store.stats()["a"]["pending"] == 500
    clock.advance(10)
    machine.backends["a"].fault = None
    clock.advance(60)
    assert machine.backends["a"].messages == messages
    assert machine.store.stats()["a"]["delivered"] == 500


@pytest.mark.parametrize("durability", ["spill", "write_ahead"])
def test_an_orderly_end_loses_nothing(tmp_path: Path, clock: SimulatedClock, durability: str) -> None:
    machine = Machine(tmp_path, durability, a={"max_queue_size": 10}, b={})
    machine.backends["a"].fault = "silent"
    machine.start()
    messages = [str(number) for number in range(50)]
    machine.log(*messages)
    machine.store.writer.close(3)
    machine.die()
    machine.backends["a"].fault = None
    machine.backends["a"].received.clear()
    machine.start()
    machine.log("next")
    clock.advance(30)
    assert sorted(machine.backends["a"].messages, key=messages.__contains__)[-50:] == messages
    assert_accounts_add_up(machine.store.stats())


def test_at_its_bound_the_spool_gives_up_the_oldest_and_counts_it(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(tmp_path, "write_ahead", a={"max_queue_size": 2, "max_export_batch_size": 1}, b={})
    machine.backends["a"].fault = "refused"
    machine.start(spool_max_bytes=10_000_000)
    for number in range(30):
        machine.log(f"{number} " + "x" * 1_000_000)
        clock.advance(0.1)
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*/*.log")) <= 10_000_000
    machine.backends["a"].fault = None
    clock.advance(60)
    stats = machine.store.stats()
    assert_accounts_add_up(stats)
    assert stats["b"]["delivered"] == 30
    assert stats["a"]["pending"] == 0
    assert 0 < stats["a"]["dropped"] < 30
    numbers = [int(message.split()[0]) for message in machine.backends["a"].messages]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == stats["a"]["delivered"]
