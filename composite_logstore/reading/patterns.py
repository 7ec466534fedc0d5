"""Texts in queries, as backends that are written in Go take them."""

from __future__ import annotations

import json
import re


def quoted_text(text: str) -> str:
    """Return a text as LogQL and LogsQL have it: quoted by the rules of Go, which are those of JSON here."""
    return json.dumps(text.encode("utf-8", "replace").decode(), ensure_ascii=False)


def re2_pattern(text: str) -> str:
    """Return a regular expression of RE2 for texts that have this one in them, whatever its case, and for few others.

    Args:
        text: A text as in `Query.search`.
    """
    # The lower case of İ is two characters long, and so no case of i to RE2.
    return "(?i)" + re.sub("[iI]", "[iİ]", re.escape(text))
