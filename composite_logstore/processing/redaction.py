"""The step that masks secrets and keys, before a batch leaves for the backend.

Texts are scanned several at a time with one expression for everything that is looked for. Only where that finds
something is it asked what, and where. So an event without a secret costs a fraction of a microsecond.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast
from uuid import UUID
from weakref import WeakKeyDictionary

from zenml.logger import get_logger

from composite_logstore.ansi import ESCAPE
from composite_logstore.event import ExceptionInfo, LogEvent, Stream
from composite_logstore.plain import Plain
from composite_logstore.processing.expressions import ExpressionSet, any_of, compiled, literally
from composite_logstore.processing.key_formats import FORMATS
from composite_logstore.processing.known_secrets import KnownSecrets, known_secrets
from composite_logstore.processing.processor import Processed, Step
from composite_logstore.processing.settings import RedactSettings, placeholder
from composite_logstore.secret_forms import LONGEST, SHORTEST
from composite_logstore.service import tell

logger = get_logger(__name__)

REDACTED = "zenml.log.redacted"
"""The attribute of a redacted event: the names of what was masked in it."""
SECRET = "secret"
"""The name under which the values of secrets are masked."""
PRIVATE_KEY = "private_key"
"""The name of the format of private keys, which may be printed line by line."""

MOST_LINES = 200
"""So many events after the first line of a private key may be further lines of it."""

# After so many matches of one kind the rest of a text is masked: the search for each may take time for all of it.
_MOST_MATCHES = 1_000
_CHUNK = 16
_MOST_PLACES = 1_000
_MOST_BLOCKS = 64
_ROUNDS = 3
# With one of these, an expression may match only at the edge of a text, so it has to search each text by itself.
_EDGES = ("^", "$", r"\A", r"\z", r"\B")
_BEGINS = re.compile(r"-----BEGIN (?:[A-Z0-9]+ ){0,4}PRIVATE KEY(?: BLOCK)?-----")
_ENDS = re.compile(r"-----END (?:[A-Z0-9]+ ){0,4}PRIVATE KEY")
_KEY_LINE = re.compile(r"\W*[A-Za-z0-9+/]+={0,2}\W*")
_MASKED_SOMEWHERE = re.compile(r"\[redacted:[a-z0-9_-]+\]")
_MASKED = re.compile(r"\*+|\[redacted:[a-z0-9_-]+\]")
# In the metadata of an event between two steps, and never in what a child gets.
_KEY_LINE_MARK = "zenml.log.key_line"

Pieces = Callable[[str], Sequence[str]]
"""Returns the pieces of a text between which something is masked: the text as a whole if nothing is."""

_IDS = frozenset({"log.record.uid", "zenml.log.writer", "zenml.log.sequence"})


class _Rule(NamedTuple):
    """Something to look for.

    Attributes:
        name: Its name.
        expression: How to find it.
        group: The number of the group that is masked, 0 for the whole match.
        replacement: What replaces it.
    """

    name: str
    expression: Any
    group: int
    replacement: str


class _Span(NamedTuple):
    """A part of a text that is masked. Earlier parts come first, and of two that begin together the longer one."""

    begin: int
    minus_end: int
    name: str
    replacement: str


class Redactor:
    """Masks texts, and values of attributes, by one child's settings."""

    def __init__(self, settings: RedactSettings, secrets: KnownSecrets = known_secrets) -> None:
        self._secrets = secrets if settings.secrets else KnownSecrets()
        self._rules: list[_Rule] = []
        self._patterns: list[str] = []
        for one in FORMATS:
            if settings.formats == "all" or one.name in settings.formats:
                self._add(one.name, one.pattern, placeholder(one.name))
        # Without groups, RE2 finds a match in its fastest way. An own pattern may have this text in another meaning.
        self._patterns = [pattern.replace("(?P<secret>", "(?:") for pattern in self._patterns]
        for own in settings.patterns:
            self._add(own.name, own.pattern, own.masked_as)
        self.sees_edges = any(edge in own.pattern for own in settings.patterns for edge in _EDGES)
        self._which = ExpressionSet(self._patterns)
        self._forms: list[str] = []
        self._version = -1
        self._scan: Any = None
        self._scan_forms: Any = None
        self.refresh()

    def _add(self, name: str, pattern: str, replacement: str) -> None:
        expression = compiled(pattern)
        self._rules.append(_Rule(name, expression, expression.groupindex.get("secret", 0), replacement))
        self._patterns.append(pattern)

    def refresh(self) -> bool:
        """Take in secrets that have become known since, and return whether there are any."""
        if self._version == self._secrets.version:
            return False
        self._version = self._secrets.version
        self._forms = self._secrets.forms
        literals = list(map(literally, self._forms))
        self._scan_forms = any_of(literals) if literals else None
        self._scan = any_of(self._patterns + literals) if literals or self._patterns else None
        return True

    def finds(self, text: str) -> bool:
        """Return whether there may be something to mask in a text, or in several that are joined by line breaks."""
        if self._scan is None:
            return False
        return self._scan.search(text) is not None or "\x1b" in text or "\x9b" in text

    def redact(self, text: str) -> tuple[str, frozenset[str]]:
        """Return a text with everything masked, and the names of what was masked; the text itself if that is nothing.

        Where matches overlap, all of them are masked as one, by the replacement of the first.
        """
        names: set[str] = set()
        for _ in range(_ROUNDS):
            spans = sorted(self._spans(text)) if self.finds(text) else []
            if not spans:
                break
            names.update(span.name for span in spans)
            text = _masked(text, spans)
            # What remains may be a secret once more, if the text between its parts was masked by nothing.
            if not self._has_secret(text):
                break
        else:
            text = placeholder(SECRET)
        return text, frozenset(names)

    def _has_secret(self, text: str) -> bool:
        return self._scan_forms is not None and self._scan_forms.search(text) is not None

    def _spans(self, text: str) -> Iterator[_Span]:
        yield from self._spans_in(text)
        # Colours may begin and end in the middle of a secret.
        bare = ESCAPE.sub("", text) if "\x1b" in text or "\x9b" in text else text
        if len(bare) < len(text) and (spans := list(self._spans_in(bare))):
            wanted = sorted({place for span in spans for place in (span.begin, -span.minus_end - 1)})
            places = dict(zip(wanted, _with_escapes(text, wanted), strict=True))
            for span in spans:
                yield span._replace(begin=places[span.begin], minus_end=-places[-span.minus_end - 1] - 1)

    def _spans_in(self, text: str) -> Iterator[_Span]:
        for form in self._forms if self._has_secret(text) else ():
            for number, begin in enumerate(_occurrences(form, text), start=1):
                is_last = number == _MOST_MATCHES
                yield _Span(begin, -len(text) if is_last else -begin - len(form), SECRET, placeholder(SECRET))
                if is_last:
                    break
        for place in self._which.matching(text):
            rule = self._rules[place]
            for number, match in enumerate(rule.expression.finditer(text), start=1):
                begin, end = match.span(rule.group)
                if begin < 0:
                    begin, end = match.span()
                is_last = number == _MOST_MATCHES
                if is_last:
                    end = len(text)
                if begin < end and not _MASKED.fullmatch(text, begin, end):
                    yield _Span(begin, -end, rule.name, rule.replacement)
                if is_last:
                    break

    def value(self, value: Plain, names: set[str]) -> Plain:
        """Return a value of an attribute with everything masked in it, also in nested names and values.

        Args:
            value: The value.
            names: The names of what was masked are added to it.
        """
        if isinstance(value, str):
            text, found = self.redact(value)
            names |= found
            return text
        if isinstance(value, dict):
            return self.mapping(value, names)
        if isinstance(value, list):
            return [self.value(item, names) for item in value]
        if isinstance(value, int | float) and not isinstance(value, bool):
            text, found = self.redact(str(value))
            names |= found
            return text if found else value
        return value

    def mapping(self, values: Mapping[str, Plain], names: set[str]) -> dict[str, Plain]:
        """Return attributes with everything masked in them but ids.

        Args:
            values: The attributes.
            names: The names of what was masked are added to it.
        """
        masked: dict[str, Plain] = {}
        for key, value in values.items():
            if _is_id(key, value):
                masked[key] = value
                continue
            name, found = self.redact(key)
            names |= found
            while found and (name in masked or name in values):
                name += "_"
            masked[name] = self.value(value, names)
        return masked


class MarkKeyLines(Step):
    """Marks the lines of private keys for `Redact`, before other steps withhold the first line that tells them."""

    def __init__(self) -> None:
        # A stream, a writer and a logger → the number of the event with the first line of a private key → of the one
        # with the last. Deliveries repeat events, so these are not a state that moves.
        self._blocks: OrderedDict[tuple[UUID, str, str], dict[int, int]] = OrderedDict()

    def process(self, batch: Processed) -> None:
        """Mark them."""
        if self._blocks or any("-----" in event.message for event in batch.events):
            batch.events = [
                event._replace(metadata={**event.metadata, _KEY_LINE_MARK: True}) if self._is_line(event) else event
                for event in batch.events
            ]

    def _is_line(self, event: LogEvent) -> bool:
        """Return whether an event is a line of a private key whose first line was another event.

        Of what else is logged meanwhile only lines that look alike are masked, too.
        """
        key = event.stream.id, event.writer, event.logger_name
        begins = [match.end() for match in _BEGINS.finditer(event.message)] if "-----" in event.message else []
        if begins and not _ENDS.search(event.message, begins[-1]):
            blocks = self._blocks.setdefault(key, {})
            blocks[event.sequence] = event.sequence + MOST_LINES
            if len(blocks) > _MOST_BLOCKS:
                del blocks[min(blocks)]
            self._blocks.move_to_end(key)
            if len(self._blocks) > _MOST_BLOCKS:
                self._blocks.popitem(last=False)
            return False
        blocks = self._blocks.get(key, {})
        first = max((first for first in blocks if first < event.sequence), default=None)
        if first is None or event.sequence > blocks[first]:
            return False
        if _ENDS.search(event.message):
            blocks[first] = event.sequence
            return False
        return _KEY_LINE.fullmatch(event.message) is not None


class Redact(Step):
    """Masks secrets and keys in each event of a batch, and the lines of private keys that `MarkKeyLines` has marked."""

    def __init__(self, settings: RedactSettings, secrets: KnownSecrets = known_secrets) -> None:
        """Prepare. The arguments are those of `Redactor`."""
        self._redactor = Redactor(settings, secrets)
        self._secrets = secrets
        self._masks_secrets = settings.secrets
        self._told: set[str] = set()
        self._places: dict[tuple[str, str, str, str], tuple[tuple[str, str, str, str], frozenset[str]]] = {}
        # A stream → its attributes when they were last masked, and the names of what was masked in them.
        self._of_streams: WeakKeyDictionary[Stream, tuple[dict[str, Plain], set[str]]] = WeakKeyDictionary()
        self._streams: WeakKeyDictionary[Stream, Stream] = WeakKeyDictionary()

    def process(self, batch: Processed) -> None:
        """Mask everything, and count the events by the names of what was masked."""
        of_batch = {event.stream for event in batch.events}
        if self._masks_secrets:
            for stream in of_batch:
                self._secrets.learn(stream)
        if self._redactor.refresh():
            self._places.clear()
            self._of_streams.clear()
        if self._masks_secrets and len(self._secrets.ignored) > len(self._told):
            self._warn()
        streams: dict[Stream, tuple[Stream, set[str]]] = {}
        for stream in of_batch:
            if (masked := self._stream(stream)) is not None:
                streams[stream] = masked
        events: list[LogEvent] = []
        for begin in range(0, len(batch.events), _CHUNK):
            chunk = batch.events[begin : begin + _CHUNK]
            if streams or self._may_change(chunk):
                for event in chunk:
                    changed, names = self._event(event, streams)
                    events.append(changed)
                    batch.redacted.update(names)
            else:
                events += chunk
        batch.events = events

    def _warn(self) -> None:
        """Say which secrets are not masked, each once."""
        ignored = [name for name in self._secrets.ignored if name not in self._told]
        self._told.update(ignored)
        for name in ignored[:10]:
            tell(
                logger.warning,
                f"the value of %s is not redacted as a whole: it has less than {SHORTEST} characters, or a line of "
                f"more than {LONGEST:,}, or is one of too many",
                name,
            )

    def _may_change(self, chunk: Sequence[LogEvent]) -> bool:
        """Return whether some event of a chunk may have something to mask."""
        texts: list[str] = []
        for event in chunk:
            texts.append(event.message)
            if not event.is_ordinary:
                if _KEY_LINE_MARK in event.metadata:
                    return True
                texts += event.exception or ()
                for attributes in (event.attributes, event.metadata):
                    texts += _texts(attributes)
            if self._place(event)[1]:
                return True
        finds = self._redactor.finds
        return any(map(finds, texts)) if self._redactor.sees_edges else finds("\n".join(texts))

    def _place(self, event: LogEvent) -> tuple[tuple[str, str, str, str], frozenset[str]]:
        """Return the logger, level, file and function of an event, masked. They repeat, so they are remembered."""
        place = event.logger_name, event.level_name, event.file, event.function
        known = self._places.get(place)
        if known is None:
            found: set[str] = set()
            masked = []
            for text in place:
                text, names = self._redactor.redact(text)
                masked.append(text)
                found |= names
            known = (masked[0], masked[1], masked[2], masked[3]), frozenset(found)
            if len(self._places) >= _MOST_PLACES:
                self._places.clear()
            self._places[place] = known
        return known

    def _event(self, event: LogEvent, streams: Mapping[Stream, tuple[Stream, set[str]]]) -> tuple[LogEvent, set[str]]:
        """Return an event with everything masked, and the names of what was masked; the event itself if nothing was."""
        names: set[str] = set()
        redactor = self._redactor
        message, found = redactor.redact(event.message)
        names |= found
        if _KEY_LINE_MARK in event.metadata:
            message = placeholder(PRIVATE_KEY)
            names.add(PRIVATE_KEY)
        exception = event.exception
        if exception is not None:
            masked = [redactor.redact(text) for text in exception]
            names.update(*(found for _, found in masked))
            exception = ExceptionInfo(*(text for text, _ in masked))
        attributes, metadata = event.attributes, event.metadata
        if attributes:
            attributes = redactor.mapping(attributes, names)
        if metadata:
            metadata = redactor.mapping(metadata, names)
            metadata.pop(_KEY_LINE_MARK, None)
        place, found = self._place(event)
        names |= found
        stream = event.stream
        if stream in streams:
            stream, of_stream = streams[stream]
            names |= of_stream
        if not names:
            return event, names
        logger_name, level_name, file, function = place
        before = event.metadata.get(REDACTED, event.attributes.get(REDACTED))
        known = {name for name in before if isinstance(name, str)} if isinstance(before, list) else set()
        return event._replace(
            stream=stream,
            message=message,
            exception=exception,
            attributes=attributes,
            metadata={**metadata, REDACTED: cast(Plain, sorted(names | known))},
            logger_name=logger_name,
            level_name=level_name,
            file=file,
            function=function,
        ), names

    def _stream(self, stream: Stream) -> tuple[Stream, set[str]] | None:
        """Return a stream with its attributes masked, and the names of what was masked. None if nothing was."""
        attributes = stream.attributes
        before, names = self._of_streams.get(stream, ({}, set()))
        if attributes != before:
            names = set()
            metadata = self._redactor.mapping(attributes, names)
            if names:
                masked = Stream(stream.id, {}, stream.artifact_store_id, stream.stderr_level)
                self._streams.setdefault(stream, masked).metadata = metadata
            self._of_streams[stream] = attributes, names
        return (self._streams[stream], names) if names else None


def _with_escapes(text: str, places: Sequence[int]) -> Iterator[int]:
    """Yield where characters are in a text, given their ascending places in the text without its escape sequences."""
    escapes = ESCAPE.finditer(text)
    escape = next(escapes, None)
    before = 0
    for place in places:
        while escape is not None and escape.start() <= place + before:
            before += escape.end() - escape.start()
            escape = next(escapes, None)
        yield place + before


def _occurrences(part: str, text: str) -> Iterator[int]:
    """Yield where a part begins in a text, also where two of them overlap."""
    begin = text.find(part)
    while begin >= 0:
        yield begin
        begin = text.find(part, begin + 1)


class Masks:
    """Tells what is masked in the events that a child shows."""

    def __init__(self, settings: RedactSettings | None, shows_attributes: bool) -> None:
        """Prepare.

        Args:
            settings: The child's redaction as it is now; None if it has none.
            shows_attributes: Whether its events come with their attributes, which say what was masked.
        """
        own = settings.patterns if settings is not None else []
        self._known = {SECRET, *(one.name for one in FORMATS), *(one.name for one in own)}
        replacements = [re.escape(one.masked_as) for one in own]
        self._mask = re.compile("|".join([_MASKED_SOMEWHERE.pattern, *sorted(replacements, key=len, reverse=True)]))
        self._shows_attributes = shows_attributes

    def are_in(self, event: LogEvent) -> bool:
        """Return whether something in an event may be masked."""
        if self._shows_attributes:
            return REDACTED in event.metadata or REDACTED in event.attributes
        return self._mask.search(event.text) is not None

    def pieces_of(self, event: LogEvent) -> Pieces:
        """Return what tells the pieces of the event's texts between which something is masked."""
        if not self.are_in(event):
            return _as_one
        names = event.metadata.get(REDACTED, event.attributes.get(REDACTED, []))
        if isinstance(names, list) and not self._known.issuperset(map(str, names)):
            # The settings were others, and had a replacement that is unknown now.
            return _as_none
        return self._mask.split


def _as_one(text: str) -> list[str]:
    return [text]


def _as_none(text: str) -> list[str]:
    return ["", ""]


def _masked(text: str, spans: Sequence[_Span]) -> str:
    """Return a text with parts of it replaced. Parts that overlap are one."""
    parts: list[str] = []
    position = 0
    for span in spans:
        begin, end = span.begin, -span.minus_end
        if begin >= position:
            parts += text[position:begin], span.replacement
        position = max(position, end)
    return "".join((*parts, text[position:]))


def _is_id(key: str, value: Plain) -> bool:
    """Return whether an attribute identifies an event, a stream, a run or another thing: ids are never changed."""
    if not (key in _IDS or key.endswith((".id", ".uid"))):
        return False
    if not isinstance(value, str):
        # Others may number cards or accounts under such a name.
        return isinstance(value, int) and key in _IDS
    try:
        return str(UUID(value)) == value or key == "zenml.log.writer"
    except ValueError:
        return key == "zenml.log.writer" and len(value) == 15 and value.isalnum()


def _texts(value: Plain | Mapping[str, Plain]) -> Iterator[str]:
    """Yield all texts in a value: its own and nested ones, names, and numbers as text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif value is not None and not isinstance(value, bool):
        yield str(value)
