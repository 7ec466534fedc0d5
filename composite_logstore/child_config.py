"""The settings that all children have, and what a backend adds to them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, SecretStr, model_validator
from zenml.utils.secret_utils import PlainSerializedSecretStr

from composite_logstore import secret_references
from composite_logstore.backend import UnavailableError, revealed, texts_in
from composite_logstore.mistakes import Section
from composite_logstore.processing import known_secrets
from composite_logstore.processing.processor import Processor, Step, StripEscapes
from composite_logstore.processing.redaction import MarkKeyLines, Redact
from composite_logstore.processing.repeats import Repeats
from composite_logstore.processing.rules import Rules
from composite_logstore.processing.sampling import Sampling
from composite_logstore.processing.settings import (
    MOST_MATCHERS,
    BudgetSettings,
    Level,
    Matcher,
    RedactSettings,
    RepeatSettings,
    SampleSettings,
)

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

    from composite_logstore.backend import Exporter, Reader
    from composite_logstore.collector import CollectorExporter

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
    """Whether `check_registration` asks ZenML: `composite-logstore validate`, which works offline, leaves it out."""
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

        No update of a thinned progress bar is expected, since the moment of delivery decides which ones arrive. So
        backfill copies none, and a comparison does not report missing ones.

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
        """Warnings about rules that have no effect, or exclude everything: sentences without full stops."""
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
        """Create the steps that let an event pass or not by the event alone: the child's rules and its sampling."""
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

        References to secrets are not resolved. The exporter does not cover the settings that all children have.

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
