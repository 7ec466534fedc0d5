"""Texts that may be anybody's, made harmless for a terminal: names, messages, and what backends answer."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

from composite_logstore.plain import name_of, text_of

INDENT = "    "
"""What the further lines of a text begin with, so that none passes for the first line of another one."""

# https://www.ecma-international.org/publications-and-standards/standards/ecma-48/ 8.3.117, Select Graphic Rendition
_COLOUR = re.compile(r"(\x1b\[[0-9;:]*m)")
_NO_COLOUR = "\x1b[0m"

_MOST_CHARACTERS = 2_000


def inert(text: str, kept: str = "\n") -> str:
    """Return a text with what a terminal or a browser would obey escaped, and what nobody would see.

    That is control characters, escape sequences begin with one; what changes the direction of writing; what takes no
    room; and surrogates that are alone.

    Args:
        text: The text.
        kept: Which of these characters are left. Without line breaks it is one line.
    """
    if text.isprintable():
        return text
    return "".join(one if _is_shown(one) or one in kept else _escaped(one) for one in text)


def message_of(error: BaseException) -> str:
    """Return an error's message on one line that no terminal obeys: a backend's answer may be part of it.

    An error may repeat a whole request, so only its beginning counts. Never raises, even if `str(error)` does.
    """
    return inert(text_of(error)[:_MOST_CHARACTERS], "")


def described(error: BaseException) -> str:
    """Return an error's type and message, such as `ValueError: no such index`. Never raises."""
    return f"{name_of(type(error))}: {message_of(error)}"


def paragraph(text: str, colours: bool = False) -> str:
    """Return a text of several lines, such as a traceback, that is inert, with all lines but the first indented.

    Args:
        text: The text. Tabs stay tabs.
        colours: Whether to leave in what sets colours and the like, which ends with the text.
    """
    text = text.replace("\r\n", "\n").removesuffix("\n")
    if colours:
        # The separators are at the odd places.
        parts = _COLOUR.split(text)
        text = "".join(part if place % 2 else inert(part, "\n\t") for place, part in enumerate(parts))
        text += _NO_COLOUR if len(parts) > 1 else ""
    else:
        text = inert(text, "\n\t")
    return text.replace("\n", f"\n{INDENT}")


def inert_json(value: Any) -> str:
    """Return a value as JSON on one line, which says the same, with such characters escaped as JSON does it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isprintable() else "".join(one if _is_shown(one) else json.dumps(one)[1:-1] for one in text)


def _is_shown(one: str) -> bool:
    # Python calls only the plain space printable, of all that separate words.
    return one.isprintable() or unicodedata.category(one) == "Zs"


def _escaped(one: str) -> str:
    return one.encode("unicode_escape").decode()
