"""Whatever Datadog's search answers, a page is what can be shown of it, or an error of the backend's."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal
from uuid import UUID

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zenml.utils.time_utils import utc_now

from composite_logstore import Bounds, HttpResponse, PageRequest
from composite_logstore.zenml import LogsEntriesFilter, LogStoreError, make_logs
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_datadog.reader import DatadogReader

CONFIG = DatadogChildConfig(name="live", type="datadog", api_key="test-key", application_key="test-application-key")
LOGS = make_logs(UUID(int=7, version=4), "step", utc_now())

LIMITS = [0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 10**11, 4e15, 1e308, -1e308]
TEXTS = [
    "",
    "9" * 4_000,
    "9" * 5_000,
    "-1",
    "nan",
    "inf",
    "1e999",
    "\x1b]0;x\x07",
    "2026-01-01T00:00:00Z",
    "0001-01-01",
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.sampled_from(LIMITS)
    | st.sampled_from(TEXTS)
    | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.just(orjson.Fragment(b"[" * 500 + b"]" * 500))
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def mostly(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(usual, usual, usual, ANYTHING)


def fields(**usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """An object that lacks any of its fields, or has anything in their place."""
    return mostly(st.fixed_dictionaries({}, optional={name: mostly(value) for name, value in usual.items()}))


TIMES = st.sampled_from(["2026-09-21T12:00:00.000Z", "2026-09-21T12:00:00.001Z"])
ATTRIBUTES = fields(
    otel=fields(timestamp=st.integers(0, 2**62).map(str)),
    log=fields(record=fields(uid=st.uuids().map(str))),
    zenml=fields(log=fields(writer=st.sampled_from(["a" * 15, "b" * 15]), sequence=st.integers(0, 5))),
    code=fields(file=fields(path=st.text()), line=fields(number=st.integers()), function=fields(name=st.text())),
    exception=fields(type=st.text(), message=st.text(), stacktrace=st.text()),
    logger=fields(name=st.text()),
    timestamp=TIMES,
)
LOG = fields(
    id=st.text(), attributes=fields(message=st.text(), status=st.text(), timestamp=TIMES, attributes=ATTRIBUTES)
)
ANSWER = fields(
    data=st.lists(LOG, max_size=6),
    meta=fields(
        status=st.sampled_from(["done", "timeout"]),
        page=fields(after=st.sampled_from(["c1", "c2", "c3"])),
        warnings=st.just([]),
    ),
)


class Server:
    """Stands where the HTTP client is, and answers anything, in turn."""

    def __init__(self, answers: list[HttpResponse]) -> None:
        self.answers = answers
        self.requests = 0

    def request(self, method: str, url: str, **_: Any) -> HttpResponse:
        self.requests += 1
        return self.answers[self.requests % len(self.answers)]

    def close(self) -> None:
        """Close nothing."""


def encoded(answer: Any) -> bytes:
    try:
        return orjson.dumps(answer)
    except TypeError:
        # Numbers beyond 64 bits, which another encoder would take.
        return b"{}"


HEADERS = st.fixed_dictionaries(
    {},
    optional={name: st.sampled_from([*TEXTS, "7", "\u0663", "1.5"]) for name in ("Retry-After", "X-RateLimit-Reset")},
)
ANSWERS = st.builds(
    HttpResponse,
    st.sampled_from([200] * 8 + [429, 503, 400]),
    HEADERS,
    ANSWER.map(encoded) | st.binary(max_size=20),
    st.sampled_from([None] * 8 + ["too large", "too late", "cut", "undecodable"]),  # type: ignore[list-item]
)


@settings(max_examples=200)
@given(answers=st.lists(ANSWERS, min_size=1, max_size=3), direction=st.sampled_from(["newer", "older"]))
def test_a_page_or_an_error_of_the_backend_and_nothing_else(
    answers: list[HttpResponse], direction: Literal["newer", "older"]
) -> None:
    reader = DatadogReader(CONFIG)
    reader._searches._http = server = Server(answers)  # type: ignore[assignment]
    token = None
    with pytest.MonkeyPatch.context() as patch, suppress(LogStoreError):
        patch.setattr(Bounds, "SEARCHES", 10)
        for page_number in range(1, 4):
            page = reader.read(PageRequest(LOGS, direction, token, 4, LogsEntriesFilter()))
            assert server.requests <= 10 * page_number
            assert len(page.entries) <= 4
            for entry, event in page.entries:
                # As ZenML's server sends it on.
                orjson.loads(entry.model_dump_json())
                assert event is None or (len(event.writer) <= 64 and 0 <= event.sequence < 2**63)
            token = getattr(page, direction)
            if token is None:
                return
            assert len(token) < 10_000
