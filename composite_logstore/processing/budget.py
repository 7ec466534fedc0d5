"""A child's budget: how many events or bytes it may get in a run, a day or a minute, and what happens then.

Each event is charged once. It is charged before its first export, under a lock that all processes of this machine
share, and the charge stays:

- A retry, or a piece of a split batch, finds its events charged, even if a new minute or day has begun meanwhile.
- However many processes ask at once, together they never get more than the budget.
- A process that dies between the charge and the answer of the backend leaves its charge behind, and the process that
  recovers the events charges them again. So after a crash at most one batch of each child is charged twice, and no
  event is free.

An event that gets nothing of the budget is charged nothing. Whether it is withheld is decided anew for each attempt, so
events whose first attempt failed profit from a new minute or day.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from hashlib import blake2b
from itertools import accumulate, islice, takewhile
from logging import WARNING
from threading import Lock
from typing import NamedTuple, Protocol
from uuid import UUID

from composite_logstore.clock import Clock
from composite_logstore.event import LogEvent, Stream, total_size
from composite_logstore.names import quoted
from composite_logstore.processing.processor import Processed, Step
from composite_logstore.processing.settings import BudgetSettings

REASON = "over budget"
"""The reason for which events over a budget are withheld."""

ONE_IN = 100
"""With `sample`, one event in so many is exported once the budget is used up."""

NOTICE = "zenml.log.notice"
"""The attribute of an event whose text is replaced by a notice about the events that follow it."""

MOST_PERIODS = 1_000
"""How many periods are remembered in memory: a process may log for many runs, one after the other or at once."""

_LOGGER = "composite_logstore"
_NOTICE_BEGINS = "The budget of this log, "
_RUN = "zenml.pipeline.run.id"
_ID = re.compile(r"[0-9a-f-]{1,64}")
_UNITS = {"run": "a run", "day": "a day", "minute": "a minute"}
_NEXT = {"run": "until the run ends", "day": "until the next day begins in UTC", "minute": "until the next minute"}
_ALMOST = 0.8


class Spent(NamedTuple):
    """What was charged in one period.

    Attributes:
        events: How many events.
        bytes: How many bytes they have, as `LogEvent.size` counts them.
    """

    events: int = 0
    bytes: int = 0


Charge = Callable[[Spent], Spent]
"""Returns what is charged afterwards, given what was charged before."""


class Account(Protocol):
    """Where charges are counted: for this process alone, or for all of this machine."""

    def charge(self, period: str, charge: Charge) -> Spent:
        """Charge something in a period, which no other charge interrupts, and return the result. Never raises.

        Args:
            period: The name of the period, of letters, digits and `-`.
            charge: Called with what was charged in this period before. Its last call counts, if there are several.
        """
        ...


class OwnAccount:
    """Counts what this process alone has charged."""

    def __init__(self, spent: Iterable[tuple[str, Spent]] = ()) -> None:
        """Begin with what was charged before.

        Args:
            spent: A period, and what was charged in it.
        """
        self._lock = Lock()
        self._spent = OrderedDict(spent)

    def charge(self, period: str, charge: Charge) -> Spent:
        """See `Account`."""
        with self._lock:
            spent = self._spent[period] = charge(self._spent.get(period, Spent()))
            self._spent.move_to_end(period)
            while len(self._spent) > MOST_PERIODS:
                self._spent.popitem(last=False)
            return spent

    def copy(self) -> OwnAccount:
        """Return a copy for a forked process, in which the lock of this one may stay locked for ever."""
        return OwnAccount(list(self._spent.items()))


class Told:
    """Of which periods a process has warned. The workers of one child share it."""

    def __init__(self) -> None:
        self._shares: OrderedDict[str, float] = OrderedDict()

    def is_news(self, period: str, share: float) -> bool:
        """Return whether this share of a period's budget has not been warned of yet, and note that it is now."""
        if share <= self._shares.get(period, 0.0):
            return False
        self._shares[period] = share
        while len(self._shares) > MOST_PERIODS:
            self._shares.popitem(last=False)
        return True


def passes(event: LogEvent, settings: BudgetSettings) -> bool:
    """Return whether an event is exported even if the budget is used up: the same in all processes and attempts."""
    if settings.then == "warnings_only":
        return event.level >= WARNING
    return settings.then == "sample" and _is_sampled(event)


def is_notice(event: LogEvent) -> bool:
    """Return whether an event that was read from a child is a notice, in place of one that its budget withheld."""
    if NOTICE in event.attributes or NOTICE in event.metadata:
        return True
    # Some readers return no attributes, or no names of loggers.
    return event.message.startswith(_NOTICE_BEGINS) and event.logger_name in (_LOGGER, "")


def in_words(settings: BudgetSettings) -> str:
    """Return a budget in words, such as `100,000 events a day`."""
    parts = []
    if settings.events is not None:
        parts.append(f"{settings.events:,} event{'s' if settings.events > 1 else ''}")
    if settings.bytes is not None:
        parts.append(f"{settings.bytes:,} byte{'s' if settings.bytes > 1 else ''}")
    return f"{' or '.join(parts)} {_UNITS[settings.per]}"


class Budget(Step):
    """Withholds the events of one child that exceed its budget. It is the last step, so it charges what is exported.

    Only the worker of one journal uses it, which exports one batch after the other in the order of the journal.
    """

    def __init__(
        self,
        settings: BudgetSettings,
        account: Account,
        told: Told,
        clock: Clock,
        warn: Callable[[str], None],
        elsewhere: Iterable[str] = (),
    ) -> None:
        """Charge nothing yet.

        Args:
            settings: The budget.
            account: Where to count.
            told: Of which periods this process has warned.
            clock: The source of time.
            warn: Warns the user.
            elsewhere: The names of other children that get all events.
        """
        self._settings = settings
        self._account = account
        self._told = told
        self._clock = clock
        self._warn = warn
        self._elsewhere = list(elsewhere)
        # The numbers of the events that are charged, and may be exported again.
        self._charged: set[int] = set()
        # A stream's id → the last period in which its log says that events are missing.
        self._noticed: OrderedDict[UUID, str] = OrderedDict()

    def process(self, batch: Processed) -> None:
        """Withhold the events for which the budget does not suffice. See `Step`; in addition it charges the others."""
        if not batch.events:
            return
        if self._charged:
            # Earlier events are acknowledged, or were dropped: no further attempt follows.
            first = batch.events[0].number
            self._charged = {number for number in self._charged if number >= first}
        new: dict[str, list[LogEvent]] = {}
        uncharged = [event for event in batch.events if event.number not in self._charged]
        if self._settings.per == "run":
            for event in uncharged:
                new.setdefault(_run_of(event.stream), []).append(event)
        elif uncharged:
            new[self._now()] = uncharged
        over: dict[int, str] = {}
        for period, events in new.items():
            charged = self._charge(period, events)
            self._charged.update(event.number for event in events[:charged])
            over.update((event.number, period) for event in events[charged:])
        if over:
            batch.events = self._without(batch, over)

    def commit(self, batch: Processed) -> None:
        """Note that the notices of this batch have arrived. See `Step`."""
        for stream, period in batch.notes.get(self, {}).items():
            self._noticed[stream] = period
            self._noticed.move_to_end(stream)
        while len(self._noticed) > MOST_PERIODS:
            self._noticed.popitem(last=False)

    def _now(self) -> str:
        """Return the name of the present day or minute."""
        now = datetime.fromtimestamp(self._clock.time(), timezone.utc)
        return f"day-{now:%Y-%m-%d}" if self._settings.per == "day" else f"minute-{now:%Y-%m-%dT%H-%M}"

    def _charge(self, period: str, events: list[LogEvent]) -> int:
        """Charge as many of these events as the budget suffices for. Returns how many."""
        most_events, most_bytes = self._settings.events, self._settings.bytes
        number = 0

        def charge(before: Spent) -> Spent:
            nonlocal number
            number = len(events)
            if most_events is not None:
                number = max(0, min(number, most_events - before.events))
            if most_bytes is not None:
                # The event that uses up the rest is exported as a whole.
                reached = accumulate((event.size for event in events[:number]), initial=before.bytes)
                number = sum(1 for _ in takewhile(lambda bytes: bytes < most_bytes, islice(reached, number)))
            return Spent(before.events + number, before.bytes + total_size(events[:number]))

        spent = self._account.charge(period, charge)
        self._tell(period, spent)
        return number

    def _tell(self, period: str, spent: Spent) -> None:
        settings = self._settings
        shares = [
            used / most
            for used, most in ((spent.events, settings.events), (spent.bytes, settings.bytes))
            if most is not None
        ]
        share = max(shares)
        if share >= 1 and self._told.is_news(period, 1):
            self._warn(f"the budget of {in_words(settings)} is used up. {self._consequence()} stats() counts them.")
        elif share >= _ALMOST and self._told.is_news(period, _ALMOST):
            self._warn(f"{int(share * 100)} % of the budget of {in_words(settings)} is used up.")

    def _consequence(self) -> str:
        what = {
            "warnings_only": "only events of level WARNING or above are sent",
            "sample": f"only one event in {ONE_IN} is sent",
            "stop": "no events are sent",
        }[self._settings.then]
        found = f"is in {quoted(self._elsewhere)}" if self._elsewhere else "may be in no other child"
        return f"From now on, {_NEXT[self._settings.per]}, {what}. What is missing here {found}."

    def _without(self, batch: Processed, over: dict[int, str]) -> list[LogEvent]:
        """Return the events of a batch that are exported, given the numbers of those over budget and their periods."""
        kept = []
        notices: dict[UUID, str] = {}
        for event in batch.events:
            period = over.get(event.number)
            if period is None or passes(event, self._settings):
                kept.append(event)
                continue
            stream = event.stream.id
            if stream not in notices and self._noticed.get(stream) != period:
                notices[stream] = period
                kept.append(self._notice(event))
            else:
                batch.withheld[REASON] += 1
        batch.notes[self] = notices
        return kept

    def _notice(self, event: LogEvent) -> LogEvent:
        """Return what the log says in place of the first event that is missing.

        It has that event's identity: an event of its own would need a number in the journal, and be missing in every
        other child.
        """
        text = f"{_NOTICE_BEGINS}{in_words(self._settings)}, is used up. {self._consequence()}"
        return event._replace(
            level=WARNING,
            level_name="WARNING",
            message=text,
            logger_name=_LOGGER,
            file="",
            line=0,
            function="",
            exception=None,
            attributes={NOTICE: "budget"},
            metadata={},
            progress=False,
        )


def _run_of(stream: Stream) -> str:
    """Return the name of the period of a stream's run. What a program logs without a run counts for its stream."""
    run = str(stream.metadata.get(_RUN) or stream.id)
    # It becomes the name of a file.
    return f"run-{run if _ID.fullmatch(run) else blake2b(run.encode('utf-8', 'replace'), digest_size=16).hexdigest()}"


def _is_sampled(event: LogEvent) -> bool:
    """Return whether an event is one of the few that are exported over budget.

    The hash differs from that of a sample of all events, so that the two do not select the same events.
    """
    digest = blake2b(event.uid.encode(), digest_size=8, person=b"budget").digest()
    return int.from_bytes(digest, "big") % ONE_IN == 0
