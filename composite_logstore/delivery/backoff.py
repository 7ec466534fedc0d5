"""The one policy for exports and reads that fail: when to retry, how large the next batch is, what counts as rejected.

Nothing here does I/O or knows the time. Deliveries, backfills, scans and `fetch()` all ask this policy, so a value that
makes no sense (NaN, a negative number, text, a year) has the same meaning to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from composite_logstore.backend import RejectedError, RetryableError, TooLargeError, UnavailableError
from composite_logstore.bounds import Bounds
from composite_logstore.delivery.batch_size import BatchSize
from composite_logstore.delivery.states import Outcome
from composite_logstore.event import LogEvent
from composite_logstore.inert import described, message_of
from composite_logstore.zenml import LogStoreRateLimitError, LogStoreUnavailableError

LONGEST_RETRY_AFTER = Bounds.WAIT_SECONDS
"""The longest pause that a backend can ask for, in seconds. A backend that asks for a year has a defect."""

MOST_REJECTED = 10
"""After so many rejections in a row, of one event each and with no event accepted in between, the backend is at fault
and not the events."""

READ_ATTEMPTS = 4
"""How often a backfill or a comparison reads something before an error counts."""

PASSING = (LogStoreRateLimitError, LogStoreUnavailableError)
"""The errors of a reader after which the same may succeed."""

_MOST_DOUBLINGS = 64


def bounded_seconds(value: object) -> float | None:
    """Return the seconds that a backend asks for, between 0 and one hour; None if the value makes no sense."""
    # Only NaN differs from itself. `isnan` raises for an integer that is too large for a float.
    if not isinstance(value, int | float) or value != value:
        return None
    return float(min(max(0, value), LONGEST_RETRY_AFTER))


def bounded_count(value: object, most: int) -> int:
    """Return a number of events that a backend reports, between 0 and `most`; 0 if the value makes no sense."""
    return min(most, max(0, value)) if isinstance(value, int) else 0


class Backoff(NamedTuple):
    """How long to wait between retries.

    Attributes:
        first: The wait after the first failure, in seconds. Each further failure in a row doubles it.
        longest: The longest wait, in seconds.
        rand: Returns a number from 0 to 1: retries of many writers are spread over half of each wait.
        may_shorten: Whether a backend can ask for a shorter wait than the present one, down to the first.
    """

    first: float
    longest: float
    rand: Callable[[], float] = lambda: 1.0
    may_shorten: bool = True

    def wait(self, failures: int, asked_for: object = None) -> float:
        """Return how many seconds to wait.

        Args:
            failures: How many failures in a row came before this one.
            asked_for: The pause that the backend asks for, in seconds. A backend that asks to be retried at once, again
                and again, gets the shortest wait instead, so that it is not flooded.
        """
        seconds, asked = self.unjittered(failures), bounded_seconds(asked_for)
        if asked is None:
            return self.jittered(seconds)
        return max(asked, self.jittered(self.first if self.may_shorten else seconds))

    def unjittered(self, failures: int) -> float:
        """Return the wait after so many failures in a row, in seconds, without jitter."""
        return min(self.first * 2.0 ** min(failures, _MOST_DOUBLINGS), self.longest)

    def jittered(self, seconds: float) -> float:
        """Return between half and all of a wait, so that many writers do not retry at the same moment."""
        return seconds * (0.5 + 0.5 * self.rand())


_RATE_LIMITED = Backoff(first=2.0, longest=120.0)
_UNAVAILABLE = Backoff(first=0.5, longest=120.0)


def seconds_until_read(error: Exception, failures: int) -> float:
    """Return how many seconds to wait before something is read again.

    Args:
        error: One of the errors in `PASSING`.
        failures: How many errors in a row came before this one.
    """
    if isinstance(error, LogStoreRateLimitError):
        return min(bounded_seconds(error.retry_after) or _RATE_LIMITED.wait(failures), _RATE_LIMITED.longest)
    return _UNAVAILABLE.wait(failures)


class Decision(NamedTuple):
    """What follows from a failed export.

    Attributes:
        outcome: What the failure means for the child's state.
        reason: Why the export failed.
        wait: How many seconds to wait before the next export.
        rejected: How many events of the batch the backend rejects for good; it took the others. None if the events have
            to be exported again: in halves after `ANSWERED`, otherwise as many at once as `ExportPolicy.limit` allows.
        rejected_in_a_row: How many events were rejected in a row, each in an export of its own; 0 if the backend says
            how many it rejects.
    """

    outcome: Outcome
    reason: str
    wait: float = 0.0
    rejected: int | None = None
    rejected_in_a_row: int = 0

    @property
    def is_hopeless(self) -> bool:
        """Whether the backend takes nothing until somebody corrects something: a retry cannot help now."""
        return self.outcome in (Outcome.REFUSED, Outcome.REJECTED_ALL)

    @property
    def message(self) -> str:
        """What to tell the user."""
        if self.outcome is Outcome.REJECTED_ALL:
            return f"the last {self.rejected_in_a_row} events were rejected: {self.reason}"
        return self.reason


class Rejection(NamedTuple):
    """Which events of an export the backend rejects for good.

    Attributes:
        reason: Why.
        number: How many it rejects.
        events: These events. More than `number` if the backend does not say which: these are among them.
    """

    reason: str
    number: int
    events: Sequence[LogEvent]


def rejection(error: BaseException, sent: Sequence[LogEvent]) -> Rejection | None:
    """Return which events a failed export has lost for good; None if none, or if they will be sent again."""
    if not isinstance(error, RejectedError | TooLargeError):
        return None
    count = _counted(error, len(sent))
    if count is None:
        # The batch will be split until the event at fault is alone.
        count = 1 if len(sent) == 1 else 0
    if not count:
        return None
    named = _named(error, sent)
    return Rejection(message_of(error), count, named if len(named) == count else sent)


def _counted(error: BaseException, sent: int) -> int | None:
    """Return how many of the events the backend says that it rejects; None if it rejects the batch as a whole."""
    count = getattr(error, "count", None) if isinstance(error, RejectedError) else None
    return bounded_count(count, sent) if isinstance(count, int) else None


def _named(error: BaseException, sent: Sequence[LogEvent]) -> list[LogEvent]:
    """Return the events that an error names, as far as they were sent. A backend may have put anything there."""
    try:
        named = {(event.writer, event.number) for event in getattr(error, "events", None) or ()}
        return [event for event in sent if (event.writer, event.number) in named]
    except Exception:
        return []


class ExportPolicy:
    """Decides how large the next batch may be, and what to do after an export has failed.

    Attributes:
        backoff: How long to wait between retries.
    """

    def __init__(self, batch_size: int, backoff: Backoff) -> None:
        """Begin with the largest batch.

        Args:
            batch_size: The most events of one export.
            backoff: How long to wait between retries.
        """
        self.backoff = backoff
        self._size = BatchSize(batch_size)
        self._failures = 0
        # How many events were rejected, each in an export of its own, since the backend last took one.
        self._rejected_in_a_row = 0

    @property
    def limit(self) -> int:
        """The most events of the next export. A backend that rejects everything gets single events, as probes."""
        return 1 if self._rejected_in_a_row >= MOST_REJECTED else self._size.limit

    def start_again(self) -> None:
        """Begin with the shortest wait again, for a new batch."""
        self._failures = 0

    def succeeded(self, size: int, was_late: bool = False) -> None:
        """Note that the backend took a batch.

        Args:
            size: How many events the batch had.
            was_late: Whether the export took longer than it may: a smaller batch would have been in time.
        """
        self._failures = self._rejected_in_a_row = 0
        if was_late:
            self._size.broken_off(size)
        else:
            self._size.taken(size)

    def failed(self, error: BaseException, size: int, was_late: bool = False, sent: int | None = None) -> Decision:
        """Decide what to do after an export has raised.

        Args:
            error: What the export raised.
            size: How many events the batch had.
            was_late: Whether the export took longer than it may.
            sent: How many of the events were sent, since the child's settings may withhold some; all if not given.
        """
        if isinstance(error, RejectedError | TooLargeError):
            return self._rejected(error, size, size if sent is None else sent)
        if isinstance(error, UnavailableError):
            return Decision(Outcome.REFUSED, message_of(error), self.backoff.jittered(self.backoff.longest))
        return self._retry(error, size, was_late)

    def _rejected(self, error: BaseException, size: int, sent: int) -> Decision:
        reason = message_of(error)
        rejected = _counted(error, sent)
        if rejected is not None:
            # The backend has looked at each event, so it does not reject them all alike.
            if rejected < sent:
                self._rejected_in_a_row = 0
                self._size.taken(size)
            self._failures = 0
            return Decision(Outcome.ANSWERED, reason, rejected=rejected)
        if sent > 1:
            # The event at fault is in one of the halves.
            if isinstance(error, RejectedError):
                return Decision(Outcome.ANSWERED, reason)
            self._size.too_large(size)
            return Decision(Outcome.TOO_LARGE, reason)
        self._rejected_in_a_row += 1
        self._failures = 0
        in_a_row = self._rejected_in_a_row
        if in_a_row < MOST_REJECTED:
            return Decision(Outcome.ANSWERED, reason, 0.0, 1, in_a_row)
        return Decision(Outcome.REJECTED_ALL, reason, self.backoff.wait(in_a_row - MOST_REJECTED), 1, in_a_row)

    def _retry(self, error: BaseException, size: int, was_late: bool) -> Decision:
        asked_for = getattr(error, "retry_after_seconds", None) if isinstance(error, RetryableError) else None
        wait = self.backoff.wait(self._failures, asked_for)
        is_longest = self.backoff.unjittered(self._failures) >= self.backoff.longest
        self._failures += 1
        is_smaller = _may_be_size(error, asked_for, was_late) and self._size.broken_off(size)
        outcome = Outcome.FAILED_LONG if is_longest else Outcome.BROKEN_OFF if is_smaller else Outcome.FAILED
        return Decision(outcome, _reason(error), wait)


def _may_be_size(error: BaseException, asked_for: object, was_late: bool) -> bool:
    """Return whether the size of the batch may be the reason that an export failed."""
    if isinstance(error, RetryableError):
        # A backend that asks for a pause has another reason than the size of this batch.
        is_paused = bounded_seconds(asked_for) is not None
        return not is_paused and (was_late or getattr(error, "smaller_may_pass", False) is True)
    # Other exceptions may mean anything, but these two happen before anything is sent.
    return not isinstance(error, ImportError | ConnectionRefusedError)


def _reason(error: BaseException) -> str:
    if isinstance(error, RetryableError):
        return message_of(error)
    # A file that cannot be opened, or a lack of memory, may be the fault of the machine.
    is_defect = not isinstance(error, OSError | ImportError | MemoryError)
    return f"{'defect of the backend: ' if is_defect else ''}{described(error)}"
