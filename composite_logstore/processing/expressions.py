"""Regular expressions whose time grows only with the length of a text, whatever the expression and the text are.

They are those of RE2 (https://github.com/google/re2/wiki/Syntax), which knows neither look-around nor back-references:
these are what makes other engines backtrack. A timeout would bound them too, but then it would depend on how busy the
machine is whether an event matches, and a comparison could not tell which events a child should have.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

MOST_CHARACTERS = 1_000
"""How long an expression may be."""

_CACHE_BYTES = 16 * 1024**2
"""How many bytes an expression, or all of a set, may take while it searches. Beyond that it is slower."""

_CACHE_BYTES_OF_ANY = 64 * 1024**2
"""The same for one expression that stands for many: it searches every text."""

_LOOK_AROUND = ("(?=", "(?!", "(?<=", "(?<!")


class ExpressionSet:
    """Some expressions that search a text together: ten take hardly longer than one."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """Compile the expressions.

        Raises:
            ValueError: One of them is not valid.
        """
        import re2

        self._each = [compiled(pattern) for pattern in patterns]
        self._set: Any = re2.Set.SearchSet(_options())
        try:
            # The last one matches every text. So if none is found, the set has no memory left, which it says nowhere.
            for pattern in (*patterns, ""):
                self._set.Add(pattern)
            self._set.Compile()
        except re2.error:
            # Together they are too large.
            self._set = None

    def matching(self, text: str) -> Sequence[int]:
        """Return the places, from 0, of the expressions that match somewhere in a text."""
        found: list[int] = self._set.Match(text) if self._set is not None else []
        if found:
            found.remove(len(self._each))
            return found
        # Alone, an expression needs less memory, and does without if there is none.
        return [place for place, one in enumerate(self._each) if one.search(text)]


def any_of(patterns: Sequence[str]) -> Any:
    """Return one expression that matches wherever one of some valid patterns does. It has no groups."""
    import re2

    options = _options()
    options.max_mem = _CACHE_BYTES_OF_ANY
    options.never_capture = True
    return re2.compile("|".join(f"(?:{pattern})" for pattern in patterns), options)


def literally(text: str) -> str:
    """Return a pattern that matches nothing but this text."""
    import re2

    return cast(str, re2.escape(text))


@lru_cache(maxsize=1_000)
def compiled(pattern: str) -> Any:
    """Return an expression, compiled: an object with the methods of one of the standard library.

    Raises:
        ValueError: It is not valid. The message begins with `is ` and says where the mistake is, but repeats nothing of
            the expression, which may contain a secret.
    """
    import re2

    if len(pattern) > MOST_CHARACTERS:
        raise ValueError(f"is longer than {MOST_CHARACTERS:,} characters; split it into several expressions")
    try:
        return re2.compile(pattern, _options())
    except UnicodeEncodeError as error:
        where = f"at position {error.start + 1}"
        raise ValueError(f"is not a valid regular expression {where}: a character is no Unicode") from None
    except re2.error as error:
        raise ValueError(_mistake_in(pattern, error)) from None


def _options() -> Any:
    import re2

    options = re2.Options()
    # It would write them to stderr.
    options.log_errors = False
    options.max_mem = _CACHE_BYTES
    return options


def _mistake_in(pattern: str, error: Exception) -> str:
    said = error.args[0] if error.args else ""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    why, _, fragment = text.partition(": ")
    place = pattern.find(fragment) if fragment else -1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except re.error as other:
        # The standard library says more exactly where it is, but does not know all escapes, such as `\pL`.
        is_of_re2 = other.msg.startswith("bad escape \\") and not (
            why.startswith("invalid") and pattern.startswith(fragment, other.pos or 0)
        )
        if not is_of_re2:
            why, place = other.msg, place if other.pos is None else other.pos
    except (OverflowError, RecursionError):
        pass
    if fragment.startswith(_LOOK_AROUND) or (fragment[:1] == "\\" and fragment[1:2].isdigit()):
        why = "look-around and back-references are not supported, since they can take for ever"
    elif why.startswith("invalid repetition size"):
        why = "an expression may be repeated 1,000 times at most"
    elif why.startswith("pattern too large"):
        return "is too large; repeat less in it, or split it into several expressions"
    where = f" at position {place + 1}" if place >= 0 else ""
    return f"is not a valid regular expression{where}: {why}"
