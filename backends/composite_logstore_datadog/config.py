"""The settings of a `datadog` child."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import closing
from datetime import datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from zenml import __version__

from composite_logstore import Bounds, ChildConfig, Secret, UnavailableError, has_reference

if TYPE_CHECKING:
    from composite_logstore import Exporter, Reader

EXTRA = "composite-logstore[datadog]"

# Datadog's rules for tags, and a comma would be taken for the end of one.
# https://docs.datadoghq.com/getting_started/tagging/#define-tags
_TAG = re.compile(r"[^\W\d_][^\s,]{0,199}")
_SITE = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)+")

# https://docs.datadoghq.com/logs/log_configuration/processors/log_date_remapper/
# It answers 202 to older ones too, and drops them.
OLDEST_SECONDS = 18 * 3600


_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def seconds_asked_for(headers: Mapping[str, str]) -> float | None:
    """Return how long an answer asks to be left alone, if it does, and in numbers that make sense.

    A later reset than in an hour is no number of seconds: some proxies give the time of day.

    https://docs.datadoghq.com/api/latest/rate-limits/
    """
    value = (headers.get("Retry-After") or headers.get("X-RateLimit-Reset") or "").strip()
    seconds = float(value) if _SECONDS.fullmatch(value) else None
    return seconds if seconds is not None and seconds <= Bounds.WAIT_SECONDS else None


class DatadogChildConfig(ChildConfig):
    """Sends events to Datadog's log intake and reads them with its log search.

    Attributes:
        api_key: The API key, for sending and for reading.
        application_key: The application key; it may read logs (scope `logs_read_data`). Only needed to read.
        site: The Datadog site.
        service_name: The `service` of every event, and the one that is searched for.
        service_version: The `version` of every event.
        endpoint: The whole URL of the log intake; the site's if not set.
        api_endpoint: The base URL of the API that searches; the site's if not set.
        tags: Tags of every event, such as `env:prod`.
    """

    # https://docs.datadoghq.com/api/latest/logs/#send-logs
    oldest_seconds: ClassVar[float | None] = OLDEST_SECONDS
    max_batch_size: ClassVar[int] = 1_000
    default_batch_size: ClassVar[int] = 1_000
    readable: ClassVar[bool] = True
    requirements: ClassVar[frozenset[str]] = frozenset({EXTRA})

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
        """Why it cannot be read: Datadog's search wants a key of its own."""
        return None if self.application_key else "'application_key' is needed to read it; set it"

    @property
    def intake_url(self) -> str:
        """Where events are sent to."""
        return self.endpoint or f"https://http-intake.logs.{self.site}/api/v2/logs"

    @property
    def search_url(self) -> str:
        """Where events are searched for."""
        base = self.api_endpoint or f"https://api.{self.site}"
        return f"{base.rstrip('/')}/api/v2/logs/events/search"

    @field_validator("api_key", "application_key")
    @classmethod
    def _key_fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        # HTTP libraries repeat a header that they refuse in their errors, so none may get that far.
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
            # Another ImportError says nothing of what is installed: a library may not be openable just now.
            raise UnavailableError(f"cannot import '{error.name}'; install '{EXTRA}'") from None
        return DatadogExporter(self)

    def create_reader(self) -> Reader:
        """Create the reader. It needs nothing but what ZenML has.

        Raises:
            UnavailableError: There is no application key.
        """
        if self.application_key is None:
            raise UnavailableError("Datadog only lets itself be read with an 'application_key'; set it")
        from composite_logstore_datadog.reader import DatadogReader

        return DatadogReader(self)

    def backend_time(self) -> datetime | None:
        """Ask Datadog's intake what time it is. Any answer says it, and none needs a key."""
        from composite_logstore import HttpClient

        with closing(HttpClient()) as client:
            return client.time_at(self.intake_url, self.export_timeout_millis / 1000)

    def check(self) -> None:
        """Check that Datadog's client is installed.

        Raises:
            ValueError: It is not.
        """
        if find_spec("datadog_api_client") is None:
            raise ValueError(f"'type': 'datadog' needs Datadog's client; install '{EXTRA}'")
