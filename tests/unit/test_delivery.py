from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import pytest

from composite_logstore.backend import RejectedError, RetryableError, TooLargeError, UnavailableError
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.flush import Flush
from composite_logstore.delivery.states import TRANSITIONS, EndStream, Export, Outcome, State, Wait
from composite_logstore.event import LogEvent
from tests.events import make_events, make_stream
from tests.simulation import assert_accounts_add_up, make_child


def make_delivery(**settings: Any) -> Delivery:
    """Return a delivery without a delay, and with retries without jitter."""
    accepted: list[int] = [0]
    delivery = Delivery(make_child("archive", **settings), lambda: accepted[0], rand=lambda: 1.0)
    delivery.offer = lambda events: _offer(delivery, accepted, events)  # type: ignore[attr-defined]
    return delivery


def _offer(delivery: Delivery, accepted: list[int], events: list[LogEvent]) -> None:
    delivery.queue.extend(events)
    accepted[0] += len(events)


def offer(delivery: Delivery, count: int, first: int = 0) -> list[LogEvent]:
    events = make_events([f"m{number}" for number in range(first, first + count)], first=first)
    delivery.offer(events)  # type: ignore[attr-defined]
    return events


def account(delivery: Delivery) -> dict[str, Any]:
    stats = vars(delivery.stats())
    assert_accounts_add_up({"archive": stats})
    return stats


def test_an_empty_queue_is_waited_for_without_a_limit() -> None:
    assert make_delivery().next(0) == Wait(None, events=1)


def test_a_full_batch_is_exported_at_once() -> None:
    delivery = make_delivery(schedule_delay_millis=1000, max_export_batch_size=3)
    events = offer(delivery, 2)
    assert delivery.next(10) == Wait(1.0, events=1)
    events += offer(delivery, 2, first=2)
    assert delivery.next(10) == Export(events[:3])


def test_a_batch_is_exported_when_its_oldest_event_has_waited_for_the_delay() -> None:
    delivery = make_delivery(schedule_delay_millis=1000, max_export_batch_size=3)
    events = offer(delivery, 1)
    assert delivery.next(10) == Wait(1.0, events=2)
    assert delivery.next(10.25) == Wait(0.75, events=2)
    assert delivery.next(11) == Export(events)


def test_a_flush_exports_events_without_waiting_for_a_fuller_batch() -> None:
    delivery = make_delivery(schedule_delay_millis=1000)
    events = offer(delivery, 2)
    delivery.flush(before=2)
    assert delivery.next(0) == Export(events)
    delivery.exported()
    offer(delivery, 1, first=2)
    assert delivery.next(0) == Wait(1.0, events=999)


def test_delivered_events_are_counted() -> None:
    delivery = make_delivery()
    offer(delivery, 3)
    assert account(delivery)["pending"] == 3
    delivery.next(0)
    assert account(delivery)["pending"] == 3
    delivery.exported(shortened=1)
    assert account(delivery) | {"delivered": 3, "pending": 0, "shortened": 1} == account(delivery)


def test_a_full_queue_drops_the_oldest_and_counts_them() -> None:
    delivery = make_delivery(max_queue_size=2)
    events = offer(delivery, 5)
    assert account(delivery)["dropped"] == 3
    assert delivery.next(0) == Export(events[3:])


def test_events_of_an_export_under_way_are_not_dropped() -> None:
    delivery = make_delivery(max_queue_size=2, max_export_batch_size=2)
    events = offer(delivery, 2)
    assert delivery.next(0) == Export(events)
    offer(delivery, 5, first=2)
    assert (account(delivery)["dropped"], account(delivery)["pending"]) == (3, 4)


def test_the_same_batch_is_retried_after_waits_that_double_to_the_longest() -> None:
    delivery = make_delivery(retry_initial_interval_millis=500, retry_max_interval_millis=3000)
    events = offer(delivery, 2)
    now, waits = 0.0, []
    for _ in range(5):
        assert delivery.next(now) == Export(events)
        delivery.failed(RetryableError("refused"), now)
        action = delivery.next(now)
        assert isinstance(action, Wait)
        assert action.seconds is not None
        waits.append(action.seconds)
        now += action.seconds
    assert waits == [0.5, 1, 2, 3, 3]
    assert account(delivery)["pending"] == 2


def test_jitter_shortens_a_wait_by_at_most_half() -> None:
    delivery = Delivery(make_child("archive"), lambda: 1, rand=lambda: 0.0)
    delivery.queue.extend(make_events(["m"]))
    delivery.next(0)
    delivery.failed(RetryableError("refused"), 0)
    assert delivery.next(0) == Wait(0.25)


def test_the_pause_that_a_backend_asks_for_replaces_the_backoff() -> None:
    delivery = make_delivery()
    offer(delivery, 1)
    delivery.next(0)
    delivery.failed(RetryableError("busy", retry_after_seconds=120), 0)
    assert delivery.next(0) == Wait(120)


def test_a_success_resets_the_backoff() -> None:
    delivery = make_delivery()
    offer(delivery, 1)
    for now in (0, 10):
        delivery.next(now)
        delivery.failed(RetryableError("refused"), now)
    delivery.next(20)
    delivery.exported()
    assert delivery.state is State.HEALTHY
    offer(delivery, 1, first=1)
    delivery.next(30)
    delivery.failed(RetryableError("refused"), 30)
    assert delivery.next(30) == Wait(0.5)


def test_an_unavailable_backend_is_probed_rarely_and_loses_no_event() -> None:
    delivery = make_delivery()
    events = offer(delivery, 2)
    delivery.next(0)
    delivery.failed(UnavailableError("the key is wrong; set another"), 0)
    assert delivery.state is State.UNAVAILABLE
    assert delivery.next(0) == Wait(30)
    assert delivery.next(30) == Export(events)
    assert account(delivery)["last_error"] == "the key is wrong; set another"


def test_rejected_events_are_counted_by_reason_and_delay_no_other_event() -> None:
    delivery = make_delivery(max_export_batch_size=4)
    events = offer(delivery, 5)
    delivery.next(0)
    delivery.failed(RejectedError("too old", count=3, shortened=1), 0)
    stats = account(delivery)
    assert (stats["delivered"], stats["rejected"], stats["shortened"]) == (1, 3, 1)
    assert stats["rejected_reasons"] == {"too old": 3}
    assert delivery.next(0) == Export(events[4:])
    assert delivery.state is State.HEALTHY


def export_all(delivery: Delivery, backend: Callable[[list[LogEvent]], None]) -> None:
    while isinstance(action := delivery.next(0), Export):
        try:
            backend(action.batch)
        except Exception as error:
            delivery.failed(error, 0)
        else:
            delivery.exported()


def test_a_batch_refused_as_a_whole_is_split_until_the_event_at_fault_is_alone() -> None:
    delivery = make_delivery()
    events = offer(delivery, 9)
    taken: list[LogEvent] = []

    def backend(batch: list[LogEvent]) -> None:
        if events[6] in batch:
            raise RejectedError("bad request")
        taken.extend(batch)

    export_all(delivery, backend)
    assert taken == events[:6] + events[7:]
    assert account(delivery)["rejected_reasons"] == {"bad request": 1}


def test_a_batch_that_is_too_large_is_split_and_keeps_its_order() -> None:
    delivery = make_delivery()
    events = offer(delivery, 10)
    taken: list[LogEvent] = []

    def backend(batch: list[LogEvent]) -> None:
        if len(batch) > 3:
            raise TooLargeError("5 MB at most")
        taken.extend(batch)

    export_all(delivery, backend)
    assert taken == events


def test_a_single_event_that_is_too_large_is_rejected() -> None:
    delivery = make_delivery()
    offer(delivery, 1)
    delivery.next(0)
    delivery.failed(TooLargeError("1 MB at most"), 0)
    assert account(delivery)["rejected_reasons"] == {"1 MB at most": 1}


# Size, and what is rejected


def meet(delivery: Delivery, backend: Callable[[list[LogEvent]], None], seconds: float, now: float = 0.0) -> list[int]:
    """Drive the delivery for so many seconds. Returns the size of each export."""
    end, sizes = now + seconds, []
    while now < end:
        action = delivery.next(now)
        if isinstance(action, Export):
            sizes.append(len(action.batch))
            try:
                backend(action.batch)
            except Exception as error:
                delivery.failed(error, now)
            else:
                delivery.exported(now=now)
        elif isinstance(action, Wait) and action.seconds is not None:
            now += action.seconds
        else:
            break
    return sizes


BROKEN_OFF = RetryableError("no answer within 0.9 seconds", smaller_may_pass=True)


def takes(most: int, taken: list[LogEvent], error: Exception = BROKEN_OFF) -> Callable[[list[LogEvent]], None]:
    def backend(batch: list[LogEvent]) -> None:
        if len(batch) > most:
            raise error
        taken.extend(batch)

    return backend


@pytest.mark.parametrize("most", [1, 7, 300, 999])
@pytest.mark.parametrize("error", [BROKEN_OFF, TooLargeError("1 MiB at most"), TimeoutError("not translated")])
def test_a_batch_that_fails_for_its_size_is_halved_until_it_gets_through(most: int, error: Exception) -> None:
    delivery = make_delivery()
    events = offer(delivery, 3000)
    taken: list[LogEvent] = []
    sizes = meet(delivery, takes(most, taken, error), seconds=10_000_000)
    assert taken == events
    assert account(delivery) | {"state": "healthy", "delivered": 3000, "rejected": 0} == account(delivery)
    # However few get through at once, most exports do.
    too_large = [size for size in sizes if size > most]
    assert len(too_large) <= 12 + len(sizes) / 7


def test_there_is_a_wait_before_each_half() -> None:
    delivery = make_delivery()
    offer(delivery, 1000)
    now = 0.0
    for size, wait in [(1000, 0.5), (1000, 1), (500, 2), (250, 4)]:
        action = delivery.next(now)
        assert isinstance(action, Export)
        assert len(action.batch) == size
        delivery.failed(BROKEN_OFF, now)
        assert delivery.next(now) == Wait(wait)
        assert delivery.state is State.RETRYING
        now += wait


@pytest.mark.parametrize(
    "error",
    [
        RetryableError("connection refused"),
        RetryableError("slow down", retry_after_seconds=7, smaller_may_pass=True),
        UnavailableError("the key is wrong"),
    ],
)
def test_a_failure_without_relation_to_size_leaves_the_batch_as_it_is(error: Exception) -> None:
    delivery = make_delivery()
    events = offer(delivery, 1000)
    for now in range(0, 1000, 100):
        assert delivery.next(now) == Export(events)
        delivery.failed(error, now)


def test_after_an_outage_batches_grow_to_their_former_size() -> None:
    delivery = make_delivery()
    offer(delivery, 20_000)
    taken: list[LogEvent] = []
    outage = meet(delivery, takes(0, taken), seconds=3600)
    assert outage[-1] == 1
    # An hour of silence is no more requests than before.
    assert len(outage) < 130
    after = meet(delivery, takes(1000, taken), seconds=40, now=3600)
    assert len(taken) == 20_000
    # 20 would have been the fewest.
    assert after[:9] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert after[12:] == [1000] * 18


@pytest.mark.parametrize("ends", ["well", "refused", "at once"])
def test_an_export_that_returns_too_late_counts_as_broken_off(ends: str) -> None:
    delivery = make_delivery(export_timeout_millis=10_000, schedule_delay_millis=1_000)
    offer(delivery, 3_000)
    sizes, now = [], 0.0
    for _ in range(3):
        action = delivery.next(now)
        assert isinstance(action, Export)
        sizes.append(len(action.batch))
        now += 10.5 if ends != "at once" else 9.5
        if ends == "refused":
            delivery.failed(RetryableError("connection refused"), now)
        else:
            delivery.exported(0, now)
        now += 60
    assert sizes == ([1000] * 3 if ends == "at once" else [1000, 1000, 500])


def rejects_all(batch: list[LogEvent]) -> None:
    raise RejectedError("no tenant")


def test_a_backend_that_rejects_everything_is_probed_with_single_events_at_the_pace_of_retries() -> None:
    delivery = make_delivery()
    offer(delivery, 5000)
    sizes = meet(delivery, rejects_all, seconds=3600)
    stats = account(delivery)
    # An hour has 120 times 30 seconds.
    assert len(sizes) < 160
    assert stats["state"] == "unavailable"
    assert stats["rejected"] < 140
    assert stats["rejected_reasons"] == {"no tenant": stats["rejected"]}
    assert stats["pending"] == 5000 - stats["rejected"]
    assert "no tenant" in stats["last_error"]
    assert sizes[-100:] == [1] * 100

    # As soon as it takes one, there are batches again.
    rejected = stats["rejected"]
    sizes = meet(delivery, takes(1000, []), seconds=60, now=3600)
    stats = account(delivery)
    assert stats | {"state": "healthy", "rejected": rejected, "delivered": 5000 - rejected} == stats
    assert len(sizes) < 30


def test_a_backend_to_which_every_single_event_is_too_large_rejects_everything() -> None:
    """For example behind a proxy that lets no body pass."""
    delivery = make_delivery()
    offer(delivery, 1000)
    sizes = meet(delivery, takes(0, [], TooLargeError("413")), seconds=600)
    assert len(sizes) < 60
    assert account(delivery) | {"state": "unavailable", "delivered": 0} == account(delivery)
    assert account(delivery)["rejected"] < 40


@pytest.mark.parametrize("place", [0, 1, 499, 500, 999])
def test_a_single_bad_record_costs_a_few_requests_and_no_time(place: int) -> None:
    delivery = make_delivery()
    events = offer(delivery, 1000)

    def backend(batch: list[LogEvent]) -> None:
        if events[place] in batch:
            raise RejectedError("bad request")

    now, requests = 0.0, 0
    while isinstance(action := delivery.next(now), Export):
        requests += 1
        try:
            backend(action.batch)
        except RejectedError as error:
            delivery.failed(error, now)
        else:
            delivery.exported()
        assert delivery.state is State.HEALTHY
    assert requests <= 2 * 10 + 1
    assert account(delivery) | {"delivered": 999, "rejected": 1} == account(delivery)


def test_bad_records_between_good_ones_are_rejected_one_by_one() -> None:
    delivery = make_delivery()
    offer(delivery, 1000)

    def backend(batch: list[LogEvent]) -> None:
        if any(event.number % 10 for event in batch):
            raise RejectedError("bad request")

    export_all(delivery, backend)
    assert account(delivery) | {"state": "healthy", "delivered": 100, "rejected": 900} == account(delivery)


def test_a_backend_that_says_how_many_it_rejects_is_believed() -> None:
    """If it rejects old events, newer ones need not wait."""
    delivery = make_delivery()
    offer(delivery, 5000)

    def backend(batch: list[LogEvent]) -> None:
        raise RejectedError("too old", count=len(batch))

    export_all(delivery, backend)
    assert account(delivery) | {"state": "healthy", "rejected": 5000, "pending": 0} == account(delivery)


@pytest.mark.parametrize("error", [TypeError("oops"), SystemExit(3), KeyboardInterrupt(), MemoryError()])
def test_any_other_exception_counts_as_a_defect_and_is_retried(error: BaseException) -> None:
    delivery = make_delivery()
    events = offer(delivery, 1)
    delivery.next(0)
    delivery.failed(error, 0)
    assert delivery.state is State.RETRYING
    assert type(error).__name__ in account(delivery)["last_error"]
    assert delivery.next(1) == Export(events)


def test_a_hanging_export_makes_the_child_unavailable_until_it_returns() -> None:
    delivery = make_delivery(export_timeout_millis=10_000)
    offer(delivery, 1)
    delivery.next(0)
    delivery.watch(10)
    assert delivery.state is State.HEALTHY
    delivery.watch(10.5)
    assert delivery.state is State.UNAVAILABLE
    delivery.exported()
    assert delivery.state is State.HEALTHY
    assert account(delivery)["delivered"] == 1


def test_a_stream_ends_after_its_last_event_and_before_later_events() -> None:
    delivery = make_delivery(max_export_batch_size=1)
    stream = make_stream()
    events = offer(delivery, 2)
    delivery.end_stream(stream, before=1)
    assert delivery.next(0) == Export(events[:1])
    delivery.failed(RetryableError("refused"), 0)
    assert delivery.next(1) == Export(events[:1])
    delivery.exported()
    assert delivery.next(1) == EndStream(stream)
    assert delivery.next(1) == Export(events[1:])


def test_the_number_of_reasons_is_limited() -> None:
    delivery = make_delivery(max_export_batch_size=1)
    offer(delivery, 100)
    for number in range(100):
        delivery.next(0)
        delivery.failed(RejectedError(f"request {number} refused", count=1), 0)
    assert len(account(delivery)["rejected_reasons"]) <= 21


def test_a_batch_is_limited_in_bytes_and_a_larger_event_is_exported_alone() -> None:
    delivery = make_delivery(max_export_batch_size=100)
    delivery.offer(make_events(["x" * 3_000_000, "y" * 2_000_000, "z" * 9_000_000, "a", "b"]))  # type: ignore[attr-defined]
    batches = []
    while isinstance(action := delivery.next(0), Export):
        batches.append([event.message[0] for event in action.batch])
        delivery.exported()
    assert batches == [["x"], ["y"], ["z"], ["a", "b"]]


@pytest.mark.parametrize("shortened", [None, "many", -3, 7])
def test_an_invalid_result_of_an_exporter_does_no_harm(shortened: Any) -> None:
    delivery = make_delivery()
    offer(delivery, 2)
    delivery.next(0)
    delivery.exported(shortened)
    assert account(delivery)["delivered"] == 2
    assert account(delivery)["shortened"] in (0, 2)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    "error",
    [
        Unspeakable(),
        RetryableError("later", retry_after_seconds=float("nan")),
        RetryableError("later", retry_after_seconds=float("inf")),
        RetryableError("later", retry_after_seconds=-1),
        RetryableError("later", retry_after_seconds="soon"),  # type: ignore[arg-type]
        SystemExit(3),
        KeyboardInterrupt(),
    ],
)
def test_a_batch_is_retried_after_any_exception(error: BaseException) -> None:
    delivery = make_delivery()
    events = offer(delivery, 2)
    delivery.next(0)
    delivery.failed(error, 0)
    assert delivery.next(3600) == Export(events)
    assert account(delivery)["pending"] == 2


@pytest.mark.parametrize(("count", "rejected"), [(-1, 0), (0, 0), (1, 1), (9, 2)])
def test_a_rejection_of_an_odd_number_of_events(count: Any, rejected: int) -> None:
    delivery = make_delivery()
    offer(delivery, 2)
    delivery.next(0)
    delivery.failed(RejectedError("too old", count=count), 0)
    stats = account(delivery)
    assert (stats["rejected"], stats["delivered"]) == (rejected, 2 - rejected)


def test_every_state_has_a_transition_for_every_outcome_that_it_can_meet() -> None:
    never = {(State.UNAVAILABLE, Outcome.GIVEN_UP)}
    assert TRANSITIONS.keys() == {(state, outcome) for state in State for outcome in Outcome} - never


class TestFlush:
    def flush(self, *deliveries: Delivery, timeout: float = 5, limit: float = 30, before: int = 100) -> Flush:
        return Flush(list(deliveries), before, now=0, timeout=timeout, limit=limit)

    def test_it_is_over_at_once_without_events(self) -> None:
        assert self.flush(make_delivery()).wait(0) == 0

    def test_it_waits_for_a_child_without_progress_no_longer_than_the_timeout(self) -> None:
        delivery = make_delivery()
        offer(delivery, 1)
        flush = self.flush(delivery)
        assert flush.wait(0) == 5
        assert flush.wait(4) == 1
        assert flush.wait(5) == 0
        assert delivery.state is State.UNAVAILABLE

    @pytest.mark.parametrize("begin", [1000.0, 1000.1, 2.0**20 + 0.7, 86_400.3])
    @pytest.mark.parametrize("timeout", [0.1, 0.3, 0.7, 5.0])
    def test_rounding_of_seconds_does_not_keep_it_from_giving_up(self, begin: float, timeout: float) -> None:
        delivery = make_delivery()
        offer(delivery, 1)
        flush = Flush([delivery], 100, begin, timeout, limit=30)
        now = begin
        while (seconds := flush.wait(now)) > 0:
            now += seconds
        assert delivery.state is State.UNAVAILABLE
        assert now - begin == pytest.approx(timeout)

    def test_the_next_one_does_not_wait_for_it_again(self) -> None:
        delivery = make_delivery()
        offer(delivery, 1)
        self.flush(delivery).wait(5)
        assert self.flush(delivery, timeout=0.0).wait(0) == 0
        assert self.flush(delivery).wait(0) == 0

    def test_it_waits_up_to_the_limit_while_a_child_makes_progress(self) -> None:
        delivery = make_delivery(max_export_batch_size=1)
        offer(delivery, 50)
        flush = self.flush(delivery)
        for now in (4, 8, 12, 16, 20, 24, 28):
            delivery.next(now)
            delivery.exported()
            assert flush.wait(now) == min(5, 30 - now)
        assert flush.wait(30) == 0
        assert delivery.state is State.HEALTHY

    def test_it_does_not_wait_for_events_after_its_beginning(self) -> None:
        delivery = make_delivery(max_export_batch_size=1)
        offer(delivery, 2)
        flush = self.flush(delivery, before=1)
        delivery.next(0)
        delivery.exported()
        assert flush.wait(1) == 0
        assert delivery.oldest == 1

    def test_a_dead_child_does_not_end_the_wait_for_a_living_one(self) -> None:
        dead, living = make_delivery(), make_delivery(max_export_batch_size=1)
        living.name = "living"
        offer(dead, 1)
        offer(living, 2)
        flush = self.flush(dead, living)
        living.next(4)
        living.exported()
        assert flush.wait(4) == 1
        assert flush.wait(5) == 4
        living.next(5)
        living.exported()
        assert living.oldest == inf
        assert flush.wait(5) == 0

    def test_it_notices_an_export_that_hangs(self) -> None:
        delivery = make_delivery(export_timeout_millis=1000)
        offer(delivery, 1)
        delivery.next(0)
        assert self.flush(delivery).wait(2) == 0
        assert delivery.state is State.UNAVAILABLE
