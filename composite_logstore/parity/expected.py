"""What a child should have of the events that another child shows, by the rules in its settings."""

from __future__ import annotations

from typing import Any

from composite_logstore.backend import PAGES
from composite_logstore.config import ChildConfig
from composite_logstore.event import LogEvent, Stream
from composite_logstore.parity.scan import PageScanner, Source


class Expectation:
    """Whether the rules and the sampling of one child let the events of another pass.

    Where what the other child shows does not tell, they are expected: it is better to report an event that may rightly
    be missing than to be silent about one that is lost.

    Attributes:
        doubt: Why an event was expected that may rightly be missing, in words; empty if there was no doubt.
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
        self.doubt = ""
        if isinstance(source.scanner, PageScanner):
            child = _without_own_attributes(child, stream)
        self._has_rules = bool(child.drop or child.keep)
        self._rules = child.model_copy(update={"sample": None}).create_selector()
        self._sampling = child.model_copy(update={"drop": [], "keep": []}).create_selector()
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
        if self._has_rules and self._masks.are_in(event):
            # The rules saw the text as it was.
            self.doubt = f"'drop' or 'keep' may exclude it: '{self._source.name}' shows it with secrets masked"
            return True
        if not self._rules.wants(event):
            return False
        if event.level < self._needs_id_below and not self._shows_uid(event, content):
            self.doubt = f"'sample' may exclude it: '{self._source.name}' does not show the event's own id"
            return True
        return self._sampling.wants(event)

    def _shows_uid(self, event: LogEvent, content: Any) -> bool:
        entry = self._source.scanner.entry_of(content)
        return entry is not None and str(entry.id) == event.uid


def _without_own_attributes(child: ChildConfig, stream: Stream) -> ChildConfig:
    """Return settings whose `keep` asks for no attribute of an event: the pages of a reader do not show them."""
    known = stream.attributes
    keep = []
    for matcher in child.keep:
        asked = {name: value for name, value in (matcher.attributes or {}).items() if name in known}
        keep.append(matcher.model_copy(update={"attributes": asked or None}))
    return child.model_copy(update={"keep": keep})
