"""A process and the machine's agents as a state machine: they hand over at any point, and agents are killed at any."""

from __future__ import annotations

import logging
import random
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from composite_logstore.event import LogEvent
from composite_logstore.spool.account import ACCOUNT
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from tests.properties.machines import run
from tests.simulated_agent import SimulatedAgent
from tests.simulation import (
    assert_accounts_add_up,
    folders_of_processes,
    make_child,
    make_logs,
    make_store,
    process_dies,
)

CHILDREN: dict[str, dict[str, Any]] = {
    "archive": {"max_export_batch_size": 4},
    "live": {"max_export_batch_size": 3, "min_level": "WARNING"},
}
names = st.sampled_from(sorted(CHILDREN))


def is_meant(child: str, event: LogEvent) -> bool:
    return child == "archive" or event.level >= logging.WARNING


class World:
    """A process with `delivery: auto`, and the agents of its machine, of which one may work at a time."""

    def __init__(self, durability: str, seed: int = 0) -> None:
        self.clock = SimulatedClock(seed)
        self.clock.__enter__()
        self.disk = tempfile.TemporaryDirectory(prefix="composite-logstore-tests-")
        self.backends = {name: SimulatedBackend() for name in CHILDREN}
        self.holds = {name: backend.received for name, backend in self.backends.items()}
        self.store = make_store(
            *(make_child(name, self.backends[name], **settings) for name, settings in CHILDREN.items()),
            durability=durability,
            delivery="auto",
            spool_directory=self.disk.name,
            flush_timeout_millis=5_000,
            flush_limit_millis=30_000,
        )
        self.origin = self.store.register_origin("step", make_logs(self.store), {})
        self.agent: SimulatedAgent | None = None
        self.meant: dict[str, list[int]] = {name: [] for name in CHILDREN}
        # How many events a child may have twice: those of the batch that a killed agent was sending.
        self.twice = dict.fromkeys(CHILDREN, 0)
        self.changes = 0

    def log(self, levels: list[int]) -> None:
        for level in levels:
            number = self.store.writer._journal.next_number
            self.store.emit(self.origin, logging.LogRecord("train", level, "/code/train.py", 1, "text", (), None))
            for name, numbers in self.meant.items():
                if name == "archive" or level >= logging.WARNING:
                    numbers.append(number)

    def begin_agent(self) -> None:
        if self.agent is None:
            self.agent = SimulatedAgent(Path(self.disk.name) / str(self.store.id), self.holds, is_meant)
            self.changes += 1

    def end_agent(self, how: str = "end") -> None:
        if self.agent is not None:
            self.agent.end() if how == "end" else self.agent.kill()
            self.agent = None
            self.changes += 1

    def deliver(self, child: str, most: int, killed: str = "") -> None:
        if self.agent is not None:
            before = len(self.holds[child])
            self.agent.deliver(child, most, killed)
            if killed:
                self.agent = None
                self.changes += 1
            if killed == "export":
                self.twice[child] += len(self.holds[child]) - before

    def note(self) -> None:
        if self.agent is not None:
            self.agent.account()

    def check(self) -> None:
        stats = self.store.stats()
        assert_accounts_add_up(stats)
        for name, numbers in self.meant.items():
            assert stats[name]["accepted"] == len(numbers)
            assert stats[name]["dropped"] == 0
            got = [event.number for event in self.holds[name]]
            first = list(dict.fromkeys(got))
            # In order, without a gap, and without duplicates beyond those that a kill brings.
            assert first == numbers[: len(first)]
            assert len(got) - len(first) <= self.twice[name]
            assert all(one < other for one, other in pairwise(first))

    def end(self) -> None:
        """Without an agent the process delivers the rest by itself."""
        self.end_agent("kill")
        self.clock.advance(15)
        self.store.flush()
        self.check()
        for name, child in self.store.stats().items():
            assert child["delivered"] == child["accepted"] == len(self.meant[name])
            assert {event.number for event in self.holds[name]} == set(self.meant[name])

    def close(self) -> None:
        process_dies(self.clock)
        self.clock.__exit__()
        self.disk.cleanup()


class Handovers(RuleBasedStateMachine):
    durability = "spill"

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.durability)

    @rule(levels=st.lists(st.sampled_from([logging.INFO, logging.ERROR]), min_size=1, max_size=6))
    def log(self, levels: list[int]) -> None:
        self.world.log(levels)

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.2, 4]))
    def time_passes(self, seconds: float) -> None:
        self.world.clock.advance(seconds)

    @rule()
    def flush(self) -> None:
        self.world.store.flush()

    @rule()
    def an_agent_begins(self) -> None:
        self.world.begin_agent()

    @precondition(lambda self: self.world.agent is not None)
    @rule(how=st.sampled_from(["end", "kill"]))
    def it_ends(self, how: str) -> None:
        self.world.end_agent(how)

    @precondition(lambda self: self.world.agent is not None)
    @rule()
    def it_looks(self) -> None:
        assert self.world.agent
        self.world.agent.look()

    @precondition(lambda self: self.world.agent is not None)
    @rule()
    def it_writes_its_account(self) -> None:
        self.world.note()

    @precondition(lambda self: self.world.agent is not None)
    @rule(child=names, most=st.integers(1, 5), killed=st.sampled_from(["", "", "", "export", "position"]))
    def it_delivers(self, child: str, most: int, killed: str) -> None:
        self.world.deliver(child, most, killed)

    @precondition(lambda self: self.world.agent is None)
    @rule(what=st.sampled_from(["gone", "damaged"]))
    def the_account_is_lost(self, what: str) -> None:
        for folder in folders_of_processes(Path(self.world.disk.name)):
            if (path := folder / ACCOUNT).exists():
                path.unlink() if what == "gone" else path.write_bytes(b"nonsense")

    @invariant()
    def nothing_is_wrong(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        try:
            self.world.end()
        finally:
            self.world.close()


class WriteAheadHandovers(Handovers):
    durability = "write_ahead"


def test_handovers_lose_nothing_and_double_one_batch_at_most() -> None:
    run(Handovers, examples=12, steps=20)


@pytest.mark.deep
@pytest.mark.parametrize("machine", [Handovers, WriteAheadHandovers])
def test_many_more_handovers(machine: type[Handovers]) -> None:
    run(machine, examples=300, steps=60)


@pytest.mark.deep
@pytest.mark.parametrize("durability", ["spill", "write_ahead"])
def test_delivery_changes_over_a_hundred_times(durability: str) -> None:
    chance = random.Random(durability)
    world = World(durability)
    try:
        while world.changes < 110:
            world.log([chance.choice([logging.INFO, logging.ERROR]) for _ in range(chance.randint(0, 4))])
            world.clock.advance(chance.choice([0.1, 0.4, 1.5]))
            if world.agent is None:
                world.begin_agent()
            else:
                world.agent.look()
                world.deliver(chance.choice(sorted(CHILDREN)), 3, chance.choice(["", "", "export", "position"]))
                if chance.random() < 0.5:
                    world.note()
                if chance.random() < 0.2:
                    world.end_agent(chance.choice(["end", "kill"]))
            world.check()
        world.end()
    finally:
        world.close()
