"""Escape sequences of terminals in a text: how to find them, and the text without them."""

from __future__ import annotations

import re

# https://www.ecma-international.org/publications-and-standards/standards/ecma-48/ 5.4 (control sequences) and 5.6
# (control strings, which xterm also ends by BEL). The bounds keep a stray ESC from hiding the text behind it.
ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,8}[@-~]"
    r"|\x1b[\]PX^_][^\x07\x1b\x9c\n]{0,4096}(?:\x07|\x9c|\x1b\\)"
    r"|\x1b[ -/]{0,8}[0-OQ-WYZ\\`-~]"
)
"""One whole escape sequence."""

ESCAPE_OR_STRAY = re.compile(rf"{ESCAPE.pattern}|[\x1b\x9b]")
"""One whole escape sequence, or the beginning of one that does not end."""


def without_escapes(text: str) -> str:
    """Return a text without its escape sequences, such as those for colours."""
    return ESCAPE_OR_STRAY.sub("", text) if "\x1b" in text or "\x9b" in text else text
