"""Bugs that the state machines have to find: one that is not found shows that a machine does not check it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from composite_logstore.backend import RetryableError
from composite_logstore.delivery.batch_size import BatchSize
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.journal import Journal
from composite_logstore.delivery.spilling import Spilling
from composite_logstore.delivery.states import State, Wait
from composite_logstore.processing.rules import Rules
from composite_logstore.spool.folder import Spool

NOTE = Spool.acknowledge
ACKNOWLEDGE, FAILED, NEXT = Delivery._acknowledge, Delivery.failed, Delivery.next


def acknowledges_one_too_many(delivery: Delivery, *arguments: Any) -> None:
    ACKNOWLEDGE(delivery, *arguments)
    if delivery.queue:
        delivery.queue.popleft()
        delivery._delivered += 1


def loses_a_retry(delivery: Delivery, error: BaseException, now: float, processed: Any = None) -> bool:
    is_over = FAILED(delivery, error, now, processed)
    if isinstance(error, RetryableError) and delivery._batches:
        delivery._batches.popleft()
    return is_over


def withholds_again(delivery: Delivery, error: BaseException, now: float, processed: Any = None) -> bool:
    is_over = FAILED(delivery, error, now, processed)
    if not is_over and processed:
        delivery._withheld += processed.withheld.total()
        delivery._withheld_reasons.update(processed.withheld)
    return is_over


def never_comes_back(delivery: Delivery, now: float) -> Any:
    return Wait(60) if delivery.state is State.UNAVAILABLE else NEXT(delivery, now)


def takes_a_refusal_for_size(delivery: Delivery, error: BaseException, now: float, processed: Any = None) -> bool:
    is_over = FAILED(delivery, error, now, processed)
    if isinstance(error, RetryableError):
        delivery._policy._size.too_large(delivery._exporting)
    return is_over


def notes_one_too_many(spool: Spool, child: str, before: float) -> None:
    NOTE(spool, child, before + 1)


def frees_what_one_child_has(spool: Spool) -> None:
    acknowledged = max(map(spool.acknowledged, spool.children))
    segments = spool.segments.all
    while len(segments) > 1 and segments[0].last < acknowledged:
        segments.pop(0).path.unlink(missing_ok=True)


def forgets_positions(spool: Spool, child: str, before: float) -> None:
    pass


def spills_late(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("composite_logstore.delivery.schedule._TICKS", 30)


BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "one too many is acknowledged": lambda patch: patch.setattr(Delivery, "_acknowledge", acknowledges_one_too_many),
    "a retry is lost": lambda patch: patch.setattr(Delivery, "failed", loses_a_retry),
    "a child never comes back": lambda patch: patch.setattr(Delivery, "next", never_comes_back),
}

MEMORY_BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "bytes are not bounded": lambda patch: patch.setattr(Journal, "_make_room", lambda _: None),
}

POLICY_BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "what breaks off is never made smaller": lambda patch: patch.setattr(BatchSize, "broken_off", lambda *_: False),
    "what breaks off is tried too often": lambda patch: patch.setattr(
        "composite_logstore.delivery.batch_size._ATTEMPTS", 4
    ),
    "batches do not grow again": lambda patch: patch.setattr(BatchSize, "taken", lambda *_: None),
    "what is refused is made smaller": lambda patch: patch.setattr(Delivery, "failed", takes_a_refusal_for_size),
    "who rejects everything gets no rest": lambda patch: patch.setattr(
        "composite_logstore.delivery.backoff.MOST_REJECTED", 10**9
    ),
}

DURABILITY_BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a position is one too far": lambda patch: patch.setattr(Spool, "acknowledge", notes_one_too_many),
    "positions are not noted": lambda patch: patch.setattr(Spool, "acknowledge", forgets_positions),
    "what one child has is freed": lambda patch: patch.setattr(Spool, "_free", frees_what_one_child_has),
    "events are spilled too late": spills_late,
    "nothing is brought to disk": lambda patch: patch.setattr(Spilling, "write", lambda *_, **__: False),
}

RULE_BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a retry counts as withheld once more": lambda patch: patch.setattr(Delivery, "failed", withholds_again),
    "rules are forgotten": lambda patch: patch.setattr(Rules, "_reason", lambda *_: None),
}
