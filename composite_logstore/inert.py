"""Makes texts from untrusted sources harmless for a terminal: names, messages, and answers of backends."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

from composite_logstore.plain import name_of, text_of

INDENT = "    "
"""The beginning of each further line of a text, so that none looks like the first line of another text."""

# https://www.ecma-international.org/publications-and-standards/standards/ecma-48/ 8.3.117, Select Graphic Rendition
_COLOUR = re.compile(r"(\x1b\[[0-9;:]*m)")
_NO_COLOUR = "\x1b[0m"

_MOST_CHARACTERS = 2_000


class InertError(Exception):
    """An error whose text is harmless for a terminal: `str()` returns its message as a `paragraph`.

    Attributes:
        message: The message as it was given, to become part of another text that is made inert as a whole.
    """

    def __init__(self, message: str) -> None:
        super().__init__(paragraph(message))
        self.message = message


def inert(text: str, kept: str = "\n") -> str:
    """Return a text with all characters escaped that a terminal would obey, or not show.

    These are control characters, which also begin escape sequences; characters that change the direction of writing;
    characters without width; and lone surrogates.

    Args:
        text: The text.
        kept: Those of these characters that stay. Without a line break among them the result is one line.
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
    """Return a text of several lines, such as a traceback, inert, and indented from its second line on.

    Args:
        text: The text. Tabs stay tabs.
        colours: Whether to keep escape sequences for colours. They are reset at the end of the text.
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
    """Return a value as JSON on one line, with such characters escaped as JSON escapes them."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isprintable() else "".join(one if _is_shown(one) else json.dumps(one)[1:-1] for one in text)


def _is_shown(one: str) -> bool:
    # Of all separators of words, Python counts only the plain space as printable.
    return one.isprintable() or unicodedata.category(one) == "Zs"


def _escaped(one: str) -> str:
    return one.encode("unicode_escape").decode()
