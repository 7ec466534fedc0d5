"""The rules `drop` and `keep`: which events a child does not get.

With `keep`, a child gets only the events that one of its matchers matches; of these, it does not get those that one of
the matchers of `drop` matches. So the order of the matchers does not matter, and `drop` always wins, as in Prometheus'
relabelling, Fluent Bit's grep, and the Collector's include and exclude.

Most events are decided by their logger and level alone, which is remembered. All expressions search a message at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from composite_logstore.ansi import without_escapes
from composite_logstore.event import LogEvent, Stream
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
        asks_stream: Whether it asks for attributes of the stream.
        asks_event: Whether it asks for attributes that an event may have itself.
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
        self.asks_event = bool(self._attributes)
        self.asks_stream = self.asks_event or bool(self._of_stream)
        self.is_decided = by_message is None and not self.asks_stream

    def may_match(self, logger: str, level: int) -> bool:
        """Return whether it may match events of a logger and a level."""
        if self._level is not None and (level < self._level if self._is_keep else level > self._level):
            return False
        return self._logger is None or bool(self._logger(logger))

    def fits(self, of_stream: Mapping[str, Plain], of_event: Mapping[str, Plain]) -> bool:
        """Return whether the attributes are those that it asks for.

        Args:
            of_stream: The attributes of the stream, if it asks for them.
            of_event: Those of the stream and the event together, if it asks for them.
        """
        return _has(of_stream, self._of_stream) and _has(of_event, self._attributes)


class _Candidates(NamedTuple):
    """What the rules say about all events of a logger and a level.

    Attributes:
        reason: Why they are withheld, if all are.
        drop: The matchers of `drop` that may match them.
        keep: Those of `keep` of which one has to match, None if none has to.
        asks_message: Whether one of these asks for the message.
        asks_stream: Whether one of these asks for attributes of the stream.
        asks_event: Whether one of these asks for attributes of the event.
    """

    reason: str | None = None
    drop: Sequence[_Rule] = ()
    keep: Sequence[_Rule] | None = None
    asks_message: bool = False
    asks_stream: bool = False
    asks_event: bool = False


def _has(attributes: Mapping[str, Plain], wanted: Mapping[str, Callable[[str], object]]) -> bool:
    """Return whether each wanted attribute is there, with a value that fits."""
    # A generator would cost more than the rest.
    for name, fits in wanted.items():  # noqa: SIM110
        if name not in attributes or not fits(text_of(attributes[name])):
            return False
    return True


def _first_of(
    rules: Sequence[_Rule], found: Sequence[int], of_stream: Mapping[str, Plain], of_event: Mapping[str, Plain]
) -> _Rule | None:
    """Return the first rule that matches an event, of those that its logger and level leave; None if none does."""
    for rule in rules:
        if (rule.by_message is None or rule.by_message in found) and rule.fits(of_stream, of_event):
            return rule
    return None


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
        # The attributes of the streams of a batch: ZenML may add some between two batches.
        self._of_streams: dict[Stream, dict[str, Plain]] = {}
        self._candidates = lru_cache(maxsize=_MOST_KINDS)(self._candidates_of)

    def process(self, batch: Processed) -> None:
        """Withhold the events that the rules exclude, each for the first matcher of `drop` that matches, or `keep`."""
        kept = []
        self._of_streams.clear()
        for event in batch.events:
            reason = self._reason(event)
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
        self._of_streams.clear()
        return self._reason(event)

    def _reason(self, event: LogEvent) -> str | None:
        candidates = self._candidates(event.logger_name, event.level)
        keep = candidates.keep
        if candidates.reason is not None or (not candidates.drop and keep is None):
            return candidates.reason
        found: Sequence[int] = ()
        if candidates.asks_message:
            # As a reader shows it, so that a comparison decides alike.
            text = event.message if event.exception is None else event.text
            found = self._expressions.matching(without_escapes(text))
        of_stream: Mapping[str, Plain] = {}
        of_event: Mapping[str, Plain] = {}
        if candidates.asks_stream:
            of_stream = self._attributes_of(event.stream)
        if candidates.asks_event:
            of_event = {**of_stream, **event.details}
        rule = _first_of(candidates.drop, found, of_stream, of_event)
        if rule is not None:
            return rule.reason
        return KEEP if keep is not None and _first_of(keep, found, of_stream, of_event) is None else None

    def _attributes_of(self, stream: Stream) -> dict[str, Plain]:
        known = self._of_streams.get(stream)
        if known is None:
            known = self._of_streams[stream] = stream.attributes
        return known

    def _candidates_of(self, logger: str, level: int) -> _Candidates:
        drop = [rule for rule in self._drop if rule.may_match(logger, level)]
        if drop and drop[0].is_decided:
            return _Candidates(drop[0].reason)
        keep: list[_Rule] | None = [rule for rule in self._keep if rule.may_match(logger, level)]
        if not self._keep or any(rule.is_decided for rule in keep or ()):
            keep = None
        if keep == [] and not drop:
            return _Candidates(KEEP)
        rules = [*drop, *(keep or ())]
        return _Candidates(
            None,
            drop,
            keep,
            any(rule.by_message is not None for rule in rules),
            any(rule.asks_stream for rule in rules),
            any(rule.asks_event for rule in rules),
        )
