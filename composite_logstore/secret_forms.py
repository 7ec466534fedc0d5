"""The forms in which a log or an answer may show a secret."""

from __future__ import annotations

import json
import re
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator
from urllib.parse import quote, quote_plus

SHORTEST = 6
"""The fewest characters of a secret that is looked for: a shorter one would mask half of each log."""

LONGEST = 64 * 1024
"""The most characters of a secret that is looked for as a whole."""

_HEX = re.compile("%[0-9A-F]{2}")


def forms(value: str) -> Iterator[str]:
    """Yield the forms of a secret's value: as it is, escaped, encoded for a URL, in base64, and line by line."""
    lines = [line.strip() for line in value.splitlines()]
    if len(lines) > 1:
        yield from (line for line in lines if SHORTEST <= len(line) <= LONGEST)
    if len(value) > LONGEST:
        return
    yield value
    encoded = value.encode("utf-8", "replace")
    for escaped in (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]):
        yield escaped
        # As pandas writes it.
        yield escaped.replace("/", "\\/")
    yield repr(value)[1:-1]
    yield repr(encoded)[2:-1]
    for quoted in (quote(value, safe=""), quote(value), quote_plus(value)):
        yield quoted
        yield _HEX.sub(lambda found: found[0].lower(), quoted)
    yield from _in_base64(encoded)


def _in_base64(value: bytes) -> Iterator[str]:
    """Yield what base64 shows of a value, wherever the value begins among the encoded bytes, such as `user:value`."""
    for before in range(3):
        for encode in (b64encode, urlsafe_b64encode):
            encoded = encode(bytes(before) + value).decode().rstrip("=")
            # The characters at both ends also depend on the bytes beside the value.
            begin = (0, 2, 3)[before]
            end = len(encoded) - (1 if (before + len(value)) % 3 else 0)
            if end - begin >= SHORTEST:
                yield encoded[begin:end]
