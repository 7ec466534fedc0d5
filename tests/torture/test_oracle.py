"""What is planted in the evidence, the oracle finds; in evidence of which nothing is wrong, it finds nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import pytest

from tests.crashing import Said
from tests.events import WRITER, make_events
from tests.servers.three_backends import Held
from tests.torture.oracle import LAST_SECONDS, NOT_WHOLE, TOLERANCE_SECONDS, End, Evidence, Logged, Walk, judge

STREAM = "stream"
EVENTS = 20
# One event is logged each tenth of a second from 0 on.
PAUSE_SECONDS = 0.1
END = EVENTS * PAUSE_SECONDS


def held(name: str, numbers: Sequence[int], writer: str = WRITER) -> list[Held]:
    events = make_events([f"{name}/{number}" for number in numbers], first=numbers[0], writer=writer)
    return [Held(STREAM, event.uid, writer, event.sequence, event.message) for event in events]


HELD = held("p0/0", range(EVENTS))
ACCOUNT = {"accepted": 3, "delivered": 2, "rejected": 0, "dropped": 0, "pending": 1, "withheld": 0}
ACCOUNT |= {"rejected_reasons": {}, "withheld_reasons": {}}


def logged(**changes: Any) -> Logged:
    emitted = [Said(number * PAUSE_SECONDS, copy.message) for number, copy in enumerate(HELD)]
    sound = Logged("p0", "write_ahead", {"archive", "collector"}, emitted, End(END, True))
    return dataclasses.replace(sound, **changes)


def walk(copies: Sequence[Held]) -> Walk:
    entries = [(copy.uid, copy.message) for copy in copies]
    return Walk(entries, entries)


def evidence(copies: Sequence[Held] = HELD, shown: Walk | Sequence[Held] = (), **changes: Any) -> Evidence:
    """Return evidence of a torture that nothing was wrong with, but for the changes."""
    seen = shown if isinstance(shown, Walk) else walk(shown or copies)
    sound = {
        "logged": [logged()],
        "held": {"collector": copies},
        "shown": {"archive": {STREAM: seen}},
        "stats": {"p0": {"archive": ACCOUNT}},
    }
    return Evidence(**{**sound, **changes})


def assert_found(found: Evidence, *words: str) -> None:
    wrong = judge(found)
    assert wrong
    for word in words:
        assert any(word in line for line in wrong), wrong


def test_nothing_is_wrong() -> None:
    assert judge(evidence()) == []


@pytest.mark.parametrize("durability", ["write_ahead", "spill"])
@pytest.mark.parametrize("number", range(EVENTS))
def test_a_lost_event_is_found_unless_it_may_be_lost(durability: str, number: int) -> None:
    there = [copy for copy in HELD if copy is not HELD[number]]
    wrong = judge(evidence(there, logged=[logged(durability=durability)]))
    age = END - number * PAUSE_SECONDS
    if durability == "spill" and age < LAST_SECONDS + TOLERANCE_SECONDS:
        assert wrong == []
    else:
        # In the one, and in the other.
        assert len(wrong) == 2
        assert all(HELD[number].message in line for line in wrong)


def test_memory_promises_nothing() -> None:
    assert judge(evidence(HELD[:1], logged=[logged(durability="memory")])) == []


@pytest.mark.parametrize("durability", ["write_ahead", "spill"])
def test_an_orderly_end_loses_nothing(durability: str) -> None:
    assert_found(evidence(HELD[:-1], logged=[logged(durability=durability, end=End(END, False))]), HELD[-1].message)


def test_what_is_lost_in_one_backend_alone_is_found() -> None:
    assert_found(evidence(shown=HELD[:-1]), "archive shows")
    assert judge(evidence(HELD[1:], shown=HELD)) != []


def test_a_backend_that_was_not_meant_needs_not_have_it() -> None:
    assert judge(evidence(HELD[:3], shown=HELD, logged=[logged(backends={"archive"})])) == []


def test_what_was_destroyed_is_excused_and_nothing_else() -> None:
    found = evidence(HELD[2:], excused={HELD[0].message}, destroyed=1)
    assert_found(found, "but 1 of", HELD[1].message)
    assert not any(HELD[0].message in line for line in judge(found))


def test_the_time_in_which_a_process_was_stopped_is_not_part_of_its_last_second() -> None:
    # It ran for half a second before it was stopped, and never again.
    killed = End(END + 60, True, [(END - 0.5, inf)])
    assert killed.ran_since(END - 0.7) == pytest.approx(0.2)
    spilled = logged(durability="spill", end=killed)
    assert judge(evidence(HELD[:-10], logged=[spilled])) == []
    assert_found(evidence(HELD[:2], logged=[spilled]), HELD[2].message)


@pytest.mark.parametrize(
    ("moment", "pauses", "ran"),
    [
        (0, [], 10),
        (0, [(1, 2), (5, 7)], 7),
        (6, [(1, 2), (5, 7)], 3),
        (8, [(1, 2), (5, 7)], 2),
        (8, [(1, 2), (5, inf)], 0),
        (0, [(1, 5), (4, 7), (2, 3)], 4),
        (0, [(1, 7), (2, 7), (2, 3)], 4),
        (2.5, [(1, 7), (2, 3)], 3),
        (12, [(1, 2), (5, 7)], -2),
    ],
)
def test_how_long_a_process_ran(moment: float, pauses: list[tuple[float, float]], ran: float) -> None:
    assert End(10, True, pauses).ran_since(moment) == pytest.approx(ran)


def forked(durability: str, end: End) -> Logged:
    return logged(name="p0~0", durability=durability, end=end, fork=End(END, True))


def test_what_is_on_the_way_to_a_parent_that_is_killed_may_be_lost() -> None:
    killed_at = 1.0
    on_the_way = [copy for copy in HELD if copy is not HELD[9]]
    assert judge(evidence(on_the_way, logged=[forked("write_ahead", End(killed_at, True))])) == []
    for lost in (HELD[2], HELD[15]):
        there = [copy for copy in HELD if copy is not lost]
        assert_found(evidence(there, logged=[forked("write_ahead", End(killed_at, True))]), lost.message)


def test_a_forked_process_loses_nothing_of_its_own_while_its_parent_lives() -> None:
    for durability in ("write_ahead", "spill"):
        assert_found(evidence(HELD[:-1], logged=[forked(durability, End(END + 5, False))]), HELD[-1].message)


def test_a_forked_process_whose_parent_is_gone_loses_its_own_last_second() -> None:
    gone = End(0.2, False)
    assert judge(evidence(HELD[:-8], logged=[forked("spill", gone)])) == []
    assert_found(evidence(HELD[:-15], logged=[forked("spill", gone)]), HELD[-15].message)
    assert_found(evidence(HELD[:-8], logged=[forked("write_ahead", gone)]), HELD[-8].message)


def test_copies_in_a_backend_are_no_fault() -> None:
    assert judge(evidence([*HELD[:5], *HELD[2:5], *HELD[5:], HELD[0]], shown=HELD)) == []


def test_a_copy_that_says_something_else_is_found() -> None:
    assert_found(evidence([*HELD, HELD[3]._replace(message="p0/0/4")], shown=HELD), "one id")


def test_an_event_that_has_two_ids_is_found() -> None:
    (again,) = held("p0/0", [EVENTS])
    assert_found(evidence([*HELD, again._replace(message=HELD[3].message)], shown=HELD), HELD[3].message)


def test_what_is_shown_twice_is_found() -> None:
    assert_found(evidence(shown=[*HELD, HELD[0]]), HELD[0].message)
    of_one_end = Walk(walk(HELD).oldest_first, walk([*HELD, HELD[0]]).newest_first)
    assert_found(evidence(shown=of_one_end), "from the newest on", HELD[0].message)


@pytest.mark.parametrize("change", [lambda all: all[1:], lambda all: all[:-1], lambda all: []])
def test_what_one_end_alone_shows_is_found(change: Callable[[Any], Any]) -> None:
    entries = walk(HELD).oldest_first
    assert_found(evidence(shown=Walk(entries, change(entries))), "in the first alone")


def test_events_in_the_wrong_order_are_found() -> None:
    swapped = [*HELD[:3], HELD[4], HELD[3], *HELD[5:]]
    assert_found(evidence(swapped, shown=HELD), "collector", HELD[3].message)
    assert_found(evidence(shown=swapped), "archive", HELD[3].message)


def test_from_the_newest_end_a_copy_may_come_where_it_arrived() -> None:
    copies = [*HELD[:5], HELD[3], *HELD[5:]]
    entries = walk(HELD).oldest_first
    assert (
        judge(
            evidence(
                shown=Walk(entries, walk([*HELD[:3], HELD[4], HELD[3], *HELD[5:]]).newest_first),
                held={"archive": copies},
            )
        )
        == []
    )
    for newest_first in ([*HELD[:8], HELD[9], HELD[8], *HELD[10:]], [HELD[1], HELD[0], *HELD[2:]]):
        found = evidence(shown=Walk(entries, walk(newest_first).newest_first), held={"archive": copies})
        assert_found(found, "from the newest on")
    assert_found(
        evidence(
            shown=Walk(walk([*HELD[:3], HELD[4], HELD[3], *HELD[5:]]).oldest_first, entries), held={"archive": copies}
        ),
        "from the oldest on",
    )


def test_a_backend_that_sorts_by_time_need_not_keep_the_order_of_numbers() -> None:
    swapped = [*HELD[:3], HELD[4], HELD[3], *HELD[5:]]
    assert judge(evidence(shown=swapped, by_time={"archive"})) == []


def test_writers_and_threads_have_no_order_between_them() -> None:
    other = held("p1/0", range(EVENTS), "fedcba987654321")
    both = [copy for pair in zip(HELD, other, strict=True) for copy in pair]
    logs = [logged(), logged(name="p1", emitted=[Said(0, copy.message) for copy in other])]
    assert judge(evidence(both, logged=logs)) == []


def test_what_nobody_logged_is_found() -> None:
    # One that was not acknowledged is what the thread was about to say when it died.
    known = logged(emitted=logged().emitted[:-1])
    assert judge(evidence(logged=[known])) == []
    assert_found(evidence(logged=[logged(emitted=logged().emitted[:-2])]), "never logged")
    cut = HELD[-1]._replace(message=f"{NOT_WHOLE} p0/0/19 5 xx")
    assert_found(evidence([*HELD[:-1], cut], shown=HELD), "collector", NOT_WHOLE)
    assert_found(evidence(shown=[*HELD[:-1], cut]), "archive", NOT_WHOLE)


@pytest.mark.parametrize("change", [{"accepted": 4}, {"pending": 0}, {"delivered": 4, "pending": -1}])
def test_an_account_that_does_not_add_up_is_found(change: dict[str, int]) -> None:
    assert_found(evidence(stats={"p0": {"archive": {**ACCOUNT, **change}}}), "does not add up")


def test_events_that_are_rejected_or_dropped_without_a_reason_are_found() -> None:
    assert_found(evidence(stats={"p0": {"archive": {**ACCOUNT, "rejected": 1, "pending": 0}}}), "rejected")
    dropped = {"p0": {"archive": {**ACCOUNT, "dropped": 1, "pending": 0}}}
    assert_found(evidence(stats=dropped), "dropped")
    assert judge(evidence(stats=dropped, destroyed=1)) == []


def test_threads_that_died_and_whatever_else_went_wrong_are_found() -> None:
    assert_found(evidence(threads={"p0": ["composite-logstore spool"]}), "p0", "composite-logstore spool")
    assert_found(evidence(damage=["/spool/damaged/file"]), "/spool/damaged/file")
    assert_found(evidence(other=["p0 hangs"]), "p0 hangs")
