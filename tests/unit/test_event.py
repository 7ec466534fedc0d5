from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from unittest.mock import MagicMock
from uuid import UUID

import numpy as np
import orjson
import pytest
import structlog
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from composite_logstore.plain import plain
from tests.events import capture, make_capture, make_events, make_stream

try:
    from opentelemetry.instrumentation.logging.handler import std_to_otel
except ModuleNotFoundError:
    # Where it was before.
    from opentelemetry.sdk._logs._internal import std_to_otel


def record(message: Any = "hello", *args: Any, name: str = "train", **changes: Any) -> logging.LogRecord:
    made = logging.LogRecord(name, logging.INFO, "/code/train.py", 42, message, args, None, "fit")
    for key, value in changes.items():
        setattr(made, key, value)
    return made


def test_a_record_is_taken_down_with_its_place_and_its_own_time() -> None:
    captured = capture(record("loss %.2f", 0.5, created=1_790_000_000.25))
    assert captured.message == "loss 0.50"
    assert (captured.file, captured.line, captured.function) == ("/code/train.py", 42, "fit")
    assert (captured.logger_name, captured.level, captured.level_name) == ("train", 20, "INFO")
    assert captured.time_unix_nano == 1_790_000_000_250_000_000


def test_later_changes_of_what_was_logged_do_not_reach_the_event() -> None:
    state = {"step": 1}
    captured = capture(record(state=state))
    state["step"] = 2
    assert captured.attributes == {"state": {"step": 1}}


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("message", "args", "expected"),
    [
        ("%d items", ("many",), "%d items ('many',)"),
        ("%s %s", ("one",), "%s %s ('one',)"),
        ({"a": 1}, (), "{'a': 1}"),
        (None, (), "None"),
        (Unprintable(), (), "<Unprintable> ()"),
        ("a\ud800b", (), "a?b"),
        ("nul \0 and \x1b[31mred\x1b[0m", (), "nul \0 and \x1b[31mred\x1b[0m"),
        ("ünï 🎉", (), "ünï 🎉"),
    ],
)
def test_whatever_the_message_is_it_becomes_text(message: Any, args: tuple[Any, ...], expected: str) -> None:
    captured = capture(record(message, *args))
    assert captured.message == expected
    captured.message.encode()


def test_a_message_of_5_mb_is_taken_down_whole() -> None:
    assert len(capture(record("x" * 5_000_000)).message) == 5_000_000


def test_a_record_without_anything_is_taken_down_too() -> None:
    taken = capture(logging.makeLogRecord({}))
    assert (taken.level, taken.message, taken.logger_name) == (0, "", "")


@pytest.mark.parametrize(
    ("printed", "is_update"),
    [("\r 10%|#   |", True), ("epoch 3\r", True), ("\x1b[2K\r 3/10", True), ("done\r\n", False), ("a\r\nb", False)],
)
def test_a_carriage_return_on_stdout_or_stderr_is_a_progress_bars_update(printed: str, is_update: bool) -> None:
    record = logging.LogRecord("stderr", logging.ERROR, "", 0, printed, (), None)
    assert capture(record).progress is is_update
    assert not capture(logging.LogRecord("train", logging.INFO, "/code/train.py", 1, printed, (), None)).progress


def test_the_end_of_a_printed_line_is_not_part_of_the_message() -> None:
    printed = logging.LogRecord("stdout", logging.INFO, "", 0, "\r 50%|█████  |\n", (), None, "")
    assert capture(printed).message == "\r 50%|█████  |"
    assert capture(record("ends in a newline\n")).message == "ends in a newline\n"


def test_a_source_file_with_an_odd_name_does_not_make_the_event_undeliverable() -> None:
    captured = capture(record(name="log\udcff", pathname="/code/\udcff.py", funcName="f\udcff"))
    for text in (captured.logger_name, captured.file, captured.function):
        text.encode()


class Homeless:
    """As a proxy of a request, or of a context, outside of it."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError("there is no context")


class Valueless(str):
    @property
    def value(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, True),
        (7, 7),
        (2**80, str(2**80)),
        (-(2**63), -(2**63)),
        (0.25, 0.25),
        ("text", "text"),
        ("lone \udcff", "lone ?"),
        (None, None),
        (b"by\xfftes", "by\\xfftes"),
        ((1, "a", None), [1, "a", None]),
        ({1: {2: object}}, {"1": {"2": "<class 'object'>"}}),
        (UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (Unprintable(), "<Unprintable>"),
        (Valueless("text"), "text"),
        (logging.INFO, 20),
    ],
)
def test_extra_attributes_become_values_that_every_backend_can_encode(value: Any, expected: Any) -> None:
    attributes = capture(record(given=value)).attributes
    assert attributes == {"given": expected}
    assert orjson.loads(orjson.dumps(attributes)) == {"given": expected}


class Tensor:
    """As the scalars of PyTorch and JAX (`item`) and of TensorFlow (`numpy`)."""

    def __init__(self, item: Any, ndim: Any = 0, way: str = "item") -> None:
        self.ndim = ndim
        self._item = item
        setattr(self, way, self._get)

    def _get(self) -> Any:
        if isinstance(self._item, BaseException):
            raise self._item
        return self._item

    def __str__(self) -> str:
        return "a tensor"


class Shaped:
    """A scalar of a library that tells its shape alone."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape

    def item(self) -> float:
        return 0.5

    def __str__(self) -> str:
        return "shaped"


NUMBERS = [
    (np.float32(0.5), 0.5),
    (np.float64(0.1), 0.1),
    (np.float16(2), 2.0),
    (np.int8(-3), -3),
    (np.int64(2**62), 2**62),
    (np.uint64(2**63), str(2**63)),
    (np.bool_(True), True),
    (np.array(7), 7),
    (np.longdouble(0.5), "0.5"),
    (np.complex64(1 + 2j), "(1+2j)"),
    (np.datetime64("2026-01-31"), "2026-01-31"),
    (np.str_("text"), "text"),
    (np.array([1]), "[1]"),
    (Tensor(0.25), 0.25),
    (Tensor(np.float32(0.25), way="numpy"), 0.25),
    (Tensor(3, ndim=1), "a tensor"),
    (Tensor(3, ndim=False), "a tensor"),
    (Shaped(()), 0.5),
    (Shaped((2,)), "shaped"),
    (Shaped(None), "shaped"),
    (Tensor(RuntimeError("CUDA error")), "a tensor"),
    (Tensor(["not", "a", "number"]), "a tensor"),
    (Tensor(Tensor(1)), "a tensor"),
    (MagicMock(__str__=lambda self: "a mock"), "a mock"),
    (Decimal("0.1"), 0.1),
    (Decimal("10.00"), 10.0),
    (Decimal("-0.5"), -0.5),
    (Decimal("1E+3"), 1000.0),
    (Decimal("0.1234567890123456789"), "0.1234567890123456789"),
    (Decimal("12345678901234567890"), "12345678901234567890"),
    (Decimal("1E+999999999"), "1E+999999999"),
    (Decimal("1E-999999999"), "1E-999999999"),
    (Decimal("NaN"), "NaN"),
    (Decimal("sNaN"), "sNaN"),
    (Decimal("-Infinity"), "-Infinity"),
]


@pytest.mark.parametrize(("value", "expected"), NUMBERS)
def test_the_numbers_of_other_libraries_stay_numbers(value: Any, expected: Any) -> None:
    attributes = capture(record(given=value, nested={"in": [value]})).attributes
    assert attributes == {"given": expected, "nested": {"in": [expected]}}
    assert type(attributes["given"]) is type(expected)
    assert orjson.loads(orjson.dumps(attributes)) == attributes


def test_the_number_is_that_of_the_moment() -> None:
    loss = np.zeros(())
    captured = capture(record(loss=loss))
    loss += 1
    assert captured.attributes == {"loss": 0.0}


def test_no_array_library_is_imported_to_recognize_its_numbers() -> None:
    program = "import composite_logstore, composite_logstore.capture.record, sys; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


class TestStructlog:
    @pytest.fixture(autouse=True)
    def _records(self) -> Iterator[None]:
        records: list[logging.LogRecord] = []

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                records.append(record)

        logger = logging.getLogger("test_event.structlog")
        logger.propagate = False
        logger.setLevel(logging.DEBUG)
        handler = Handler()
        logger.addHandler(handler)
        self._logger, self._taken = logger, records
        yield
        logger.removeHandler(handler)

    def _bound(self, *processors: Any) -> Any:
        return structlog.wrap_logger(
            self._logger,
            processors=processors,
            wrapper_class=structlog.stdlib.BoundLogger,
            cache_logger_on_first_use=False,
        )

    @pytest.mark.parametrize(
        "renderer", [structlog.stdlib.ProcessorFormatter.wrap_for_formatter, structlog.stdlib.render_to_log_kwargs]
    )
    def test_an_event_dictionary_becomes_a_message_and_attributes(self, renderer: Any) -> None:
        self._bound(structlog.stdlib.add_log_level, renderer).warning("epoch done", epoch=3, loss=np.float32(0.5))
        captured = capture(self._taken[0])
        assert (captured.message, captured.level) == ("epoch done", logging.WARNING)
        assert captured.attributes == {"epoch": 3, "loss": 0.5, "level": "warning"}
        assert captured.logger_name == "test_event.structlog"

    @pytest.mark.parametrize(
        "renderer", [structlog.stdlib.ProcessorFormatter.wrap_for_formatter, structlog.stdlib.render_to_log_kwargs]
    )
    def test_its_exception_is_the_events(self, renderer: Any) -> None:
        bound = self._bound(renderer)
        try:
            raise ValueError("bad")
        except ValueError:
            bound.exception("failed", step=1)
            captured = capture(self._taken[0])
        assert captured.exception is not None
        assert captured.exception[:2] == ("ValueError", "bad")
        assert captured.attributes == {"step": 1}

    def test_an_event_that_is_no_text_becomes_text(self) -> None:
        self._bound(structlog.stdlib.ProcessorFormatter.wrap_for_formatter).info(Unprintable())
        assert capture(self._taken[0]).message == "<Unprintable>"

    def test_a_dictionary_without_structlog_is_a_message_as_before(self) -> None:
        self._logger.info({"event": "x", "_name": 1}, extra={"_name": "mine"})
        captured = capture(self._taken[0])
        assert (captured.message, captured.attributes) == ("{'event': 'x', '_name': 1}", {"_name": "mine"})


def test_an_attribute_whose_very_type_cannot_be_asked_for_is_no_obstacle() -> None:
    assert "Homeless" in str(capture(record(given=Homeless())).attributes["given"])


@pytest.mark.parametrize("times", [1, 30])
def test_an_attribute_that_contains_itself_ends(times: int) -> None:
    loop: list[Any] = []
    loop.extend([loop] * times)
    graph: dict[str, Any] = {}
    graph.update({f"edge {number}": graph for number in range(times)})
    for endless in (loop, graph):
        assert len(orjson.dumps(plain(endless))) < 5_000_000


def test_what_is_nested_too_deep_is_abbreviated() -> None:
    value: Any = ["the innermost"]
    for _ in range(8):
        value = [value]
    flat = plain(value)
    for _ in range(8):
        assert isinstance(flat, list)
        (flat,) = flat
    assert flat == "['the innermost']"


@pytest.mark.parametrize(
    ("value", "mark"),
    [
        (list(range(10_000)), None),
        (list(range(10_001)), "… [shortened by 1 values]"),
        ({str(number): number for number in range(10_005)}, "… [shortened by 5 values]"),
    ],
)
def test_an_attribute_of_very_many_values_is_shortened_with_a_mark(value: Any, mark: str | None) -> None:
    taken = plain(value)
    if mark is None:
        assert taken == value
    elif isinstance(taken, list):
        assert taken == [*range(10_000), mark]
    else:
        assert taken == {**{str(number): number for number in range(10_000)}, "…": mark}


@pytest.mark.parametrize("created", [float("nan"), float("inf"), None])
def test_a_record_without_a_time_has_that_of_now(created: Any) -> None:
    before = time.time_ns()
    assert before <= capture(record(created=created)).time_unix_nano <= time.time_ns()


def test_an_exception_that_is_false_is_one() -> None:
    class NoErrors(ValueError):
        def __len__(self) -> int:
            return 0

    try:
        raise NoErrors("none of them")
    except NoErrors:
        captured = capture(record("failed", exc_info=sys.exc_info()))
    assert captured.exception is not None
    assert captured.exception[:2] == ("NoErrors", "none of them")
    assert "test_event.py" in captured.exception.stacktrace


def test_an_exception_is_taken_down_as_text() -> None:
    try:
        raise ValueError("bad value", 3)
    except ValueError:
        captured = capture(record("failed", exc_info=sys.exc_info()))
    assert captured.exception is not None
    assert (captured.exception.type, captured.exception.message) == ("ValueError", "bad value")
    assert captured.exception.stacktrace.startswith("Traceback (most recent call last):")
    assert "raise ValueError" in captured.exception.stacktrace


@pytest.mark.parametrize("exc_info", [True, (None, None, None), ("x",), (ValueError, None, None)])
def test_odd_exception_information_does_no_harm(exc_info: Any) -> None:
    capture(record("failed", exc_info=exc_info))


def test_the_current_span_is_noted() -> None:
    assert capture(record()).trace is None
    with TracerProvider().get_tracer("t").start_as_current_span("s") as span:
        captured = capture(record())
    context = span.get_span_context()
    assert captured.trace == (context.trace_id, context.span_id, context.trace_flags)
    assert trace.get_current_span().get_span_context() is not context


def test_uids_are_version_8_uuids_that_differ_by_writer_and_number() -> None:
    events = make_events(["a", "b"]) + make_events(["a"], writer="f" * 15) + make_events(["z"], first=2**61)
    uids = [UUID(event.uid) for event in events]
    assert len(set(uids)) == 4
    assert all(uid.variant == "specified in RFC 4122" and uid.version == 8 for uid in uids)


def test_the_streams_attributes_are_those_of_the_moment_they_are_read() -> None:
    stream = make_stream()
    assert "zenml.step.run.name" not in stream.attributes
    stream.metadata["zenml.step.run.name"] = "trainer"
    assert stream.attributes["zenml.step.run.name"] == "trainer"


def test_details_carry_opentelemetrys_names_and_what_was_given_to_emit_wins() -> None:
    captured = make_capture()._replace(attributes={"epoch": 3, "zenml.event.type": "x"})
    event = make_events(["m"])[0]._replace(attributes=captured.attributes, metadata={"zenml.event.type": "exception"})
    assert event.details == {
        "epoch": 3,
        "code.file.path": "/code/train.py",
        "code.line.number": 42,
        "code.function.name": "fit",
        "zenml.event.type": "exception",
    }


def test_a_level_for_which_opentelemetry_has_no_number_is_an_attribute() -> None:
    [event] = make_events(["m"], level=9)
    assert event.details == {**make_events(["m"])[0].details, "zenml.log.level": 9}
    assert not event.is_ordinary


@pytest.mark.parametrize("level", [0, 5, 10, 13, 19, 20, 25, 30, 39, 40, 45, 50, 53, 54, 90])
def test_severity_numbers_are_those_of_opentelemetrys_own_handler(level: int) -> None:
    event = make_events(["m"])[0]._replace(level=level)
    assert event.severity_number == std_to_otel(level).value


def test_severity_texts_are_those_that_zenml_writes() -> None:
    texts = [make_events(["m"])[0]._replace(level_name=name).severity_text for name in ("INFO", "WARNING", "CRITICAL")]
    assert texts == ["INFO", "WARN", "FATAL"]
