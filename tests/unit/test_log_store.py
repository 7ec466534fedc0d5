from __future__ import annotations

import logging
import os
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from composite_logstore import CompositeLogStore, RejectedError, RetryableError, log_store
from composite_logstore.delivery import step_metadata
from composite_logstore.delivery.writer import Writer
from composite_logstore.log_store import CompositeLogStoreOrigin
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from tests.simulation import assert_accounts_add_up, make_child, make_logs, make_store
from tests.watching import wait_until


def log(store: CompositeLogStore, origin: Any, *messages: str, level: int = logging.INFO) -> None:
    for message in messages:
        store.emit(origin, logging.LogRecord("train", level, "/code/train.py", 1, message, (), None, "fit"))


def register(store: CompositeLogStore, source: str = "step", **metadata: Any) -> Any:
    logs = make_logs(store, source)
    return store.register_origin(str(logs.id), logs, metadata)


def test_every_record_reaches_every_child_in_order() -> None:
    a, b = SimulatedBackend(), SimulatedBackend()
    store = make_store(make_child("a", a), make_child("b", b))
    origin = register(store)
    log(store, origin, *(f"line {number}" for number in range(100)))
    store.deregister_origin(origin)
    assert a.messages == b.messages == [f"line {number}" for number in range(100)]
    assert_accounts_add_up(store.stats())
    assert store.stats()["a"] == store.stats()["b"] | {"state": "healthy", "delivered": 100, "pending": 0}


def test_a_disabled_child_gets_nothing_and_is_not_in_the_stats() -> None:
    off = SimulatedBackend()
    store = make_store(make_child("a"), make_child("off", off, enabled=False))
    origin = register(store)
    log(store, origin, "hello")
    store.deregister_origin(origin)
    assert off.received == []
    assert store.stats().keys() == {"a"}


def test_a_dead_child_costs_its_sibling_nothing_and_the_flush_its_timeout_once() -> None:
    with SimulatedClock() as clock:
        dead, living = SimulatedBackend(), SimulatedBackend()
        dead.fault = RetryableError("connection refused")
        store = make_store(make_child("living", living), make_child("dead", dead), flush_timeout_millis=300)
        took = []
        for _ in range(2):
            origin = register(store)
            log(store, origin, "hello")
            begin = clock.now()
            store.deregister_origin(origin)
            took.append(round(clock.now() - begin, 6))
        assert took == [0.3, 0]
        assert living.messages == ["hello", "hello"]
        assert store.stats()["dead"]["pending"] == 2
        assert store.stats()["dead"]["state"] == "unavailable"
        assert_accounts_add_up(store.stats())


def test_a_child_that_hangs_holds_up_nobody() -> None:
    with SimulatedClock():
        hung, living = SimulatedBackend(), SimulatedBackend()
        hung.fault = "silent"
        store = make_store(make_child("living", living), make_child("hung", hung), flush_timeout_millis=100)
        origin = register(store)
        log(store, origin, "one")
        assert hung.entered.wait(60)
        log(store, origin, "two")
        store.deregister_origin(origin)
        assert living.messages == ["one", "two"]
        assert_accounts_add_up(store.stats())
        assert store.stats()["hung"]["state"] == "unavailable"
        hung.fault = None
        hung.wait_for(2)
        assert hung.messages == ["one", "two"]
        assert_accounts_add_up(store.stats())


def test_what_a_child_missed_arrives_in_order_when_it_is_back() -> None:
    with SimulatedClock():
        backend = SimulatedBackend()
        backend.faults = [RetryableError("refused")] * 3
        store = make_store(
            make_child("a", backend, max_export_batch_size=2), flush_limit_millis=10_000, flush_timeout_millis=5_000
        )
        origin = register(store)
        log(store, origin, *"abcdefg")
        store.deregister_origin(origin)
        assert backend.messages == list("abcdefg")


def test_a_backend_that_asks_to_be_tried_again_at_once_is_not_asked_without_end() -> None:
    with SimulatedClock() as clock:
        backend = SimulatedBackend()
        backend.fault = RetryableError("busy", retry_after_seconds=0)
        store = make_store(make_child("a", backend))
        log(store, register(store), "hello")
        clock.advance(60)
        assert 60 <= backend.exports <= 240


def test_an_exporter_may_say_how_long_events_are_to_wait_for_a_fuller_batch() -> None:
    with SimulatedClock() as clock:
        backend = SimulatedBackend()
        backend.schedule_delay_millis = None  # type: ignore[attr-defined]
        store = make_store(make_child("a", backend, schedule_delay_millis=1_000))
        origin = register(store)
        log(store, origin, "one")
        clock.advance(1)
        backend.schedule_delay_millis = 10_000  # type: ignore[attr-defined]
        log(store, origin, "two")
        clock.advance(1)
        assert backend.messages == ["one", "two"]
        log(store, origin, "three")
        clock.advance(9)
        assert backend.messages == ["one", "two"]
        clock.advance(1)
        assert backend.messages == ["one", "two", "three"]
        log(store, origin, "four")
        store.flush()
        assert backend.messages == ["one", "two", "three", "four"]


def test_rejected_events_are_counted_and_the_rest_goes_on() -> None:
    backend = SimulatedBackend()
    backend.faults = [RejectedError("too old", count=1)]
    store = make_store(make_child("a", backend, max_export_batch_size=1))
    origin = register(store)
    log(store, origin, *"abc")
    store.deregister_origin(origin)
    assert store.stats()["a"]["rejected_reasons"] == {"too old": 1}
    assert backend.messages == ["b", "c"]
    assert_accounts_add_up(store.stats())


def test_trouble_is_one_warning_when_it_begins_and_one_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    with SimulatedClock() as clock, caplog.at_level(logging.WARNING):
        backend = SimulatedBackend()
        backend.faults = [RetryableError("connection refused")] * 5
        store = make_store(make_child("collector", backend))
        log(store, register(store), "hello")
        clock.advance(60)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2
    assert "child 'collector'" in texts[0]
    assert "connection refused" in texts[0]
    assert "again" in texts[1]


def test_the_flush_of_the_last_origin_alone_delivers_and_each_stream_ends() -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend, schedule_delay_millis=60_000))
    outer, inner = register(store, "client"), register(store, "step")
    log(store, inner, "inside")
    store.deregister_origin(inner)
    assert backend.received == []
    log(store, outer, "outside")
    store.deregister_origin(outer)
    assert backend.messages == ["inside", "outside"]
    assert {event.stream.attributes["zenml.log.source"] for event in backend.received} == {"client", "step"}


def test_deregistering_twice_or_what_was_registered_anew_does_no_harm() -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend, schedule_delay_millis=60_000))
    logs = make_logs(store)
    first = store.register_origin("same", logs, {})
    second = store.register_origin("same", logs, {})
    log(store, first, "one")
    store.deregister_origin(first)
    assert backend.received == []
    log(store, second, "two")
    store.deregister_origin(second)
    store.deregister_origin(second)
    assert backend.messages == ["one", "two"]
    assert [event.sequence for event in backend.received] == [0, 1]


def test_an_origin_can_be_used_after_it_was_deregistered_and_after_cleanup() -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    origin = register(store)
    log(store, origin, "one")
    store.deregister_origin(origin)
    store.cleanup()
    store.cleanup()
    log(store, origin, "two")
    store.flush()
    assert backend.messages == ["one", "two"]
    assert [event.sequence for event in backend.received] == [0, 1]


def test_a_flush_that_does_not_block_returns_at_once_and_delivers_all_the_same() -> None:
    backend = SimulatedBackend()
    backend.fault = "silent"
    store = make_store(make_child("a", backend, schedule_delay_millis=60_000))
    origin = register(store)
    log(store, origin, "hello")
    store.deregister_origin(origin, blocking=False)
    assert backend.entered.wait(60)
    backend.fault = None
    store.flush()
    assert backend.messages == ["hello"]


def test_the_stores_lock_is_free_while_it_flushes() -> None:
    backend = SimulatedBackend()
    backend.fault = "silent"
    store = make_store(make_child("a", backend), flush_timeout_millis=60_000)
    origin = register(store)
    log(store, origin, "hello")
    ending = threading.Thread(target=store.deregister_origin, args=(origin,))
    ending.start()
    assert backend.entered.wait(60)
    other = register(store)
    log(store, other, "from another step")
    backend.fault = None
    ending.join(60)
    assert not ending.is_alive()


def test_metadata_that_zenml_fills_later_is_on_the_first_events_too() -> None:
    backend = SimulatedBackend()
    backend.fault = "silent"
    store = make_store(make_child("a", backend))
    origin = register(store)
    log(store, origin, "early")
    origin.metadata["zenml.step.run.name"] = "trainer"
    backend.fault = None
    store.deregister_origin(origin)
    [event] = backend.received
    assert event.stream.attributes["zenml.step.run.name"] == "trainer"


def test_streams_carry_the_attributes_of_zenmls_own_stores() -> None:
    store = make_store(make_child("a"))
    logs = make_logs(store, "step")
    origin = store.register_origin("x", logs, {"zenml.step.run.id": "7"})
    assert isinstance(origin, CompositeLogStoreOrigin)
    assert origin.stream.attributes == {
        "zenml.log.id": str(logs.id),
        "zenml.log.source": "step",
        "zenml.log_store.id": str(store.id),
        "zenml.log_store.name": "logs",
        "zenml.step.run.id": "7",
    }


def test_emit_never_raises() -> None:
    store = make_store(make_child("a"))
    origin = register(store)
    store.emit(origin, "not a record")  # type: ignore[arg-type]
    store.emit(None, logging.makeLogRecord({}))  # type: ignore[arg-type]


def test_an_exporter_that_cannot_be_created_makes_an_unavailable_child() -> None:
    with SimulatedClock():
        child = make_child("a")
        type(child).backends.pop("a")
        living = SimulatedBackend()
        store = make_store(make_child("living", living), child)
        origin = register(store)
        log(store, origin, "hello")
        store.deregister_origin(origin)
        assert living.messages == ["hello"]
        assert store.stats()["a"]["state"] == "unavailable"
        assert "KeyError" in store.stats()["a"]["last_error"]


def test_two_instances_of_one_component_share_one_writer() -> None:
    backend = SimulatedBackend()
    id = uuid4()
    first = make_store(make_child("a", backend), id=id)
    second = make_store(make_child("a", backend), id=id)
    for store in (first, second):
        origin = register(store)
        log(store, origin, "hello")
        store.deregister_origin(origin)
    assert len({event.writer for event in backend.received}) == 1
    assert first.stats() == second.stats()
    assert make_store(make_child("a", backend, max_queue_size=5), id=id).writer is not first.writer


def test_building_a_store_starts_nothing() -> None:
    before = threading.active_count()
    store = make_store(make_child("a"))
    store.stats()
    store.flush()
    store.cleanup()
    assert threading.active_count() == before


@pytest.mark.process
def test_the_process_exit_is_bounded_and_says_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with SimulatedClock() as clock:
        silent, living = SimulatedBackend(), SimulatedBackend()
        silent.fault = "silent"
        store = make_store(make_child("living", living), make_child("silent", silent))
        origin = register(store)
        log(store, origin, *"abc")
        begin = clock.now()
        with caplog.at_level(logging.WARNING):
            store.writer.close(1.0)
        assert round(clock.now() - begin, 6) == 1
        assert living.messages == list("abc")
        assert "3 for child 'silent'" in caplog.text


def test_workers_end_and_exporters_are_closed_when_a_writer_is_closed() -> None:
    with SimulatedClock() as clock:
        backend = SimulatedBackend()
        store = make_store(make_child("closing", backend))
        origin = register(store)
        log(store, origin, "hello")
        store.writer.close(1.0)
        clock.advance(0)
        assert clock.threads == []
        assert backend.closed == 1


def step() -> Any:
    return SimpleNamespace(step_run_id=uuid4())


def test_step_metadata_says_what_became_of_the_events_as_of_the_steps_end() -> None:
    store = make_store(make_child("a"))
    origin = register(store)
    log(store, origin, "hello")
    store.flush()
    metadata = store.get_step_run_metadata(step())
    assert metadata["log_store.a"] == {
        "as_of": "the end of the step, before its last events are flushed",
        "state": "healthy",
        "delivered": 1,
        "pending": 0,
        "dropped": 0,
        "rejected": 0,
        "withheld": 0,
    }


@pytest.mark.parametrize("blocking", [True, False])
def test_after_the_last_flush_the_summary_is_published_once_more_for_every_step(
    blocking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[Any] = []
    monkeypatch.setattr(step_metadata, "_publish", lambda *arguments: published.append(arguments))
    store = make_store(make_child("a", schedule_delay_millis=60_000))
    outer, inner = register(store), register(store)
    steps = [step(), step()]
    log(store, inner, "hello")
    for info in steps:
        assert store.get_step_run_metadata(info)["log_store.a"]["pending"] == 1  # type: ignore[call-overload, index]
    store.deregister_origin(inner, blocking)
    store.writer.summaries.wait(60)
    assert published == []
    store.deregister_origin(outer, blocking)
    store.writer.summaries.wait(60)
    ((component, of, metadata),) = published
    assert (component, of) == (store.id, {info.step_run_id for info in steps})
    account = metadata["log_store.a"]
    assert (account["as_of"], account["delivered"], account["pending"]) == ("the last flush", 1, 0)
    # Of a later run in this process only the later steps.
    store.deregister_origin(register(store), blocking)
    store.writer.summaries.wait(60)
    assert len(published) == 1


def test_a_summary_that_cannot_be_published_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = threading.Event()
    tries: list[None] = []

    def hang(*_: Any) -> None:
        tries.append(None)
        is_over.wait(60)
        raise ConnectionError("there is no server")

    monkeypatch.setattr(step_metadata, "_publish", hang)
    store = make_store(make_child("a"))
    for _ in range(5):
        origin = register(store)
        log(store, origin, "hello")
        store.get_step_run_metadata(step())
        start = time.monotonic()
        store.deregister_origin(origin)
        assert time.monotonic() - start < 20
    wait_until(lambda: len(tries) == 1, "the first is being published")
    is_over.set()
    store.writer.summaries.wait(60)
    # All that came meanwhile is one more.
    assert len(tries) == 2


def test_a_forked_process_publishes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(make_child("a"))
    store.get_step_run_metadata(step())
    monkeypatch.setattr(step_metadata, "_publish", lambda *_: pytest.fail("published"))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    store.writer.summaries.publish(dict)
    assert not store.writer.summaries._under_way


def test_a_writer_remembers_the_streams_of_late_alone() -> None:
    writer = Writer(uuid4(), make_store(make_child("a")).config)
    for _ in range(10_010):
        stream = writer.stream(uuid4(), {}, None)
    writer.end_stream(stream)
    assert len(writer._streams) <= 10_001
    assert stream.id in writer._streams


@pytest.mark.parametrize("has_gil", [True, False])
def test_a_python_without_its_global_interpreter_lock_is_warned_of_once(
    has_gil: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: has_gil, raising=False)
    log_store._warn_without_gil.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            make_store(make_child("a"))
    log_store._warn_without_gil.cache_clear()
    said = [record.getMessage() for record in caplog.records if "PYTHON_GIL" in record.getMessage()]
    assert len(said) == (not has_gil)
