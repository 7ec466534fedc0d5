"""Whatever a record carries in any attribute, what is numbered is plain and bounded, and goes to disk."""

from __future__ import annotations

import builtins
import contextlib
import logging
import pickle
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from opentelemetry.trace import NonRecordingSpan, use_span

from composite_logstore.capture import record
from composite_logstore.capture.record import note, numbered
from composite_logstore.event import ExceptionInfo, LogEvent, Stream, abridged
from composite_logstore.plain import MOST_BYTES, plain_mapping
from composite_logstore.spool.format import ABRIDGED_BYTES, LINE_BYTES, decode_event, decode_line, encode_event
from composite_logstore.testing import SimulatedBackend
from tests.events import WRITER, capture, make_events, make_stream
from tests.hostile import FIELDS, VALUES, Unreadable, Unusable, assert_plain, make_record, without
from tests.simulation import make_child, make_logs, make_store

STREAM = make_stream()


def numbered_as(record: Any, metadata: Any = None) -> LogEvent:
    said = note(record, metadata)
    noted = numbered(said, STREAM, WRITER, 5, 3)
    assert_plain(noted)
    assert noted[:4] == (STREAM, WRITER, 5, 3)
    # Once more, since a place is remembered.
    assert_plain(numbered(said, STREAM, WRITER, 6, 4))
    assert_plain(LogEvent(*noted[:4], *pickle.loads(pickle.dumps(noted[4:]))))
    line = encode_event(noted, str(STREAM.id))
    read = decode_event(decode_line(line), lambda _: STREAM)
    assert read is not None
    assert repr(read[:11]) == repr(noted[:11])
    return noted


@pytest.mark.parametrize("value", VALUES)
def test_any_attribute_may_be_anything(value: str) -> None:
    for field in FIELDS:
        numbered_as(make_record(**{field: VALUES[value]()}))
    numbered_as(make_record(), VALUES[value]())
    numbered_as(make_record(), {"given": VALUES[value]()})
    numbered_as(make_record("%s", args=(VALUES[value](),)))
    numbered_as(make_record(**dict.fromkeys(FIELDS, VALUES[value]())))


@pytest.mark.parametrize("value", VALUES)
def test_a_stream_s_attributes_may_be_anything(value: str) -> None:
    for metadata in ({"given": VALUES[value]()}, VALUES[value]()):
        attributes = Stream(STREAM.id, metadata).attributes
        assert orjson.loads(orjson.dumps(attributes)) is not None
        assert_plain(numbered_as(make_record())._replace(attributes=attributes))


@pytest.mark.parametrize("value", VALUES)
def test_a_span_may_be_anything(value: str) -> None:
    made = VALUES[value]

    class Span(NonRecordingSpan):
        def __init__(self, context: Any) -> None:
            self._odd = context

        def get_span_context(self) -> Any:
            return self._odd

    contexts = [
        made(),
        SimpleNamespace(trace_id=made(), span_id=1, trace_flags=1, is_valid=True),
        SimpleNamespace(trace_id=1, span_id=made(), trace_flags=1, is_valid=True),
        SimpleNamespace(trace_id=1, span_id=1, trace_flags=made(), is_valid=True),
        SimpleNamespace(trace_id=1, span_id=1, trace_flags=1, is_valid=made()),
    ]
    for context in contexts:
        with use_span(Span(context)):
            numbered_as(make_record())


@pytest.mark.parametrize("missing", [*FIELDS, "all"])
def test_any_attribute_may_be_missing(missing: str) -> None:
    noted = numbered_as(without(*(FIELDS if missing == "all" else [missing])))
    if missing not in ("msg", "all"):
        assert noted.message.startswith("hello")


class Computed(logging.LogRecord):
    """A record that computes the number of its line."""

    lineno = property(lambda self: 7)  # type: ignore[assignment]


def test_an_attribute_that_a_subclass_computes_is_read() -> None:
    record = without("lineno")
    record.__class__ = Computed
    assert numbered_as(record).line == 7


@pytest.mark.parametrize("value", VALUES)
def test_a_log_store_captures_a_record_whatever_its_logger_s_name_is(value: str) -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    origin = store.register_origin("step", make_logs(store), {})
    store.emit(origin, make_record(name=VALUES[value]()))
    assert store.stats()["a"]["accepted"] == 1


def test_what_is_hardly_a_record_is_an_event_all_the_same() -> None:
    for hardly in (None, object(), Unusable(), "text", Unreadable("n", 20, "", 0, "hello", (), None)):
        numbered_as(hardly)


TIMELESS = [1_790_000_000_000, 1.79e12, 1e300, float("nan"), float("inf"), -1, -1e-9, None, "1790000000.25", b"1"]


@pytest.mark.parametrize("created", [*TIMELESS, True, 1j, 1 << 80, [1_790_000_000], 10**300])
def test_a_time_that_is_none_in_seconds_is_that_of_now(created: Any) -> None:
    before = time.time_ns()
    assert before <= numbered_as(make_record(created=created)).time_unix_nano <= time.time_ns()


@pytest.mark.parametrize("value", ["decimal", "numpy-like", "fraction"])
def test_a_time_of_another_type_is_one_if_it_is_a_number_of_seconds(value: str) -> None:
    created = VALUES[value]()
    assert numbered_as(make_record(created=created)).time_unix_nano == round(float(created) * 1e6) * 1000


LEVELS = [(20, 20), (True, 1), (20.7, 20), ("20", 0), ("INFO", 0), (None, 0), (float("nan"), 0), (float("inf"), 0)]
HUGE_LEVELS = [(10**6, 10**6), (1 << 31, (1 << 31) - 1), (-(1 << 80), -(1 << 31)), (10**300, (1 << 31) - 1)]


@pytest.mark.parametrize(("level", "expected"), [*LEVELS, *HUGE_LEVELS])
def test_a_level_is_a_number_within_bounds(level: Any, expected: int) -> None:
    assert numbered_as(make_record(levelno=level)).level == expected


@pytest.mark.parametrize("number", ["int enum", "numpy-like"])
def test_a_number_of_another_type_is_one(number: str) -> None:
    noted = numbered_as(make_record(levelno=VALUES[number](), lineno=VALUES[number]()))
    assert (noted.level, noted.line) == (20, 20)


@pytest.mark.parametrize(
    ("line", "expected"), [(None, 0), ("7", 0), (-3, 0), (1 << 70, (1 << 31) - 1), (7.9, 7), (True, 1)]
)
def test_a_line_is_a_number_within_bounds(line: Any, expected: int) -> None:
    assert numbered_as(make_record(lineno=line)).line == expected


def test_an_exception_itself_may_stand_for_what_is_to_be_known_of_it() -> None:
    noted = numbered_as(make_record(exc_info=VALUES["an exception"]()))
    assert noted.exception is not None
    assert noted.exception[:2] == ("ValueError", "bad")
    assert "hostile.py" in noted.exception.stacktrace


def test_of_an_exception_that_cannot_be_read_what_can_be_is_kept() -> None:
    noted = numbered_as(make_record(exc_info=VALUES["exc_info, odd"]()))
    assert noted.exception is not None
    assert noted.exception.type == "OddError"
    assert "hostile.py" in noted.exception.stacktrace
    noted = numbered_as(make_record(exc_info=VALUES["exc_info, nameless"]()))
    assert noted.exception is not None
    assert noted.exception[:2] == ("NamelessError", "bad")


Group: Any = getattr(builtins, "ExceptionGroup", None)


def nested_groups() -> BaseException:
    error: BaseException = ValueError("innermost")
    for number in range(2_000):
        error = Group(f"group {number}", [error])
    return error


def groups_that_share() -> BaseException:
    error: BaseException = ValueError("innermost")
    for number in range(64):
        error = Group(f"group {number}", [error, error])
    return error


def wide_group() -> BaseException:
    return Group("many", [ValueError(number) for number in range(20_000)])


def long_chain() -> BaseException:
    error = ValueError("first")
    for number in range(20_000):
        following = ValueError(number)
        following.__context__ = error
        error = following
    return error


def odd_members() -> BaseException:
    class Odd(ValueError):
        exceptions = VALUES["endless list"]()

    return Odd("one")


@pytest.mark.skipif(Group is None, reason="Python 3.11 has the first groups of exceptions")
@pytest.mark.parametrize("make", [nested_groups, groups_that_share, wide_group, long_chain, odd_members])
def test_of_exceptions_within_exceptions_the_outermost_is_shown(make: Callable[[], BaseException]) -> None:
    error = make()
    with contextlib.suppress(Exception):
        raise error
    noted = numbered_as(make_record(exc_info=error))
    assert noted.exception is not None
    assert noted.exception.type == type(error).__name__
    assert "hostile_records.py" in noted.exception.stacktrace
    assert str(error) in noted.exception.stacktrace


# Bounds


def test_texts_are_bounded_and_say_how_much_they_lack() -> None:
    error = ValueError("x" * (MOST_BYTES + 10))
    try:
        raise error
    except ValueError:
        exc_info = sys.exc_info()
    noted = numbered_as(make_record("y" * (MOST_BYTES + 10), exc_info=exc_info, funcName="f" * 1_000_000))
    assert "shortened by" in noted.message[-40:]
    assert noted.message.startswith("y" * (MOST_BYTES - 100))
    assert noted.exception is not None
    assert all("shortened by" in text[-40:] for text in noted.exception[1:])
    assert "shortened by" in noted.function


def test_attributes_are_bounded_together_and_the_small_ones_are_whole() -> None:
    extra = {"large": "x" * (2 * MOST_BYTES), "nested": {"large": ["y" * MOST_BYTES]}, "epoch": 3, "model": "resnet"}
    noted = numbered_as(make_record(**extra))
    assert noted.attributes["epoch"] == 3
    assert noted.attributes["model"] == "resnet"
    for name in ("large", "nested"):
        text = noted.attributes[name]
        assert isinstance(text, str)
        assert len(text) > MOST_BYTES / 3
        assert "shortened by" in text[-40:]
    assert len(str(noted.attributes)) <= MOST_BYTES


def test_very_many_attributes_are_bounded_with_a_mark() -> None:
    noted = numbered_as(make_record(), {f"name {number}": number for number in range(400_000)})
    assert len(noted.metadata) < 150_000
    assert noted.metadata["name 7"] == 7
    assert noted.metadata["…"] == f"… [shortened by {400_001 - len(noted.metadata)} values]"


def test_a_name_of_an_attribute_is_bounded_too() -> None:
    attributes = plain_mapping({"x" * (2 * MOST_BYTES): "given", "other": 1})
    assert attributes["other"] == 1
    assert sum(map(len, attributes)) <= MOST_BYTES


def test_the_largest_event_fits_into_a_line_once_it_is_abridged() -> None:
    nothing_but_escapes = "\0" * MOST_BYTES
    (largest,) = make_events([nothing_but_escapes], attributes={"a": nothing_but_escapes}, metadata={"b": [1] * 10_000})
    largest = largest._replace(
        exception=ExceptionInfo("\0" * 4096, nothing_but_escapes, nothing_but_escapes),
        file="\0" * 4096,
        function="\0" * 4096,
    )
    small = abridged(largest, ABRIDGED_BYTES)
    assert_plain(small)
    assert len(encode_event(small, str(STREAM.id))) < LINE_BYTES
    assert small.attributes.keys() == {"a"}


def test_what_is_odd_is_not_remembered() -> None:
    record._places.clear()
    capture(make_record(funcName="ordinary"))
    assert len(record._places) == 1
    for value in ("odd text", "unusable", "odd int", "long text", "numpy-like", "dict", "nan"):
        capture(make_record(funcName=VALUES[value](), lineno=VALUES[value]()))
    assert len(record._places) == 1


# What nobody handles


class _Exit:
    """It ends whoever asks it, as a signal handler does that comes at that moment."""

    def __mul__(self, other: object) -> Any:
        raise SystemExit

    def __float__(self) -> Any:
        raise SystemExit

    __hash__ = __float__  # type: ignore[assignment]


@pytest.mark.parametrize("field", ["created", "levelno", "funcName"])
def test_what_nobody_handles_holds_up_no_other_thread(field: str) -> None:
    said = note(make_record(**{field: _Exit()}))
    numbered_there: list[LogEvent] = []
    thread = threading.Thread(target=lambda: numbered_there.append(numbered(said, STREAM, WRITER, 5, 3)))
    thread.start()
    thread.join()
    (noted,) = numbered_there
    assert_plain(noted)
    # In the main thread it may be a signal, and is nobody's to keep.
    with pytest.raises(SystemExit):
        numbered(said, STREAM, WRITER, 5, 3)


def test_an_ordinary_record_is_as_it_was() -> None:
    noted = numbered_as(make_record("epoch 1", created=1_790_000_000.25, given="x"), {"from": "emit"})
    assert noted[4:] == (
        1_790_000_000_250_000_000,
        20,
        "INFO",
        "epoch 1",
        "train",
        "/code/train.py",
        42,
        "fit",
        None,
        None,
        {"given": "x"},
        {"from": "emit"},
        False,
    )
    assert logging.getLevelName(noted.level) == noted.level_name
