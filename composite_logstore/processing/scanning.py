"""Many expressions at once: whether one of them matches in a text, and which ones may."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

_CACHE_BYTES = 64 * 1024**2
"""The most bytes that a scan may take while it searches. Beyond that it is slower, but finds the same."""


def any_of(patterns: Sequence[str]) -> Any:
    """Return one expression that matches wherever one of some valid patterns does. It has no groups."""
    import re2

    return re2.compile("|".join(f"(?:{pattern})" for pattern in patterns), _options(never_capture=True))


def which_of(patterns: Sequence[str]) -> Callable[[str], Iterable[int]]:
    """Return a function that says in one scan which of some valid patterns may match in a text, by their places."""
    import re2

    every = range(len(patterns))
    if not patterns:
        return lambda text: every
    one = re2.Set.SearchSet(_options())
    for pattern in patterns:
        one.Add(pattern)
    one.Compile()

    def which(text: str) -> Iterable[int]:
        # Without enough memory a set finds nothing, in silence, unlike an expression: then any of them may match.
        return cast("list[int]", one.Match(text)) or every

    return which


def literally(text: str) -> str:
    """Return a pattern that matches nothing but this text."""
    import re2

    return cast(str, re2.escape(text))


def _options(never_capture: bool = False) -> Any:
    import re2

    options = re2.Options()
    options.max_mem = _CACHE_BYTES
    options.never_capture = never_capture
    # It would write them to stderr.
    options.log_errors = False
    return options
