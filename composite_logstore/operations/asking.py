"""Asks children whether they hold anything of a stream, within a bounded time and without repeating the question."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from composite_logstore import secret_references
from composite_logstore.backend import PageRequest
from composite_logstore.child_config import ChildConfig

if TYPE_CHECKING:
    from zenml.models import LogsResponse

ANSWER_SECONDS = 10.0
"""How long children that are asked at the same time may take to show their first entry, in seconds."""


class Answer(NamedTuple):
    """What a child says about a stream.

    Attributes:
        holds: Whether it holds an entry of the stream.
        trouble: Why it cannot be read, empty if it can.
    """

    holds: bool = False
    trouble: str = ""


def ask(children: Sequence[ChildConfig], logs: LogsResponse, seconds: float | None = None) -> dict[str, Answer]:
    """Ask children at the same time for one entry of a stream.

    Args:
        children: The children.
        logs: The stream.
        seconds: How long they may take; `ANSWER_SECONDS` if not given.

    Returns:
        A child's name → its answer.
    """
    seconds = ANSWER_SECONDS if seconds is None else seconds
    late = Answer(trouble=f"it has not answered within {seconds:g} s")
    answers = dict.fromkeys((child.name for child in children), late)

    def note(child: ChildConfig) -> None:
        answers[child.name] = _answer(child, logs)

    # A backend that hangs cannot be interrupted.
    asking = [
        threading.Thread(target=note, args=(child,), name=f"composite-logstore ask {child.name}", daemon=True)
        for child in children
    ]
    for one in asking:
        one.start()
    ends = time.monotonic() + seconds
    for one in asking:
        one.join(max(0.0, ends - time.monotonic()))
    return dict(answers)


def _answer(child: ChildConfig, logs: LogsResponse) -> Answer:
    from zenml.exceptions import DoesNotExistException

    from composite_logstore.parity.scan import is_foreseen
    from composite_logstore.zenml import LogsEntriesFilter, LogStoreRateLimitError

    try:
        with closing(secret_references.resolve(child).create_reader()) as reader:
            return Answer(bool(reader.read(PageRequest(logs, "older", None, 1, LogsEntriesFilter())).entries))
    except (DoesNotExistException, LogStoreRateLimitError):
        # The backend is there.
        return Answer()
    except Exception as error:
        return Answer(trouble=str(error) if is_foreseen(error) else f"its reader raised {type(error).__name__}")
