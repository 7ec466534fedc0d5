"""Delivery by the machine's agent, and how a process and the agent hand over to each other."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from composite_logstore.delivery import handover
from composite_logstore.delivery.handover import (
    AGAIN_SECONDS,
    NOT_ITS_CHILD,
    OFFER_SECONDS,
    STILL_SECONDS,
    STOPPED,
    Handover,
)
from composite_logstore.event import LogEvent
from composite_logstore.spool.folder import Spool
from composite_logstore.testing import SimulatedClock
from tests.patience import PATIENCE_SECONDS
from tests.simulated_agent import SimulatedAgent
from tests.simulation import Machine, assert_accounts_add_up, folders_of_processes
from tests.unit.test_lightness import CHECKS, HEAVY


class Both:
    """A process and an agent on one machine."""

    def __init__(self, clock: SimulatedClock, disk: Path, delivery: str, durability: str = "spill", **child: Any):
        self.clock = clock
        self.machine = Machine(clock, disk, durability, a=child, b=child)
        self.store = self.machine.start(delivery=delivery)
        # What the process and agents have delivered, in the order of arrival.
        self.holds: dict[str, list[LogEvent]] = {
            name: backend.received for name, backend in self.machine.backends.items()
        }
        self.said: list[str] = []

    def agent(self) -> SimulatedAgent:
        return SimulatedAgent(self.machine.disk / str(self.machine.id), self.holds)

    def log(self, *messages: str) -> None:
        self.said += messages
        self.machine.log(*messages)

    def stats(self) -> dict[str, dict[str, Any]]:
        stats = self.store.stats()
        assert_accounts_add_up(stats)
        return stats

    def counts(self, *names: str) -> list[Any]:
        return [self.stats()["a"][name] for name in names]

    def there(self, child: str = "a") -> list[str]:
        """The messages that a child's backend holds, from the process and from the agent."""
        return [event.message for event in self.holds[child]]

    def assert_served_by(self, agent: SimulatedAgent) -> None:
        """Have an agent deliver what waits, and check that the process knows it."""
        agent.work()
        self.clock.advance(2)
        assert self.counts("state", "pending") == ["healthy", 0]

    @property
    def exporting(self) -> list[str]:
        return [name for name in self.clock.threads if name in ("composite-logstore a", "composite-logstore b")]


@pytest.mark.parametrize("durability", ["spill", "write_ahead"])
@pytest.mark.parametrize("delivery", ["agent", "auto"])
def test_with_an_agent_the_process_exports_nothing(
    clock: SimulatedClock, tmp_path: Path, delivery: str, durability: str
) -> None:
    both = Both(clock, tmp_path, delivery, durability)
    agent = both.agent()
    both.log("one", "two")
    clock.advance(1)
    assert both.counts("accepted", "pending", "delivered") == [2, 2, 0]
    agent.work()
    assert both.counts("accepted", "pending", "delivered", "state") == [2, 0, 2, "healthy"]
    assert [event.message for event in both.holds["b"]] == ["one", "two"]
    assert both.machine.backends["a"].exports == 0
    assert both.exporting == []


@pytest.mark.parametrize("works", [False, True])
def test_no_export_begins_while_it_is_decided_who_delivers(
    clock: SimulatedClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    both = Both(clock, tmp_path, "auto")
    looks = 0

    def look(root: Path) -> bool:
        nonlocal looks
        looks += 1
        if looks == 1:
            # Another thread, or a signal handler, logs meanwhile.
            both.log("two")
            assert both.exporting == []
        return works

    monkeypatch.setattr(handover, "agent_works", look)
    both.log("one")
    assert both.exporting == ([] if works else ["composite-logstore a", "composite-logstore b"])
    clock.advance(6)
    assert both.counts("accepted", "pending", "delivered") == ([2, 2, 0] if works else [2, 0, 2])


def test_the_account_is_the_process_s_and_the_agent_s(clock: SimulatedClock, tmp_path: Path) -> None:
    both = Both(clock, tmp_path, "agent")
    agent = both.agent()
    both.log(*"abcdef")
    clock.advance(1)
    agent.look()
    agent.deliver("a", 4)
    agent.account(
        rejected=1, rejected_reasons={"too old": 1}, withheld=1, withheld_reasons={"budget": 1}, state="retrying"
    )
    both.log("g")
    stats = both.stats()["a"]
    assert (stats["accepted"], stats["delivered"], stats["rejected"], stats["withheld"]) == (7, 4, 1, 1)
    assert (stats["pending"], stats["state"]) == (1, "retrying")
    assert stats["rejected_reasons"] == {"too old": 1}


def test_events_leave_memory_once_they_are_on_disk(clock: SimulatedClock, tmp_path: Path) -> None:
    both = Both(clock, tmp_path, "agent", max_queue_size=1_000)
    both.agent()
    both.log(*(str(number) for number in range(2_500)))
    clock.advance(1)
    journal = both.store.writer._journal
    assert not any(delivery.queue for delivery in journal.deliveries)
    assert journal.spilling
    assert not journal.spilling.unwritten
    assert both.counts("accepted", "pending", "dropped") == [2_500, 2_500, 0]


def test_what_cannot_be_written_waits_and_is_dropped_when_there_is_no_room(
    clock: SimulatedClock, tmp_path: Path
) -> None:
    both = Both(clock, tmp_path, "agent", max_queue_size=100)
    agent = both.agent()
    tmp_path.joinpath(str(both.machine.id)).write_text("no folder")
    both.log(*(str(number) for number in range(250)))
    clock.advance(2)
    assert both.counts("accepted", "pending", "dropped") == [250, 99, 151]
    tmp_path.joinpath(str(both.machine.id)).unlink()
    clock.advance(2)
    agent.work()
    assert both.counts("accepted", "pending", "delivered", "dropped") == [250, 0, 99, 151]
    assert both.there() == both.said[151:]


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_process_that_cannot_write_delivers_by_itself(
    clock: SimulatedClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_begun: bool
) -> None:
    monkeypatch.setattr(handover, "AGAIN_SECONDS", 10)
    both = Both(clock, tmp_path, "auto", schedule_delay_millis=500)
    tmp_path.joinpath(str(both.machine.id)).write_text("no folder")
    if has_begun:
        both.machine.backends["a"].fault = "refused"
        both.log("zero")
        clock.advance(3)
        both.machine.backends["a"].fault = None
    agent = both.agent()
    for _ in range(3):
        both.log("one", "two", "three")
        clock.advance(3)
    clock.advance(9)
    assert both.there() == both.said
    tmp_path.joinpath(str(both.machine.id)).unlink()
    for _ in range(12):
        both.log("more")
        clock.advance(2)
        agent.work()
    clock.advance(1)
    assert both.exporting == []
    assert both.there() == both.said
    found = both.counts("accepted", "delivered", "pending", "dropped")
    assert found == [len(both.said), len(both.said), 0, 0]


def test_a_folder_that_is_made_while_a_process_takes_the_delivery_back_is_the_agent_s(
    clock: SimulatedClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Both(clock, tmp_path, "auto", "write_ahead")
    blocking = tmp_path / str(both.machine.id)
    blocking.write_text("no folder")
    agent = both.agent()
    positions = Handover._positions

    def unblocked(self: Handover, spool: Spool | None) -> Any:
        blocking.unlink(missing_ok=True)
        return positions(self, spool)

    monkeypatch.setattr(Handover, "_positions", unblocked)
    both.log("one")
    clock.advance(1)
    agent.work()
    both.log("two")
    clock.advance(2)
    agent.work()
    clock.advance(1)
    assert both.there() == both.said
    assert both.counts("accepted", "delivered") == [2, 2]


def test_while_the_disk_is_full_a_process_goes_on_delivering(clock: SimulatedClock, tmp_path: Path) -> None:
    both = Both(clock, tmp_path, "auto", schedule_delay_millis=500)
    tmp_path.joinpath(str(both.machine.id)).write_text("no folder")
    both.agent()
    clock.advance(15)
    for number in range(90):
        both.log(f"event {number}")
        clock.advance(3)
        assert both.there() == both.said


# Flushes


def test_a_flush_waits_for_the_agent(clock: SimulatedClock, tmp_path: Path) -> None:
    both = Both(clock, tmp_path, "agent")
    agent = both.agent()
    both.log("one")

    def work_later() -> None:
        clock.advance(2)
        agent.work()

    clock.start(work_later, "agent")
    began = clock.now()
    both.store.flush()
    assert 2 <= clock.now() - began < 3
    assert agent.spools[0].due == 1
    assert both.counts("pending", "delivered") == [0, 1]


@pytest.mark.parametrize("stops", [False, True])
def test_a_flush_does_not_wait_long_for_an_agent_that_does_nothing(
    clock: SimulatedClock, tmp_path: Path, stops: bool
) -> None:
    both = Both(clock, tmp_path, "agent")
    agent = both.agent()
    if stops:
        agent.look()
    both.log("one")
    began = clock.now()
    both.store.flush()
    assert 5 <= clock.now() - began < 6
    assert both.counts("state", "pending") == ["unavailable", 1]
    both.log("two")
    began = clock.now()
    both.store.flush()
    assert clock.now() == began
    agent.work()
    assert both.counts("state", "pending") == ["healthy", 0]


def test_a_flush_without_an_agent_does_not_wait_at_all(clock: SimulatedClock, tmp_path: Path) -> None:
    both = Both(clock, tmp_path, "agent")
    both.log("one")
    began = clock.now()
    both.store.flush()
    assert clock.now() == began
    stats = both.stats()["a"]
    assert (stats["state"], stats["pending"]) == ("unavailable", 1)
    assert "composite-logstore agent" in stats["last_error"]
    assert both.exporting == []
    both.agent().work()
    assert both.counts("state", "pending") == ["healthy", 0]


# An agent that makes no progress


def test_an_agent_that_has_stopped_is_told_once_and_flushes_wait_for_it_no_more(
    clock: SimulatedClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = Both(clock, tmp_path, "agent")
    agent = both.agent()
    both.log("one")
    clock.advance(1)
    agent.look()
    clock.advance(STILL_SECONDS - 2)
    assert both.counts("state", "last_error") == ["healthy", None]
    for _ in range(3):
        clock.advance(STILL_SECONDS)
        both.log("more")
    assert both.counts("state", "last_error", "pending") == ["unavailable", STOPPED, 4]
    assert len([text for text in caplog.messages if STOPPED in text]) == 2
    began = clock.now()
    both.store.flush()
    assert clock.now() == began
    both.assert_served_by(agent)


@pytest.mark.parametrize("seconds", [60, 4_000])
def test_after_a_pause_the_agent_is_given_time(
    clock: SimulatedClock, tmp_path: Path, caplog: pytest.LogCaptureFixture, seconds: float
) -> None:
    both = Both(clock, tmp_path, "agent")
    agent = both.agent()
    both.log("one")
    clock.advance(1)
    agent.work()
    clock.advance(seconds)
    both.log("two")
    clock.advance(2)
    assert both.counts("state", "pending", "last_error") == ["healthy", 1, None]
    both.assert_served_by(agent)
    assert caplog.messages == []


def test_an_agent_that_waits_for_a_fuller_batch_has_not_stopped(
    clock: SimulatedClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = Both(clock, tmp_path, "agent", schedule_delay_millis=120_000)
    agent = both.agent()
    both.log("one")
    clock.advance(1)
    agent.look()
    clock.advance(110)
    assert both.counts("state", "pending") == ["healthy", 1]
    both.assert_served_by(agent)
    assert caplog.messages == []


def test_a_child_that_the_agent_does_not_have_is_told_once(
    clock: SimulatedClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = Both(clock, tmp_path, "agent")
    agent = both.agent()
    for _ in range(3):
        both.log("more")
        clock.advance(1)
        agent.look()
        agent.deliver("a")
        agent.account("a")
        clock.advance(1)
    assert both.counts("state", "pending") == ["healthy", 0]
    other = both.stats()["b"]
    assert (other["state"], other["last_error"], other["pending"]) == ("unavailable", NOT_ITS_CHILD, 3)
    assert len([text for text in caplog.messages if NOT_ITS_CHILD in text]) == 1


# The end


def test_what_the_agent_has_not_delivered_stays_on_disk_and_the_folder_is_left_to_it(
    clock: SimulatedClock, tmp_path: Path
) -> None:
    both = Both(clock, tmp_path, "agent")
    agent = both.agent()
    both.log("one")
    clock.advance(1)
    agent.work()
    both.log("two")
    both.store.writer.close(3)
    (folder,) = folders_of_processes(tmp_path)
    both.machine.die()
    (spool,) = agent.spools
    assert spool.inherit()
    agent.work()
    assert both.there() == ["one", "two"]
    agent.kill()
    recovered = Spool.recover(folder)
    assert recovered is not None
    assert len(list(recovered.reader.scan())) == 2
    recovered.close()
    assert not folder.exists()


# Handing over


def test_a_process_hands_over_to_an_agent_that_begins(clock: SimulatedClock, tmp_path: Path) -> None:
    both = Both(clock, tmp_path, "auto")
    both.log("one", "two")
    clock.advance(2)
    assert both.there() == ["one", "two"]
    agent = both.agent()
    both.log("three")
    clock.advance(3)
    assert both.exporting == []
    both.log("four")
    clock.advance(1)
    agent.work()
    assert both.there() == both.said
    assert both.counts("accepted", "delivered", "pending") == [4, 4, 0]


def test_a_process_takes_back_when_the_agent_ends(clock: SimulatedClock, tmp_path: Path) -> None:
    both = Both(clock, tmp_path, "auto")
    agent = both.agent()
    both.log("one", "two", "three")
    clock.advance(1)
    agent.look()
    agent.deliver("a", 2)
    agent.end()
    both.log("four")
    clock.advance(3)
    assert both.there() == both.said
    assert both.counts("accepted", "delivered", "pending", "dropped") == [4, 4, 0, 0]
    assert both.stats()["b"]["delivered"] == 4


@pytest.mark.parametrize("killed", ["export", "position"])
def test_a_killed_agent_costs_nothing_but_one_batch_twice(clock: SimulatedClock, tmp_path: Path, killed: str) -> None:
    both = Both(clock, tmp_path, "auto")
    agent = both.agent()
    both.log("one", "two", "three")
    clock.advance(1)
    agent.look()
    agent.deliver("a", 1)
    agent.account()
    agent.deliver("a", 1, killed)
    both.log("four")
    clock.advance(3)
    twice = ["two"] if killed == "export" else []
    assert both.there() == ["one", "two", *twice, "three", "four"]
    assert both.counts("accepted", "delivered", "pending", "dropped") == [4, 4, 0, 0]


def test_what_a_process_could_not_take_back_the_next_agent_counts_once(
    clock: SimulatedClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [1.5]

    def no_files(*_: object) -> int:
        # The spool's thread works meanwhile.
        clock.advance(seconds.pop() if seconds else 0)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    both = Both(clock, tmp_path, "auto")
    agent = both.agent()
    both.log("one", "two", "three")
    clock.advance(1)
    agent.look()
    agent.deliver("a", 1)
    agent.account()
    agent.deliver("a", 1, "position")
    with monkeypatch.context() as patch:
        patch.setattr(handover._Backlog, "count", no_files)
        clock.advance(3)
    assert both.exporting == []
    both.agent().work()
    clock.advance(2)
    assert both.there() == ["one", "two", "three"]
    assert both.counts("accepted", "delivered", "pending", "dropped") == [3, 3, 0, 0]


def test_a_flush_takes_back_at_once(clock: SimulatedClock, tmp_path: Path) -> None:
    both = Both(clock, tmp_path, "auto")
    agent = both.agent()
    both.log("one")
    clock.advance(1)
    agent.kill()
    began = clock.now()
    both.log("two")
    both.store.flush()
    assert clock.now() - began < 0.5
    assert both.there() == ["one", "two"]


@pytest.mark.parametrize("seconds", [2, 100])
@pytest.mark.parametrize("has_begun", [False, True])
def test_a_flush_waits_for_a_backlog_to_be_counted_but_no_longer_than_for_a_backend(
    clock: SimulatedClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, has_begun: bool
) -> None:
    both = Both(clock, tmp_path, "auto")
    agent = both.agent()
    both.log("one")
    clock.advance(1)
    count = handover._Backlog.count

    def count_slowly(backlog: handover._Backlog, spool: Spool) -> int:
        found = count(backlog, spool)
        if found:
            clock.advance(seconds)
        return found

    monkeypatch.setattr(handover._Backlog, "count", count_slowly)
    agent.kill()
    if has_begun:
        clock.advance(1)
    began = clock.now()
    both.store.flush()
    assert clock.now() - began < 6
    assert both.there() == (["one"] if seconds == 2 else [])
    clock.advance(110)
    assert both.there() == ["one"]
    assert both.counts("state", "pending", "delivered") == ["healthy", 0, 1]


def test_the_delivery_is_offered_again_after_a_minute(clock: SimulatedClock, tmp_path: Path) -> None:
    both = Both(clock, tmp_path, "auto")
    both.agent()
    both.log("one")
    clock.advance(OFFER_SECONDS + 2)
    assert both.there() == ["one"]
    both.log("two")
    clock.advance(AGAIN_SECONDS - 5)
    assert both.there() == ["one", "two"]
    assert both.exporting
    both.log("three")
    clock.advance(3)
    both.log("four")
    clock.advance(4)
    assert both.exporting == []


def test_an_agent_that_does_not_take_the_delivery_gets_it_back_later(clock: SimulatedClock, tmp_path: Path) -> None:
    both = Both(clock, tmp_path, "auto")
    agent = both.agent()
    both.log("one")
    clock.advance(5)
    assert both.there() == []
    clock.advance(10)
    assert both.there() == ["one"]
    for _ in range(8):
        both.log("more")
        clock.advance(10)
    agent.work()
    both.log("last")
    clock.advance(1)
    agent.work()
    assert both.holds["a"][-1].message == "last"
    assert both.there() == both.said


def test_an_export_that_does_not_return_does_not_keep_the_other_children_waiting(
    clock: SimulatedClock, tmp_path: Path
) -> None:
    both = Both(clock, tmp_path, "auto", export_timeout_millis=5_000)
    both.machine.backends["a"].fault = "silent"
    both.log("one")
    clock.advance(2)
    both.agent()
    for _ in range(6):
        both.log("more")
        clock.advance(5)
    assert both.there("b") == both.said
    both.machine.backends["a"].fault = None


def test_many_changes_lose_nothing(clock: SimulatedClock, tmp_path: Path) -> None:
    """Those at random points are in tests/properties/test_handovers.py."""
    both = Both(clock, tmp_path, "auto")
    for change in range(12):
        agent = both.agent()
        both.log(f"{change} at the beginning")
        clock.advance(2.5)
        both.log(f"{change} with an agent")
        clock.advance(1)
        if change % 3:
            agent.work()
        agent.kill()
        both.log(f"{change} without one")
        clock.advance(2.5)
    for child in ("a", "b"):
        assert both.there(child) == both.said
    assert both.counts("accepted", "delivered", "pending", "dropped") == [36, 36, 0, 0]


# What a process loads

LOGGING = """
import json, logging, sys, threading
from composite_logstore import CompositeLogStoreConfig
from composite_logstore.capture.record import note
from composite_logstore.delivery.writers import writer_of
from uuid import uuid4

children = [
    {"name": "over-http", "type": "otlp", "endpoint": "http://127.0.0.1:9"},
    {"name": "over-grpc", "type": "otlp", "endpoint": "127.0.0.1:9", "protocol": "grpc"},
    {"name": "live", "type": "datadog", "api_key": "key", "application_key": "key"},
    {"name": "aws", "type": "cloudwatch", "region": "eu-central-1"},
]
config = CompositeLogStoreConfig(primary="live", children=children, delivery="agent", spool_directory=sys.argv[1])
writer = writer_of(uuid4(), config)
writer.append(writer.stream(uuid4(), {}, None), note(logging.makeLogRecord({"msg": "hello"})))
writer.flush(0, 0)
threads = [thread.name for thread in threading.enumerate()]
accepted = writer.stats()["live"].accepted
with open(sys.argv[2], "w") as file:
    json.dump({"accepted": accepted, "threads": threads, "modules": list(sys.modules)}, file)
"""


def test_a_process_whose_events_an_agent_delivers_loads_no_exporter(tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    command = [sys.executable, "-c", LOGGING, str(tmp_path / "spool"), str(told)]
    subprocess.run(command, check=True, timeout=PATIENCE_SECONDS, capture_output=True)
    found = json.loads(told.read_text())
    assert found["accepted"] == 1
    assert [name for name in found["threads"] if name.split()[-1] in ("over-http", "over-grpc", "live", "aws")] == []
    backends = [name for name in found["modules"] if name.startswith("composite_logstore_")]
    assert "composite_logstore_otlp.config" in backends
    assert [name for name in backends if "." in name and not name.endswith((".config", *CHECKS))] == []
    assert [name for name in found["modules"] if name in HEAVY] == []
