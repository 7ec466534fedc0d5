"""The journal and its queues as a state machine, compared with a model that keeps all events in lists."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from composite_logstore.clock import Clock
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.journal import Journal
from composite_logstore.delivery.schedule import TICK_SECONDS
from composite_logstore.delivery.states import Export, Wait
from composite_logstore.event import LogEvent, Stream
from composite_logstore.spool.settings import SpoolSettings
from tests.events import NOON, SECOND, make_capture, make_stream
from tests.properties.machines import run
from tests.simulation import assert_accounts_add_up, make_child

CHILDREN: dict[str, dict[str, Any]] = {
    "all": {"max_queue_size": 1000},
    "small": {"max_queue_size": 5},
    "errors": {"min_level": "ERROR"},
    "latest": {"progress": "latest"},
    "small latest": {"progress": "latest", "max_queue_size": 4, "min_level": "INFO"},
}
LEVELS = [logging.DEBUG, logging.INFO, 25, logging.ERROR]


class JournalMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.journal = Journal([make_child(name.replace(" ", "-"), **child) for name, child in CHILDREN.items()])
        self.deliveries = dict(zip(CHILDREN, self.journal.deliveries, strict=True))
        self.streams = [make_stream(), make_stream()]
        self.events: list[LogEvent] = []
        self.taken: dict[str, list[LogEvent]] = {name: [] for name in CHILDREN}
        self.lost: dict[str, int] = dict.fromkeys(CHILDREN, 0)

    # What happens

    @rule(stream=st.integers(0, 1), levels=st.lists(st.sampled_from(LEVELS), min_size=1, max_size=7))
    def emit(self, stream: int, levels: list[int]) -> None:
        self._append(self.streams[stream], levels, progress=False)

    @rule(
        stream=st.integers(0, 1),
        updates=st.integers(1, 6),
        on=st.sampled_from(["stdout", "stderr"]),
        bar=st.sampled_from([True, 2, 3]),
    )
    def draw_a_progress_bar(self, stream: int, updates: int, on: str, bar: int) -> None:
        level = logging.ERROR if on == "stderr" else logging.INFO
        self._append(self.streams[stream], [level] * updates, progress=bar, logger_name=on)

    def _append(self, stream: Stream, levels: list[int], progress: int, logger_name: str = "train") -> None:
        """Log several events, that are handed out together."""
        for level in levels:
            self.now += 0.25 * bool(progress)
            capture = make_capture(level=level, progress=progress, logger_name=logger_name)
            self.journal.append(stream, capture._replace(time_unix_nano=NOON + int(self.now * SECOND)))
        assert self.journal.next_number == len(self.events) + len(levels)
        # Of a progress bar's updates it gets all, as they are.
        self.events += list(self.deliveries["all"].queue)[-len(levels) :]
        assert [event.number for event in self.events] == list(range(len(self.events)))

    @rule(level=st.sampled_from(LEVELS), progress=st.booleans())
    def lose_one_in_a_fork(self, level: int, progress: bool) -> None:
        self.journal.drop(level, progress)
        for name in CHILDREN:
            self.lost[name] += self._wants(name, level, progress)

    @rule(name=st.sampled_from(sorted(CHILDREN)), flush=st.booleans())
    def take(self, name: str, flush: bool) -> None:
        """A child takes its batches until there is none."""
        delivery = self.deliveries[name]
        if flush:
            delivery.flush(self.journal.next_number)
        while not isinstance(action := delivery.next(self.now), Wait):
            if isinstance(action, Export):
                self.taken[name] += action.batch
                delivery.exported()
        if flush:
            assert delivery.pending == 0

    @rule(seconds=st.sampled_from([0.25, 1, 2]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(stream=st.integers(0, 1))
    def end_stream(self, stream: int) -> None:
        self.journal.end_stream(self.streams[stream])
        self.streams[stream] = make_stream()

    # What is always true

    @staticmethod
    def _wants(name: str, level: int, progress: int) -> bool:
        if progress and "latest" in name:
            level = logging.INFO
        return level >= {"errors": logging.ERROR, "small latest": logging.INFO}.get(name, 0)

    @invariant()
    def accounts_add_up(self) -> None:
        stats = {name: vars(delivery.stats()) for name, delivery in self.deliveries.items()}
        assert_accounts_add_up(stats)
        for name, child in stats.items():
            wanted = [event for event in self.events if self._wants(name, event.level, event.progress)]
            if "latest" not in name:
                assert child["accepted"] == len(wanted) + self.lost[name]
            assert child["accepted"] <= len(wanted) + self.lost[name]
            assert child["dropped"] >= self.lost[name]
            assert child["delivered"] == len(self.taken[name])
            if "small" not in name:
                assert child["dropped"] == self.lost[name]

    @invariant()
    def every_child_has_what_it_wants_in_order(self) -> None:
        for name, delivery in self.deliveries.items():
            here = [event.number for event in [*self.taken[name], *delivery.queue]]
            assert here == sorted(set(here))
            assert len(delivery.queue) <= CHILDREN[name].get("max_queue_size", 100_000)
            wanted = [e.number for e in self.events if self._wants(name, e.level, e.progress)]
            if name in ("all", "errors"):
                assert here == wanted
            elif name == "small":
                assert set(here) <= set(wanted)
            else:
                self._holds_the_latest(name, delivery, here)

    def _holds_the_latest(self, name: str, delivery: Delivery, here: list[int]) -> None:
        """Of each second of each bar it has one update at most, the last, unless a flush took one before."""
        ordinary = [e.number for e in self.events if not e.progress and self._wants(name, e.level, False)]
        if name == "latest":
            assert [number for number in here if not self.events[number].progress] == ordinary
            last = {(e.stream.id, e.logger_name, e.progress): e.number for e in self.events if e.progress}
            assert set(last.values()) <= set(here)
        waiting = [event for event in delivery.queue if event.progress]
        assert all(event.level == logging.INFO for event in waiting)
        seconds = [(e.stream.id, e.logger_name, e.progress, e.time_unix_nano // SECOND) for e in waiting]
        assert len(set(seconds)) == len(seconds)

    @invariant()
    def sequences_have_no_gap(self) -> None:
        last: dict[Any, int] = {}
        for event in self.events:
            assert event.sequence == last.get(event.stream.id, -1) + 1
            last[event.stream.id] = event.sequence


def test_the_journal_under_anything_that_is_logged() -> None:
    run(JournalMachine, 100, steps=40)


@pytest.mark.deep
def test_the_journal_under_very_much_that_is_logged() -> None:
    run(JournalMachine, 10_000, steps=40)


@settings(max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    # None stands for a tick of the spool's thread.
    happens=st.lists(st.sampled_from(LEVELS) | st.none(), max_size=60),
    handed_out_after=st.sets(st.integers(0, 59)),
)
def test_what_is_on_disk_does_not_depend_on_how_many_events_are_handed_out_at_a_time(
    sizes: list[int], happens: list[int | None], handed_out_after: set[int]
) -> None:
    """The workers of the other children have a part in that."""
    seldom = on_disk_after(sizes, happens, set())
    assert on_disk_after(sizes, happens, handed_out_after) == seldom
    assert on_disk_after(sizes, happens, set(range(60))) == seldom


class Stopped(Clock):
    """A clock that somebody else moves."""

    seconds = 1000.0

    def now(self) -> float:
        return self.seconds


# What is made room for takes longer than what is written.
@patch("composite_logstore.spool.segments.SEGMENT_BYTES", 8192)
def on_disk_after(sizes: Sequence[int], happens: Sequence[int | None], handed_out_after: set[int]) -> list[int]:
    """Return the numbers of the events that would survive a sudden death."""
    with tempfile.TemporaryDirectory() as folder:
        children = [make_child(f"c{number}", max_queue_size=size) for number, size in enumerate(sizes)]
        clock = Stopped()
        journal = Journal(children, clock, SpoolSettings(Path(folder), False, 100_000_000))
        spilling = journal.spilling
        assert spilling is not None
        journal.hand_out()
        stream = make_stream()
        for number, level in enumerate(happens):
            if level is None:
                clock.seconds += TICK_SECONDS
                spilling.tick(journal.next_number)
                spilling.write_due()
            else:
                journal.append(stream, make_capture(level=level))
            if number in handed_out_after:
                journal.hand_out()
        if spilling.folder.spool is None:
            return []
        numbers = [event.number for event in spilling.folder.spool.reader.read(-1, inf)]
        spilling.folder.abandon()
        return numbers
