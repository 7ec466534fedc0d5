"""Reads settings from a file of JSON or YAML."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from composite_logstore.catalog.errors import ArgumentError
from composite_logstore.settings_text import parse_settings

_MOST_BYTES = 1024**2


def read_settings(file: str) -> Any:
    """Return the settings in a file: of YAML if its name ends with `.yaml` or `.yml`, or else of JSON.

    Args:
        file: The file; `-` for stdin, where settings that begin with no bracket are YAML.

    Raises:
        ArgumentError: The file cannot be read.
        ValueError: It is not valid JSON or YAML. The message names the place but nothing of the content.
    """
    try:
        if file == "-":
            content = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            with Path(file).open("rb") as opened:
                content = opened.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ArgumentError("file", f"'{file}' cannot be read: {error.strerror or error}") from None
    if len(content) > _MOST_BYTES:
        raise ArgumentError("file", f"'{file}' has more than {_MOST_BYTES:,} bytes; give a file of settings")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is no UTF-8") from None
    is_yaml = file.lower().endswith((".yaml", ".yml")) or (file == "-" and text.lstrip()[:1] not in ("[", "{"))
    return parse_settings(text, is_yaml)
