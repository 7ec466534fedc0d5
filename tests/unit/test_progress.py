"""A child with `progress: latest` gets the last update of a progress bar in each second."""

from __future__ import annotations

import logging
from typing import Any

from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.journal import Journal
from composite_logstore.delivery.states import Export, Wait
from composite_logstore.event import Stream
from tests.events import NOON, SECOND, make_capture, make_stream
from tests.simulation import assert_accounts_add_up, make_child


class Bars:
    """A journal with a child that gets all updates and one that gets the latest."""

    def __init__(self, **settings: Any) -> None:
        self.journal = Journal([make_child("all"), make_child("live", progress="latest", **settings)])
        self.all, self.live = self.journal.deliveries
        self.stream = make_stream()

    def update(
        self, at: float, message: str, stream: Stream | None = None, on: str = "stderr", bar: int = True
    ) -> None:
        capture = make_capture(
            message, logging.ERROR, time_unix_nano=NOON + int(at * SECOND), progress=bar, logger_name=on
        )
        self.journal.append(stream or self.stream, capture)
        self.journal.hand_out()

    def log(self, at: float, message: str, level: int = logging.INFO) -> None:
        self.journal.append(self.stream, make_capture(message, level, time_unix_nano=NOON + int(at * SECOND)))
        self.journal.hand_out()


def taken(delivery: Delivery, now: float) -> list[str]:
    messages = []
    while isinstance(action := delivery.next(now), Export):
        messages += [event.message for event in action.batch]
        delivery.exported()
        assert_accounts_add_up({delivery.name: vars(delivery.stats())})
    return messages


def test_only_the_last_update_of_each_second_is_delivered() -> None:
    bars = Bars()
    for tenth in range(30):
        bars.update(tenth / 10, f"{tenth}")
    bars.live.flush(before=1000)
    assert taken(bars.live, 0) == ["9", "19", "29"]
    assert len(taken(bars.all, 0)) == 30
    assert bars.live.stats().accepted == 3
    assert bars.all.stats().accepted == 30


def test_other_events_between_updates_keep_their_order() -> None:
    bars = Bars()
    for tenth in range(12):
        bars.update(tenth / 10, f"{tenth}")
        bars.log(tenth / 10, f"loss {tenth}")
    bars.live.flush(before=1000)
    losses = [f"loss {tenth}" for tenth in range(12)]
    assert taken(bars.live, 0) == [*losses[:9], "9", *losses[9:11], "11", "loss 11"]


def test_an_update_waits_until_its_second_is_over() -> None:
    bars = Bars()
    bars.log(0, "begin")
    bars.update(0.1, "1")
    assert taken(bars.live, 100) == ["begin"]
    assert bars.live.next(100.25) == Wait(0.75)
    bars.update(0.9, "2")
    bars.log(0.95, "between")
    assert taken(bars.live, 101) == []
    assert taken(bars.live, 102) == ["2", "between"]


def test_an_update_of_the_next_second_releases_the_one_before() -> None:
    bars = Bars()
    bars.update(0.1, "1")
    bars.update(1.1, "2")
    assert taken(bars.live, 100) == ["1"]


def test_updates_are_info_there_and_errors_elsewhere() -> None:
    bars = Bars(min_level="INFO")
    bars.update(0, "1")
    assert [event.level for event in bars.live.queue] == [logging.INFO]
    assert [event.level_name for event in bars.live.queue] == ["INFO"]
    assert [event.level for event in bars.all.queue] == [logging.ERROR]
    assert bars.live.queue[0].uid == bars.all.queue[0].uid


def test_a_child_that_wants_warnings_gets_no_update() -> None:
    bars = Bars(min_level="WARNING")
    bars.update(0, "1")
    bars.log(0, "hot", logging.WARNING)
    assert [event.message for event in bars.live.queue] == ["hot"]
    assert bars.live.stats().accepted == 1


def test_progress_bars_differ_by_stream_and_by_stdout_or_stderr() -> None:
    bars = Bars()
    bars.update(0.1, "a")
    bars.update(0.2, "b", on="stdout")
    bars.update(0.3, "c", make_stream())
    bars.live.flush(before=1000)
    assert taken(bars.live, 0) == ["a", "b", "c"]


def test_each_bar_of_a_stream_has_its_own_latest_update() -> None:
    bars = Bars()
    for tenth in range(10):
        for bar in (2, 3, 4):
            bars.update(tenth / 10, f"{bar}: {tenth}", bar=bar)
    bars.update(1.5, "2: end", bar=2)
    bars.live.flush(before=1000)
    assert taken(bars.live, 0) == ["2: 9", "3: 9", "4: 9", "2: end"]
    assert bars.live.stats().accepted == 4


def test_remembered_bars_are_bounded() -> None:
    bars = Bars()
    for number in range(3_000):
        bars.update(0.1, f"{number}", bar=number + 2)
    assert len(bars.live.progress_bars._latest) <= 1_000
    bars.live.flush(before=10_000)
    assert len(taken(bars.live, 0)) == 3_000


def test_the_end_of_a_stream_does_not_wait_for_the_end_of_the_second() -> None:
    bars = Bars()
    bars.update(0.1, "100%")
    bars.journal.end_stream(bars.stream)
    assert [event.message for event in bars.live.next(100).batch] == ["100%"]  # type: ignore[union-attr]


def test_an_update_that_left_a_full_queue_is_counted() -> None:
    bars = Bars(max_queue_size=3)
    bars.update(0.1, "1")
    for number in range(5):
        bars.log(0.2, f"{number}")
    bars.update(0.3, "2")
    stats = bars.live.stats()
    assert (stats.accepted, stats.dropped, stats.pending) == (7, 4, 3)
