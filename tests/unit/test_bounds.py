"""How long flushes take, whatever the children do and however many threads ask, in simulated time."""

from __future__ import annotations

import dis
import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType
from typing import Any

import pytest

from composite_logstore import CompositeLogStore
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from tests.simulation import assert_accounts_add_up, make_child, make_logs, make_store


class Slow(SimulatedBackend):
    """Each export takes its time."""

    def __init__(self, clock: SimulatedClock, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._simulated = clock

    def export(self, batch: Any) -> int:
        self._simulated.advance(self._seconds)
        return super().export(batch)


def register(store: CompositeLogStore) -> Any:
    logs = make_logs(store)
    return store.register_origin(str(logs.id), logs, {})


def log(store: CompositeLogStore, origin: Any, *messages: str) -> None:
    for message in messages:
        store.emit(origin, logging.LogRecord("train", 20, "/code/train.py", 1, message, (), None))


SECONDS = {"flush_timeout_millis": 5_000, "flush_limit_millis": 30_000}


@pytest.mark.parametrize("fault", ["silent", "refused", "unavailable"])
def test_many_threads_that_end_their_steps_at_once_all_wait_no_longer_than_one(
    clock: SimulatedClock, fault: str
) -> None:
    dead = SimulatedBackend()
    dead.fault = fault
    store = make_store(make_child("living"), make_child("dead", dead), **SECONDS)
    took: list[float] = []

    def step() -> None:
        origin = register(store)
        log(store, origin, "hello")
        begin = clock.now()
        store.deregister_origin(origin)
        store.flush()
        took.append(clock.now() - begin)

    for number in range(50):
        clock.start(step, f"step {number}")
    clock.advance(60)
    assert len(took) == 50
    assert max(took) <= 5
    # The next step's end costs nothing.
    clock.start(step, "a later step")
    clock.advance(60)
    assert took[-1] == 0
    assert_accounts_add_up(store.stats())


def test_a_healthy_child_with_a_long_queue_is_not_abandoned_while_it_makes_progress(clock: SimulatedClock) -> None:
    backend = Slow(clock, 2)
    store = make_store(make_child("slow", backend, max_export_batch_size=1), **SECONDS)
    origin = register(store)
    log(store, origin, *"abcdefghij")
    begin = clock.now()
    store.flush()
    assert clock.now() - begin == 20
    assert backend.messages == list("abcdefghij")


def test_a_flush_ends_at_its_limit_even_so(clock: SimulatedClock) -> None:
    backend = Slow(clock, 2)
    store = make_store(make_child("slow", backend, max_export_batch_size=1), **SECONDS)
    log(store, register(store), *map(str, range(100)))
    begin = clock.now()
    store.flush()
    assert clock.now() - begin == 30


def test_one_streams_flood_does_not_hold_up_the_end_of_another(clock: SimulatedClock) -> None:
    backend = Slow(clock, 0.1)
    store = make_store(make_child("a", backend, max_export_batch_size=10), **SECONDS)
    quiet, loud = register(store), register(store)
    log(store, quiet, "one", "two")

    def flood() -> None:
        for _ in range(1000):
            log(store, loud, *["noise"] * 10)
            clock.advance(0.1)

    clock.start(flood, "flood")
    clock.advance(1)
    log(store, quiet, "three")
    store.deregister_origin(quiet)
    begin = clock.now()
    store.flush()
    assert clock.now() - begin <= 1
    assert [event.message for event in backend.received if event.stream is quiet.stream] == ["one", "two", "three"]
    clock.advance(1)
    assert backend.ended == [quiet.stream]


def test_flush_and_cleanup_twice_and_with_nothing(clock: SimulatedClock) -> None:
    store = make_store(make_child("a"), **SECONDS)
    for _ in range(2):
        store.flush()
        store.cleanup()
    log(store, register(store), "hello")
    for _ in range(2):
        store.flush()
        store.cleanup()
    assert store.stats()["a"]["delivered"] == 1


def test_the_process_s_own_exit_takes_three_seconds_at_most(clock: SimulatedClock) -> None:
    hung, slow = SimulatedBackend(), Slow(clock, 1)
    hung.fault = "silent"
    store = make_store(make_child("hung", hung), make_child("slow", slow, max_export_batch_size=1), **SECONDS)
    log(store, register(store), *map(str, range(100)))
    begin = clock.now()
    store.writer.close(3.0)
    assert clock.now() - begin == 3


def interrupt_at(left: list[int]) -> Any:
    """Return a trace function that raises a Ctrl-C where Python may: after so many calls. It counts them down."""
    last: dict[FrameType, str] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        # What is raised when an object that nobody has any longer is taken apart, Python ignores.
        if "weakref" in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if last.get(frame, "").startswith("CALL"):
                left[0] -= 1
            last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if left[0] < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    return trace


def is_interrupted(step: int, run: Callable[[], None]) -> bool:
    """Do something, and return whether it was interrupted at that step."""
    left = [step]
    before = sys.gettrace()
    # Python 3.12 looks for it only when the tracing begins.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(interrupt_at(left))
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    # Not whether it arrived here: where the garbage collector has called a finalizer, Python ignores it.
    return left[0] < 0


def test_a_ctrl_c_at_any_point_of_emit_holds_up_no_child() -> None:
    """Not even where it comes inside of the standard library."""
    interrupted = 0
    for step in range(1_000):
        backend = SimulatedBackend()
        store = make_store(make_child("a", backend))
        origin = register(store)
        # On a thread of its own: one that is interrupted while it handles an exception may go on handling it for ever.
        with ThreadPoolExecutor(1) as pool:
            if not pool.submit(is_interrupted, step, partial(log, store, origin, "in the middle")).result():
                break
        interrupted += 1
        log(store, origin, "after")
        backend.wait_for(1)
        store.flush()
        assert backend.messages[-1] == "after"
        assert_accounts_add_up(store.stats())
    else:
        pytest.fail("the record never got through")
    assert interrupted > 20
