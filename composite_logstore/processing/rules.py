"""The rules `drop` and `keep`: which events a child does not get.

With `keep`, a child gets only the events that one of its matchers matches; of these, it does not get those that one of
the matchers of `drop` matches. So the order of the matchers does not matter, and `drop` always wins, as in Prometheus'
relabelling, Fluent Bit's grep, and the Collector's include and exclude.

Most events are decided by their logger and level alone, which is remembered. All expressions search a message at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from composite_logstore.ansi import without_escapes
from composite_logstore.event import LogEvent
from composite_logstore.plain import Plain, text_of
from composite_logstore.processing.expressions import ExpressionSet
from composite_logstore.processing.processor import Processed, Step
from composite_logstore.processing.settings import Matcher
from composite_logstore.processing.wildcards import wildcard

_MOST_KINDS = 1_000
"""Of how many pairs of a logger and a level it is remembered which matchers may match."""

KEEP = "keep"
"""The reason for which events are withheld that no matcher of `keep` matches."""

_OF_STREAM = {"source": "zenml.log.source", "step": "zenml.step.run.name", "pipeline": "zenml.pipeline.name"}
"""A field of a matcher → the attribute of the stream that it is about."""


class _Rule:
    """A matcher, ready for use.

    Attributes:
        reason: Why an event is withheld that it matches.
        by_message: The place of its expression among all, None if it has none.
        is_decided: Whether logger and level alone decide.
    """

    def __init__(self, matcher: Matcher, is_keep: bool, reason: str, by_message: int | None) -> None:
        self.reason = reason
        self.by_message = by_message
        self._is_keep = is_keep
        self._level = None if matcher.level is None else matcher.level.value
        self._logger = None if matcher.logger is None else wildcard(matcher.logger)
        of_stream = {name: getattr(matcher, field) for field, name in _OF_STREAM.items()}
        self._of_stream = {name: wildcard(value) for name, value in of_stream.items() if value is not None}
        self._attributes = {name: wildcard(value) for name, value in (matcher.attributes or {}).items()}
        self.is_decided = by_message is None and not self._of_stream and not self._attributes

    def may_match(self, logger: str, level: int) -> bool:
        """Return whether it may match events of a logger and a level."""
        if self._level is not None and (level < self._level if self._is_keep else level > self._level):
            return False
        return self._logger is None or bool(self._logger(logger))

    def matches(self, event: LogEvent, found: Sequence[int]) -> bool:
        """Return whether it matches an event that it may match, apart from its message.

        Args:
            event: The event.
            found: The places of the expressions that match the message.
        """
        if self.by_message is not None and self.by_message not in found:
            return False
        if self._of_stream or self._attributes:
            attributes = event.stream.attributes
            if not _has(attributes, self._of_stream):
                return False
            return not self._attributes or _has(attributes | event.details, self._attributes)
        return True


def _has(attributes: Mapping[str, Plain], wanted: Mapping[str, Callable[[str], object]]) -> bool:
    """Return whether each wanted attribute is there, with a value that fits."""
    return all(name in attributes and fits(text_of(attributes[name])) for name, fits in wanted.items())


class Rules(Step):
    """Withholds the events that `drop` and `keep` exclude."""

    def __init__(self, drop: Sequence[Matcher], keep: Sequence[Matcher]) -> None:
        """Compile the matchers.

        Args:
            drop: The matchers of `drop`.
            keep: The matchers of `keep`; none keeps everything.
        """
        patterns: list[str] = []

        def place_of(pattern: str | None) -> int | None:
            if pattern is None:
                return None
            patterns.append(pattern)
            return len(patterns) - 1

        self._drop = [_Rule(one, False, f"drop.{place}", place_of(one.message)) for place, one in enumerate(drop)]
        self._keep = [_Rule(one, True, KEEP, place_of(one.message)) for one in keep]
        self._expressions = ExpressionSet(patterns)
        self._candidates = lru_cache(maxsize=_MOST_KINDS)(self._candidates_of)

    def process(self, batch: Processed) -> None:
        """Withhold the events that the rules exclude, each for the first matcher of `drop` that matches, or `keep`."""
        kept = []
        for event in batch.events:
            reason = self.reason(event)
            if reason is None:
                kept.append(event)
            else:
                batch.withheld[reason] += 1
        batch.events = kept

    def wants(self, event: LogEvent) -> bool:
        """Return whether the rules let an event pass."""
        return self.reason(event) is None

    def reason(self, event: LogEvent) -> str | None:
        """Return why an event is withheld; None if it is not."""
        reason, drop, keep, needs_message = self._candidates(event.logger_name, event.level)
        if reason is not None or (not drop and keep is None):
            return reason
        found: Sequence[int] = ()
        if needs_message:
            # As a reader shows it, so that a comparison decides alike.
            text = event.message if event.exception is None else event.text
            found = self._expressions.matching(without_escapes(text) if "\x1b" in text or "\x9b" in text else text)
        for rule in drop:
            if rule.matches(event, found):
                return rule.reason
        return KEEP if keep is not None and not any(rule.matches(event, found) for rule in keep) else None

    def _candidates_of(self, logger: str, level: int) -> tuple[str | None, list[_Rule], list[_Rule] | None, bool]:
        """Return what the rules say about all events of a logger and a level.

        Returns:
            Why they are withheld, if all are; the matchers of `drop` that may match them; those of `keep` of which one
            has to, None if none has to; and whether any of these asks for the message.
        """
        drop = [rule for rule in self._drop if rule.may_match(logger, level)]
        if drop and drop[0].is_decided:
            return drop[0].reason, [], None, False
        keep: list[_Rule] | None = [rule for rule in self._keep if rule.may_match(logger, level)]
        if not self._keep or any(rule.is_decided for rule in keep or ()):
            keep = None
        if keep == [] and not drop:
            return KEEP, [], None, False
        return None, drop, keep, any(rule.by_message is not None for rule in [*drop, *(keep or ())])
