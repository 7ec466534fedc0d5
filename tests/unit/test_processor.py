from __future__ import annotations

from collections import Counter

import pytest

from composite_logstore.backend import RejectedError, RetryableError, TooLargeError, UnavailableError
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.states import Export, State, Wait
from composite_logstore.event import LogEvent
from composite_logstore.processing.processor import Processed, Processor, Step
from composite_logstore.testing import SimulatedBackend, SimulatedChildConfig, SimulatedClock
from tests.simulation import assert_accounts_add_up, make_child, make_store
from tests.unit.test_delivery import account, make_delivery, offer
from tests.unit.test_log_store import log, register


class Odd(Step):
    """Withholds events with odd numbers, changes the others, and remembers what was committed."""

    def __init__(self) -> None:
        self.committed: list[str] = []

    def process(self, batch: Processed) -> None:
        kept = [event for event in batch.events if self.wants(event)]
        batch.withheld["odd"] += len(batch.events) - len(kept)
        batch.redacted["even"] += len(kept)
        batch.events = [event._replace(message=f"{event.message}!") for event in kept]

    def commit(self, batch: Processed) -> None:
        self.committed += [event.message for event in batch.events]

    def wants(self, event: LogEvent) -> bool:
        return event.number % 2 == 0


def kept(events: list[LogEvent]) -> Processed:
    return Processor([Odd()]).process(events)


def test_processing_changes_neither_the_batch_nor_the_processor() -> None:
    delivery = make_delivery()
    events = offer(delivery, 5)
    odd = Odd()
    processor = Processor([odd])
    first, second = processor.process(events), processor.process(events)
    assert first == second
    assert [event.message for event in first.events] == ["m0!", "m2!", "m4!"]
    assert [event.message for event in events] == ["m0", "m1", "m2", "m3", "m4"]
    assert not odd.committed
    processor.commit(first)
    assert odd.committed == ["m0!", "m2!", "m4!"]


def test_steps_follow_one_another_and_each_must_want_an_event() -> None:
    events = offer(make_delivery(), 2)
    processor = Processor([Odd(), Odd()])
    assert [event.message for event in processor.process(events).events] == ["m0!!"]
    assert [processor.wants(event) for event in events] == [True, False]
    assert Processor().changes_nothing
    assert not processor.changes_nothing


def next_batch(delivery: Delivery) -> list[LogEvent]:
    action = delivery.next(1000)
    assert isinstance(action, Export)
    return action.batch


def test_withheld_events_are_acknowledged_and_counted_by_reason() -> None:
    delivery = make_delivery()
    offer(delivery, 5)
    delivery.exported(shortened=9, processed=kept(next_batch(delivery)))
    stats = account(delivery)
    assert (stats["delivered"], stats["withheld"], stats["pending"], stats["shortened"]) == (3, 2, 0, 3)
    assert stats["withheld_reasons"] == {"odd": 2}
    assert stats["redacted"] == {"even": 3}
    assert delivery.acknowledged == 5


def test_a_batch_without_anything_to_export_says_nothing_about_the_backend() -> None:
    delivery = make_delivery()
    offer(delivery, 1)
    delivery.next(0)
    delivery.failed(UnavailableError("wrong key"), 0)
    delivery.withheld(Processed([], Counter(all=1)))
    assert (account(delivery)["withheld"], delivery.state) == (1, State.UNAVAILABLE)
    assert delivery.next(1000) == Wait(None, events=1)


@pytest.mark.parametrize("error", [RejectedError("bad"), TooLargeError("large")], ids=["rejected", "too large"])
def test_an_event_that_was_sent_alone_is_the_one_at_fault(error: Exception) -> None:
    delivery = make_delivery()
    offer(delivery, 2)
    assert delivery.failed(error, 0, kept(next_batch(delivery)))
    stats = account(delivery)
    assert (stats["rejected"], stats["withheld"], stats["delivered"], stats["pending"]) == (1, 1, 0, 0)


def test_a_backend_rejects_no_more_events_than_were_sent() -> None:
    delivery = make_delivery()
    offer(delivery, 10)
    assert delivery.failed(RejectedError("bad", count=8), 0, kept(next_batch(delivery)))
    stats = account(delivery)
    assert (stats["rejected"], stats["withheld"], stats["delivered"]) == (5, 5, 0)


@pytest.mark.parametrize("error", [RetryableError("busy"), RejectedError("bad"), TooLargeError("large")])
def test_nothing_counts_before_the_backend_has_answered_for_good(error: Exception) -> None:
    delivery = make_delivery()
    offer(delivery, 8)
    assert not delivery.failed(error, 0, kept(next_batch(delivery)))
    stats = account(delivery)
    assert (stats["pending"], stats["withheld"], stats["redacted"]) == (8, 0, {})


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Odd:
    step = Odd()
    monkeypatch.setattr(SimulatedChildConfig, "create_processor", lambda self: Processor([step]))
    return step


def test_the_worker_processes_each_event_and_commits_it_once(odd: Odd) -> None:
    with SimulatedClock() as clock:
        backend = SimulatedBackend()
        backend.faults = [RetryableError("busy"), RejectedError("bad"), TooLargeError("large")]
        store = make_store(make_child("a", backend))
        origin = register(store)
        log(store, origin, *(f"line {number}" for number in range(10)))
        clock.advance(60)
        expected = [f"line {number}!" for number in range(0, 10, 2)]
        assert backend.messages == odd.committed == expected
        stats = store.stats()
        assert_accounts_add_up(stats)
        assert (stats["a"]["delivered"], stats["a"]["withheld"], stats["a"]["state"]) == (5, 5, "healthy")


def test_if_a_step_fails_nothing_leaves_or_is_lost_and_the_backend_is_not_blamed(
    odd: Odd, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: Processed) -> None:
        raise ValueError("no luck")

    with SimulatedClock() as clock:
        backend = SimulatedBackend()
        store = make_store(make_child("a", backend))
        origin = register(store)
        with monkeypatch.context() as failing:
            failing.setattr(odd, "process", fail)
            log(store, origin, *(f"line {number}" for number in range(10)))
            clock.advance(600)
            stats = store.stats()["a"]
            assert not backend.received
            assert (stats["pending"], stats["state"]) == (10, "unavailable")
            assert "no luck" in stats["last_error"]
            assert "backend" not in stats["last_error"]
            assert len(caplog.records) == 1
        clock.advance(600)
        assert backend.messages == [f"line {number}!" for number in range(0, 10, 2)]
        assert_accounts_add_up(store.stats())
    assert len(caplog.records) == 2


def test_the_backend_is_not_asked_if_all_is_withheld(odd: Odd) -> None:
    with SimulatedClock() as clock:
        backend = SimulatedBackend()
        store = make_store(make_child("a", backend, max_export_batch_size=1))
        origin = register(store)
        log(store, origin, "even", "odd")
        clock.advance(60)
        assert [len(batch) for batch in backend.batches] == [1]
        assert store.stats()["a"]["withheld"] == 1
        # A flush does not wait for it either.
        begin = clock.now()
        store.flush()
        assert clock.now() == begin
