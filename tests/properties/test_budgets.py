"""Processes that share a budget, retry, split batches and die, while the clock steps back and ahead."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from composite_logstore.clock import Clock
from composite_logstore.event import EVENT_BYTES, LogEvent
from composite_logstore.processing.budget import NOTICE, Account, Budget, OwnAccount, Spent, Told
from composite_logstore.processing.processor import Processed
from composite_logstore.processing.settings import BudgetSettings
from composite_logstore.spool import charges
from composite_logstore.spool.charges import SharedAccount
from composite_logstore.testing.events import make_events, make_stream
from tests.properties.machines import run

MOST_IN_A_BATCH = 12
STREAMS = [make_stream(**{"zenml.pipeline.run.id": str(number)}) for number in range(3)]


class WallClock(Clock):
    """A clock that tells the time that the test has set."""

    def __init__(self) -> None:
        self.seconds = 1_767_225_600.0

    def time(self) -> float:
        return self.seconds


@dataclass
class Process:
    """One process, and what it has yet to export.

    Attributes:
        budget: Its budget.
        pending: The events of its batch that are not acknowledged.
        charged: The numbers of those that were to be exported in an attempt.
    """

    budget: Budget
    pending: list[LogEvent] = field(default_factory=list)
    charged: set[int] = field(default_factory=set)
    next_number: int = 0


class Processes(RuleBasedStateMachine):
    """Any number of processes of one machine, one after the other and at once."""

    @initialize(
        events=st.none() | st.integers(1, 30),
        size=st.none() | st.integers(1, 30 * EVENT_BYTES),
        per=st.sampled_from(["run", "day", "minute"]),
        then=st.sampled_from(["warnings_only", "sample", "stop"]),
    )
    def begin(self, events: int | None, size: int | None, per: str, then: str) -> None:
        if events is None and size is None:
            events = 5
        self.settings = BudgetSettings(events=events, bytes=size, per=per, then=then)  # type: ignore[arg-type]
        self.clock = WallClock()
        self.directory = tempfile.TemporaryDirectory()
        self.processes: list[Process] = []
        # The period → the events that were charged in it.
        self.charged: dict[str, list[LogEvent]] = {}
        # How many of them were acknowledged, and of how many that is unknown, since their process died.
        self.acknowledged = self.left_behind = 0
        for _ in range(3):
            self.start()

    def account(self) -> Account:
        return SharedAccount(Path(self.directory.name), "a", OwnAccount(), pytest.fail)

    @rule()
    def start(self) -> None:
        if len(self.processes) < 4:
            budget = Budget(self.settings, self.account(), Told(), self.clock, lambda _: None)
            self.processes.append(Process(budget))

    @rule(seconds=st.sampled_from([1, 59, 60, 86_400, -1, -60, -86_400, -10_000_000]))
    def step(self, seconds: int) -> None:
        self.clock.seconds += seconds

    @rule(
        place=st.integers(0, 3),
        count=st.integers(1, MOST_IN_A_BATCH),
        stream=st.sampled_from(STREAMS),
        levels=st.lists(st.sampled_from([10, 20, 30, 40]), min_size=1, max_size=4),
        size=st.integers(1, 2 * EVENT_BYTES),
    )
    def take_batch(self, place: int, count: int, stream: object, levels: list[int], size: int) -> None:
        process = self.processes[place % len(self.processes)] if self.processes else None
        if process is None or process.pending:
            return
        process.pending = make_events(["x" * size] * count, stream, process.next_number, levels=levels)  # type: ignore[arg-type]
        process.next_number += count

    def period(self, event: LogEvent) -> str:
        if self.settings.per == "run":
            return f"run-{event.stream.metadata['zenml.pipeline.run.id']}"
        now = datetime.fromtimestamp(self.clock.seconds, timezone.utc)
        return f"day-{now:%Y-%m-%d}" if self.settings.per == "day" else f"minute-{now:%Y-%m-%dT%H-%M}"

    def attempt(self, process: Process, events: list[LogEvent]) -> Processed:
        batch = Processed(list(events))
        process.budget.process(batch)
        # Nothing is lost, doubled or out of order.
        assert len(batch.events) + batch.withheld.total() == len(events)
        numbers = [event.number for event in batch.events]
        assert numbers == sorted(set(numbers))
        assert set(numbers) <= {event.number for event in events}
        # What was charged in an earlier attempt is exported in each further one, and is charged nowhere else.
        charged = process.budget._charged
        before = {event.number for event in events} & process.charged
        assert before <= charged
        for event in events:
            if event.number in charged and event.number not in process.charged:
                process.charged.add(event.number)
                self.charged.setdefault(self.period(event), []).append(event)
        for event in batch.events:
            is_over = event.number not in charged
            passes = event.level >= 30 and self.settings.then == "warnings_only"
            assert not is_over or passes or NOTICE in event.attributes or self.settings.then == "sample"
        return batch

    @rule(place=st.integers(0, 3), count=st.integers(1, MOST_IN_A_BATCH), is_answered=st.booleans())
    def export(self, place: int, count: int, is_answered: bool) -> None:
        """Export a batch or the first part of one. If the backend does not answer, all events are tried again."""
        process = self.processes[place % len(self.processes)] if self.processes else None
        if process is None or not process.pending:
            return
        piece = process.pending[:count]
        batch = self.attempt(process, piece)
        if is_answered:
            process.budget.commit(batch)
            del process.pending[:count]
            done = process.charged & {event.number for event in piece}
            self.acknowledged += len(done)
            process.charged -= done

    @precondition(lambda self: self.processes)
    @rule(place=st.integers(0, 3))
    def die(self, place: int) -> None:
        """A process dies; another one begins with what it has left."""
        process = self.processes.pop(place % len(self.processes))
        assert len(process.charged) <= MOST_IN_A_BATCH
        self.left_behind += len(process.charged)
        budget = Budget(self.settings, self.account(), Told(), self.clock, lambda _: None)
        self.processes.append(Process(budget, process.pending, set(), process.next_number))

    @invariant()
    def no_period_has_more_than_its_budget(self) -> None:
        for period, events in getattr(self, "charged", {}).items():
            settings = self.settings
            if settings.events is not None:
                assert len(events) <= settings.events
            if settings.bytes is not None:
                # The event that uses up the rest is exported as a whole.
                assert sum(event.size for event in events[:-1]) < settings.bytes
            spent = self.account().charge(period, lambda spent: spent)
            assert spent == Spent(len(events), sum(event.size for event in events))

    @invariant()
    def each_event_is_charged_once_unless_its_process_died(self) -> None:
        if hasattr(self, "charged"):
            waiting = sum(len(process.charged) for process in self.processes)
            assert sum(map(len, self.charged.values())) == self.acknowledged + waiting + self.left_behind

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            self.directory.cleanup()


def test_no_period_has_more_than_its_budget_and_no_event_is_charged_twice() -> None:
    run(Processes, 60, 30)


def _charge_each_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Budget.process

    def forgetful(self: Budget, batch: Processed) -> None:
        self._charged.clear()
        process(self, batch)

    monkeypatch.setattr(Budget, "process", forgetful)


def _forget_what_others_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charges, "_decoded", lambda data: Spent())


def _exceed_by_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    charge = SharedAccount.charge
    monkeypatch.setattr(SharedAccount, "charge", lambda self, period, add: charge(self, period, lambda s: add(Spent())))


@pytest.mark.parametrize("plant", [_charge_each_attempt, _forget_what_others_charged, _exceed_by_a_batch])
def test_the_machine_finds_planted_bugs(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run(Processes, 60, 30, phases=[Phase.generate], database=None, report_multiple_bugs=False)
