"""The reader of log stores that are registered in ZenML: what it makes of tokens and of what they raise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from composite_logstore import PageRequest
from composite_logstore.testing import make_logs, make_stream
from composite_logstore.zenml import LogEntry, LogsEntriesFilter, LogsEntriesResponse, LogStoreUnavailableError
from composite_logstore_component import reader as reader_module
from composite_logstore_component.reader import ComponentReader


class Other:
    """A log store that looks at nothing closely."""

    name, flavor, id = "other", "own", uuid4()

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.tokens: list[Any] = []

    def fetch(self, logs: Any, **arguments: Any) -> LogsEntriesResponse:
        self.tokens.append(arguments.get("before") or arguments.get("after"))
        if self.error is not None:
            raise self.error
        return LogsEntriesResponse(items=[LogEntry(message=str(number)) for number in range(5)])

    def cleanup(self) -> None:
        """Close nothing."""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Other:
    store = Other()
    monkeypatch.setattr(reader_module, "find", lambda name: SimpleNamespace(id=uuid4(), name=name))
    monkeypatch.setattr(reader_module, "load", lambda model: store)
    monkeypatch.setattr(reader_module, "as_its_own", lambda logs, store: logs)
    return store


def read(token: str | None, limit: int = 2) -> list[str]:
    request = PageRequest(make_logs(make_stream()), "older", token, limit, LogsEntriesFilter())
    return [read.entry.message for read in ComponentReader("other").read(request).entries]


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("x"), AttributeError("x"), IndexError("x"), ZeroDivisionError("x")]
)
def test_a_token_that_a_log_store_can_make_nothing_of_is_the_callers_mistake(store: Other, error: Exception) -> None:
    """It is none of the backend's: for that every page would fall back for half a minute."""
    store.error = error
    with pytest.raises(ValueError, match=r"'other'.*Begin anew"):
        read("forged")
    with pytest.raises(LogStoreUnavailableError):
        read(None)


@pytest.mark.parametrize("error", [OSError("x"), ConnectionError("x"), LogStoreUnavailableError("x")])
def test_a_log_store_that_is_away_is_away_with_a_token_too(store: Other, error: Exception) -> None:
    store.error = error
    for token in (None, "token"):
        with pytest.raises(LogStoreUnavailableError):
            read(token)


@pytest.mark.parametrize("token", ["", "x", "-1", "1.5", "\u0661", "1" * 10, "9" * 5_000, "1\n", " 1", "None"])
def test_a_place_in_a_log_store_of_artifacts_is_a_number(
    store: Other, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setattr(reader_module, "extends_artifact", lambda store: True)
    with pytest.raises(ValueError, match="malformed"):
        read(token)
    assert store.tokens == []
    assert read("3") == ["1", "2"]
    assert read("999999999") == ["3", "4"]
