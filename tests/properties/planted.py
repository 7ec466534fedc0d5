"""Bugs for the state machines to find. One that is not found shows that a machine does not look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from composite_logstore.backend import RetryableError
from composite_logstore.delivery import Delivery, State, Wait

SETTLE, FAILED, NEXT = Delivery._settle, Delivery.failed, Delivery.next


def acknowledges_one_too_many(delivery: Delivery, rejected: int, shortened: int) -> None:
    SETTLE(delivery, rejected, shortened)
    if delivery.queue:
        delivery.queue.popleft()
        delivery._delivered += 1


def loses_a_retry(delivery: Delivery, error: BaseException, now: float) -> None:
    FAILED(delivery, error, now)
    if isinstance(error, RetryableError) and delivery._batches:
        delivery._batches.popleft()


def never_comes_back(delivery: Delivery, now: float) -> Any:
    return Wait(60) if delivery.state is State.UNAVAILABLE else NEXT(delivery, now)


BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "one too many is acknowledged": lambda patch: patch.setattr(Delivery, "_settle", acknowledges_one_too_many),
    "a retry is lost": lambda patch: patch.setattr(Delivery, "failed", loses_a_retry),
    "a child never comes back": lambda patch: patch.setattr(Delivery, "next", never_comes_back),
}
