"""What a child should have of the events that another child shows, by the rules in its settings."""

from __future__ import annotations

from typing import Any

from composite_logstore.backend import PAGES
from composite_logstore.child_config import ChildConfig
from composite_logstore.event import LogEvent, Stream
from composite_logstore.intervals import Intervals
from composite_logstore.parity.scan import PageScanner, Source
from composite_logstore.processing.processor import Processor
from composite_logstore.processing.settings import Matcher


class Expectation:
    """Whether the rules and the sampling of one child let the events of another pass.

    If the other child shows too little to decide, an event is expected: it is better to report an event that may
    rightly be missing than to be silent about one that is lost.
    """

    def __init__(self, child: ChildConfig, source: Source, stream: Stream) -> None:
        """Prepare to judge events.

        Args:
            child: The settings of the child that should have them.
            source: The child that shows them.
            stream: Their stream, with its attributes.
        """
        self._source = source
        self._masks = source.masks()
        # In words why an event was expected that may rightly be missing → a writer → the numbers of such events.
        self._doubts: dict[str, dict[str, Intervals]] = {}
        self._has_rules = bool(child.drop or child.keep)
        drop, keep = child.drop, child.keep
        if isinstance(source.scanner, PageScanner):
            drop, keep = _without_own_attributes(drop, stream), _without_own_attributes(keep, stream)
        # The first excludes an event only if the rules exclude it for any value of the attributes that are not shown.
        # The second excludes it if they do for some value; it is None if both are the same.
        self._rules = _selector(child, keep=keep, sample=None)
        self._strictest = None if (drop, keep) == (child.drop, child.keep) else _selector(child, drop=drop, sample=None)
        self._sampling = _selector(child, drop=[], keep=[])
        # The ids of events decide below this level, and may not be shown.
        self._needs_id_below = 0
        if child.sample is not None and source.scanner.scan_format == PAGES:
            self._needs_id_below = child.sample.below.value

    @property
    def is_certain(self) -> bool:
        """Whether the child should have every event."""
        return self._rules.changes_nothing and self._sampling.changes_nothing

    def expects(self, event: LogEvent, content: Any) -> bool:
        """Return whether the child should have an event, as far as rules and sampling say.

        Args:
            event: The event, as the other child shows it.
            content: The record that it was read from.
        """
        doubt = ""
        if self._has_rules and self._masks.are_in(event):
            # The rules saw the text as it was.
            doubt = f"'drop' or 'keep' may exclude it: '{self._source.name}' shows it with secrets masked"
        elif not self._rules.wants(event):
            return False
        elif self._strictest is not None and not self._strictest.wants(event):
            doubt = f"'drop' or 'keep' may exclude it: '{self._source.name}' does not show its attributes"
        if event.level < self._needs_id_below and not self._shows_uid(event, content):
            doubt = doubt or f"'sample' may exclude it: '{self._source.name}' does not show the event's own id"
        elif not self._sampling.wants(event):
            return False
        if doubt:
            of_writer = self._doubts.setdefault(doubt, {}).setdefault(event.writer, Intervals())
            of_writer.add(event.sequence, event.sequence)
        return True

    def doubt(self, writer: str, sequence: int) -> str:
        """Return why an event was expected that may rightly be missing, in words; empty if there was no doubt."""
        return next((doubt for doubt, found in self._doubts.items() if sequence in found.get(writer, ())), "")

    def _shows_uid(self, event: LogEvent, content: Any) -> bool:
        entry = self._source.scanner.entry_of(content)
        return entry is not None and str(entry.id) == event.uid


def _selector(child: ChildConfig, **changes: Any) -> Processor:
    return child.model_copy(update=changes).create_selector()


def _without_own_attributes(matchers: list[Matcher], stream: Stream) -> list[Matcher]:
    """Return matchers that ask for no attribute of an event: the pages of a reader do not show them."""
    known = stream.attributes
    shown = []
    for matcher in matchers:
        asked = {name: value for name, value in (matcher.attributes or {}).items() if name in known}
        is_shown = asked == (matcher.attributes or {})
        shown.append(matcher if is_shown else matcher.model_copy(update={"attributes": asked or None}))
    return shown
