"""Values and texts that every backend can encode, and how many bytes they take."""

from __future__ import annotations

import reprlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, repeat
from typing import Any, TypeAlias

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""A value that every backend can encode."""

MOST_BYTES = 16 * 1024 * 1024
"""The most bytes of each text of an event, and of its attributes together. Longer ones are shortened, with a mark."""

_INT64 = 1 << 63
_DEEPEST = 8
_MOST_VALUES = 10_000
# What an attribute counts besides its text, and a value within one, so that their number has a bound, too.
_VALUE_BYTES = 64
_ITEM_BYTES = 8
_ABBREVIATED = reprlib.Repr()
_ABBREVIATED.maxlevel = 2
_MARK = "… [shortened by {} bytes]"


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
        if isinstance(value, bytes):
            return bytes.decode(value, "utf-8", "backslashreplace")
        if isinstance(value, bytearray):
            return bytearray.decode(value, "utf-8", "backslashreplace")
        is_mapping = isinstance(value, Mapping)
        if not is_mapping and not isinstance(value, list | tuple | set | frozenset | deque):
            return text_of(value)
        if depth == _DEEPEST:
            return _unicode(_ABBREVIATED.repr(value))
        room = room or repeat(None, _MOST_VALUES)
        # The iterator may be endless.
        items = list(islice(value.items() if is_mapping else value, _MOST_VALUES + 1))
        taken = [item for _, item in zip(room, items, strict=False)]
        mark = f"… [shortened by {max(len(items), len(value)) - len(taken)} values]"
        if is_mapping:
            mapping = {text_of(key): plain(item, depth + 1, room) for key, item in taken}
            return mapping if len(taken) == len(items) else {**mapping, "…": mark}
        sequence = [plain(item, depth + 1, room) for item in taken]
        return sequence if len(taken) == len(items) else [*sequence, mark]
    except Exception:
        # Even `isinstance` may raise: for a proxy outside of its context, say.
        return text_of(value)


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
