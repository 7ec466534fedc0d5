"""What a backend's errors say about retrying and rejecting, whatever their author put into them.

Deliveries, backfills, scans and `fetch()` ask here, so that none of them believes what the others do not.
"""

from __future__ import annotations

from collections.abc import MutableMapping

from composite_logstore.backend import RejectedError, RetryableError
from composite_logstore.bounds import Bounds

LONGEST_RETRY_AFTER = Bounds.WAIT_SECONDS
"""How long a backend may ask to be left alone, in seconds. One that asks for a year has a defect."""

_MOST_REASONS = 20


def at_most(most: int, number: object) -> int:
    """Return a number of events that a backend has told, within what is possible."""
    return min(most, max(0, number)) if isinstance(number, int) else 0


def bounded_seconds(value: object) -> float | None:
    """Return for how many seconds a backend asks to be left alone, an hour at most; None if it makes no sense."""
    # Nothing but NaN differs from itself. `isnan` raises for an integer that is too large for a float.
    if not isinstance(value, int | float) or value != value:
        return None
    return float(min(max(0, value), LONGEST_RETRY_AFTER))


def retry_after(error: BaseException) -> float | None:
    """Return for how many seconds an export's error asks to be left alone, None if for no particular time."""
    return bounded_seconds(getattr(error, "retry_after_seconds", None)) if isinstance(error, RetryableError) else None


def may_be_size(error: BaseException, was_late: bool) -> bool:
    """Say whether a batch may be too large, since its export raised something that is neither a refusal nor says so.

    Args:
        error: What it raised.
        was_late: Whether it took longer than an export may.
    """
    if isinstance(error, RetryableError):
        # Whoever asks for a pause has another reason than the size of this batch.
        return retry_after(error) is None and (was_late or getattr(error, "smaller_may_pass", False) is True)
    # Nobody knows what it means, but for what is over before anything is sent.
    return not isinstance(error, ImportError | ConnectionRefusedError)


def is_judged(error: BaseException) -> bool:
    """Say whether an export's error tells of a look at each event: it says how many are rejected."""
    return isinstance(error, RejectedError) and isinstance(getattr(error, "count", None), int)


def rejections(error: BaseException, batch: int) -> int | None:
    """Return how many events of a batch were rejected.

    Args:
        error: What the export raised: `RejectedError` or `TooLargeError`.
        batch: How many events the batch has.

    Returns:
        None if it is not known which are at fault, so that the batch has to be split.
    """
    if is_judged(error):
        return at_most(batch, getattr(error, "count", None))
    return 1 if batch == 1 else None


def count_reason(reasons: MutableMapping[str, int], reason: str, number: int) -> None:
    """Count rejected events by their reason, as long as reasons are few: backends may put an id into each.

    Args:
        reasons: A reason → how many events were rejected for it.
        reason: The reason.
        number: How many more.
    """
    if number > 0:
        known = reason if reason in reasons or len(reasons) < _MOST_REASONS else "other reasons"
        reasons[known] = reasons.get(known, 0) + number
