from __future__ import annotations

import dis
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from composite_logstore.delivery.journal import Journal
from composite_logstore.event import LogEvent
from tests.events import make_capture, make_stream
from tests.simulation import assert_accounts_add_up, make_child


def queues(journal: Journal) -> list[list[LogEvent]]:
    return [list(delivery.queue) for delivery in journal.deliveries]


def test_every_child_gets_a_reference_to_the_same_event() -> None:
    journal = Journal([make_child("a"), make_child("b")])
    journal.append(make_stream(), make_capture())
    [[first], [second]] = queues(journal)
    assert first is second


def test_events_are_numbered_in_the_journal_and_in_their_stream() -> None:
    journal = Journal([make_child("a")])
    one, other = make_stream(), make_stream()
    for stream in (one, other, one, one, other):
        journal.append(stream, make_capture())
    [events] = queues(journal)
    assert [event.number for event in events] == [0, 1, 2, 3, 4]
    assert [event.sequence for event in events] == [0, 0, 1, 2, 1]
    assert {event.writer for event in events} == {journal.writer}


def test_every_writer_has_a_name_of_its_own() -> None:
    assert Journal([make_child("a")]).writer != Journal([make_child("a")]).writer


def test_a_child_gets_no_event_below_its_level_and_is_not_counted_for_it() -> None:
    journal = Journal([make_child("all"), make_child("live", min_level="WARNING")])
    for level in (10, 20, 30, 40, 35):
        journal.append(make_stream(), make_capture(level=level))
    all_levels, live = journal.deliveries
    assert [event.level for event in live.queue] == [30, 40, 35]
    assert (all_levels.stats().accepted, live.stats().accepted) == (5, 3)


def test_a_child_without_a_level_gets_events_of_all_levels() -> None:
    journal = Journal([make_child("a")])
    for level in (-5, 0, 1_000_000):
        journal.append(make_stream(), make_capture(level=level))
    [events] = queues(journal)
    assert [event.level for event in events] == [-5, 0, 1_000_000]
    assert journal.deliveries[0].stats().accepted == 3


def test_a_slow_child_takes_no_event_from_another() -> None:
    journal = Journal([make_child("dead", max_queue_size=2), make_child("b")])
    for _ in range(10):
        journal.append(make_stream(), make_capture())
    dead, other = journal.deliveries
    assert (dead.stats().dropped, other.stats().dropped) == (8, 0)


def test_workers_are_woken_by_the_first_event_and_then_as_the_first_of_them_has_asked() -> None:
    journal = Journal([make_child("a"), make_child("b")])
    assert journal.append(make_stream(), make_capture())
    # Until they have been, as a Ctrl-C may come in between.
    assert journal.append(make_stream(), make_capture())
    journal.wakes_done = journal.wakes_wanted
    journal.wake_after(5)
    journal.wake_after(3)
    wakes = [journal.append(make_stream(), make_capture()) for _ in range(4)]
    assert wakes == [False, False, True, True]
    journal.wakes_done = journal.wakes_wanted
    wakes = [journal.append(make_stream(), make_capture()) for _ in range(4)]
    assert wakes == [False, False, False, False]
    journal.wake_after(1)
    assert journal.append(make_stream(), make_capture())


def test_threads_leave_no_gap_and_no_duplicate() -> None:
    journal = Journal([make_child("a"), make_child("b")])
    stream = make_stream()

    def log() -> None:
        for _ in range(2_000):
            journal.append(stream, make_capture())

    threads = [threading.Thread(target=log) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for events in queues(journal):
        assert [event.number for event in events] == list(range(8_000))
        assert [event.sequence for event in events] == list(range(8_000))


def interrupt_at(step: int) -> Any:
    """Return a trace function that raises a Ctrl-C at the given bytecode of the journal."""
    left = [step]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(("journal.py", "event.py", "record.py")):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left[0] -= 1
            if left[0] < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    return trace


def test_a_ctrl_c_at_any_point_of_an_append_leaves_the_journal_consistent() -> None:
    interrupted = 0
    for step in range(2_000):
        journal = Journal([make_child("a"), make_child("b", max_queue_size=2), make_child("c", min_level="ERROR")])
        stream = make_stream()
        for _ in range(3):
            journal.append(stream, make_capture())
        captured = make_capture(level=40)
        before = sys.gettrace()
        # Python 3.12 looks for it only when the tracing begins.
        sys._getframe().f_trace_opcodes = True
        sys.settrace(interrupt_at(step))
        try:
            journal.append(stream, captured)
            journal.hand_out()
        except KeyboardInterrupt:
            interrupted += 1
        else:
            break
        finally:
            sys.settrace(before)
        journal.append(stream, make_capture("after", level=50))
        first, second, third = queues(journal)
        assert [event.number for event in first] == list(range(len(first)))
        assert [event.sequence for event in first] == list(range(len(first)))
        assert first[-2:] == second
        assert third == first[3:]
        assert_accounts_add_up({delivery.name: vars(delivery.stats()) for delivery in journal.deliveries})
    else:
        pytest.fail("the append never got through")
    assert interrupted > 50


def call_at(step: int, handler: Callable[[], None]) -> Any:
    """Return a trace function that runs a signal handler where Python may do so: in the journal, after a call."""
    left = [step]
    last: dict[FrameType, str] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith("journal.py"):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left[0] -= last.get(frame, "").startswith("CALL")
            last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if left[0] < 0:
                sys.settrace(None)
                handler()
        return trace

    return trace


def test_a_signal_s_handler_may_log_at_any_point_of_an_append() -> None:
    in_between = 0
    for step in range(2_000):
        journal = Journal([make_child("a"), make_child("b", min_level="ERROR")])
        stream, other = make_stream(), make_stream()
        for level in (20, 40, 20):
            journal.append(stream, make_capture(level=level))
        handled = []

        def handler() -> None:
            handled.append(journal.append(stream, make_capture("handler", level=40)))  # noqa: B023
            journal.hand_out()  # noqa: B023

        before = sys.gettrace()
        # Python 3.12 looks for it only when the tracing begins.
        sys._getframe().f_trace_opcodes = True
        sys.settrace(call_at(step, handler))
        try:
            journal.append(other, make_capture(level=40))
            journal.hand_out()
        finally:
            sys.settrace(before)
        events, errors = queues(journal)
        assert [event.number for event in events] == list(range(4 + len(handled)))
        assert [event.sequence for event in events if event.stream is stream] == list(range(3 + len(handled)))
        assert errors == [event for event in events if event.level == 40]
        assert_accounts_add_up({delivery.name: vars(delivery.stats()) for delivery in journal.deliveries})
        if not handled:
            break
        in_between += 1
    else:
        pytest.fail("the append never got through")
    assert in_between > 20
