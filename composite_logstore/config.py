"""The settings of the log store, and what is checked across its children."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field, SerializeAsAny, WithJsonSchema, field_validator, model_validator
from zenml.enums import LoggingLevels
from zenml.log_stores.base_log_store import BaseLogStoreConfig
from zenml.logger import get_logger
from zenml.utils.secret_utils import SecretReference

from composite_logstore import secret_references
from composite_logstore.child_config import ChildConfig
from composite_logstore.child_types import parse_child
from composite_logstore.mistakes import LEVELS, refuse_boolean
from composite_logstore.names import did_you_mean
from composite_logstore.processing import known_secrets
from composite_logstore.processing.settings import LEVEL_SCHEMA
from composite_logstore.server import is_server
from composite_logstore.settings_text import parse_settings
from composite_logstore.zenml import parse_log_level

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

logger = get_logger(__name__)

MOST_CHILDREN = 100
"""How many children a log store may have: each takes a thread in a pipeline, and a page may ask each of them."""

DELIVERY_VARIABLE = "COMPOSITE_LOGSTORE_DELIVERY"
"""The environment variable that decides who delivers the events of a process, whatever the setting says."""

QUEUE_BYTES = 64 * 1024**2
"""How many bytes of events may wait in memory, unless `max_queue_bytes` is set."""


@cache
def _warn(text: str) -> None:
    """Warn once in a process: ZenML checks settings in its client, and once more in its local store."""
    logger.warning(text)


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
        stderr_level: The level of what is printed to stderr. `detect`: the level that a line names, ERROR for a
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
                _warn(
                    f"child '{child.name}': '{field}' is written in clear text, which ZenML stores and shows "
                    f"as it is. Put it into a ZenML secret and refer to it as '{{{{secret_name.key}}}}'."
                )
        for warning in self.warnings:
            _warn(f"{warning}.")
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
