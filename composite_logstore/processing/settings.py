"""The sections of a child's settings that say what happens to its events on their way."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator
from zenml.enums import LoggingLevels

from composite_logstore.mistakes import Section
from composite_logstore.names import did_you_mean
from composite_logstore.processing.expressions import compiled
from composite_logstore.processing.key_formats import FORMATS
from composite_logstore.zenml import NamedLoggingLevel

MOST_PATTERNS = 100
"""How many own patterns a redaction may have."""

SMALLEST_RATIO = 1e-6
"""The smallest part of its events that a child may get by sampling: less would mean no events, without a warning."""

MOST_MATCHERS = 100
"""How many matchers `drop` and `keep` may have each."""


def _of_either_case(name: str) -> str:
    return "".join(f"[{letter}{letter.lower()}]" for letter in name)


# Names of any case, and numbers also as texts. An editor offers the names.
LEVEL_SCHEMA: dict[str, list[dict[str, Any]]] = {
    "anyOf": [
        {"enum": list(LoggingLevels.__members__)},
        {"enum": sorted({level.value for level in LoggingLevels})},
        {"type": "string", "pattern": f"^({'|'.join(map(_of_either_case, LoggingLevels.__members__))}|[0-9]+)$"},
    ]
}

Level = Annotated[NamedLoggingLevel, WithJsonSchema(LEVEL_SCHEMA)]
"""The type of a setting that is a level."""


class Matcher(Section):
    """The events that a rule applies to: an event must satisfy all of the fields that are set.

    In names, `*` stands for any characters and `?` for one.

    Attributes:
        logger: The logger's name, with wildcards; `stdout` or `stderr` for printed text.
        level: In `drop`, the level of the events or a higher one; in `keep`, their level or a lower one.
        message: A regular expression of RE2 that matches somewhere in the message, or in the exception that follows it.
        source: The stream's source, with wildcards, such as `step` or `client`.
        step: The step's name, with wildcards.
        pipeline: The pipeline's name, with wildcards.
        attributes: The name of an attribute of the event or its stream → its value as text, with wildcards.
    """

    logger: str | None = None
    level: Level | None = None
    message: str | None = None
    source: str | None = None
    step: str | None = None
    pipeline: str | None = None
    attributes: dict[str, str] | None = None

    @field_validator("message")
    @classmethod
    def _is_expression(cls, value: str | None) -> str | None:
        if value is not None:
            compiled(value)
        return value

    @property
    def matches_all(self) -> bool:
        """Whether it says nothing but what applies to every event."""
        others = (self.message, self.source, self.step, self.pipeline, self.attributes)
        is_any_level = self.level is None or self.level is LoggingLevels.CRITICAL
        return self.logger in (None, "*") and is_any_level and not any(others)

    @model_validator(mode="after")
    def _says_something(self) -> Matcher:
        if not any(getattr(self, name) not in (None, {}) for name in type(self).model_fields):
            raise ValueError(
                f"is empty, so it would match every event; set one of {', '.join(type(self).model_fields)}"
            )
        return self


class SampleSettings(Section):
    """Which part of the less important events a child gets. Every process and command chooses the same events.

    Attributes:
        ratio: The part of these events that it gets, at least one in a million and below 1: `0.1` for one in ten.
        below: Events of this level and above are not sampled: it gets all of them.
    """

    ratio: float
    below: Level = LoggingLevels.WARNING

    @field_validator("ratio")
    @classmethod
    def _is_part(cls, value: float) -> float:
        if not SMALLEST_RATIO <= value < 1:
            raise ValueError(
                "must be at least 0.000001 and below 1; use 'min_level' to get none, or leave 'sample' out to get all"
            )
        return value


class RepeatSettings(Section):
    """How long a child gets an event only once that is logged again and again.

    Attributes:
        window_millis: For how long after an event equal ones are withheld, in milliseconds.
    """

    window_millis: int = Field(default=60_000, gt=0, le=86_400_000)


class BudgetSettings(Section):
    """How many events or bytes a child may get, from all processes of the log store on this machine together.

    Attributes:
        events: The most events in a period.
        bytes: The most bytes in a period: of the texts and attributes of the events, and 512 for each event. The event
            that uses up the rest is sent as a whole.
        per: The period. Days and minutes are those of UTC, and of the moment when an event is sent.
        then: What is sent once the budget is used up: events of level WARNING or above, one event in 100, or none.
    """

    events: int | None = Field(default=None, json_schema_extra={"minimum": 1})
    bytes: int | None = Field(default=None, json_schema_extra={"minimum": 1})
    per: Literal["run", "day", "minute"] = "day"
    then: Literal["warnings_only", "sample", "stop"] = "warnings_only"

    @model_validator(mode="after")
    def _is_positive(self) -> BudgetSettings:
        given = {"events": self.events, "bytes": self.bytes}
        for name, most in given.items():
            if most is not None and most < 1:
                raise ValueError(
                    f"'budget.{name}' is below 1, so the child would get nothing; set 'enabled' to false instead, or "
                    f"leave 'budget' out for no limit"
                )
        if not any(given.values()):
            raise ValueError("'budget' has no limit; set 'budget.events' or 'budget.bytes'")
        return self


Name = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")]


def placeholder(name: str) -> str:
    """Return what replaces a masked value."""
    return f"[redacted:{name}]"


class OwnPattern(Section):
    """An own pattern of a redaction.

    Attributes:
        name: Its name in accounts and in redacted events, of `a-z 0-9 - _`.
        pattern: A regular expression of the syntax of RE2. If it has a group `secret`, only that group is masked.
        replacement: What replaces it, literally; `[redacted:NAME]` if not set.
    """

    name: Name
    pattern: str
    replacement: str | None = Field(default=None, max_length=200)

    @field_validator("pattern")
    @classmethod
    def _is_usable(cls, value: str) -> str:
        if compiled(value).search("") is not None:
            raise ValueError("must not match an empty text, which is everywhere; make it match at least one character")
        return value

    @field_validator("replacement")
    @classmethod
    def _shows(cls, value: str | None) -> str | None:
        if value == "":
            raise ValueError("must not be empty, since nothing would show where something was masked; leave it out")
        return value

    @property
    def masked_as(self) -> str:
        """What replaces a match."""
        return placeholder(self.name) if self.replacement is None else self.replacement


class RedactSettings(Section):
    """What is masked in a child's events.

    Attributes:
        secrets: Whether to mask the values of the secrets that the process knows.
        formats: Which well-known formats of keys to mask, by name.
        patterns: Own patterns to mask.
    """

    secrets: bool = True
    formats: Literal["all"] | list[str] = "all"
    patterns: list[OwnPattern] = Field(default_factory=list, max_length=MOST_PATTERNS)

    @property
    def masks_private_keys(self) -> bool:
        """Whether private keys are masked, also where each line is an event."""
        return self.formats == "all" or "private_key" in self.formats

    @field_validator("formats", mode="before")
    @classmethod
    def _are_known(cls, value: object) -> object:
        known = [one.name for one in FORMATS]
        if value == "all":
            return value
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            raise ValueError('must be "all" or a list of names')
        for name in value:
            if name not in known:
                raise ValueError(
                    f"there is no format '{name}'{did_you_mean(name, known)}; set \"all\" or a list of names"
                )
        return list(value)

    @field_validator("patterns")
    @classmethod
    def _have_own_names(cls, value: list[OwnPattern]) -> list[OwnPattern]:
        taken = {one.name for one in FORMATS} | {"secret"}
        for own in value:
            if own.name in taken:
                raise ValueError(f"the name '{own.name}' is taken; choose another")
            taken.add(own.name)
        return value

    @model_validator(mode="after")
    def _masks_something(self) -> RedactSettings:
        if not self.secrets and not self.formats and not self.patterns:
            raise ValueError("masks nothing; leave 'redact' out, or set 'secrets', 'formats' or 'patterns'")
        return self
