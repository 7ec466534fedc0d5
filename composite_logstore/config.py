"""The configuration: the composite's own settings, and what every child's settings have in common."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from zenml.log_stores.base_log_store import BaseLogStoreConfig
from zenml.logger import get_logger
from zenml.models.v2.misc.log_models import NamedLoggingLevel
from zenml.utils.secret_utils import PlainSerializedSecretStr, SecretReference

from composite_logstore import secret_references
from composite_logstore.backend import UnavailableError
from composite_logstore.names import did_you_mean
from composite_logstore.server import is_server

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

    from composite_logstore.backend import Exporter, Reader

logger = get_logger(__name__)

_LEVELS = ("DEBUG", "INFO", "WARN", "ERROR", "CRITICAL")

BACKENDS = "composite_logstore.backends"
"""The entry-point group of backends. A name is a child's `type`, its value the backend's `ChildConfig`."""

MOST_CHILDREN = 100
"""How many children a log store may have: each takes a thread in a pipeline, and a page may ask each of them."""

QUEUE_BYTES = 64 * 1024**2
"""How many bytes of events may wait in memory, unless `max_queue_bytes` is set."""

Secret = PlainSerializedSecretStr
"""The type of a setting that is shown as asterisks. ZenML stores it in clear text."""


class ChildConfig(BaseModel):
    """The settings of one child. A backend adds its own in a subclass, which imports nothing heavy.

    Attributes:
        name: The child's name, of `a-z 0-9 - _`.
        type: The backend's entry-point name.
        enabled: A disabled child keeps its settings and gets no events.
        min_level: The child gets, and counts, only events of this level or above.
        progress: Which updates of a progress bar it gets: `all`, or the `latest` of each second, at level INFO. An
            update is a line printed with a carriage return.
        max_queue_size: The most events that wait in memory, besides the batch being exported.
        max_export_batch_size: The most events of one export. The backend's own default if not set.
        schedule_delay_millis: How long an event may wait for a fuller batch, in milliseconds.
        export_timeout_millis: How long one export may take, in milliseconds.
        retry_initial_interval_millis: The first wait before a retry, in milliseconds. Each further wait is twice as
            long, with jitter.
        retry_max_interval_millis: The longest wait before a retry, in milliseconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

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
    requirements: ClassVar[frozenset[str]] = frozenset()
    """The packages that the image of a remote step needs, as requirement specifiers."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    type: str
    enabled: bool = True
    min_level: NamedLoggingLevel | None = None
    progress: Literal["all", "latest"] = "all"
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
        """Whether the child gets every event, unchanged."""
        return self.min_level is None and not self.is_thinned

    def wants(self, level: int, is_update: bool = False) -> bool:
        """Return whether the child gets events of this kind: all of them, or the latest updates in each second.

        This and `expects` are the only places that decide which events a child gets.

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

    @property
    def is_local(self) -> bool:
        """Whether only this machine can use the backend."""
        return False

    @property
    def unreadable(self) -> str | None:
        """Why the child cannot be read, None if it can. A backend names settings that are missing for that."""
        return None if self.readable else f"children of type '{self.type}' cannot be read"

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

    def create_exporter(self) -> Exporter:
        """Create the exporter, in the worker thread, with secrets resolved.

        Raises:
            UnavailableError: Something is missing. The message says how to fix it.
        """
        raise NotImplementedError

    def create_reader(self) -> Reader:
        """Create the reader, with secrets resolved, if the child is not `unreadable`."""
        raise NotImplementedError

    def backend_time(self) -> datetime | None:
        """Ask the backend what time it is, with secrets resolved: for `composite-logstore check`.

        Returns:
            Its time, cut off to seconds; None if it does not tell. An exception counts as None.
        """
        return None

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
        spool_directory: The folder for undelivered events; one in ZenML's configuration folder if not set.
        spool_max_bytes: How many bytes all processes of the log store together may use there.
        max_queue_bytes: How many bytes of events may wait in memory or be in an export. An event counts once, however
            many children have yet to take it.
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
    spool_directory: str | None = None
    spool_max_bytes: int = Field(default=1024**3, ge=16 * 1024**2)
    max_queue_bytes: int = Field(default=QUEUE_BYTES, gt=0)
    serve_from_artifact_store: bool = False

    @field_validator("spool_directory")
    @classmethod
    def _is_absolute(cls, value: str | None) -> str | None:
        # Processes of a log store find each other's spools, whichever folder they start in.
        if value is not None and not os.path.isabs(os.path.expanduser(value)):
            raise ValueError("'spool_directory' must be an absolute path, or begin with ~/")
        return value

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

    @property
    def required_secrets(self) -> set[SecretReference]:
        """The secrets that children refer to. ZenML itself finds only references in top-level fields."""
        return {reference for child in self.enabled_children for reference in secret_references.references(child)}

    @property
    def is_local(self) -> bool:
        """Whether there is a child that only this machine can use."""
        return any(child.is_local for child in self.enabled_children)

    @property
    def is_valid(self) -> bool:
        """Check what matters only when a component is registered or updated, which is when ZenML asks.

        When it is loaded, a child of an unknown type must not make the others unusable.

        Raises:
            ValueError: A reference to a secret is in a field where it would not be resolved. Or, on a client: a
                child's type is unknown, or two children write to one place.
        """
        for child in self.children:
            try:
                # On the server, too: a client without this package can register a log store.
                secret_references.check(child)
                if not is_server():
                    if isinstance(child, UnknownChild):
                        raise ValueError(_unknown_type(child.type))
                    child.check_registration()
            except ValueError as error:
                raise ValueError(f"child '{child.name}': {error}") from None
            for field in secret_references.clear_text_fields(child):
                logger.warning(
                    f"child '{child.name}': '{field}' is written in clear text, which ZenML stores and shows "
                    f"as it is. Put it into a ZenML secret and refer to it as '{{{{secret_name.key}}}}'."
                )
        if not is_server() and (twice := self.doubled(None)):
            raise ValueError(twice)
        return True

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
                    parsed[key] = json.loads(parsed[key])
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
        return [_parse_child(number, child) for number, child in enumerate(value, start=1)]

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
        return self

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

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    primary: str = ""

    def _must_be_readable(self, key: str, name: str) -> None:
        if name:
            raise ValueError(f"'{key}': a handler reads nothing; leave it out")

    @model_validator(mode="after")
    def _can_be_used(self) -> HandlerConfig:
        for child in self.children:
            try:
                if isinstance(child, UnknownChild):
                    child.create_exporter()
                secret_references.check(child)
                child.check_registration()
            except (ValueError, UnavailableError) as error:
                raise ValueError(f"child '{child.name}': {error}") from None
        if twice := self.doubled(None):
            raise ValueError(twice)
        return self


def _parse_child(number: int, raw: Any) -> ChildConfig:
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
        mistakes = "; ".join(_mistakes(config_class, error))
        raise ValueError(f"{label}: {mistakes}") from None


def _mistakes(config_class: type[ChildConfig], error: ValidationError) -> Iterator[str]:
    """Yield each mistake in words that name the field and the fix. Never repeats a value, which may be a secret."""
    known = list(config_class.model_fields)
    for detail in error.errors(include_url=False, include_input=False, include_context=False):
        field = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            yield f"unknown key '{field}'{did_you_mean(field, known)}; the keys of this type are: {', '.join(known)}"
        elif detail["type"] == "missing":
            yield f"'{field}' is required; set it"
        elif field == "min_level":
            yield f"'min_level' is not a log level; set one of {', '.join(_LEVELS)}, or its number"
        elif detail["type"] == "value_error":
            message = detail["msg"].removeprefix("Value error, ")
            if field and f"'{field}'" not in message:
                message = f"'{field}' {message}" if message.startswith(("is ", "must ")) else f"'{field}': {message}"
            yield message
        elif field == "name":
            yield "'name' may only have the characters a-z 0-9 - _; choose another"
        else:
            yield f"'{field}': {detail['msg'][:1].lower()}{detail['msg'][1:]}"


@lru_cache(maxsize=1)
def backends() -> dict[str, EntryPoint]:
    """Return the installed backends: a child's `type` → the entry point of its `ChildConfig`."""
    return {entry_point.name: entry_point for entry_point in entry_points(group=BACKENDS)}


def _unknown_type(name: str) -> str:
    known = sorted(backends())
    if name in known:
        return f"'type': backend '{name}' is installed but cannot be imported; reinstall the package that has it"
    return (
        f"'type': there is no backend '{name}' here{did_you_mean(name, known)}; set one of: {', '.join(known)}, "
        f"or install the package that has it"
    )


__all__ = [
    "BACKENDS",
    "ChildConfig",
    "CompositeLogStoreConfig",
    "HandlerConfig",
    "Secret",
    "SecretStr",
    "UnknownChild",
    "backends",
]
