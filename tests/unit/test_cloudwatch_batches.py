"""How log events are divided into requests, and which of them an answer rejects."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composite_logstore_cloudwatch.batches import EVENT_BYTES, MOST_BYTES, MOST_EVENTS, Line, rejected_in, requests_of
from tests.servers.cloudwatch import broken_limit

DAY = 24 * 3600 * 1000
LARGEST = MOST_BYTES - EVENT_BYTES


def lines(*times_and_sizes: tuple[int, int]) -> list[Line]:
    return [
        Line(millis, b"x" * size, ("0123456789abcde", number)) for number, (millis, size) in enumerate(times_and_sizes)
    ]


@pytest.mark.parametrize(
    ("given_lines", "sizes"),
    [
        ([], []),
        ([(0, 1)], [1]),
        ([(0, LARGEST)], [1]),
        ([(0, LARGEST), (0, 1)], [1, 1]),
        # Two events of half a request fit if their 26 bytes each do.
        ([(0, MOST_BYTES // 2 - EVENT_BYTES)] * 2, [2]),
        ([(0, MOST_BYTES // 2 - EVENT_BYTES), (0, MOST_BYTES // 2 - EVENT_BYTES + 1)], [1, 1]),
        ([(0, 1)] * MOST_EVENTS, [MOST_EVENTS]),
        ([(0, 1)] * (MOST_EVENTS + 1), [MOST_EVENTS, 1]),
        ([(0, 1), (DAY - 1, 1)], [2]),
        ([(0, 1), (DAY, 1)], [1, 1]),
        # The span counts from the first event of the request, not of the batch.
        ([(0, 1), (DAY, 1), (2 * DAY - 1, 1), (2 * DAY, 1)], [1, 2, 1]),
        # The times of the batch may be in any order.
        ([(2 * DAY, 1), (0, 1), (2 * DAY + 1, 1), (1, 1)], [2, 2]),
    ],
)
def test_where_a_request_ends(given_lines: list[tuple[int, int]], sizes: list[int]) -> None:
    assert [len(request) for request in requests_of(lines(*given_lines))] == sizes


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, 3), st.integers(0, 3 * DAY)),
            st.one_of(st.integers(1, 300), st.sampled_from([LARGEST, LARGEST // 2, MOST_BYTES // 3])),
        ),
        max_size=40,
    )
)
def test_requests_are_within_the_limits_and_lose_nothing(given_lines: list[tuple[int, int]]) -> None:
    sent = lines(*given_lines)
    requests = list(requests_of(sent))

    for request in requests:
        events = [{"timestamp": line.millis, "message": line.message.decode()} for line in request]
        assert broken_limit(events) == ""
    # In the order of time, and within a millisecond in the order of the batch.
    assert [line for request in requests for line in request] == sorted(sent, key=lambda line: line.millis)


@pytest.mark.parametrize(
    ("answer", "rejected"),
    [
        (None, {}),
        ({}, {}),
        ({"tooOldLogEventEndIndex": 0, "tooNewLogEventStartIndex": 10}, {}),
        ({"tooOldLogEventEndIndex": 3}, {"older than CloudWatch takes": 3}),
        ({"expiredLogEventEndIndex": 2}, {"older than the log group's retention": 2}),
        (
            {"tooOldLogEventEndIndex": 2, "expiredLogEventEndIndex": 5},
            {"older than CloudWatch takes": 2, "older than the log group's retention": 3},
        ),
        ({"tooOldLogEventEndIndex": 5, "expiredLogEventEndIndex": 2}, {"older than CloudWatch takes": 5}),
        ({"tooNewLogEventStartIndex": 7}, {"more than 2 hours ahead": 3}),
        ({"tooNewLogEventStartIndex": 0}, {"more than 2 hours ahead": 10}),
        (
            {"tooOldLogEventEndIndex": 4, "tooNewLogEventStartIndex": 9},
            {"older than CloudWatch takes": 4, "more than 2 hours ahead": 1},
        ),
        # An answer may say anything; no event is counted twice, and none that is not there.
        (
            {"tooOldLogEventEndIndex": 99, "expiredLogEventEndIndex": -1, "tooNewLogEventStartIndex": 0},
            {"older than CloudWatch takes": 10},
        ),
        ({"tooOldLogEventEndIndex": "3", "tooNewLogEventStartIndex": True, "expiredLogEventEndIndex": 1.5}, {}),
        ([3], {}),
    ],
)
def test_which_events_an_answer_rejects(answer: Any, rejected: dict[str, int]) -> None:
    found = rejected_in(answer, 10)

    assert {reason: len(places) for reason, places in found.items()} == rejected
    places = [place for each in found.values() for place in each]
    assert len(set(places)) == len(places)
    assert set(places) <= set(range(10))
