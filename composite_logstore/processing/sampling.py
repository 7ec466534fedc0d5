"""Sampling: a child gets only a part of its less important events.

Which ones depends on their ids alone. So an event's fate is the same in each process, after each retry, and for each
command that compares or copies.
"""

from __future__ import annotations

import hashlib

from composite_logstore.event import LogEvent
from composite_logstore.processing.processor import Processed, Step
from composite_logstore.processing.settings import SampleSettings

_BITS = 64


class Sampling(Step):
    """Withholds all events below a level but a part."""

    def __init__(self, settings: SampleSettings) -> None:
        self._below = settings.below.value
        self._end = int(settings.ratio * (1 << _BITS))

    def process(self, batch: Processed) -> None:
        """Withhold the events that are not among the sampled ones."""
        events = list(filter(self.wants, batch.events))
        if len(events) < len(batch.events):
            batch.withheld["sample"] += len(batch.events) - len(events)
            batch.events = events

    def wants(self, event: LogEvent) -> bool:
        """Return whether an event is important enough, or among the sampled ones."""
        return event.level >= self._below or _place_of(event) < self._end


def _place_of(event: LogEvent) -> int:
    """Return a number below 2^64, the same for each event everywhere, and evenly distributed."""
    return int.from_bytes(hashlib.blake2b(event.uid.encode(), digest_size=_BITS // 8).digest(), "big")
