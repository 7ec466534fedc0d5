"""The settings of the section `read` for VictoriaLogs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from composite_logstore import HttpReaderConfig

if TYPE_CHECKING:
    from composite_logstore import LogEvent, Reader

SEVERITY_NUMBER = "zenml.log.severity_number"
"""The attribute with the severity's number."""

LOGGER = "zenml.log.logger"
"""The attribute with the logger's name: a scope without one becomes `unknown`."""

IS_MESSAGE = "zenml.log.is_message"
"""The attribute of an event whose own message begins with `NO_MESSAGE`."""

NO_MESSAGE = "missing _msg field; see https://docs.victoriametrics.com/"
"""The beginning of VictoriaLogs' message of an entry that was sent without one."""


class VictoriaLogsReaderConfig(HttpReaderConfig):
    """Reads events from VictoriaLogs, which takes OTLP at `/insert/opentelemetry/v1/logs`.

    Attributes:
        url: VictoriaLogs' URL, such as `http://victorialogs:9428`, or that of `vmauth` before it.
        username: The user to read as.
        password: That user's password.
        api_key: A token that `vmauth` asks for, instead of a user.
        certificate_file: The certificate authorities to trust, as a PEM file. Default: those of the system.
        account_id: The tenant's account (`AccountID`). Default: 0.
        project_id: The tenant's project (`ProjectID`). Default: 0.
    """

    known_losses: ClassVar[str] = (
        "VictoriaLogs drops events that are older than its '-retentionPeriod' (7 days by default), or more than two "
        "days ahead, and reports no error"
    )

    url: str
    account_id: int = Field(default=0, ge=0, lt=1 << 32)
    project_id: int = Field(default=0, ge=0, lt=1 << 32)

    def added_attributes(self, event: LogEvent) -> Mapping[str, str | int]:
        """Return the severity's number, which older versions drop, and what VictoriaLogs' own words could stand for."""
        added: dict[str, str | int] = {SEVERITY_NUMBER: event.severity_number, LOGGER: event.logger_name}
        if event.message.startswith(NO_MESSAGE):
            added[IS_MESSAGE] = True
        return added

    def create_reader(self, service_name: str | None) -> Reader:
        """Create the reader. Streams are found by their attribute, whatever the service."""
        from composite_logstore_victorialogs.reader import VictoriaLogsReader

        return VictoriaLogsReader(self)
