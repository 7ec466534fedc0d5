"""Names with wildcards: `*` stands for any characters, `?` for one."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import translate
from functools import lru_cache


@lru_cache(maxsize=1_000)
def wildcard(pattern: str) -> Callable[[str], object]:
    """Return a function that says whether a text is as the pattern says, upper and lower case told apart."""
    if "*" not in pattern and "?" not in pattern:
        return pattern.__eq__
    # Brackets are no wildcards.
    return re.compile(translate(pattern.replace("[", "[[]"))).match
