"""Explains what the settings of a child do to a sample of events, before they are switched on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from composite_logstore import secret_references
from composite_logstore.ansi import without_escapes
from composite_logstore.backend import RetryableError, UnavailableError
from composite_logstore.capture.record import note, numbered
from composite_logstore.catalog.errors import ArgumentError, NoAnswerError, nearest
from composite_logstore.catalog.stores import RegisteredStore, collectors, find_store, open_child
from composite_logstore.child_config import ChildConfig
from composite_logstore.child_types import parse_child
from composite_logstore.delivery.progress_bars import at_info
from composite_logstore.event import LogEvent, Stream
from composite_logstore.operations.copying import stream_of
from composite_logstore.operations.progress import ProgressCallback, Reporter
from composite_logstore.operations.selection import Selection
from composite_logstore.parity.scan import as_event, is_foreseen
from composite_logstore.processing.repeats import REASON as REPEATS
from composite_logstore.processing.rules import KEEP

if TYPE_CHECKING:
    from composite_logstore.parity.scan import Source

MOST_EVENTS = 10_000
"""How many events a sample has at most."""

MOST_BYTES = 16 * 1024 * 1024
"""Roughly how many bytes of events a sample has at most. The event that exceeds it is its last."""

_EXAMPLES = 3
_EXAMPLE_CHARACTERS = 200
_BEFORE = 12
_WRITER = "0" * 15
_TIME = 1_700_000_000_000_000_000


@dataclass
class Effect:
    """What one rule does to the events of a sample.

    Attributes:
        rule: The rule, by the name under which `stats()` counts it, or the name of what is masked.
        events: The number of events that it applies to.
        bytes: Roughly how many bytes these have.
        examples: The beginnings of some of them, as the child would get them: what `redact` masks is masked.
    """

    rule: str
    events: int = 0
    bytes: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, size: int, example: str) -> None:
        """Count an event."""
        self.events += 1
        self.bytes += size
        if len(self.examples) < _EXAMPLES and example not in self.examples:
            self.examples.append(example)


@dataclass
class Explanation:
    """What the settings of a child do to a sample of events.

    Attributes:
        child: The child's name.
        events: The number of events in the sample.
        bytes: Roughly how many bytes these have.
        is_whole: Whether the sample is everything that there is.
        sent: What the child gets.
        withheld: What it does not get, for each of its rules in their order, also for those that withhold nothing.
        redacted: What is masked in the events that it gets, for each name; also for own patterns that match nothing.
        notes: What the numbers leave out: sentences without full stops.
    """

    child: str
    events: int = 0
    bytes: int = 0
    is_whole: bool = True
    sent: Effect = field(default_factory=lambda: Effect("sent"))
    withheld: list[Effect] = field(default_factory=list)
    redacted: list[Effect] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def saved_events(self) -> float:
        """Which part of the events the child does not get, from 0 to 1."""
        return max(0.0, 1 - self.sent.events / self.events) if self.events else 0.0

    @property
    def saved_bytes(self) -> float:
        """Which part of the bytes the child does not get, from 0 to 1."""
        return max(0.0, 1 - self.sent.bytes / self.bytes) if self.bytes else 0.0


def explain(
    store: str,
    child: str,
    *,
    run: str | None = None,
    lines: Iterable[str] | None = None,
    children: Any = None,
    progress: ProgressCallback | None = None,
) -> Explanation:
    """Explain what the settings of a child do to events of a run, or to lines, and send nothing.

    The events pass through the steps that the child's worker takes. At most 10,000 events and about 16 MiB are looked
    at. With `children` and `lines`, ZenML is not asked: then the log store need not exist yet.

    Examples:
        >>> found = explain("logs", "live", run="train-1", children=[
        ...     {"name": "live", "type": "artifact", "drop": [{"message": "epoch 1"}]}])
        >>> found.events, found.sent.events, [(one.rule, one.events) for one in found.withheld]
        (3, 2, [('drop.0', 1)])

    Args:
        store: The log store's name or id.
        child: The child's name.
        run: The name or id of a run, whose events are read from the primary.
        lines: Lines of text, as if a step had printed them, or lines of JSON that `composite-logstore logs` has
            printed, which keep their level, logger, step, source and time.
        children: Settings to use in place of the registered ones: a list of children, or an object with `children`.
        progress: Is told how far the reading is.

    Raises:
        ArgumentError: There is no such log store, child or run, neither `run` nor `lines` is given or both are, the
            settings are wrong, or the primary cannot be read.
        NoAnswerError: ZenML or the primary cannot be reached.
    """
    if (run is None) == (lines is None):
        raise ArgumentError("run", "name a run, or give lines, but not both")
    config = _chosen(children, child) if children is not None else None
    found = find_store(store) if config is None or run is not None else None
    if config is None:
        assert found is not None
        config = found.child(child)
    result = Explanation(child)
    result.notes += _notes(config, is_of_lines=lines is not None)
    if run is not None and found is not None and not found.child(found.config.primary).wants_all:
        result.notes.append(f"The primary '{found.config.primary}', which is read, does not get every event itself")
    sample = _Sample(result, _resolved(config, found, result))
    if lines is not None:
        sample.take(_events_of(lines))
    else:
        assert found is not None
        assert run is not None
        _take_run(sample, found, run, Reporter(progress))
    sample.end()
    return result


def _chosen(children: Any, name: str) -> ChildConfig:
    raw = children.get("children") if isinstance(children, dict) else children
    if not isinstance(raw, list):
        raise ArgumentError("children", "the settings must be a list of children, or an object with 'children'")
    names = []
    for number, one in enumerate(raw, start=1):
        named = one.get("name") if isinstance(one, dict) else None
        names.append(str(named))
        if named == name:
            try:
                return parse_child(number, one)
            except ValueError as error:
                raise ArgumentError("children", str(error)) from None
    raise ArgumentError("child", f"the settings have no child '{name}'{nearest(name, names)}")


def _notes(config: ChildConfig, is_of_lines: bool) -> Iterator[str]:
    if not config.enabled:
        yield f"Child '{config.name}' is disabled, so it gets nothing at present"
    for odd in config.odd_rules:
        yield f"Child '{config.name}': {odd}"
    if config.budget is not None:
        yield "'budget' is not computed: it depends on the other events that the child gets"
    if config.is_thinned:
        yield "'progress' is not computed: which updates of a progress bar it gets depends on the moment"
    if is_of_lines and config.collapse_repeats is not None:
        yield "Lines without a time count as logged at the same time"
    if config.redact is not None and config.redact.secrets:
        yield "Secrets that a step resolves itself are unknown here, and not masked"


def _resolved(config: ChildConfig, found: RegisteredStore | None, result: Explanation) -> ChildConfig:
    """Return the settings with secrets resolved, which are masked then, if ZenML may be asked for them."""
    if config.redact is None or not config.redact.secrets or next(secret_references.references(config), None) is None:
        return config
    if found is None:
        result.notes.append("Secrets that the settings refer to are not masked: ZenML is not asked")
        return config
    try:
        return secret_references.resolve(config)
    except UnavailableError as error:
        result.notes.append(f"Secrets that the settings refer to are not masked here: {str(error).rstrip('.')}")
        return config


class _Sample:
    """Events on their way through the steps of a child."""

    def __init__(self, result: Explanation, config: ChildConfig) -> None:
        self._result = result
        self._config = config
        self._processor = config.create_processor()
        # What is withheld is shown, too, and it may hold a secret.
        shows_all: dict[str, Any] = {"drop": [], "keep": [], "sample": None, "collapse_repeats": None}
        self._masker = config.model_copy(update=shows_all).create_processor()
        rules = ["min_level"] if config.min_level else []
        rules += [f"drop.{place}" for place, _ in enumerate(config.drop)]
        rules += [name for name, is_set in ((KEEP, config.keep), ("sample", config.sample)) if is_set]
        rules += [REPEATS] if config.collapse_repeats else []
        self._withheld = {rule: Effect(rule) for rule in rules}
        patterns = config.redact.patterns if config.redact else []
        self._redacted = {pattern.name: Effect(pattern.name) for pattern in patterns}

    @property
    def room(self) -> int:
        """How many more events are taken."""
        return MOST_EVENTS - self._result.events if self._result.bytes < MOST_BYTES else 0

    def take(self, events: Iterable[LogEvent], most: int = MOST_EVENTS) -> None:
        """Take in events, at most so many, until the sample is full.

        Raises:
            NoAnswerError: ZenML cannot be asked which secrets to mask, or the events cannot be processed.
        """
        for taken, event in enumerate(events):
            if taken >= most or not self.room:
                self._result.is_whole = False
                return
            try:
                self._take(event)
            except RetryableError as error:
                raise NoAnswerError(str(error)) from error

    def _take(self, event: LogEvent) -> None:
        size = event.size
        self._result.events += 1
        self._result.bytes += size
        # An event at a time, so that it is known which one a rule is about.
        masked = self._masker.process([event]).events[0].text
        example = _excerpt(masked, event.text)
        if not self._config.wants(event.level, bool(event.progress)):
            self._withheld["min_level"].add(size, example)
            return
        if event.progress and self._config.is_thinned:
            event = at_info(event)
        batch = self._processor.process([event])
        self._processor.commit(batch)
        for reason in batch.withheld:
            self._withheld[reason].add(size, example)
        for sent in batch.events:
            self._result.sent.add(sent.size, example)
            hint = " (in an attribute)" if masked == event.text else ""
            for name in batch.redacted:
                self._redacted.setdefault(name, Effect(name)).add(sent.size, f"{example}{hint}")

    def end(self) -> None:
        """Put down the result."""
        self._result.withheld = list(self._withheld.values())
        self._result.redacted = sorted(self._redacted.values(), key=lambda effect: -effect.events)


def _excerpt(text: str, logged: str) -> str:
    """Return a part of a text on one line: its beginning, or where it was masked if that is beyond the beginning."""
    begin = 0
    if logged and text != logged:
        same = next((place for place, (a, b) in enumerate(zip(text, logged, strict=False)) if a != b), 0)
        begin = max(0, same - _BEFORE)
    shown = text[begin : begin + 2 * _EXAMPLE_CHARACTERS]
    shown = " ".join(without_escapes(shown).split())
    more = "…" if len(shown) > _EXAMPLE_CHARACTERS or begin + 2 * _EXAMPLE_CHARACTERS < len(text) else ""
    return f"{'…' if begin else ''}{shown[:_EXAMPLE_CHARACTERS]}{more}"


def _take_run(sample: _Sample, found: RegisteredStore, run: str, report: Reporter) -> None:
    """Take in events of a run. Each of its streams gets the same share of the sample, as far as it has so many."""
    primary = found.readable_child(found.config.primary)
    streams = list(Selection(run).streams(collectors(found, [primary]), report))
    source = open_child(primary)
    try:
        for place, stream in enumerate(streams):
            share = max(1, sample.room // (len(streams) - place))
            sample.take(_read(source, stream, found), share)
    finally:
        source.close()


def _read(source: Source, stream: Any, found: RegisteredStore) -> Iterator[LogEvent]:
    from zenml.exceptions import DoesNotExistException

    of = stream_of(stream, found)
    ordinal = 0
    try:
        for chunk in source.scanner.scan(stream.logs):
            for content in chunk.contents:
                event = as_event(source.scanner, content, of, ordinal)
                ordinal += not chunk.writer
                if event is not None:
                    yield event
    except DoesNotExistException:
        return
    except Exception as error:
        why = error if is_foreseen(error) else type(error).__name__
        raise NoAnswerError(f"child '{source.name}' could not be read: {why}") from error


def _events_of(lines: Iterable[str]) -> Iterator[LogEvent]:
    """Yield the lines as events of streams that exist nowhere."""
    streams: dict[tuple[str, str], Stream] = {}
    for number, line in enumerate(lines):
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        logged = _logged(text)
        step, source = _text(logged, "step"), _text(logged, "source") or "step"
        if (step, source) not in streams:
            named = {"zenml.step.run.name": step} if step else {}
            streams[step, source] = Stream(uuid4(), {"zenml.log.source": source, **named})
        level = logging.getLevelName({"WARN": "WARNING"}.get(name := _text(logged, "level").upper(), name))
        record = logging.LogRecord(
            _text(logged, "logger") or "stdout",
            level if isinstance(level, int) else logging.INFO,
            _text(logged, "file"),
            0,
            _text(logged, "message") if logged else text,
            (),
            None,
        )
        event = numbered(note(record), streams[step, source], _WRITER, number, number)
        yield event._replace(time_unix_nano=_time_of(_text(logged, "timestamp")))


def _logged(text: str) -> dict[str, Any]:
    """Return an entry that `composite-logstore logs` has printed as JSON; nothing for any other text."""
    if not text.startswith("{"):
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("message"), str) and "logger" in found else {}


def _text(logged: dict[str, Any], key: str) -> str:
    value = logged.get(key)
    return value if isinstance(value, str) else ""


def _time_of(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
        since = moment.astimezone(timezone.utc) - datetime(1970, 1, 1, tzinfo=timezone.utc)
    except (ValueError, OverflowError):
        return _TIME
    return int(since.total_seconds() * 1e9)
