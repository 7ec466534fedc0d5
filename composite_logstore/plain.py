"""Values and texts that every backend can encode, and how many bytes they take.

`composite-logstore run` loads this module into processes of any environment: to import it takes the standard library
alone, of any Python from 3.7 on.
"""

from __future__ import annotations

import reprlib
import sys
import traceback
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from itertools import islice, repeat
from math import isfinite
from operator import index
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import TypeAlias

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""A value that every backend can encode."""

MOST_BYTES = 16 * 1024 * 1024
"""The most bytes of each text of an event, and of its attributes together. Longer ones are shortened, with a mark."""

MOST_NAME_BYTES = 4096
"""The most bytes of each text that says where a record comes from: its level's name, logger, file and function."""

LOWEST_LEVEL, HIGHEST_LEVEL = -(1 << 31), (1 << 31) - 1
"""The bounds of a record's level."""

_INT64 = 1 << 63
_DEEPEST = 8
_MOST_VALUES = 10_000
# What an attribute counts besides its text, and a value within one, so that their number has a bound, too.
_VALUE_BYTES = 64
_ITEM_BYTES = 8
_MOST_EXCEPTIONS = 1_000
_ABBREVIATED = reprlib.Repr()
_ABBREVIATED.maxlevel = 2
_MARK = "… [shortened by {} bytes]"

_KEPT_BYTES = 10_000
"""The least bytes that a text of an entry that is too large keeps, before another text is shortened."""

# https://opentelemetry.io/docs/specs/otel/common/mapping-to-non-otlp/#dropped-attributes-count
_LEFT_OUT = "otel.dropped_attributes_count"


def plain_mapping(values: Mapping[Any, Any]) -> dict[str, Plain]:
    """Return the mapping with text as keys and values that every backend can encode. Never raises.

    Keys and values together have at most `MOST_BYTES`: beyond that the largest values are shortened first.

    Args:
        values: The mapping. Another thread may change it meanwhile. Anything but a mapping counts as an empty one.
    """
    return sized_mapping(values)[0]


def sized_mapping(values: Mapping[Any, Any]) -> tuple[dict[str, Plain], int]:
    """Return the result of `plain_mapping`, and roughly how many bytes it takes."""
    mapping: dict[str, Plain] = {}
    size = 0
    is_nested = False
    for key, value in _items(values):
        if type(key) is not str or not key.isascii():
            key = text_of(key)
        kind = type(value)
        if kind is str:
            if not value.isascii():
                value = _unicode(value)
            size += len(value)
        elif not (value is None or kind is float or kind is bool or (kind is int and -_INT64 <= value < _INT64)):
            value = plain(value)
            size += _characters(value)
            is_nested = True
        size += len(key)
        mapping[key] = value
    size += _VALUE_BYTES * len(mapping)
    if size > MOST_BYTES:
        return _shortened(mapping, MOST_BYTES), MOST_BYTES
    return mapping, bytes_of(mapping) if is_nested else size


def _items(values: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    try:
        if type(values) is dict:
            # One C call: another thread cannot change the dictionary in the middle of it.
            return list(values.items())
        return list(islice(values.items(), MOST_BYTES // _VALUE_BYTES))
    except Exception:
        return []


def fitting(mapping: Mapping[str, Plain], most_bytes: int) -> Mapping[str, Plain]:
    """Return a mapping shortened to so many bytes, or the mapping itself if it fits."""
    return _shortened(mapping, most_bytes) if _characters(dict(mapping)) > most_bytes else mapping


def _characters(value: Plain) -> int:
    """Return about how many characters a value has, nested ones included."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(map(_characters, value)) + _ITEM_BYTES * len(value)
    if isinstance(value, dict):
        return sum(map(len, value)) + sum(map(_characters, value.values())) + _ITEM_BYTES * len(value)
    return 0


def _shortened(mapping: Mapping[str, Plain], most_bytes: int) -> dict[str, Plain]:
    """Return a mapping shortened to so many bytes: each value may use the share that smaller ones leave unused."""
    kept = dict(islice(mapping.items(), most_bytes // (2 * _VALUE_BYTES)))
    room = most_bytes - _VALUE_BYTES * len(kept)
    fitting: dict[str, tuple[str, Plain]] = {}
    sizes = sorted((len(name) + _characters(value), name) for name, value in kept.items())
    for place, (size, name) in enumerate(sizes):
        share = room // (len(kept) - place)
        value = kept[name]
        fitting[name] = name, value
        if size > share:
            short = shorten(name, share // 2)
            text = shorten(value if isinstance(value, str) else str(value), share - len(short))
            fitting[name] = short, text
            size = len(short) + len(text)
        room -= size
    shortened = dict(fitting[name] for name in kept)
    if len(mapping) > len(kept):
        shortened["…"] = f"… [shortened by {len(mapping) - len(kept)} values]"
    return shortened


def plain(value: Any, depth: int = 0, room: Iterator[None] | None = None) -> Plain:
    """Return the value, or the nearest one that every backend can encode. Never raises.

    Integers beyond 64 bits become text, since OTLP cannot hold them. Objects of unknown types become their `str`.
    Objects may refer to each other without end: values nested deeper than 8 levels are abbreviated, and after
    10,000 values a mark says how many are left out.

    Args:
        value: The value.
        depth: How deep it is nested.
        room: Yields one item for each value that the result may still have.
    """
    try:
        # A subclass may override `__str__`, `__int__` and so on with anything.
        if isinstance(value, str):
            return _unicode(str(value.value) if hasattr(value, "value") else str(value))
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            number = int.__add__(value, 0)
            return number if -_INT64 <= number < _INT64 else text_of(number)
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, (bytes, bytearray)):
            return str(value, "utf-8", "backslashreplace")
        if isinstance(value, Decimal):
            return _number_of(value)
        if _has_no_dimension(value):
            return _item_of(value)
        is_mapping = isinstance(value, Mapping)
        if not is_mapping and not isinstance(value, (list, tuple, set, frozenset, deque)):
            return text_of(value)
        if depth == _DEEPEST:
            return _unicode(_ABBREVIATED.repr(value))
        room = room or repeat(None, _MOST_VALUES)
        # The iterator may be endless.
        items = list(islice(value.items() if is_mapping else value, _MOST_VALUES + 1))
        # The container takes room, too: one that contains itself many times would otherwise have thousands of them.
        taken = items[: sum(1 for _ in islice(room, len(items) + 1))]
        mark = f"… [shortened by {max(len(items), len(value)) - len(taken)} values]"
        if is_mapping:
            mapping = {text_of(key): plain(item, depth + 1, room) for key, item in taken}
            return mapping if len(taken) == len(items) else {**mapping, "…": mark}
        sequence = [plain(item, depth + 1, room) for item in taken]
        return sequence if len(taken) == len(items) else [*sequence, mark]
    except Exception:
        # Even `isinstance` may raise: for a proxy outside of its context, say.
        return text_of(value)


def whole(value: Any, lowest: int, highest: int) -> int:
    """Return a number as a plain integer within bounds, 0 if it is not a number. Never raises."""
    if type(value) is int and lowest <= value <= highest:
        return value
    try:
        number = int(value) if isinstance(value, float) else index(value)
        # A subclass may override `__int__` with anything.
        return max(lowest, min(int.__add__(number, 0), highest))
    except Exception:
        return 0


def _number_of(value: Decimal) -> float | str:
    """Return a decimal as a number if that shows the same digits, and as text otherwise.

    No backend has decimals. 0.1 as a binary number still reads 0.1, but more than 17 digits would be lost.
    """
    text = Decimal.__str__(value)
    if not Decimal.is_finite(value):
        return text
    number = float(text)
    return number if isfinite(number) and Decimal(repr(number)) == value else text


def _has_no_dimension(value: Any) -> bool:
    """Return whether a value is a scalar of an array library: of NumPy, PyTorch, JAX, TensorFlow and others.

    None of them is imported for it. They share the properties `ndim` and `shape`.
    """
    ndim = getattr(value, "ndim", None)
    if type(ndim) is int:
        return ndim == 0
    shape = getattr(value, "shape", None)
    return isinstance(shape, tuple) and not len(shape)


def _item_of(value: Any) -> Plain:
    """Return the number in a scalar of an array library, or its text if it holds none.

    A tensor on a GPU waits for its computation here, as it would for its `str`.
    """
    try:
        # TensorFlow's tensors have no `item`, but the scalars of NumPy that they become.
        item = value.item() if hasattr(value, "item") else value.numpy().item()
    except Exception:
        item = None
    return plain(item) if type(item) in _NUMBERS else text_of(value)


_NUMBERS = {bool, int, float}


def text_of(value: Any) -> str:
    """Return the `str` of a value, as text that every backend can encode. Never raises."""
    if type(value) is str and value.isascii():
        return value
    try:
        return _unicode(str(value))
    except Exception:
        return f"<{name_of(type(value))}>"


def name_of(kind: type) -> str:
    """Return a class's name, even where its metaclass overrides `__name__`."""
    return _unicode(_name_of(kind))


_name_of: Callable[[type], str] = vars(type)["__name__"].__get__


def plain_exception(exc_info: Any) -> tuple[str, str, str] | None:
    """Return the type, the message and the stack trace of a record's exception, None if there is none. Never raises.

    Args:
        exc_info: The record's `exc_info`: a tuple, an exception, or anything else for the exception that is being
            handled.
    """
    try:
        if isinstance(exc_info, BaseException):
            exc_info = (type(exc_info), exc_info, None)
        kind, value, _ = exc_info if isinstance(exc_info, tuple) else sys.exc_info()
    except Exception:
        return "Exception", "", ""
    if kind is None:
        return None
    message = ""
    with suppress(Exception):
        # ZenML's and OpenTelemetry's handlers, too, take the first argument for the message.
        message = text_of(value.args[0]) if value is not None and value.args else ""
    return (
        (isinstance(kind, type) and shorten(name_of(kind), MOST_NAME_BYTES)) or "Exception",
        shorten(message, MOST_BYTES),
        shorten(_stacktrace(kind, value), MOST_BYTES),
    )


def _stacktrace(kind: Any, value: Any) -> str:
    trace = None
    with suppress(Exception):
        trace = None if value is None else value.__traceback__
        if _are_few(value):
            return text_of("".join(traceback.format_exception(kind, value, trace)))
    # Python formats groups within groups recursively, and one that is in several groups once for each.
    with suppress(Exception):
        lines = traceback.format_tb(trace)
        return text_of("".join(lines) + f"{name_of(kind)}: {text_of(value)}\n… [shortened by the exceptions within]")
    return ""


def _are_few(error: BaseException | None) -> bool:
    """Return whether an exception and those that it contains, follows, or is caused by, are few enough to be shown."""
    chained: set[int] = set()
    waiting = [error]
    for _ in range(_MOST_EXCEPTIONS):
        if not waiting:
            return True
        error = waiting.pop()
        within = getattr(error, "exceptions", None)
        if isinstance(within, tuple):
            waiting.extend(islice(within, _MOST_EXCEPTIONS))
        for other in (getattr(error, "__cause__", None), getattr(error, "__context__", None)):
            if other is not None and id(other) not in chained:
                chained.add(id(other))
                waiting.append(other)
    return False


def _unicode(text: str) -> str:
    """Return the text without lone surrogates, which neither JSON nor protobuf can hold."""
    if type(text) is not str:
        # A subclass may override any method.
        text = "".join((text,))
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def shorten(text: str, max_bytes: int) -> str:
    """Cut a text that is too long for a backend, with a mark that says by how much.

    Args:
        text: The text.
        max_bytes: The most bytes of UTF-8 that the result may have.

    Returns:
        The text itself, if it fits.
    """
    if len(text) * 4 <= max_bytes:
        return text
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return text
    # The mark's own length depends on the number in it, so leave room for the longest.
    room = max(0, max_bytes - len(_MARK.format(len(encoded)).encode()))
    kept = encoded[:room].decode("utf-8", "ignore")
    mark = _MARK.format(len(encoded) - len(kept.encode()))
    # Where the whole mark does not fit either, its beginning has to do.
    return (kept + mark).encode()[:max_bytes].decode("utf-8", "ignore")


def shorten_in_json(value: Any, max_bytes: int) -> str:
    """Return a value as a text that takes at most so many bytes in JSON, with the mark of `shorten` if it is cut.

    Args:
        value: A text, or another value that JSON can express.
        max_bytes: The most bytes, with the quotes: at least 2.
    """
    import orjson

    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    most = room = max(0, max_bytes - 2)
    while True:
        cut = shorten(text, room)
        size = len(orjson.dumps(cut)) - 2
        if size <= most:
            return cut
        # In JSON a character takes up to six times as many bytes, so the length has to be found by trying.
        room = room * most // size


def shorten_fields(fields: dict[str, Any], max_bytes: int, indispensable: Container[str]) -> bytes:
    """Return a backend's entry for an event, encoded, and shortened until it is small enough.

    The message is shortened first, then the stack trace, then the largest of the other texts. If that is not enough,
    the largest attributes are left out, and counted in one of their own.

    Args:
        fields: The entry, which is changed. It has attributes beside `message`.
        max_bytes: The most bytes of the entry as JSON.
        indispensable: The names that it keeps however large it is.
    """
    import orjson

    names = {key: len(orjson.dumps(key)) + 2 for key in fields}
    sizes = {key: names[key] + len(orjson.dumps(value)) for key, value in fields.items()}
    excess = sum(sizes.values()) + 1 - max_bytes
    by_size = sorted(sizes, key=lambda key: sizes[key], reverse=True)
    for key in ["message", "exception.stacktrace", *by_size]:
        size = sizes.get(key, 0)
        if excess > 0 and size > _KEPT_BYTES:
            fields[key] = shorten_in_json(fields[key], max(_KEPT_BYTES, size - excess) - names[key])
            sizes[key] = names[key] + len(orjson.dumps(fields[key]))
            excess -= size - sizes[key]
    if excess > 0:
        # Still too large: there are very many attributes, or very long names.
        count = len(fields)
        excess += len(_LEFT_OUT) + 16
        for key in by_size:
            if excess > 0 and key not in indispensable:
                del fields[key]
                excess -= sizes[key]
        fields[_LEFT_OUT] = count - len(fields)
    return orjson.dumps(fields)


def bytes_of(value: Any) -> int:
    """Return roughly how many bytes a value takes in memory, nested ones included."""
    size = 0
    # Not recursive: a value that another program has written may be nested deeper than Python can recur.
    waiting = [value]
    while waiting:
        value = waiting.pop()
        size += sys.getsizeof(value)
        if type(value) is dict:
            size += sum(map(sys.getsizeof, value))
            value = value.values()
        elif type(value) not in _NESTING:
            continue
        if _NESTING.isdisjoint(map(type, value)):
            size += sum(map(sys.getsizeof, value))
        else:
            waiting.extend(value)
    return size


_NESTING = {dict, list, tuple}
