"""Records that nobody expects: any attribute of them may be anything."""

from __future__ import annotations

import decimal
import enum
import fractions
import logging
import math
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from hypothesis import strategies as st

from composite_logstore.event import LogEvent
from composite_logstore.plain import MOST_BYTES, MOST_NAME_BYTES


def _raises(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no")


class Unusable:
    """Whatever one asks it, it raises."""

    __str__ = __repr__ = __bool__ = __len__ = __iter__ = __hash__ = __eq__ = __lt__ = _raises  # type: ignore[assignment]
    __int__ = __float__ = __index__ = __mul__ = __rmul__ = __format__ = __getattr__ = _raises  # type: ignore[assignment]

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError("no")


class Nameless(type):
    """A metaclass that has something else for a class's name."""

    __name__ = property(_raises)  # type: ignore[assignment]


class Unnamed(metaclass=Nameless):
    __str__ = __repr__ = _raises  # type: ignore[assignment]


class OddText(str):
    """A text that lies about itself."""

    __str__ = __repr__ = encode = isascii = __format__ = _raises  # type: ignore[assignment]


class OddTextItself(str):
    def __str__(self) -> str:
        return self

    encode = isascii = rstrip = replace = _raises  # type: ignore[assignment]


class UnhashableText(str):
    __hash__ = _raises  # type: ignore[assignment]


class UncomparableText(str):
    __eq__ = _raises  # type: ignore[assignment]

    def __hash__(self) -> int:
        return str.__hash__(self)


class OddInt(int):
    """A number that lies about itself."""

    __int__ = __index__ = __str__ = __repr__ = __format__ = __bool__ = _raises  # type: ignore[assignment]

    def __lt__(self, other: object) -> bool:
        return True

    __le__ = __gt__ = __ge__ = __lt__


class OddFloat(float):
    __float__ = __mul__ = __rmul__ = __lt__ = __ge__ = __round__ = __str__ = _raises  # type: ignore[assignment]


class NumpyLike:
    """As a scalar of an array: a number to those who ask, and of no known type."""

    def __init__(self, value: float) -> None:
        self._value = value

    def __float__(self) -> float:
        return float(self._value)

    def __int__(self) -> int:
        return int(self._value)

    def __index__(self) -> int:
        return int(self._value)

    def __str__(self) -> str:
        return str(self._value)

    def __eq__(self, other: object) -> Any:
        raise ValueError("the truth value of an array with more than one element is ambiguous")

    __hash__ = None  # type: ignore[assignment]


class Colour(enum.Enum):
    RED = 20


class Size(enum.IntEnum):
    LARGE = 20


class Name(str, enum.Enum):
    TRAIN = "train"


class Broken(Mapping[Any, Any]):
    """A mapping that raises in the middle."""

    def __iter__(self) -> Iterator[Any]:
        yield "one"
        raise RuntimeError("no")

    def __getitem__(self, key: Any) -> Any:
        return 1

    def __len__(self) -> int:
        return 2


class Endless(Mapping[Any, Any]):
    """A mapping without an end."""

    def __iter__(self) -> Iterator[Any]:
        number = 0
        while True:
            yield number
            number += 1

    def __getitem__(self, key: Any) -> Any:
        return key

    def __len__(self) -> int:
        return 1 << 40


class EndlessList(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield 1


class Changing(dict[Any, Any]):
    """It changes while one looks."""

    def items(self) -> Any:
        for key in self:
            self[str(len(self))] = 1
            yield key, 1


class OddError(Exception):
    """An exception nothing of which can be read."""

    __str__ = __repr__ = _raises  # type: ignore[assignment]
    args = property(_raises)  # type: ignore[assignment]


class NamelessError(Exception, metaclass=Nameless):
    pass


def _cycle() -> Any:
    cycle: dict[str, Any] = {}
    cycle["self"] = [cycle] * 3
    return cycle


def _deep(depth: int) -> Any:
    value: Any = "the innermost"
    for _ in range(depth):
        value = [value]
    return value


def _raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as raised:
        return raised


def _tangled() -> BaseException:
    error, cause = _raised(ValueError("one")), _raised(KeyError("two"))
    error.__cause__, cause.__context__ = cause, error
    return error


def _as_tuple(error: BaseException) -> tuple[Any, ...]:
    return (type(error), error, error.__traceback__)


VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "true": lambda: True,
    "false": lambda: False,
    "zero": lambda: 0,
    "negative": lambda: -7,
    "64 bits": lambda: (1 << 63) - 1,
    "beyond 64 bits": lambda: 1 << 63,
    "beyond 64 bits, negative": lambda: -(1 << 64),
    "beyond all text": lambda: 10**5000,
    "milliseconds": lambda: 1_790_000_000_000,
    "milliseconds, a float": lambda: 1_790_000_000_123.5,
    "nanoseconds": lambda: 1_790_000_000_123_456_789,
    "before 1970": lambda: -1.5,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "a float": lambda: 20.5,
    "the largest float": lambda: 1.7e308,
    "complex": lambda: 1j,
    "decimal": lambda: decimal.Decimal("1790000000.25"),
    "decimal nan": lambda: decimal.Decimal("sNaN"),
    "fraction": lambda: fractions.Fraction(1, 3),
    "odd int": lambda: OddInt(1 << 70),
    "odd float": lambda: OddFloat(0.5),
    "numpy-like": lambda: NumpyLike(20),
    "numpy-like nan": lambda: NumpyLike(math.nan),
    "enum": lambda: Colour.RED,
    "int enum": lambda: Size.LARGE,
    "text enum": lambda: Name.TRAIN,
    "nothing": lambda: "",
    "text": lambda: "INFO",
    "a number as text": lambda: "20",
    "surrogates": lambda: "a\ud800b\udcff",
    "NUL": lambda: "a\0b",
    "line breaks": lambda: "a\r\nb\u2028c\rd",
    "bidi": lambda: "\u202egnp.exe \U0010ffff \ufffe",
    "long text": lambda: "x" * 100_000,
    "odd text": lambda: OddText("odd"),
    "odd text itself": lambda: OddTextItself("odd \ud800"),
    "unhashable text": lambda: UnhashableText("odd"),
    "uncomparable text": lambda: UncomparableText("train"),
    "bytes": lambda: b"by\xfftes",
    "bytearray": lambda: bytearray(b"by\xff"),
    "memoryview": lambda: memoryview(b"by"),
    "time": lambda: datetime(2026, 1, 2, tzinfo=timezone.utc),
    "tuple": lambda: (1, "two", None),
    "list": lambda: [math.nan, [1 << 64], {}],
    "set": lambda: {1, "two"},
    "deque": lambda: deque([1, 2]),
    "dict": lambda: {1: {"two": (3,)}, "1": 2, None: 4},
    "ordered": lambda: OrderedDict(a=1),
    "mapping proxy": lambda: types.MappingProxyType({"a": 1}),
    "contains itself": _cycle,
    "deep": lambda: _deep(5_000),
    "wide": lambda: list(range(20_000)),
    "broken mapping": Broken,
    "endless mapping": Endless,
    "endless list": lambda: EndlessList([1]),
    "changing mapping": lambda: Changing(a=1),
    "generator": lambda: (number for number in range(3)),
    "type": lambda: int,
    "lambda": lambda: lambda: None,
    "object": object,
    "unusable": Unusable,
    "unnamed": Unnamed,
    "unnamed class": lambda: Unnamed,
    "an exception": lambda: _raised(ValueError("bad")),
    "exc_info": lambda: _as_tuple(_raised(ValueError("bad", 3))),
    "exc_info, tangled": lambda: _as_tuple(_tangled()),
    "exc_info, odd": lambda: _as_tuple(_raised(OddError())),
    "exc_info, nameless": lambda: _as_tuple(_raised(NamelessError("bad"))),
    "exc_info, surrogates": lambda: _as_tuple(_raised(ValueError("\ud800"))),
    "exc_info, without a value": lambda: (ValueError, None, None),
    "exc_info, a class for a value": lambda: (ValueError, ValueError, None),
    "exc_info, no class": lambda: ("ValueError", "bad", "here"),
    "exc_info, unusable": lambda: (Unusable(), Unusable(), Unusable()),
    "exc_info, four of them": lambda: (1, 2, 3, 4),
    "exc_info, empty": lambda: (None, None, None),
}
"""What an attribute of a record may be, each made anew."""

FIELDS = (
    "created",
    "levelno",
    "levelname",
    "name",
    "pathname",
    "lineno",
    "funcName",
    "msg",
    "args",
    "exc_info",
    "given",
    "message",
    "process",
)
"""The attributes of a record; `given` stands for what `extra` brings along."""


class Unreadable(logging.LogRecord):
    """A record that cannot say anything of itself."""

    getMessage = _raises


def make_record(message: str = "hello", **fields: Any) -> logging.LogRecord:
    """Return an ordinary record but for some fields."""
    record = logging.LogRecord("train", logging.INFO, "/code/train.py", 42, message, (), None, "fit")
    record.__dict__.update(fields)
    return record


def without(*fields: str) -> logging.LogRecord:
    """Return a record that lacks some attributes."""
    record = make_record()
    for field in fields:
        record.__dict__.pop(field, None)
    return record


KEYS: dict[str, Callable[[], Any]] = {
    "number": lambda: 1,
    "None": lambda: None,
    "tuple": lambda: (1, 2),
    "bytes": lambda: b"k",
    "nothing": lambda: "",
    "of the record": lambda: "message",
    "dotted": lambda: "a.b",
    "surrogates": lambda: "a\ud800",
    "odd text": lambda: OddText("odd"),
    "text enum": lambda: Name.TRAIN,
    "beyond 64 bits": lambda: 1 << 80,
}
"""What a name of an attribute may be."""

# By name: whoever shows or compares what is drawn would stumble over it.
values = st.sampled_from(sorted(VALUES))
_anything = values.map(lambda name: (VALUES[name],)) | (st.integers() | st.floats() | st.text() | st.binary())


@st.composite
def records(draw: st.DrawFn) -> logging.LogRecord:
    """Any record whatsoever."""

    def make(drawn: Any) -> Any:
        return drawn[0]() if type(drawn) is tuple else drawn

    record = make_record()
    for field, value in draw(st.dictionaries(st.sampled_from(FIELDS), _anything, max_size=4)).items():
        record.__dict__[field] = make(value)
    for key, value in draw(st.dictionaries(st.sampled_from(sorted(KEYS)), _anything, max_size=3)).items():
        record.__dict__[KEYS[key]()] = make(value)
    for field in draw(st.sets(st.sampled_from(FIELDS), max_size=2)):
        record.__dict__.pop(field, None)
    if draw(st.booleans()):
        record.__class__ = Unreadable
    return record


def assert_plain(event: LogEvent) -> None:
    """Check that each field of an event is bounded, and of exactly the type that it is said to be."""
    assert type(event.time_unix_nano) is int
    assert 0 <= event.time_unix_nano < 1 << 63
    assert type(event.level) is int
    assert -(1 << 31) <= event.level < 1 << 31
    assert type(event.line) is int
    assert 0 <= event.line < 1 << 31
    assert type(event.progress) is bool
    for text in (event.level_name, event.logger_name, event.file, event.function):
        _assert_text(text, MOST_NAME_BYTES)
    _assert_text(event.message, MOST_BYTES)
    if event.exception is not None:
        kind, message, stacktrace = event.exception
        _assert_text(kind, MOST_NAME_BYTES)
        _assert_text(message, MOST_BYTES)
        _assert_text(stacktrace, MOST_BYTES)
    if event.trace is not None:
        assert [*map(type, event.trace)] == [int] * 3
        assert 0 < event.trace.trace_id < 1 << 128
        assert 0 < event.trace.span_id < 1 << 64
        assert 0 <= event.trace.flags <= 0xFF
    for mapping in (event.attributes, event.metadata):
        assert type(mapping) is dict
        _assert_value(mapping)
        assert len(str(mapping)) <= 2 * MOST_BYTES


def _assert_text(text: Any, most: int) -> None:
    assert type(text) is str
    assert len(text.encode()) <= most


def _assert_value(value: Any) -> None:
    if type(value) is list:
        for item in value:
            _assert_value(item)
    elif type(value) is dict:
        for key, item in value.items():
            _assert_text(key, MOST_BYTES)
            _assert_value(item)
    elif type(value) is str:
        _assert_text(value, MOST_BYTES)
    elif type(value) is int:
        assert -(1 << 63) <= value < 1 << 63
    else:
        assert value is None or type(value) in (bool, float)
