"""Line breaks between words, where a terminal would break a line in the middle of one."""

from __future__ import annotations

import re

# A command for people to copy begins a line, or ends one after a colon.
_COPIED = re.compile(r"(^|: +) *(composite-logstore|zenml|pip|python) ")
# A word of a sentence, or a command in it.
_PART = re.compile(r"(?:`[^`]*`|[^ ])+")


def fill(text: str, columns: int) -> str:
    """Return a text whose lines fit a terminal, as far as words and commands allow.

    A command that people copy stays whole: a line that contains one after a colon, or one in backticks. So do words
    that are longer than a line.

    Args:
        text: The text.
        columns: The width of the terminal.
    """
    # For a help text, which needs none of this, Rich takes too long to import.
    from rich.cells import cell_len

    lines: list[str] = []
    for line in text.split("\n"):
        if cell_len(line) <= columns or _COPIED.search(line):
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip(" "))]
        parts = iter(_PART.findall(line))
        lines.append(indent + next(parts, ""))
        for part in parts:
            if cell_len(f"{lines[-1]} {part}") > columns:
                lines.append(indent + part)
            else:
                lines[-1] += f" {part}"
    return "\n".join(lines)
