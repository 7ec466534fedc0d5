"""What agents have done for a living process's events: the file `account` in the process's folder.

It is one line, as `format` describes it, with a value for each child:

    {"account": 1, "children": {"a": {"since": 0, "before": 512, "state": "healthy", "delivered": 512, ...}}}

The agent that delivers the folder's events replaces the file, in one step. A file that is damaged or has an impossible
value counts as missing: the next agent counts anew, and notes from which event on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from composite_logstore.event import HIGHEST
from composite_logstore.plain import shorten
from composite_logstore.spool.format import POSITION, decode_line, encode_line, position_name
from composite_logstore.spool.private_folder import PrivateFolder

ACCOUNT = "account"
NEW_ACCOUNT = "account.new"
_FORMAT = 1
_MOST_BYTES = 1 << 20
_MOST_CHILDREN = 100
_MOST_REASONS = 100
_MOST_TEXT_BYTES = 500
_STATES = ("healthy", "retrying", "unavailable")


class ChildAccount(NamedTuple):
    """What agents have done for one child, of the events with numbers from `since` on and below `before`.

    Attributes:
        since: The number of the event with which the counts begin.
        before: The child has acknowledged all events below this number.
        state: `healthy`, `retrying` or `unavailable`.
        delivered: Events that the backend has taken.
        rejected: Events that the backend refused for good.
        rejected_not_kept: Those of them that are not kept on disk.
        dropped: Events that were lost before the backend answered.
        withheld: Events that the child's settings keep from its backend.
        shortened: Delivered events that the exporter had to shorten.
        rejected_reasons: A reason → how many events were rejected for it.
        withheld_reasons: A reason → how many events were withheld for it.
        redacted: The name of a redaction → how many events it has changed.
        last_error: The last problem, None if there was none.
    """

    since: int
    before: int
    state: str
    delivered: int
    rejected: int
    rejected_not_kept: int
    dropped: int
    withheld: int
    shortened: int
    rejected_reasons: dict[str, int]
    withheld_reasons: dict[str, int]
    redacted: dict[str, int]
    last_error: str | None


_COUNTS = ("rejected_reasons", "withheld_reasons", "redacted")
_NUMBERS = [name for name in ChildAccount._fields if name not in (*_COUNTS, "state", "last_error")]


def write_account(folder: PrivateFolder, account: Mapping[str, ChildAccount]) -> None:
    """Replace the account of a folder, in one step.

    Args:
        folder: The process's folder.
        account: A child's name → what agents have done for it.

    Raises:
        OSError: It cannot be written now.
    """
    children = {name: _bounded(child)._asdict() for name, child in account.items()}
    folder.make_way(NEW_ACCOUNT)
    with os.fdopen(folder.create_file(NEW_ACCOUNT), "wb") as file:
        file.write(encode_line(orjson.dumps({"account": _FORMAT, "children": children})))
    folder.put(NEW_ACCOUNT, ACCOUNT)


def _bounded(child: ChildAccount) -> ChildAccount:
    return child._replace(
        rejected_reasons=_shortened(child.rejected_reasons),
        withheld_reasons=_shortened(child.withheld_reasons),
        redacted=_shortened(child.redacted),
        last_error=child.last_error and shorten(child.last_error, _MOST_TEXT_BYTES),
    )


def _shortened(counts: Mapping[str, int]) -> dict[str, int]:
    shortened: dict[str, int] = {}
    for text, count in counts.items():
        key = shorten(text, _MOST_TEXT_BYTES)
        shortened[key] = shortened.get(key, 0) + count
    return shortened


def read_account(folder: PrivateFolder) -> dict[str, ChildAccount]:
    """Return the account of a folder: a child's name → what agents have done for it. Nothing if there is no valid one.

    Raises:
        OSError: The folder cannot be read now.
    """
    try:
        with os.fdopen(folder.open_file(ACCOUNT, os.O_RDONLY), "rb") as file:
            value = decode_line(file.read(_MOST_BYTES))
    except (FileNotFoundError, PermissionError):
        return {}
    children = value.get("children") if isinstance(value, dict) and value.get("account") == _FORMAT else None
    if not isinstance(children, dict) or len(children) > _MOST_CHILDREN:
        return {}
    found = {name: _decoded(child) for name, child in children.items() if POSITION.fullmatch(position_name(name))}
    return {name: child for name, child in found.items() if child is not None}


def _decoded(value: Any) -> ChildAccount | None:
    if not isinstance(value, dict) or value.keys() != {*ChildAccount._fields}:
        return None
    child = ChildAccount(**value)
    is_valid = (
        all(type(number) is int and 0 <= number <= HIGHEST for number in map(value.get, _NUMBERS))
        and all(_are_counts(value[name]) for name in _COUNTS)
        and child.state in _STATES
        and (child.last_error is None or type(child.last_error) is str)
        and child.rejected_not_kept <= child.rejected == sum(child.rejected_reasons.values())
        and child.withheld == sum(child.withheld_reasons.values())
    )
    return child if is_valid else None


def _are_counts(value: Any) -> bool:
    return (
        type(value) is dict
        and len(value) <= _MOST_REASONS
        and all(type(count) is int and 0 <= count <= HIGHEST for count in value.values())
    )
