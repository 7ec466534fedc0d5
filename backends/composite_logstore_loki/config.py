"""The settings of the section `read` for Grafana Loki."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from composite_logstore import HttpCredentialsConfig, checked_url

if TYPE_CHECKING:
    from composite_logstore import Reader


class LokiReaderConfig(HttpCredentialsConfig):
    """Reads events from Grafana Loki or Grafana Cloud Logs, version 3.0 or later, which take OTLP themselves.

    The names are those of ZenML's own settings for Loki.

    Attributes:
        query_url: Loki's URL, such as `https://logs-prod-012.grafana.net`: without `/loki/api/v1/query_range`. Grafana
            Cloud has one host for both, a gateway may have two.
        username: The user to read as; for Grafana Cloud the number of the instance.
        password: That user's password; for Grafana Cloud a token with `logs:read`.
        api_key: A token that a gateway asks for, instead of a user.
        certificate_file: The certificate authorities to trust, as a PEM file. Default: those of the system.
        tenant_id: The tenant of a Loki that has several (`X-Scope-OrgID`); with `a|b` both are read.
        service_name: The events' `service.name`. Default: that of the child, or `zenml`.
    """

    known_losses: ClassVar[str] = (
        "Loki refuses events that are older than its 'reject_old_samples_max_age' (a week by default), or more than an "
        "hour older than the newest event of the same labels; before 3.7 it keeps one of two events that have the same "
        "time and text"
    )

    query_url: str
    tenant_id: str | None = Field(default=None, min_length=1)
    service_name: str | None = Field(default=None, min_length=1)

    @field_validator("query_url")
    @classmethod
    def _is_a_url(cls, value: str) -> str:
        return checked_url(value).removesuffix("/loki/api/v1/query_range").removesuffix("/loki/api/v1")

    @field_validator("tenant_id")
    @classmethod
    def _is_a_tenant(cls, value: str | None) -> str | None:
        if value is not None and not (value.isascii() and value.isprintable() and value.strip() == value):
            raise ValueError("has a character that no tenant has; copy it again")
        return value

    def create_reader(self, service_name: str | None) -> Reader:
        """Create the reader."""
        from composite_logstore_loki.reader import LokiReader

        return LokiReader(self, self.service_name or service_name or "zenml")
