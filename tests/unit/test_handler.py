"""`CompositeHandler`: Python's own logging as the source of events."""

from __future__ import annotations

import logging
import logging.config
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from composite_logstore import CompositeHandler, LogEvent, RetryableError
from composite_logstore.spool.lock import DELIVERY_LOCK
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from tests.hostile import FIELDS, VALUES, make_record, without
from tests.simulation import assert_accounts_add_up, make_child


@pytest.fixture
def train() -> Iterator[logging.Logger]:
    """A logger of its own, without a level and without handlers."""
    logger = logging.getLogger(f"train-{uuid4()}")
    yield logger
    logger.handlers.clear()


def make_handler(*children: Any, **settings: Any) -> CompositeHandler:
    settings = {"durability": "memory", "flush_timeout_millis": 60_000, **settings}
    return CompositeHandler(program=f"program-{uuid4()}", children=children, **settings)


def events(backend: SimulatedBackend) -> list[LogEvent]:
    return list(backend.received)


# Who delivers


@pytest.mark.parametrize("delivery", ["agent", "auto"])
def test_no_agent_can_be_asked_to_deliver(delivery: str) -> None:
    with pytest.raises(ValueError, match="'delivery'"):
        make_handler(make_child("one"), durability="spill", delivery=delivery)


def test_the_environment_hands_nothing_to_an_agent(
    train: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPOSITE_LOGSTORE_DELIVERY", "agent")
    backend = SimulatedBackend()
    handler = make_handler(make_child("one", backend), durability="write_ahead", spool_directory=str(tmp_path))
    handler.attach(train, level="INFO")
    train.info("one")
    handler.flush()
    assert backend.messages == ["one"]
    assert list(tmp_path.rglob(DELIVERY_LOCK)) == []
    handler.close()


# Records


def test_every_record_goes_to_every_child_in_order_and_with_its_identity(train: logging.Logger) -> None:
    one, other = SimulatedBackend(), SimulatedBackend()
    handler = make_handler(make_child("one", one), make_child("other", other, min_level="WARNING"))
    handler.attach(train, level="INFO")
    for number in range(10):
        train.log(logging.WARNING if number % 2 else logging.INFO, "step %d", number)
    handler.flush()

    assert one.messages == [f"step {number}" for number in range(10)]
    assert other.messages == [f"step {number}" for number in range(1, 10, 2)]
    assert handler.stats()["one"]["delivered"] == 10
    assert_accounts_add_up(handler.stats())
    handler.close()


def test_records_carry_the_program_its_attributes_and_their_stream(train: logging.Logger) -> None:
    backend = SimulatedBackend()
    stream_id = uuid4()
    child = make_child("one", backend)
    handler = CompositeHandler("trainer", [child], attributes={"team": "a"}, stream_id=stream_id, durability="memory")
    handler.attach(train)
    train.error("hello", extra={"epoch": 3})
    handler.close()

    assert handler.stream_id == stream_id
    (event,) = events(backend)
    assert event.attributes == {"epoch": 3}
    attributes = event.stream.attributes
    assert attributes["team"] == "a"
    assert attributes["zenml.log.id"] == str(stream_id)
    assert (attributes["zenml.log_store.name"], attributes["zenml.log.source"]) == ("trainer", "python")


def test_a_child_that_fails_costs_the_program_and_the_other_children_nothing(train: logging.Logger) -> None:
    with SimulatedClock():
        living, hung = SimulatedBackend(), SimulatedBackend()
        hung.fault = "silent"
        handler = make_handler(make_child("living", living), make_child("hung", hung), flush_timeout_millis=50)
        handler.attach(train)
        train.error("hello")
        handler.flush()
        stats = handler.stats()
        hung.fault = None
    assert (stats["living"]["delivered"], stats["hung"]["pending"]) == (1, 1)


def test_what_delivering_logs_is_no_record(train: logging.Logger) -> None:
    class Chatty(SimulatedBackend):
        def export(self, batch: Sequence[LogEvent]) -> int:
            train.error("from the worker's thread")
            thread = threading.Thread(target=train.error, args=("from s3fs",), name="fsspecIO")
            thread.start()
            thread.join()
            return super().export(batch)

    backend = Chatty()
    handler = make_handler(make_child("chatty", backend, max_export_batch_size=1))
    handler.attach(train)
    handler.attach("composite_logstore.of_a_test")
    train.error("hello")
    logging.getLogger("composite_logstore.of_a_test").error("about a child")
    handler.flush()
    handler.close()
    assert backend.messages == ["hello"]


def test_a_record_that_cannot_be_formatted_arrives_with_its_arguments() -> None:
    backend = SimulatedBackend()
    handler = make_handler(make_child("one", backend))
    # Not through a logger, where the handlers of others would raise.
    handler.handle(logging.LogRecord("train", logging.ERROR, "/a.py", 1, "%d apples", ("many",), None))
    handler.close()
    assert backend.messages == ["%d apples ('many',)"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_record_whose_attributes_are_anything_arrives_and_nothing_is_raised(field: str) -> None:
    backend = SimulatedBackend()
    handler = make_handler(make_child("one", backend))
    odd = [make_record(**{field: value()}) for value in VALUES.values()]
    for record in (*odd, without(field)):
        handler.handle(record)
    handler.close()
    assert len(backend.received) == len(odd) + 1


def test_threads_that_log_do_not_wait_for_a_flush(train: logging.Logger) -> None:
    hung = SimulatedBackend()
    hung.fault = "silent"
    handler = make_handler(make_child("hung", hung), flush_timeout_millis=60_000, flush_limit_millis=60_000)
    handler.attach(train)
    train.error("before")
    flushing = threading.Thread(target=logging.shutdown, args=([lambda: handler],), daemon=True)
    flushing.start()
    logging_too = threading.Thread(target=train.error, args=("meanwhile",), daemon=True)
    logging_too.start()
    logging_too.join(10)
    assert not logging_too.is_alive()
    assert flushing.is_alive()
    hung.fault = None


# Attaching


@pytest.mark.parametrize("found", [logging.NOTSET, logging.DEBUG, logging.WARNING])
def test_detaching_gives_a_logger_its_level_back(train: logging.Logger, found: int) -> None:
    train.setLevel(found)
    handler = make_handler(make_child("one"))
    handler.attach(train, level=logging.INFO)
    assert train.isEnabledFor(logging.INFO)
    handler.attach(train, level=logging.DEBUG)
    handler.detach(train)
    assert (train.level, train.handlers) == (found, [])
    handler.detach(train)
    assert train.level == found


def test_a_level_is_lowered_and_never_raised(train: logging.Logger) -> None:
    train.setLevel(logging.DEBUG)
    handler = make_handler(make_child("one"))
    handler.attach(train, level="ERROR")
    assert train.level == logging.DEBUG


def test_a_level_that_somebody_has_set_since_is_left_as_it_is(train: logging.Logger) -> None:
    train.setLevel(logging.ERROR)
    handler = make_handler(make_child("one"))
    handler.attach(train, level="INFO")
    train.setLevel(logging.CRITICAL)
    handler.detach(train)
    assert train.level == logging.CRITICAL


def test_handlers_that_are_nested_give_back_what_each_has_found(train: logging.Logger) -> None:
    train.setLevel(logging.ERROR)
    outer, inner = make_handler(make_child("one")), make_handler(make_child("two"))
    outer.attach(train, level="INFO")
    inner.attach(train, level="DEBUG")
    inner.detach(train)
    assert train.level == logging.INFO
    outer.detach(train)
    assert train.level == logging.ERROR


def test_closing_detaches_from_every_logger(train: logging.Logger) -> None:
    child = train.getChild("child")
    handler = make_handler(make_child("one"))
    handler.attach(train, level="INFO")
    handler.attach(child.name, level="DEBUG")
    handler.close()
    assert (train.level, child.level, train.handlers, child.handlers) == (0, 0, [], [])
    handler.close()


def test_a_level_that_is_none_is_refused_and_changes_nothing(train: logging.Logger) -> None:
    handler = make_handler(make_child("one"))
    with pytest.raises(ValueError, match="LOUD"):
        handler.attach(train, level="LOUD")
    assert (train.level, train.handlers) == (0, [])


# logging.config


def test_it_works_from_a_dictionary_of_logging_config(train: logging.Logger) -> None:
    backend = SimulatedBackend()
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "incremental": False,
            "handlers": {
                "everywhere": {
                    "class": "composite_logstore.CompositeHandler",
                    "program": f"program-{uuid4()}",
                    "level": "INFO",
                    "durability": "memory",
                    "children": [make_child("one", backend), {"name": "archive", "type": "artifact", "enabled": False}],
                }
            },
            "loggers": {train.name: {"handlers": ["everywhere"], "level": "DEBUG"}},
        }
    )
    (handler,) = train.handlers
    assert isinstance(handler, CompositeHandler)
    train.debug("too quiet")
    train.info("hello")
    handler.close()
    assert backend.messages == ["hello"]


def test_children_of_a_dictionary_may_be_written_out(train: logging.Logger) -> None:
    with pytest.raises(ValueError, match="Unable to configure handler") as raised:
        logging.config.dictConfig(
            {
                "version": 1,
                "disable_existing_loggers": False,
                "handlers": {
                    "everywhere": {
                        "class": "composite_logstore.CompositeHandler",
                        "program": "trainer",
                        "children": [{"name": "collector", "type": "otlp", "endpont": "http://127.0.0.1:4318"}],
                    }
                },
            }
        )
    assert "child 'collector': unknown key 'endpont' (did you mean 'endpoint'?)" in str(raised.value.__cause__)


# Bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"children": []}, "'children' is empty"),
        ({"children": [{"name": "a", "type": "otpl"}]}, "child 'a': 'type': there is no backend 'otpl'"),
        ({"children": [{"name": "a", "type": "artifact"}] * 2}, "child 'a': the 'name' is used more than once"),
        ({"children": [{"name": "a", "type": "otel", "exporter": "consol"}]}, "child 'a': 'exporter': there is no"),
        ({"primary": "a"}, "'primary': a handler reads nothing; leave it out"),
        ({"fetch_fallback": ["a"]}, "'fetch_fallback': a handler reads nothing; leave it out"),
        ({"durability": "never"}, "durability"),
        ({"flush_timeout": 1}, "flush_timeout"),
        ({"program": ""}, "'program' is empty"),
        ({"stream_id": "mine"}, "badly formed hexadecimal UUID string"),
    ],
)
def test_a_mistake_is_refused_at_once(settings: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"program": "trainer", "children": [{"name": "a", "type": "artifact"}], **settings}
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the words are compared below
        CompositeHandler(**given)
    assert words in str(raised.value)


def test_two_handlers_of_one_program_share_one_journal(train: logging.Logger) -> None:
    backend = SimulatedBackend()
    child = make_child("one", backend)
    one, other = (CompositeHandler("trainer", [child], durability="memory") for _ in range(2))
    one.attach(train)
    other.attach(train)
    train.error("hello")
    one.close()
    other.close()
    assert [event.writer for event in events(backend)] == [events(backend)[0].writer] * 2
    assert len({event.stream.id for event in events(backend)}) == 2


def test_whoever_enters_the_lock_of_a_handler_may(train: logging.Logger) -> None:
    """Python 3.13 does so for each record, without looking whether there is one."""
    handler = make_handler(make_child("one", SimulatedBackend()))
    assert handler.lock is not None
    handler.acquire()
    with handler.lock, handler.lock:
        pass
    handler.release()
    handler.close()


def test_clocks_that_the_program_has_stopped_hold_nothing_up(
    train: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As freezegun does: in `time`, and in each module that has one of its functions."""
    names = ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns")
    for name in names:
        real = getattr(time, name)
        stopped = real()
        places = [
            (module, attribute)
            for module in list(sys.modules.values())
            if module is time or getattr(module, "__name__", "").startswith("composite_logstore")
            for attribute, value in list(vars(module).items())
            if value is real
        ]
        for module, attribute in places:
            monkeypatch.setattr(module, attribute, lambda stopped=stopped: stopped)
    dead = SimulatedBackend()
    dead.fault = RetryableError("connection refused")
    handler = make_handler(make_child("dead", dead), flush_timeout_millis=50)
    handler.attach(train)
    train.error("hello")
    flush = threading.Thread(target=handler.flush, daemon=True)
    flush.start()
    flush.join(20)
    assert not flush.is_alive()
    assert handler.stats()["dead"]["pending"] == 1


@pytest.mark.parametrize("durability", ["memory", "spill", "write_ahead"])
@pytest.mark.parametrize("fault", [None, "refused"])
def test_a_closed_handler_gives_back_its_threads_and_its_records_are_delivered(
    tmp_path: Path, durability: str, fault: str | None
) -> None:
    with SimulatedClock() as clock:
        for number in range(3):
            handler = CompositeHandler(
                "job",
                [make_child("a", backend := SimulatedBackend())],
                durability=durability,
                spool_directory=str(tmp_path),
                flush_timeout_millis=1000,
            )
            logger = logging.Logger(f"job{number}")
            handler.attach(logger)
            backend.fault = fault if number < 2 else None
            logger.info("%d", number)
            handler.close()
            handler.close()
            clock.advance(1)
            if fault is None or durability != "memory":
                assert clock.threads == []
        clock.advance(120)
        expected = ["0", "1", "2"] if fault and durability != "memory" else ["2"]
        assert sorted(backend.messages) == expected
        assert list(tmp_path.glob("*/*/*.log")) == []
        # A record after all that is delivered, too.
        handler.emit(logging.LogRecord("late", 20, "", 0, "late", (), None))
        clock.advance(60)
        assert backend.messages[-1] == "late"
        handler.close()
        clock.advance(1)
        assert [name for name in clock.threads if name.endswith(" a")] == [] or durability == "memory"


def test_handlers_of_one_program_share_threads_until_the_last_is_closed() -> None:
    with SimulatedClock() as clock:
        child = make_child("a", backend := SimulatedBackend())
        first, second = (CompositeHandler("job", [child], durability="memory") for _ in range(2))
        first.emit(logging.LogRecord("x", 20, "", 0, "1", (), None))
        first.close()
        clock.advance(1)
        second.emit(logging.LogRecord("x", 20, "", 0, "2", (), None))
        clock.advance(1)
        assert backend.messages == ["1", "2"]
        assert clock.threads
        second.close()
        clock.advance(1)
        assert clock.threads == []
        assert backend.closed == 1


def test_a_handler_that_two_threads_close_at_once_ends_its_writer_once() -> None:
    child = make_child("a", backend := SimulatedBackend())
    kept = CompositeHandler("job", [child], durability="memory")
    closed = CompositeHandler("job", [child], durability="memory")
    closed.emit(logging.LogRecord("x", 20, "", 0, "1", (), None))
    threads = [threading.Thread(target=closed.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept.emit(logging.LogRecord("x", 20, "", 0, "2", (), None))
    backend.wait_for(2)
    assert backend.closed == 0
    kept.close()
    backend.wait_for_close()
    assert backend.messages == ["1", "2"]
