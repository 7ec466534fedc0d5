"""The whole log store as a state machine: simulated children, simulated time, any faults.

What is done to a store is a script of commands, so that it can be played again with other faults.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from composite_logstore import CompositeLogStore
from composite_logstore.capture.outbox import Outbox
from composite_logstore.delivery import budgets, writer
from composite_logstore.processing.budget import NOTICE, Spent
from composite_logstore.spool.rejected import RejectedFolder
from composite_logstore.testing import FAULTS, SimulatedBackend, SimulatedChildConfig, SimulatedClock
from composite_logstore.zenml import LogStoreError
from tests.events import capture
from tests.properties.machines import assert_found, run
from tests.properties.planted import BUGS, DURABILITY_BUGS, RULE_BUGS
from tests.properties.transitions import Watched
from tests.simulation import assert_accounts_add_up, make_logs, make_store, process_dies

DROPPED = re.compile("[37]$")
"""Each event says its number. The collector does not get these."""

CHILDREN: dict[str, dict[str, Any]] = {
    "archive": {"max_export_batch_size": 4, "max_queue_size": 60, "schedule_delay_millis": 1000},
    "collector": {
        "max_export_batch_size": 3,
        "max_queue_size": 1000,
        "schedule_delay_millis": 500,
        "drop": [{"message": DROPPED.pattern}],
    },
    "live": {
        "max_export_batch_size": 5,
        "max_queue_size": 8,
        "min_level": "WARNING",
        "retry_initial_interval_millis": 5000,
        "retry_max_interval_millis": 5000,
    },
}
LEVELS = [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR]
FLUSH_SECONDS, LIMIT_SECONDS = 5, 30

names = st.sampled_from(sorted(CHILDREN))
faults = st.sampled_from([None, *FAULTS])
levels = st.lists(st.sampled_from(LEVELS), min_size=1, max_size=12)


class World:
    """A log store with its children, in simulated time. Each method is a command of the script."""

    def __init__(self, seed: int, durability: str = "memory", healthy: frozenset[str] = frozenset()) -> None:
        """Build the store; the children in `healthy` never get a fault."""
        self.clock = SimulatedClock(seed)
        self.clock.__enter__()
        self.began = self.clock.time()
        self.processes = 1
        self.durability = durability
        self.disk = tempfile.TemporaryDirectory(prefix="composite-logstore-tests-")
        self.emitted_at: dict[tuple[str, int], float] = {}
        # A dead process's writer → a child → the numbers of the events that have to reach it, and of those that may.
        self.left: dict[str, dict[str, tuple[set[int], set[int]]]] = {}
        self.healthy = healthy
        self.backends = {name: SimulatedBackend() for name in CHILDREN}
        SimulatedChildConfig.backends.update(self.backends)
        self.id = make_store(self._child("archive")).id
        self.enabled = set(CHILDREN)
        # Each store that was built, with the numbers of the events meant for each child.
        self.stores: list[CompositeLogStore] = []
        self.meant: dict[str, dict[str, list[int]]] = {}
        self.origins: list[tuple[CompositeLogStore, Any]] = []
        self.ended: list[tuple[CompositeLogStore, Any]] = []
        self.logs: list[tuple[CompositeLogStore, Any]] = []
        self.copies_allowed: set[str] = set()
        self.history: dict[str, list[Any]] = {name: [] for name in CHILDREN}
        self.build()

    def _child(self, name: str) -> SimulatedChildConfig:
        enabled = name == "archive" or name in getattr(self, "enabled", CHILDREN)
        return SimulatedChildConfig(name=name, type="simulated", enabled=enabled, **CHILDREN[name])

    def build(self) -> None:
        """Build the store anew, as ZenML does after an update of the component."""
        store = make_store(
            *map(self._child, CHILDREN),
            id=self.id,
            primary="archive",
            flush_timeout_millis=FLUSH_SECONDS * 1000,
            flush_limit_millis=LIMIT_SECONDS * 1000,
            durability=self.durability,
            spool_directory=self.disk.name,
        )
        self.stores.append(store)
        self.meant.setdefault(store.writer.writer_id, {name: [] for name in CHILDREN})

    def register(self) -> None:
        store = self.stores[-1]
        logs = make_logs(store, id=_uuid(len(self.logs)))
        self.logs.append((store, logs))
        self.origins.append((store, store.register_origin(str(logs.id), logs, {})))

    def emit(self, which: int, levels: list[int], in_thread: bool = False) -> None:
        if not self.origins:
            self.register()
        store, origin = self.origins[which % len(self.origins)]
        if in_thread:
            self.clock.start(lambda: self._emit(store, origin, levels), "a thread of the step")
            self.clock.advance(0)
        else:
            self._emit(store, origin, levels)

    def _emit(self, store: CompositeLogStore, origin: Any, levels: list[int]) -> None:
        first = store.writer._journal.next_number
        for number, level in enumerate(levels, start=first):
            store.emit(origin, logging.LogRecord("train", level, "/code/train.py", 1, f"{number}", (), None))
            self._note(store, number, level)

    def _note(self, store: CompositeLogStore, number: int, level: int) -> None:
        """Note for which children the event was meant."""
        writer = store.writer.writer_id
        self.emitted_at[writer, number] = self.clock.now()
        for child in store.config.enabled_children:
            if child.name != "live" or level >= logging.WARNING:
                self.meant[writer][child.name].append(number)

    def emit_after_the_end(self, level: int) -> None:
        if self.ended:
            store, origin = self.ended[-1]
            self._emit(store, origin, [level])

    def fork(self, which: int, levels: list[int]) -> None:
        """A forked process logs; its parent takes it down one by one, so that it can be noted.

        Nothing is forked here, which would cost more than all the rest: the other end of the pipe is used.
        """
        if not self.origins:
            self.register()
        store, origin = self.origins[which % len(self.origins)]
        store.writer.before_fork()
        inbox = store.writer._forked._inbox
        assert inbox is not None
        outbox = Outbox(inbox)
        for level in levels:
            record = logging.LogRecord("loader", level, "/code/data.py", 1, "forked", (), None)
            outbox.send(origin.stream, False, capture(record))
        append, world = store.writer.append, self

        def noting(stream: Any, capture: Any) -> None:
            before = store.writer._journal.next_number
            append(stream, capture)
            world._note(store, before, capture.level)

        store.writer.append = noting  # type: ignore[method-assign]
        try:
            store.writer._forked.receive()
        finally:
            del store.writer.append

    def deregister(self, which: int) -> None:
        if not self.origins:
            return
        store, origin = self.origins.pop(which % len(self.origins))
        self.ended.append((store, origin))
        self._bounded(lambda: store.deregister_origin(origin))

    def flush(self) -> None:
        self._bounded(self.stores[-1].flush)

    def flush_without_waiting(self) -> None:
        begin = self.clock.now()
        self.stores[-1].flush(blocking=False)
        assert self.clock.now() == begin

    def cleanup(self) -> None:
        self._bounded(self.stores[-1].cleanup)

    def _bounded(self, flush: Any) -> None:
        """Flush, see that it takes no longer than it may, and bring every script to the same time after it."""
        begin = self.clock.now()
        stats = [store.stats() for store in self.stores]
        known_to_be_unavailable = all(
            child["state"] == "unavailable" or not child["pending"] for each in stats for child in each.values()
        )
        flush()
        took = self.clock.now() - begin
        assert took <= LIMIT_SECONDS
        if known_to_be_unavailable:
            assert took == 0
        if all(backend.fault in ("silent", "refused", "unavailable") for backend in self.backends.values()):
            assert took <= FLUSH_SECONDS
        self.clock.advance(begin + LIMIT_SECONDS - self.clock.now())

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def fail(self, name: str, fault: str | None) -> None:
        if name not in self.healthy:
            self.backends[name].fault = fault
            if fault == "answer lost":
                self.copies_allowed.add(name)

    def switch(self, name: str) -> None:
        """Disable a child that is enabled, and the other way round."""
        self.enabled ^= {name}
        self.build()

    def crash(self) -> None:
        """The process is killed, and another one started."""
        for store in {store.writer.writer_id: store for store in self.stores}.values():
            for name, numbers in self.meant[store.writer.writer_id].items():
                self._note_what_is_left(store.writer, name, set(numbers))
            _close_inbox(store)
        process_dies(self.clock)
        budgets._accounts.clear()
        self.processes += 1
        self.stores.clear()
        self.origins.clear()
        self.ended.clear()
        self.build()
        self.logs = [(self.stores[-1], logs) for _, logs in self.logs]

    def _note_what_is_left(self, dead: writer.Writer, name: str, meant: set[int]) -> None:
        backend = self.backends[name]
        settled = {event.number for event in (*backend.received, *backend.rejected) if event.writer == dead.writer_id}
        may = meant - settled if self.durability != "memory" else set()
        must = may
        if "budget" in CHILDREN[name]:
            # They may be withheld.
            must = set()
        elif self.durability == "spill":
            # At most the last second is lost.
            must = {number for number in may if self.emitted_at[dead.writer_id, number] < self.clock.now() - 1}
        if "drop" in CHILDREN[name]:
            must = {number for number in must if not DROPPED.search(str(number))}
        self.left.setdefault(dead.writer_id, {})[name] = must, may | settled

    def note_history(self) -> None:
        """Note how each child stands, to compare it with another run of the script."""
        for name, backend in self.backends.items():
            place = (self.clock.now(), backend.exports, len(backend.received), len(backend.rejected))
            self.history[name].append(place)

    # What is always true

    def check(self) -> None:
        self.check_accounts()
        for name, backend in self.backends.items():
            self.check_what_a_child_holds(name, backend)
            self.check_what_was_rejected(name, backend)
            if "drop" in CHILDREN[name]:
                assert not any(DROPPED.search(event.message) for event in (*backend.received, *backend.rejected))
            if "budget" in CHILDREN[name]:
                self.check_budget(CHILDREN[name]["budget"]["events"], backend)

    def check_budget(self, most: int, backend: SimulatedBackend) -> None:
        """In each minute all processes together have sent no more than the budget. In memory each has one."""
        sent = {event.uid for event in backend.received if NOTICE not in event.attributes}
        minutes = int(self.clock.time() // 60 - self.began // 60) + 1
        assert len(sent) <= most * minutes * (self.processes if self.durability == "memory" else 1)

    def check_accounts(self) -> None:
        for store in self.stores:
            stats = store.stats()
            assert_accounts_add_up(stats)
            meant = self.meant[store.writer.writer_id]
            for delivery in store.writer._journal.deliveries:
                child = delivery.stats()
                assert child.accepted == len(meant[delivery.name])
                bound = CHILDREN[delivery.name]["max_queue_size"] + CHILDREN[delivery.name]["max_export_batch_size"]
                assert delivery._in_memory <= bound
                if self.durability == "memory":
                    assert child.pending == delivery._in_memory
                else:
                    assert not child.dropped

    def check_what_a_child_holds(self, name: str, backend: SimulatedBackend) -> None:
        held: dict[str, list[int]] = {}
        for event in backend.received:
            held.setdefault(event.writer, []).append(event.number)
        for store in {store.writer.writer_id: store for store in self.stores}.values():
            writer_id = store.writer.writer_id
            meant = set(self.meant[writer_id][name])
            numbers = held.get(writer_id, [])
            first = list(dict.fromkeys(numbers))
            assert set(first) <= meant
            assert all(one < other for one, other in pairwise(first)), "out of order"
            if name not in self.copies_allowed:
                assert len(first) == len(numbers), "delivered twice without a lost answer"
            delivery = {delivery.name: delivery for delivery in store.writer._journal.deliveries}.get(name)
            if delivery is None:
                continue
            stats = delivery.stats()
            rejected = {event.number for event in backend.rejected if event.writer == writer_id}
            assert stats.rejected == len(rejected)
            if "budget" not in CHILDREN[name]:
                may_be_withheld = {number for number in meant if DROPPED.search(str(number))}
                assert stats.withheld <= (len(may_be_withheld) if "drop" in CHILDREN[name] else 0)
            waiting = {event.number for batch in delivery._batches for event in batch}
            waiting |= {event.number for event in delivery.queue}
            missing = meant - set(first) - rejected - waiting
            assert len(missing) == stats.dropped + stats.withheld + delivery.in_spool, "a gap that is not counted"
        for writer_id, left in self.left.items():
            numbers = held.get(writer_id, [])
            first = list(dict.fromkeys(numbers))
            assert set(first) <= left[name][1]
            assert all(one < other for one, other in pairwise(first)), "out of order after a crash"
            if name not in self.copies_allowed:
                assert len(first) == len(numbers), "delivered twice without a lost answer, after a crash"

    def check_what_was_rejected(self, name: str, backend: SimulatedBackend) -> None:
        """Each rejected event is kept on disk, after a crash, too, or is counted as not kept."""
        folder = RejectedFolder(Path(self.disk.name) / str(self.id))
        kept = {line.rejected.event.uid for line in folder.read(name) if line.rejected}
        if self.durability == "memory":
            assert not folder.path.exists()
        else:
            assert {event.uid for event in backend.rejected} <= kept, "a rejected event is lost"
        for store in self.stores:
            stats = store.stats().get(name)
            if stats is not None:
                assert stats["rejected_not_kept"] == (stats["rejected"] if self.durability == "memory" else 0)

    def check_reading(self) -> None:
        """What the primary has of each stream comes back, once and in order."""
        backend = self.backends["archive"]
        for store, logs in self.logs:
            expected = list(dict.fromkeys(e.uid for e in backend.received if e.stream.id == logs.id))
            try:
                page = store.fetch(logs, limit=1000)
            except LogStoreError:
                assert backend.fault is not None
                continue
            assert [str(entry.id) for entry in page.items] == expected

    def end(self) -> None:
        """When all faults end and time passes, every child gets everything that was not dropped or rejected."""
        for name in CHILDREN:
            self.fail(name, None)
        for backend in self.backends.values():
            backend.fault = None
        if self.left:
            # A disabled child keeps its part until it is enabled again; the first event looks for it.
            self.enabled = set(CHILDREN)
            self.crash()
            self.emit(0, [logging.ERROR])
        self.clock.advance(4 * 3600)
        self.check()
        self.check_reading()
        for store in self.stores:
            for name, child in store.stats().items():
                assert child["pending"] == 0, f"{name} never came back: {child}"
        for writer_id, left in self.left.items():
            for name, (must, _) in left.items():
                backend = self.backends[name]
                settled = {e.number for e in (*backend.received, *backend.rejected) if e.writer == writer_id}
                assert must <= settled, f"{name} lost what was on disk"

    def close(self) -> None:
        for store in self.stores:
            _close_inbox(store)
        process_dies(self.clock)
        self.clock.__exit__()
        self.disk.cleanup()


def _close_inbox(store: CompositeLogStore) -> None:
    if inbox := store.writer._forked._inbox:
        inbox.close()
        store.writer._forked._inbox = None


def _uuid(number: int) -> Any:
    from uuid import UUID

    return UUID(int=number + 1, version=4)


Script: TypeAlias = Sequence[tuple[Any, ...]]


def crash(name: str, fault: str | None, seconds: float, levels: list[int], again: bool) -> Script:
    """Return the commands for a crash, `again` in the middle of taking over what the first one left."""
    script: list[tuple[Any, ...]] = [
        (World.fail, name, fault),
        (World.emit, 0, [*levels, logging.ERROR]),
        (World.advance, seconds),
        (World.crash,),
        (World.emit, 0, levels),
    ]
    if again:
        script += [(World.advance, 0.25), (World.crash,), (World.emit, 0, levels)]
    return script


def history_of(child: str, seed: int, durability: str, script: Script, healthy: frozenset[str]) -> list[Any]:
    """Play a script, in which the children in `healthy` get no faults, and return how one child stood all along."""
    world = World(seed, durability, healthy)
    try:
        for command, *arguments in script:
            command(world, *arguments)
            world.note_history()
        return world.history[child]
    finally:
        world.close()


class WholeStore(RuleBasedStateMachine):
    world: World | None = None

    @initialize(seed=st.integers(0, 1000), durability=st.sampled_from(["memory", "spill", "write_ahead"]))
    def begin(self, seed: int, durability: str) -> None:
        self.seed, self.durability = seed, durability
        self.script: list[tuple[Any, ...]] = []
        self.world = World(seed, durability)

    def do(self, command: Any, *arguments: Any) -> None:
        assert self.world is not None
        self.script.append((command, *arguments))
        command(self.world, *arguments)
        self.world.note_history()

    @rule()
    def register(self) -> None:
        self.do(World.register)

    @rule(which=st.integers(0, 3), levels=levels, in_thread=st.booleans())
    def emit(self, which: int, levels: list[int], in_thread: bool) -> None:
        self.do(World.emit, which, levels, in_thread)

    @rule(level=st.sampled_from(LEVELS))
    def emit_after_the_end(self, level: int) -> None:
        self.do(World.emit_after_the_end, level)

    @rule(which=st.integers(0, 3))
    def deregister(self, which: int) -> None:
        self.do(World.deregister, which)

    @rule()
    def flush(self) -> None:
        self.do(World.flush)

    @rule()
    def flush_without_waiting(self) -> None:
        self.do(World.flush_without_waiting)

    @rule()
    def cleanup(self) -> None:
        self.do(World.cleanup)

    @rule(seconds=st.sampled_from([0.25, 1, 6, 40, 600]))
    def time_passes(self, seconds: float) -> None:
        self.do(World.advance, seconds)

    @rule(name=names, fault=faults)
    def fail(self, name: str, fault: str | None) -> None:
        self.do(World.fail, name, fault)

    @rule(name=names, first=faults, then=faults, seconds=st.sampled_from([1, 40]), levels=levels)
    def one_fault_after_another(
        self, name: str, first: str | None, then: str | None, seconds: float, levels: list[int]
    ) -> None:
        self.do(World.fail, name, first)
        self.do(World.emit, 0, [*levels, logging.ERROR])
        self.do(World.advance, seconds)
        self.do(World.fail, name, then)
        self.do(World.advance, 12)

    @rule(name=st.sampled_from(["collector", "live"]))
    def switch(self, name: str) -> None:
        self.do(World.switch, name)

    @rule(name=names, fault=faults, seconds=st.sampled_from([0, 0.25, 1.25]), levels=levels, again=st.booleans())
    def crash(self, name: str, fault: str | None, seconds: float, levels: list[int], again: bool) -> None:
        for command in crash(name, fault, seconds, levels, again):
            self.do(*command)

    @rule(which=st.integers(0, 3), levels=levels)
    def fork(self, which: int, levels: list[int]) -> None:
        self.do(World.fork, which, levels)

    @invariant()
    def all_is_well(self) -> None:
        if self.world is not None:
            self.world.check()

    @rule()
    def fetch(self) -> None:
        if self.world is not None:
            self.world.check_reading()

    def teardown(self) -> None:
        if self.world is None:
            return
        try:
            self.world.end()
        finally:
            self.world.close()
        failed = {arguments[0] for command, *arguments in self.script if command is World.fail and arguments[1]}
        for name in failed - self.enabled_late():
            self.played_again(healthy=frozenset(CHILDREN) - {name}, compare=name)

    def enabled_late(self) -> set[str]:
        """Return who was switched after a crash: its part of what the dead left stays with who has it, see the docs."""
        commands = [command for command, *_ in self.script]
        if World.crash not in commands:
            return set()
        after = self.script[commands.index(World.crash) :]
        return {arguments[0] for command, *arguments in after if command is World.switch}

    def played_again(self, healthy: frozenset[str], compare: str) -> None:
        """No child's history depends on another child's faults."""
        assert self.world is not None
        history = history_of(compare, self.seed, self.durability, self.script, healthy)
        assert history == self.world.history[compare]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thousand warnings, and no look at ZenML's configuration."""
    monkeypatch.setattr("composite_logstore.delivery.worker.logger.warning", lambda *_: None)
    # Several of them, and none of megabytes.
    monkeypatch.setattr("composite_logstore.spool.segments.SEGMENT_BYTES", 2048)
    monkeypatch.setattr("composite_logstore.log_store._active_artifact_store_id", lambda: None)


def test_what_is_on_disk_at_a_sudden_death_does_not_depend_on_another_childs_fault() -> None:
    """Random scripts find it once in some thousand."""
    script = [
        *crash("archive", None, 0, [10, 10, 10], again=True),
        *crash("collector", "slow", 0, [10, 10], again=True),
        (World.fail, "archive", "slow"),
        (World.emit, 0, [40, 40, 10, 30, 40, 40, 10, 10, 30, 40, 10, 40]),
        (World.emit, 0, [10, 20, 20], True),
        (World.emit_after_the_end, 10),
        *crash("archive", None, 0, [10], again=False),
        (World.emit_after_the_end, 10),
        (World.fail, "archive", None),
        (World.emit, 0, [10], True),
    ]
    with_its_fault = history_of("archive", 273, "spill", script, healthy=frozenset())
    assert with_its_fault == history_of("archive", 273, "spill", script, healthy=frozenset({"collector", "live"}))


@pytest.mark.timeout(900)
def test_the_whole_store_under_any_sequence_of_faults(
    transitions: Watched, record_property: Callable[[str, object], None]
) -> None:
    run(WholeStore, 12, steps=30)
    transitions.report(record_property)


@pytest.mark.timeout(900)
def test_the_whole_store_with_a_budget_under_any_sequence_of_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = {"events": 20, "per": "minute", "then": "stop"}
    monkeypatch.setitem(CHILDREN, "collector", {**CHILDREN["collector"], "budget": budget})
    run(WholeStore, 3, steps=30)


def test_a_budget_that_processes_do_not_share_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = {"events": 20, "per": "minute", "then": "stop"}
    monkeypatch.setitem(CHILDREN, "collector", {**CHILDREN["collector"], "budget": budget})
    monkeypatch.setattr("composite_logstore.spool.charges._decoded", lambda data: Spent())
    script = [*crash("archive", None, 2, [20] * 12, again=False), (World.advance, 2)]
    world = World(0, "write_ahead")
    try:
        for command, *arguments in script:
            command(world, *arguments)
        with pytest.raises(AssertionError):
            world.check()
    finally:
        world.close()


@pytest.mark.deep
def test_the_whole_store_under_very_many_sequences_of_faults() -> None:
    run(WholeStore, 2_000, steps=30)


# Found among the first few as a rule; many more are tried before it counts as not found.
@pytest.mark.deep
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", [*BUGS, *DURABILITY_BUGS, *RULE_BUGS])
def test_planted_bugs_are_found(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    assert_found(bug, monkeypatch, WholeStore, 1_000, steps=30)
