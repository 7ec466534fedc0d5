"""What is compared of two events, and in which fields they differ.

A child may show an event with parts of it masked. Then a text differs from another only if nothing that could have been
masked makes them equal: what is between the masks has to be there, in the same order. So a comparison needs to know no
secret, and neither takes a masked value for a difference nor overlooks one beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from composite_logstore.backend import BACKFILLED
from composite_logstore.event import LogEvent, shown_fields, stripped
from composite_logstore.plain import Plain
from composite_logstore.processing.redaction import REDACTED, Pieces
from composite_logstore.processing.repeats import REPEATED

_SHOWN = ("sequence", "message", "level", "logger", "time", "file", "line")
_WHOLE = (*_SHOWN, "time", "level", "level", "message", "function", "exception", "trace", "attributes")


class Seen(NamedTuple):
    """An event as a child shows it.

    Attributes:
        event: The event.
        pieces: Returns the pieces of a text of it between which something is masked.
    """

    event: LogEvent
    pieces: Pieces


def shown(event: LogEvent | None) -> tuple[Any, ...]:
    """Return the fields of an event that every reader shows."""
    if event is None:
        return ()
    place = event.time_unix_nano, event.file, event.line
    return shown_fields(event.sequence, event.text, event.level, event.logger_name, *place)


def _shown(event: LogEvent, with_escapes: bool) -> tuple[Any, ...]:
    sequence, text, *others = shown(event)
    return (sequence, event.text if with_escapes else text, *others)


def _whole(event: LogEvent, with_escapes: bool = False) -> tuple[Any, ...]:
    """Return all fields of an event, for children that share a format. The last one is a dictionary."""
    plain = event if with_escapes else stripped(event)
    attributes = {**event.attributes, **event.metadata}
    for own in (BACKFILLED, REPEATED, REDACTED):
        attributes.pop(own, None)
    return (
        *_shown(event, with_escapes),
        event.time_unix_nano,
        event.level,
        event.level_name,
        plain.message,
        event.function,
        plain.exception,
        event.trace,
        attributes,
    )


def hash_of(event: LogEvent, is_raw: bool) -> int:
    """Return the same number for events that differ in no field.

    Args:
        event: The event.
        is_raw: Whether all its fields count, and not only those that every reader shows.
    """
    if not is_raw:
        return hash(shown(event))
    *fields, attributes = _whole(event)
    return hash((*fields, repr(sorted(attributes.items()))))


def differing(one: Seen, other: Seen, is_raw: bool) -> list[str]:
    """Return the names of the fields in which two events differ otherwise than by what is masked in them.

    Args:
        one: An event.
        other: The same event, as another child shows it.
        is_raw: Whether all fields count, and not only those that every reader shows.
    """
    differ = _differing(one, other, is_raw, with_escapes=False)
    # A part of an escape sequence may be masked, which is none any more then.
    return differ if differ and _differing(one, other, is_raw, with_escapes=True) else []


def _differing(one: Seen, other: Seen, is_raw: bool, with_escapes: bool) -> list[str]:
    fields = _whole if is_raw else _shown
    pairs = zip(
        _WHOLE if is_raw else _SHOWN, fields(one.event, with_escapes), fields(other.event, with_escapes), strict=True
    )
    return list(
        dict.fromkeys(name for name, left, right in pairs if not _may_be_same(left, right, one.pieces, other.pieces))
    )


def _may_be_same(
    left: Plain | Sequence[Plain], right: Plain | Sequence[Plain], of_left: Pieces, of_right: Pieces
) -> bool:
    """Return whether two values were the same before something was masked in them."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return _may_be_same_mapping(left, right, of_left, of_right)
    if isinstance(left, str) and isinstance(right, str):
        return left == right or _fit(of_left(left), of_right(right))
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        return all(_may_be_same(one, other, of_left, of_right) for one, other in zip(left, right, strict=True))
    # A number in which something was masked is a text.
    if isinstance(left, str) and _is_number(right):
        return len(pieces := of_left(left)) > 1 and _fit(pieces, [str(right)])
    if isinstance(right, str) and _is_number(left):
        return len(pieces := of_right(right)) > 1 and _fit(pieces, [str(left)])
    return repr(left) == repr(right)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _may_be_same_mapping(
    left: Mapping[str, Plain], right: Mapping[str, Plain], of_left: Pieces, of_right: Pieces
) -> bool:
    if len(left) != len(right):
        return False
    if not all(_may_be_same(left[name], right[name], of_left, of_right) for name in left if name in right):
        return False
    # Names may be masked, too.
    others = [name for name in right if name not in left]
    for name in left:
        if name in right:
            continue
        for other in others:
            is_name = _is_name(of_left(name), of_right(other))
            if is_name and _may_be_same(left[name], right[other], of_left, of_right):
                others.remove(other)
                break
        else:
            return False
    return True


def _is_name(left: Sequence[str], right: Sequence[str]) -> bool:
    """Return whether two names fit. Where two would be the same when masked, one of them got `_` at its end."""
    if _fit(left, right):
        return True
    ends = [*left[:-1], left[-1].rstrip("_")], [*right[:-1], right[-1].rstrip("_")]
    return len(left) + len(right) > 2 and _fit(*ends)


def _fit(left: Sequence[str], right: Sequence[str]) -> bool:
    """Return whether some text has both the pieces of `left` and those of `right`, with anything in between.

    One piece alone is the whole text.
    """
    if len(left) == 1:
        return _has(right, left[0])
    if len(right) == 1:
        return _has(left, right[0])
    # What is between the ends of one may have been masked in the other.
    begins = left[0].startswith(right[0]) or right[0].startswith(left[0])
    return begins and (left[-1].endswith(right[-1]) or right[-1].endswith(left[-1]))


def _has(pieces: Sequence[str], text: str) -> bool:
    """Return whether a text has these pieces, with anything in between."""
    if len(pieces) == 1:
        return pieces[0] == text
    begin, *between, end = pieces
    position, last = len(begin), len(text) - len(end)
    if position > last or not text.startswith(begin) or not text.endswith(end):
        return False
    for piece in between:
        position = text.find(piece, position, last)
        if position < 0:
            return False
        position += len(piece)
    return True
