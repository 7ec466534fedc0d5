"""The settings of a `datadog` child."""

from __future__ import annotations

import re
from contextlib import closing
from datetime import datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from zenml import __version__

from composite_logstore import ChildConfig, Secret, UnavailableError, has_reference

if TYPE_CHECKING:
    from composite_logstore import CollectorExporter, Exporter, Reader

EXTRA = "composite-logstore[datadog]"

# Datadog's rules for tags. A comma would end a tag.
# https://docs.datadoghq.com/getting_started/tagging/#define-tags
_TAG = re.compile(r"[^\W\d_][^\s,]{0,199}")
_INTAKE_PATH = "/api/v2/logs"
_SITE = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)+")

# https://docs.datadoghq.com/logs/log_configuration/processors/log_date_remapper/
# Datadog answers 202 to older events too, and drops them.
OLDEST_SECONDS = 18 * 3600


class DatadogChildConfig(ChildConfig):
    """Sends events to Datadog's log intake and reads them with its log search.

    Attributes:
        api_key: The API key, for sending and for reading.
        application_key: The application key, with the scope `logs_read_data`. Only needed for reading.
        site: The Datadog site.
        service_name: The `service` of every event, for writing and for reading.
        service_version: The `version` of every event.
        endpoint: The whole URL of the log intake; the one of the site if not set.
        api_endpoint: The base URL of the API with the log search; the one of the site if not set.
        tags: Tags of every event, such as `env:prod`.
    """

    # https://docs.datadoghq.com/api/latest/logs/#send-logs
    oldest_seconds: ClassVar[float | None] = OLDEST_SECONDS
    max_batch_size: ClassVar[int] = 1_000
    default_batch_size: ClassVar[int] = 1_000
    readable: ClassVar[bool] = True
    requirements: ClassVar[frozenset[str]] = frozenset({EXTRA})

    ansi: Literal["keep", "strip"] = "strip"
    api_key: Secret
    application_key: Secret | None = None
    site: str = "datadoghq.com"
    service_name: str = Field(default="zenml", min_length=1, max_length=1_000)
    service_version: str = Field(default=__version__, min_length=1, max_length=1_000)
    endpoint: str | None = None
    api_endpoint: str | None = None
    tags: list[str] = Field(default_factory=list, max_length=100)

    @property
    def unreadable(self) -> str | None:
        """Why the child cannot be read: Datadog's search needs a key of its own."""
        return None if self.application_key else "'application_key' is needed to read it; set it"

    @property
    def delay_seconds(self) -> float:
        """How long it may take until an accepted event is found, in seconds. Datadog promises no figure."""
        return 60.0

    @property
    def intake_url(self) -> str:
        """The URL of the log intake."""
        return self.endpoint or f"https://http-intake.logs.{self.site}{_INTAKE_PATH}"

    @property
    def search_url(self) -> str:
        """The URL of the log search."""
        base = self.api_endpoint or f"https://api.{self.site}"
        return f"{base.rstrip('/')}/api/v2/logs/events/search"

    @field_validator("api_key", "application_key")
    @classmethod
    def _key_fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        # HTTP libraries repeat a header that they refuse in their errors, so an invalid key must not reach them.
        if value is None or has_reference(value):
            return value
        key = value.get_secret_value().strip()
        if not key:
            raise ValueError("is empty; set it to the key itself, or to a reference '{{secret_name.key}}'")
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError("holds characters that no key has; copy it again from Datadog")
        return SecretStr(key)

    @field_validator("site")
    @classmethod
    def _site_is_a_domain(cls, value: str) -> str:
        if not has_reference(value) and (not _SITE.fullmatch(value) or value.startswith(("app.", "api."))):
            raise ValueError(
                "must be the site alone, such as 'datadoghq.com', 'us5.datadoghq.com' or 'datadoghq.eu'; "
                "set it without 'https://' and without 'app.'"
            )
        return value

    @field_validator("endpoint", "api_endpoint")
    @classmethod
    def _endpoint_is_a_url(cls, value: str | None) -> str | None:
        if value is None or has_reference(value):
            return value
        try:
            url = urlsplit(value)
            usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ValueError("must be a URL; begin it with 'https://' and the host")
        return value

    @field_validator("endpoint")
    @classmethod
    def _endpoint_has_a_path(cls, value: str | None) -> str | None:
        if value is not None and not has_reference(value) and urlsplit(value).path in ("", "/"):
            raise ValueError("must be the whole URL; add the path, which at Datadog is '/api/v2/logs'")
        return value

    @field_validator("tags")
    @classmethod
    def _tags_are_tags(cls, value: list[str]) -> list[str]:
        for number, tag in enumerate(value, start=1):
            if not has_reference(tag) and not _TAG.fullmatch(tag):
                raise ValueError(
                    f"number {number} is no tag; begin it with a letter, leave out commas and spaces, and use "
                    "at most 200 characters, such as 'env:prod'"
                )
        return value

    def create_exporter(self) -> Exporter:
        """Create the exporter.

        Raises:
            UnavailableError: Datadog's client is not installed.
        """
        try:
            from composite_logstore_datadog.exporter import DatadogExporter
        except ModuleNotFoundError as error:
            # Another ImportError need not mean that a package is missing: a library may fail to open for a moment.
            raise UnavailableError(f"cannot import '{error.name}'; install '{EXTRA}'") from None
        return DatadogExporter(self)

    def create_reader(self) -> Reader:
        """Create the reader. It needs no packages besides ZenML's.

        Raises:
            UnavailableError: The application key is missing.
        """
        if self.application_key is None:
            raise UnavailableError("reading Datadog needs an 'application_key'; set it")
        from composite_logstore_datadog.reader import DatadogReader

        return DatadogReader(self)

    def collector_exporter(self) -> CollectorExporter:
        """Return the Collector's exporter for Datadog.

        Raises:
            UnavailableError: `endpoint` has a path that the Collector's exporter cannot be told.
        """
        from composite_logstore import CollectorExporter

        settings: dict[str, Any] = {
            "api": {"key": self.api_key, "site": self.site},
            # It would report the Collector's machine as a host.
            "host_metadata": {"enabled": False},
        }
        if self.endpoint is not None:
            url = urlsplit(self.endpoint)
            if url.path != _INTAKE_PATH or url.query:
                raise UnavailableError(f"the Collector adds the path '{_INTAKE_PATH}', and its 'endpoint' has another")
            settings["logs"] = {"endpoint": f"{url.scheme}://{url.netloc}"}
        return CollectorExporter(
            "datadog",
            settings,
            attributes={"ddtags": ",".join(self.tags)} if self.tags else {},
            resource_attributes={"service.name": self.service_name, "service.version": self.service_version},
            # The exporter leaves out the name of the scope.
            statements=['set(attributes["logger.name"], instrumentation_scope.name)'],
            losses=[
                "An attribute 'message', 'level' or 'status' replaces what Datadog shows as such; numbers become texts"
            ],
        )

    def backend_time(self) -> datetime | None:
        """Ask Datadog's intake for its time. Any answer contains it, and no key is needed."""
        from composite_logstore import HttpClient

        with closing(HttpClient()) as client:
            return client.time_at(self.intake_url, self.export_timeout_millis / 1000)

    def check(self) -> None:
        """Check that Datadog's client is installed.

        Raises:
            ValueError: The client is not installed.
        """
        if find_spec("datadog_api_client") is None:
            raise ValueError(f"'type': 'datadog' needs Datadog's client; install '{EXTRA}'")
