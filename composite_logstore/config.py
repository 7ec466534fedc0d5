"""The configuration: the composite's own settings, and what every child's settings have in common."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    ConfigDict,
    Field,
    SecretStr,
    SerializeAsAny,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from zenml.enums import LoggingLevels
from zenml.log_stores.base_log_store import BaseLogStoreConfig
from zenml.logger import get_logger
from zenml.utils.secret_utils import PlainSerializedSecretStr, SecretReference

from composite_logstore import secret_references
from composite_logstore.backend import UnavailableError, revealed, texts_in
from composite_logstore.mistakes import LEVELS, Section, mistakes_in, refuse_boolean, unknown_type
from composite_logstore.names import did_you_mean
from composite_logstore.processing import known_secrets
from composite_logstore.processing.processor import Processor, Step, StripEscapes
from composite_logstore.processing.redaction import MarkKeyLines, Redact
from composite_logstore.processing.repeats import Repeats
from composite_logstore.processing.rules import Rules
from composite_logstore.processing.sampling import Sampling
from composite_logstore.processing.settings import (
    LEVEL_SCHEMA,
    MOST_MATCHERS,
    BudgetSettings,
    Level,
    Matcher,
    RedactSettings,
    RepeatSettings,
    SampleSettings,
)
from composite_logstore.server import is_server
from composite_logstore.settings_text import parse_settings
from composite_logstore.zenml import parse_log_level

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

    from composite_logstore.backend import Exporter, Reader
    from composite_logstore.collector import CollectorExporter

logger = get_logger(__name__)

BACKENDS = "composite_logstore.backends"
"""The entry-point group of backends. A name is a child's `type`, its value the backend's `ChildConfig`."""

MOST_CHILDREN = 100
"""How many children a log store may have: each takes a thread in a pipeline, and a page may ask each of them."""

DELIVERY_VARIABLE = "COMPOSITE_LOGSTORE_DELIVERY"
"""The environment variable that decides who delivers the events of a process, whatever the setting says."""

QUEUE_BYTES = 64 * 1024**2
"""How many bytes of events may wait in memory, unless `max_queue_bytes` is set."""

Secret = PlainSerializedSecretStr
"""The type of a setting that is shown as asterisks. ZenML stores it in clear text."""


class ChildConfig(Section):
    """The settings of one child. A backend adds its own in a subclass, which imports nothing heavy.

    Attributes:
        name: The child's name, of `a-z 0-9 - _`.
        type: The backend's entry-point name.
        enabled: A disabled child keeps its settings and gets no events.
        min_level: The child gets, and counts, only events of this level or above.
        progress: Which updates of a progress bar it gets: `all`, or the `latest` of each bar and second, at level INFO.
        ansi: Whether it gets escape sequences, such as those for colours, as they were logged (`keep`), or texts
            without them (`strip`).
        drop: It gets no event that one of these matches.
        keep: It gets only events that one of these matches, unless there are none.
        sample: Which part of less important events it gets.
        collapse_repeats: For how long it gets an event only once that is logged again and again.
        redact: Which secrets and keys are masked in its events.
        budget: How many events or bytes it may get in a run, a day or a minute.
        max_queue_size: The most events that wait in memory, besides the batch being exported.
        max_export_batch_size: The most events of one export. The backend's own default if not set.
        schedule_delay_millis: How long an event may wait for a fuller batch, in milliseconds.
        export_timeout_millis: How long one export may take, in milliseconds.
        retry_initial_interval_millis: The first wait before a retry, in milliseconds. Each further wait is twice as
            long, with jitter.
        retry_max_interval_millis: The longest wait before a retry, in milliseconds.
    """

    max_batch_size: ClassVar[int] = 100_000
    """The backend's own limit of events in one export."""
    default_batch_size: ClassVar[int] = 1_000
    """The default of `max_export_batch_size` for this backend."""
    max_batch_bytes: ClassVar[int] = 4 * 1024 * 1024
    """Roughly how many bytes of events one export may have. A larger event is exported alone."""
    oldest_seconds: ClassVar[float | None] = None
    """How old an event may be, in seconds, for the backend to take it. None for any age."""
    readable: ClassVar[bool] = False
    """Whether the backend has a reader."""
    asks_zenml: ClassVar[bool] = False
    """Whether `check_registration` asks ZenML: `composite-logstore validate` asks nobody, and leaves it out."""
    requirements: ClassVar[frozenset[str]] = frozenset()
    """The packages that the image of a remote step needs, as requirement specifiers."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    type: str
    enabled: bool = True
    min_level: Level | None = None
    progress: Literal["all", "latest"] = "all"
    ansi: Literal["keep", "strip"] = "keep"
    drop: list[Matcher] = Field(default_factory=list, max_length=MOST_MATCHERS)
    keep: list[Matcher] = Field(default_factory=list, max_length=MOST_MATCHERS)
    sample: SampleSettings | None = None
    collapse_repeats: RepeatSettings | None = None
    redact: RedactSettings | None = None
    budget: BudgetSettings | None = None
    max_queue_size: int = Field(default=100_000, gt=0)
    max_export_batch_size: int | None = Field(default=None, gt=0)
    schedule_delay_millis: int = Field(default=1_000, ge=0)
    export_timeout_millis: int = Field(default=10_000, gt=0)
    retry_initial_interval_millis: int = Field(default=500, gt=0)
    retry_max_interval_millis: int = Field(default=30_000, gt=0)

    @property
    def batch_size(self) -> int:
        """The most events of one export."""
        return min(self.max_export_batch_size or self.default_batch_size, self.max_queue_size)

    @property
    def is_thinned(self) -> bool:
        """Whether the child gets only the latest update in each second of a progress bar, at level INFO."""
        return self.progress == "latest"

    @property
    def wants_all(self) -> bool:
        """Whether the child gets every event."""
        return not self.excluded_by

    @property
    def excluded_by(self) -> list[str]:
        """The names of the settings by which the child does not get every event."""
        by = {
            "min_level": self.min_level is not None,
            "progress": self.is_thinned,
            "drop": self.drop,
            "keep": self.keep,
            "sample": self.sample,
            "collapse_repeats": self.collapse_repeats,
            "budget": self.budget,
        }
        return [name for name, is_set in by.items() if is_set]

    @property
    def is_selective(self) -> bool:
        """Whether the child's worker withholds events: by rules, as repeats, or over a budget."""
        by_kind = {"min_level", "progress"}
        return not by_kind.issuperset(self.excluded_by)

    def wants(self, level: int, is_update: bool = False) -> bool:
        """Return whether the child gets events of this kind: all of them, or the latest updates in each second.

        The journal and the spool ask this of each event. What the child's processor withholds is decided later.

        Args:
            level: Their level, as a number.
            is_update: Whether they are updates of a progress bar.
        """
        if is_update and self.is_thinned:
            level = logging.INFO
        return self.min_level is None or level >= self.min_level.value

    def expects(self, level: int, is_update: bool = False) -> bool:
        """Return whether the child gets each event of this kind.

        Of a thinned progress bar it depends on the moment of delivery which updates arrive, so none is expected:
        backfill copies none, and a comparison misses none.

        Args:
            level: Their level, as a number.
            is_update: Whether they are updates of a progress bar.
        """
        return not (is_update and self.is_thinned) and self.wants(level)

    def as_registered(self) -> dict[str, Any]:
        """Return the settings in the form in which ZenML stores them: plain values, and only those that were set."""
        return self.model_dump(mode="json", exclude_unset=True)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can use the backend."""
        return False

    @property
    def unreadable(self) -> str | None:
        """Why the child cannot be read, None if it can. A backend names settings that are missing for that."""
        return None if self.readable else f"children of type '{self.type}' cannot be read"

    @property
    def known_losses(self) -> str | None:
        """Which events its backend refuses or drops although they were sent, as a sentence without a full stop.

        None if it keeps all, or says which ones it rejects in a way that the exporter understands.
        """
        return None

    @property
    def delay_seconds(self) -> float:
        """How long it usually takes until an event that was exported can be read, in seconds."""
        return 0.0

    @property
    def absence(self) -> str:
        """What people can do if an event that was exported cannot be read."""
        return "check that the backend does not drop, filter or delay events, and is read where it is written"

    def unservable(self, artifact_store: BaseArtifactStore | None) -> str | None:
        """Return why ZenML's server cannot read by itself what the child writes; None if it can.

        Args:
            artifact_store: The stack's artifact store. None at registration, when no stack is known.
        """
        return f"ZenML's server cannot read by itself what children of type '{self.type}' write"

    def places(self, artifact_store: BaseArtifactStore | None) -> Mapping[str, str]:
        """Return the places that the child writes to, if two children in one of them would double each line.

        Args:
            artifact_store: The stack's artifact store. None at registration, when no stack is known.

        Returns:
            The identity of each place → its name in an error. The identity of an artifact store is its path, or its
            id if its path is not set.
        """
        return {}

    @model_validator(mode="after")
    def _within_limits(self) -> ChildConfig:
        if self.max_export_batch_size and self.max_export_batch_size > self.max_batch_size:
            raise ValueError(
                f"'max_export_batch_size' is above this backend's own limit; set at most {self.max_batch_size}"
            )
        if self.retry_max_interval_millis < self.retry_initial_interval_millis:
            raise ValueError(
                "'retry_max_interval_millis' is below 'retry_initial_interval_millis'; set it to at least that"
            )
        return self

    @property
    def odd_rules(self) -> list[str]:
        """Which rules cannot mean what they say: sentences without full stops."""
        odd = []
        lowest = self.min_level.value if self.min_level else None
        for place, matcher in enumerate(self.drop):
            if matcher.matches_all:
                odd.append(
                    f"'drop.{place}' matches every event, so it gets none; set 'enabled' to false if that is meant"
                )
            elif lowest is not None and matcher.level is not None and matcher.level.value < lowest:
                odd.append(
                    f"'drop.{place}' matches nothing, since 'min_level' is above its 'level'; remove one of them"
                )
        if self.sample and lowest is not None and self.sample.below.value <= lowest:
            odd.append("'sample' has no effect, since 'min_level' is not below 'sample.below'; remove one of them")
        return odd

    def create_processor(self) -> Processor:
        """Create what processes each batch before it is exported, with secrets resolved."""
        steps: list[Step] = [StripEscapes()] if self.ansi == "strip" else []
        if self.redact is not None and self.redact.masks_private_keys:
            steps.append(MarkKeyLines())
        steps += self._selecting_steps()
        if self.collapse_repeats:
            steps.append(Repeats(self.collapse_repeats))
        if self.redact is not None:
            if self.redact.secrets:
                known_secrets.watch()
                self.note_keys()
            steps.append(Redact(self.redact))
        return Processor(steps)

    def create_selector(self) -> Processor:
        """Create what says of an event, by itself alone, whether the child's rules and sampling let it pass."""
        return Processor(self._selecting_steps())

    def _selecting_steps(self) -> list[Step]:
        rules: list[Step] = [Rules(self.drop, self.keep)] if self.drop or self.keep else []
        return [*rules, Sampling(self.sample)] if self.sample else rules

    def note_keys(self) -> None:
        """Have the keys that these settings contain, but not references to them, masked as secrets."""
        for place, value in texts_in(self.model_dump()):
            if isinstance(value, SecretStr) and not secret_references.has_reference(value):
                known_secrets.known_secrets.note(f"'{place}' of child '{self.name}'", revealed(value))

    def create_exporter(self) -> Exporter:
        """Create the exporter, in the worker thread, with secrets resolved.

        Raises:
            UnavailableError: Something is missing. The message says how to fix it.
        """
        raise NotImplementedError

    def create_reader(self) -> Reader:
        """Create the reader, with secrets resolved, if the child is not `unreadable`."""
        raise NotImplementedError

    def collector_exporter(self) -> CollectorExporter:
        """Return the exporter of the OpenTelemetry Collector that sends what the child sends.

        References to secrets are not resolved. The settings that all children have are none of its business.

        Raises:
            UnavailableError: The Collector has none, or a setting is missing. The message says which.
        """
        raise UnavailableError(f"no exporter of the Collector is known for children of type '{self.type}'")

    def backend_time(self) -> datetime | None:
        """Ask the backend what time it is, with secrets resolved: for `composite-logstore check`.

        Returns:
            Its time, cut off to seconds; None if it does not tell. An exception counts as None.
        """
        return None

    def unprepared(self) -> str | None:
        """Ask the backend, with secrets resolved, what is missing there that `prepare` creates: for `check`.

        Returns:
            What is missing, in a few words; None if nothing is, or if the backend does not tell.

        Raises:
            UnavailableError: The backend cannot be asked.
        """
        return None

    def prepare(self) -> str:
        """Create what is missing in the backend, with secrets resolved: for `composite-logstore check --fix`.

        Returns:
            What was created, in a few words.

        Raises:
            UnavailableError: It cannot be created. The message says how to fix it.
        """
        raise NotImplementedError

    def check_registration(self) -> None:
        """Check what matters only when a log store is registered or updated.

        Not called when one is loaded, nor on the server, where files and packages that the child needs may be missing.

        Raises:
            ValueError: Something is wrong. The message says how to fix it.
        """

    def check(self) -> None:
        """Check, when a stack is validated before a run, what the client can know. Check settings in validators.

        Raises:
            ValueError: Something is wrong. The message says how to fix it.
        """


class UnknownChild(ChildConfig):
    """A child whose backend is not installed here. It keeps its settings and is unavailable."""

    model_config = ConfigDict(extra="allow")

    readable: ClassVar[bool] = True

    def unservable(self, artifact_store: BaseArtifactStore | None) -> str | None:
        """Return None: whether it can is unknown."""
        return None

    def create_exporter(self) -> Exporter:
        """Refuse: the backend is not installed.

        Raises:
            UnavailableError: Always.
        """
        raise UnavailableError(_unknown_type(self.type))

    def create_reader(self) -> Reader:
        """Refuse: the backend is not installed.

        Raises:
            UnavailableError: Always.
        """
        raise UnavailableError(_unknown_type(self.type))

    def collector_exporter(self) -> CollectorExporter:
        """Refuse: the backend is not installed.

        Raises:
            UnavailableError: Always.
        """
        raise UnavailableError(_unknown_type(self.type))

    def check_registration(self) -> None:
        """Refuse: the backend is not installed.

        Raises:
            ValueError: Always.
        """
        raise ValueError(_unknown_type(self.type))

    def check(self) -> None:
        """Refuse: the backend is not installed.

        Raises:
            ValueError: Always.
        """
        raise ValueError(_unknown_type(self.type))


class CompositeLogStoreConfig(BaseLogStoreConfig):
    """The settings of the composite log store.

    Attributes:
        primary: The name of the child that answers `fetch()`.
        children: The children, at least one.
        fetch_fallback: The names of the children to read, in order, when the primary is unavailable.
        flush_timeout_millis: How long a flush waits for a child that makes no progress, in milliseconds.
        flush_limit_millis: How long a flush waits in all, in milliseconds.
        durability: Which events survive the process. `memory`: none, nothing is ever on disk. `spill`: an undelivered
            event is on disk within a second. `write_ahead`: an event is on disk before `emit` returns.
        delivery: Who delivers the events of a process. `process`: the process itself. `agent`: the machine's agent,
            from the spool. `auto`: the agent while one works, otherwise the process. The environment variable
            `COMPOSITE_LOGSTORE_DELIVERY` decides if it is set.
        spool_directory: The folder for undelivered events; one in ZenML's configuration folder if not set.
        spool_max_bytes: How many bytes all processes of the log store together may use there.
        rejected_max_bytes: How many bytes of events that backends have rejected are kept beside them, so that they can
            be sent again. The oldest make room for newer ones; 0 keeps none.
        max_queue_bytes: How many bytes of events may wait in memory or be in an export. An event counts once, however
            many children have yet to take it.
        join_lines: Whether what is printed becomes whole lines, and a traceback one entry. Otherwise each write is an
            event.
        stderr_level: The level of what is printed to stderr. `detect`: the level that a line itself says, ERROR for a
            traceback, INFO for anything else.
        adopt_threads: Whether records and prints of threads without a logging context belong to the step, while one
            step runs in the process.
        serve_from_artifact_store: Whether to tell ZenML's server that streams are in the stack's artifact store, so
            that a server without this package can read them.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    primary: str
    children: list[SerializeAsAny[ChildConfig]]
    fetch_fallback: list[str] = Field(default_factory=list)
    flush_timeout_millis: int = Field(default=5_000, ge=0)
    flush_limit_millis: int = Field(default=30_000, ge=0)
    durability: Literal["memory", "spill", "write_ahead"] = "spill"
    delivery: Literal["process", "agent", "auto"] = "process"
    spool_directory: str | None = None
    spool_max_bytes: int = Field(default=1024**3, ge=16 * 1024**2)
    rejected_max_bytes: int = Field(default=128 * 1024**2, ge=0)
    max_queue_bytes: int = Field(default=QUEUE_BYTES, gt=0)
    join_lines: bool = True
    stderr_level: Annotated[
        Literal["DEBUG", "INFO", "WARN", "ERROR", "CRITICAL", "detect"],
        WithJsonSchema({"anyOf": [{"const": "detect"}, *LEVEL_SCHEMA["anyOf"]]}),
    ] = "ERROR"
    adopt_threads: bool = False
    serve_from_artifact_store: bool = False

    _refuse_boolean = field_validator("*", mode="before")(refuse_boolean)

    @field_validator("spool_directory")
    @classmethod
    def _is_absolute(cls, value: str | None) -> str | None:
        # Processes of a log store find each other's spools, whichever folder they start in.
        if value is not None and not os.path.isabs(os.path.expanduser(value)):
            raise ValueError("'spool_directory' must be an absolute path, or begin with ~/")
        return value

    @field_validator("stderr_level", mode="before")
    @classmethod
    def _is_level_or_detect(cls, value: Any) -> Any:
        if value == "detect":
            return value
        try:
            name = LoggingLevels(parse_log_level(value)).name
        except ValueError:
            name = ""
        if name not in LEVELS:
            raise ValueError(f"'stderr_level' is no log level; set 'detect', or one of {', '.join(LEVELS)}")
        return name

    @property
    def enabled_children(self) -> list[ChildConfig]:
        """The children that get events, in the order in which they are configured."""
        return [child for child in self.children if child.enabled]

    def child(self, name: str) -> ChildConfig:
        """Return the child of that name.

        Raises:
            KeyError: There is none.
        """
        return {child.name: child for child in self.children}[name]

    def doubled(self, artifact_store: BaseArtifactStore | None) -> str | None:
        """Return which children write to one place, which would double each line there; None if there are none.

        Args:
            artifact_store: The stack's artifact store. None at registration, when no stack is known.
        """
        writers: dict[str, str] = {}
        for child in self.enabled_children:
            for place, label in child.places(artifact_store).items():
                first = writers.setdefault(place.rstrip("/"), child.name)
                if first != child.name:
                    return (
                        f"children '{first}' and '{child.name}': both write to {label}, where each line would be "
                        "twice; set another for one of them, or disable one"
                    )
        return None

    def watch_secrets(self) -> None:
        """Have the secrets that this process uses from now on known to those children that mask them, if any does."""
        if not is_server() and any(child.redact and child.redact.secrets for child in self.enabled_children):
            known_secrets.watch()
            for child in self.enabled_children:
                child.note_keys()

    @property
    def required_secrets(self) -> set[SecretReference]:
        """The secrets that children refer to. ZenML itself finds only references in top-level fields."""
        return {reference for child in self.enabled_children for reference in secret_references.references(child)}

    @property
    def is_local(self) -> bool:
        """Whether there is a child that only this machine can use."""
        return any(child.is_local for child in self.enabled_children)

    @property
    def warnings(self) -> list[str]:
        """What a registration warns of, besides secrets in clear text: sentences without full stops."""
        found = []
        if self.durability == "memory":
            found += [
                f"child '{child.name}': with 'durability' 'memory', each process has the whole 'budget' to itself; set "
                f"'durability' to 'spill' to share it"
                for child in self.enabled_children
                if child.budget
            ]
        if self.enabled_children and all(child.budget for child in self.enabled_children):
            found.append("each child has a 'budget', so events beyond all of them are in no child; leave one out")
        for child in self.enabled_children:
            found += [f"child '{child.name}': {odd}" for odd in child.odd_rules]
            if child.name == self.primary and any(matcher.matches_all for matcher in child.drop):
                found.append(f"child '{child.name}' is the primary, so its 'drop' makes every page empty")
        return found

    @property
    def is_valid(self) -> bool:
        """Check what matters only when a component is registered or updated, which is when ZenML asks.

        When it is loaded, a child of an unknown type must not make the others unusable.

        Raises:
            ValueError: As `check_registration` raises it.
        """
        # On the server, too: a client without this package can register a log store.
        self.check_registration(is_client=not is_server())
        for child in self.children:
            for field in secret_references.clear_text_fields(child):
                logger.warning(
                    f"child '{child.name}': '{field}' is written in clear text, which ZenML stores and shows "
                    f"as it is. Put it into a ZenML secret and refer to it as '{{{{secret_name.key}}}}'."
                )
        for warning in self.warnings:
            logger.warning(f"{warning}.")
        return True

    def check_registration(self, is_client: bool) -> None:
        """Check what matters only when a component is registered or updated.

        Args:
            is_client: Whether the files and packages that children need should be on this machine.

        Raises:
            ValueError: A reference to a secret is in a field where it would not be resolved. Or, on a client: a
                child's type is unknown, or two children write to one place.
        """
        for child in self.children:
            try:
                secret_references.check(child)
                if is_client:
                    child.check_registration()
            except ValueError as error:
                raise ValueError(f"child '{child.name}': {error}") from None
        if is_client and (twice := self.doubled(None)):
            raise ValueError(twice)

    @model_validator(mode="before")
    @classmethod
    def _parse_lists(cls, data: Any) -> Any:
        # ZenML parses JSON, too, but its error repeats the text, with the API keys in it.
        if not isinstance(data, dict):
            return data
        parsed = dict(data)
        for key in ("children", "fetch_fallback"):
            if isinstance(parsed.get(key), str):
                try:
                    parsed[key] = _parse_list(parsed[key])
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"'{key}' is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
                        f"give a JSON list, or --{key}=@file.json"
                    ) from None
        return parsed

    @field_validator("children", mode="before")
    @classmethod
    def _parse_children(cls, value: Any) -> list[ChildConfig]:
        if not isinstance(value, list | tuple):
            raise ValueError("'children' must be a list of children, each with a 'name' and a 'type'")
        if not value:
            raise ValueError("'children' is empty; give at least one child")
        if len(value) > MOST_CHILDREN:
            raise ValueError(f"'children' has {len(value)} children; give at most {MOST_CHILDREN}")
        return [parse_child(number, child) for number, child in enumerate(value, start=1)]

    @model_validator(mode="after")
    def _names_fit(self) -> CompositeLogStoreConfig:
        names = [child.name for child in self.children]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"child '{name}': the 'name' is used more than once; give each child its own")
        self._must_be_readable("primary", self.primary)
        for name in self.fetch_fallback:
            self._must_be_readable("fetch_fallback", name)
            if name == self.primary or self.fetch_fallback.count(name) > 1:
                raise ValueError(
                    f"'fetch_fallback': child '{name}' is read already; name each child once, and swap it with "
                    "'primary' by setting both at once"
                )
        self._must_be_servable()
        if why := self._undeliverable(self.delivery, "'delivery'"):
            raise ValueError(why)
        return self

    def _undeliverable(self, delivery: str, label: str) -> str:
        """Return why events cannot be delivered like this, and the fix; empty if they can."""
        if delivery == "process" or self.durability != "memory":
            return ""
        return (
            f"{label} is '{delivery}', but with 'durability' 'memory' there is no spool for an agent to deliver from; "
            "set 'durability' to 'spill' or 'write_ahead', or 'delivery' to 'process'"
        )

    @property
    def chosen_delivery(self) -> Literal["process", "agent", "auto"]:
        """Who delivers the events of this process: the environment's choice, or else the setting's.

        Raises:
            ValueError: The environment's choice is none, or needs a spool.
        """
        chosen = os.environ.get(DELIVERY_VARIABLE) or self.delivery
        if chosen not in ("process", "agent", "auto"):
            raise ValueError(f"{DELIVERY_VARIABLE} is no choice; set it to 'process', 'agent' or 'auto'")
        if why := self._undeliverable(chosen, DELIVERY_VARIABLE):
            raise ValueError(why)
        return cast('Literal["process", "agent", "auto"]', chosen)

    def _must_be_servable(self) -> None:
        if not self.serve_from_artifact_store:
            return
        if why := self.child(self.primary).unservable(None):
            servable = [child.name for child in self.enabled_children if not child.unservable(None)]
            choose = f"set 'primary' to one of: {', '.join(servable)}" if servable else "add a child of type 'artifact'"
            raise ValueError(f"'serve_from_artifact_store': child '{self.primary}' is the primary: {why}; {choose}")
        if self.fetch_fallback:
            raise ValueError(
                "'fetch_fallback': with 'serve_from_artifact_store' ZenML's server reads the stack's artifact store "
                "and nothing else; leave one of the two out"
            )

    def _must_be_readable(self, key: str, name: str) -> None:
        names = [child.name for child in self.children]
        readable = [child.name for child in self.enabled_children if not child.unreadable]
        choose = f"set one of: {', '.join(readable)}" if readable else "add a child that can be read"
        if name not in names:
            raise ValueError(f"'{key}': there is no child '{name}'{did_you_mean(name, names)}; {choose}")
        if not self.child(name).enabled:
            raise ValueError(f"'{key}': child '{name}' is disabled; enable it, or {choose}")
        if why := self.child(name).unreadable:
            # Some reasons contain a fix already.
            raise ValueError(f"'{key}': child '{name}': {why}{', or' if ';' in why else ';'} {choose}")


class HandlerConfig(CompositeLogStoreConfig):
    """The settings of a handler, which reads nothing. It checks at once what a log store checks at registration.

    Attributes:
        primary: Always empty.
    """

    # Built by the first handler: a pipeline imports this module, and has none.
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, defer_build=True)

    primary: str = ""

    def _must_be_readable(self, key: str, name: str) -> None:
        if name:
            raise ValueError(f"'{key}': a handler reads nothing; leave it out")

    @property
    def chosen_delivery(self) -> Literal["process", "agent", "auto"]:
        """Always `process`: an agent has its settings from ZenML, which knows nothing of a handler."""
        return "process"

    @model_validator(mode="after")
    def _can_be_used(self) -> HandlerConfig:
        if self.delivery != "process":
            raise ValueError("'delivery': an agent knows no handler, so each process delivers by itself; leave it out")
        self.check_registration(is_client=True)
        return self


def _parse_list(text: str) -> Any:
    if text.lstrip()[:1] not in ("[", "{"):
        with suppress(ValueError):
            found = parse_settings(text, is_yaml=True)
            if isinstance(found, list):
                return found
    return json.loads(text)


def parse_child(number: int, raw: Any) -> ChildConfig:
    """Return a child from its settings.

    Args:
        number: Its place in the list, from 1.
        raw: Its settings.

    Raises:
        ValueError: Its settings are wrong. The message names the child, each mistake and its fix, but no value.
    """
    if isinstance(raw, ChildConfig):
        return raw
    if not isinstance(raw, Mapping):
        raise ValueError(f"child number {number}: must be an object with a 'name' and a 'type'")
    label = f"child '{raw['name']}'" if isinstance(raw.get("name"), str) else f"child number {number}"
    for key in ("name", "type"):
        if not isinstance(raw.get(key), str):
            raise ValueError(f"{label}: '{key}' is required; set it to a text")
    config_class: type[ChildConfig] = UnknownChild
    if raw["type"] in backends():
        try:
            config_class = backends()[raw["type"]].load()
        except ImportError as error:
            logger.debug("%s: backend '%s' cannot be imported: %s", label, raw["type"], error)
    try:
        return config_class(**raw)
    except ValidationError as error:
        mistakes = "; ".join(mistakes_in(config_class, error))
        raise ValueError(f"{label}: {mistakes}") from None


@lru_cache(maxsize=1)
def backends() -> dict[str, EntryPoint]:
    """Return the installed backends: a child's `type` → the entry point of its `ChildConfig`."""
    return {entry_point.name: entry_point for entry_point in entry_points(group=BACKENDS)}


def _unknown_type(name: str) -> str:
    return unknown_type("type", "backend", name, backends())
