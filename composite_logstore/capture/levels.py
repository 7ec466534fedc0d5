"""Finds the level that a printed text names: loggers that print write it into each line."""

from __future__ import annotations

import logging
import re
from typing import Literal

LOOKED_AT_CHARACTERS = 2_000
"""How many characters of a text are looked at: numbering events must not take long, however long a line is."""

# A level stands near the beginning of a line, behind a time and some names.
_HEAD_CHARACTERS = 300

_NUMBERS = {
    **dict.fromkeys(("TRACE", "VERBOSE", "FINE", "DEBUG"), logging.DEBUG),
    **dict.fromkeys(("INFO", "INFORMATION", "NOTICE", "SUCCESS"), logging.INFO),
    **dict.fromkeys(("WARN", "WARNING"), logging.WARNING),
    **dict.fromkeys(("ERR", "ERROR", "SEVERE"), logging.ERROR),
    **dict.fromkeys(("CRIT", "CRITICAL", "FATAL", "PANIC", "ALERT", "EMERG", "EMERGENCY"), logging.CRITICAL),
}
_PYTHON_NAMES = {0: "NOTSET", 10: "DEBUG", 20: "INFO", 30: "WARNING", 40: "ERROR", 50: "CRITICAL"}
_LETTERS = {"D": logging.DEBUG, "I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}

# None of these patterns takes more than one pass over a text: neighbouring repetitions never match the same character.
_STYLE = re.compile(r"\x1b\[[0-9;:]*[A-Za-z]")
# The process that wrote the line, as its launcher names it: `(Actor pid=123) …` of Ray, `[rank0]: …` of torchrun.
_SOURCE = re.compile(r"(?:\((?:[^()]* )?pid=\d[^()]*\)|\[[a-z]*\d+\]:) *")
# glog, Abseil, klog and PyTorch: `I0131 12:30:00.000000 …`, `I20260131 12:30:00.000000 …`, `[W socket.cpp:464] …`.
_GLOG = re.compile(r"\[?([DIWEF])(?:\d{4}(?:\d{4})? \d\d:\d\d:\d\d|(?= [\w./-]+:\d+\] ))")
# TensorFlow: `2026-01-31 12:30:00.000000: I tensorflow/…`.
_TENSORFLOW = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: ([IWEF]) ")
_PAIR = re.compile(r"(?:^|[\s{,])(?:level|levelname|lvl|severity|log\.level)=[\"']?(\w+)")
# Names are parts of longer words, as in `test_INFO` or `error-rate`, so the characters around a level count, too.
_NAME = re.compile(rf"(?<![\w.\-/])(?:{'|'.join(sorted(_NUMBERS, key=len, reverse=True))})(?![\w./])", re.IGNORECASE)
_RAISED = re.compile(r"([\w.]+)(?::|$)")
_WARNED = re.compile(r":\d+: \w*Warning: ")
_CRASHED = re.compile(r"(?:Fatal Python error|Segmentation fault|terminate called)")
# A level's name between these is one in small letters, too: `| info |`, `[info ]`, `file.c:3: error: …`.
_AROUND_ANY = {("[", "]"), ("|", "|"), ("<", ">"), ("(", ")"), (":", ":")}
_MOST_WORDS = 4
_TRACEBACK = "Traceback (most recent call last):"
_EXCEPTION_IN = re.compile(r"Exception (?:in thread|ignored in)")

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[{}\[\]:,]|[^\s"{}\[\]:,]+', re.DOTALL)
_KEYS = {("level",), ("levelname",), ("severity",), ("severitytext",), ("lvl",), ("log.level",), ("log", "level")}
# loguru's own JSON, with `serialize=True`.
_KEYS |= {("record", "level", "name")}
_DEEPEST = 3


def level_of_stderr(text: str, setting: int | Literal["detect"]) -> tuple[int, str]:
    """Return the number and the name of the level of a text that was printed to stderr.

    Args:
        text: The text.
        setting: The log store's `stderr_level`: a level's number, or `detect`.
    """
    level = detect_level(text) if setting == "detect" else setting
    return level, _PYTHON_NAMES[level]


def detect_level(text: str) -> int:
    """Return the level of a printed text: the one that it names, ERROR for a traceback, INFO for anything else.

    Most of what programs print to stderr is no error: progress bars, notes and the lines of loggers. So text that
    names no level counts as INFO.

    Args:
        text: A line, or several that belong together: the first one names the level.
    """
    text = text[:LOOKED_AT_CHARACTERS].lstrip()
    if "\x1b" in text:
        text = _STYLE.sub("", text).lstrip()
    level = _in_json(text) if text.startswith("{") else _in_line(text.partition("\n")[0][:_HEAD_CHARACTERS])
    if level is not None:
        return level
    return logging.ERROR if _TRACEBACK in text else logging.INFO


def _in_line(line: str) -> int | None:
    """Return the level that a line names, None if it names none."""
    if source := _SOURCE.match(line):
        line = line[source.end() :]
    if match := _GLOG.match(line) or _TENSORFLOW.match(line):
        return _LETTERS[match[1]]
    if (match := _PAIR.search(line)) and match[1].upper() in _NUMBERS:
        return _NUMBERS[match[1].upper()]
    for match in _NAME.finditer(line):
        if _is_label(match[0], line[: match.start()], line[match.end() :]):
            return _NUMBERS[match[0].upper()]
    raised = match[1] if (match := _RAISED.match(line)) else ""
    if raised.endswith("Warning") or _WARNED.search(line):
        return logging.WARNING
    if _CRASHED.match(line):
        return logging.CRITICAL
    if raised.endswith(("Error", "Exception", "Interrupt")) or _EXCEPTION_IN.match(line):
        return logging.ERROR
    return None


def _is_label(name: str, before: str, after: str) -> bool:
    """Return whether a level's name labels the line, given the text around it. A sentence may contain the word, too."""
    opening, closing = before.rstrip(), after.lstrip()
    if not any(map(str.isalnum, opening)):
        # It begins the line. A name in small letters may also be the first word of a sentence.
        return name.isupper() or closing.startswith((":", "|", "]", "!"))
    if (opening[-1], closing[:1]) in _AROUND_ANY:
        return True
    if not name.isupper():
        return False
    if opening[-1] in "-:|[],;" and closing[:1] in ("-", ":", "|", "[", "]", ",", ";"):
        return True
    words = opening.split()
    if (len(words) == 1 and opening[-1] in ":]") or words[-1] == "NCCL":
        # `wandb: WARNING …`, `[trainer] WARNING …`, `[12:30:00] WARNING …`, `node1:12:34 [0] NCCL WARN …`.
        return True
    # Behind a time and at most one other word: `2026-01-31 12:30:00,000 trainer WARNING …`.
    others = [word for word in words if not word.lstrip("[(")[:1].isdigit()]
    return ":" in opening and len(words) <= _MOST_WORDS and words[0] not in others and len(others) <= 1


def _in_json(text: str) -> int | None:
    """Return the level that a JSON object names, of which `text` may be only the beginning; None if it names none."""
    path: list[str] = []
    key = ""
    is_value = False
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in "{[":
            if is_value or path or token == "[":
                path.append(key if token == "{" else "[")
            key, is_value = "", False
        elif token in "}]":
            if not path:
                return None
            path.pop()
            is_value = False
        elif token == ":":
            is_value = True
        elif token == ",":
            is_value = False
        elif is_value:
            if len(path) < _DEEPEST and (*path, key) in _KEYS and (level := _named(token)) is not None:
                return level
            is_value = False
        else:
            key = token.strip('"').lower()
    return None


def _named(value: str) -> int | None:
    """Return the level of a JSON value: a name, or a number in Python's scale."""
    name = value.strip('"')
    if name.isascii() and name.isdigit() and len(name) <= 2:
        return int(name) // 10 * 10 if logging.DEBUG <= int(name) < logging.CRITICAL + 10 else None
    return _NUMBERS.get(name.upper())
