"""The exporter: sends events to an OpenTelemetry collector."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from zenml import __version__ as zenml_version

from composite_logstore import UNENCODABLE, RejectedError, detected_attributes, environment_attributes
from composite_logstore_otlp.checks import GRPC
from composite_logstore_otlp.connection import Connection
from composite_logstore_otlp.encoding import encode_request, encode_resource

if TYPE_CHECKING:
    from composite_logstore import LogEvent, Stream
    from composite_logstore_otlp.config import OtlpChildConfig

MAX_GRPC_REQUEST_BYTES = 4 * 1024 * 1024
"""The largest request that gRPC receivers accept by default, before compression."""

MAX_HTTP_REQUEST_BYTES = 20 * 1024 * 1024
"""The largest request that the collector's HTTP receiver accepts by default, before compression.

https://github.com/open-telemetry/opentelemetry-collector/tree/main/config/confighttp#server-configuration
"""


class Transport(Protocol):
    """Sends requests to the collector."""

    def send(self, payload: bytes, timeout_seconds: float) -> bytes:
        """Send a request once, and return the response, or raise as `Exporter.export` does."""

    def close(self) -> None:
        """Close connections."""


class OtlpExporter:
    """Exports batches over one connection, which it opens for the first batch."""

    def __init__(self, config: OtlpChildConfig) -> None:
        """Prepare the connection, with secrets resolved.

        Args:
            config: The child's settings.

        Raises:
            UnavailableError: A setting, a variable or a certificate cannot be used.
            ImportError: The extra is not installed.
        """
        connection = Connection.of(config)
        self._quote = connection.quote
        self._resource = encode_resource(resource_attributes(config))
        self._added = None if config.read is None else config.read.added_attributes
        self._transport: Transport
        if connection.protocol == GRPC:
            from composite_logstore_otlp.over_grpc import GrpcTransport

            self._transport, self._max_bytes = GrpcTransport(connection), MAX_GRPC_REQUEST_BYTES
        else:
            from composite_logstore_otlp.over_http import HttpTransport

            self._transport, self._max_bytes = HttpTransport(connection), MAX_HTTP_REQUEST_BYTES
        # Give up a little before the delivery does, so that the export does not count as overdue.
        seconds = config.export_timeout_millis / 1000
        self._timeout_seconds = max(seconds * 0.9, seconds - 0.5)

    def export(self, batch: Sequence[LogEvent]) -> int:
        """Send the batch as one request, once.

        Args:
            batch: The events.

        Returns:
            How many of the events had to be shortened.

        Raises:
            RetryableError: The collector cannot be reached, or asks for a retry.
            RejectedError: The collector rejected events.
            TooLargeError: The request is too large, or the collector says that it is.
            UnavailableError: The user has to mend the settings or the collector.
        """
        deadline = time.monotonic() + self._timeout_seconds
        try:
            payload, shortened = encode_request(batch, self._resource, self._max_bytes, self._added)
        except UNENCODABLE as error:
            # An event of another program, from an archive, may have text that is not Unicode, or a time before 1970. A
            # retry would fail too.
            raise RejectedError(f"an event cannot be encoded ({type(error).__name__})") from error
        # Keep half of the time for sending: otherwise an event that takes long to encode would block the child.
        remaining = max(deadline - time.monotonic(), self._timeout_seconds / 2)
        response = self._transport.send(payload, remaining)
        reason, count = _rejected(response)
        if count > 0:
            text = self._quote(reason) or "no reason given"
            raise RejectedError(f"the collector rejected events: {text}", min(count, len(batch)), shortened)
        return shortened

    def end_stream(self, stream: Stream) -> None:
        """Do nothing: in OTLP a stream has no end."""

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()


def resource_attributes(config: OtlpChildConfig) -> dict[str, Any]:
    """Return the resource of all events: from the settings, OpenTelemetry's variables, and defaults."""
    settings: dict[str, Any] = dict(config.resource_attributes)
    if config.service_name:
        settings["service.name"] = config.service_name
    if config.service_version:
        settings["service.version"] = config.service_version
    defaults = {"service.name": "zenml", "service.version": zenml_version}
    return detected_attributes({**defaults, **environment_attributes(), **settings})


def _rejected(response: bytes) -> tuple[str, int]:
    """Return why and how many events the collector rejected although it accepted the request.

    https://opentelemetry.io/docs/specs/otlp/#partial-success
    """
    try:
        partial_success = ExportLogsServiceResponse.FromString(response).partial_success
    except DecodeError:
        # Some backends answer with a text of their own. The status says that they accepted the request.
        return "", 0
    return partial_success.error_message, partial_success.rejected_log_records
