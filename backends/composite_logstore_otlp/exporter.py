"""Takes events to an OpenTelemetry collector."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from zenml import __version__ as zenml_version

from composite_logstore import UNENCODABLE, RejectedError
from composite_logstore_otlp.checks import GRPC
from composite_logstore_otlp.connection import Connection
from composite_logstore_otlp.encoding import encode_request, encode_resource

if TYPE_CHECKING:
    from composite_logstore import LogEvent, Stream
    from composite_logstore_otlp.config import OtlpChildConfig

MAX_GRPC_REQUEST_BYTES = 4 * 1024 * 1024
"""What gRPC's receivers take unless they are told otherwise, before compression."""

MAX_HTTP_REQUEST_BYTES = 20 * 1024 * 1024
"""What the collector's HTTP receiver takes unless it is told otherwise, before compression.

https://github.com/open-telemetry/opentelemetry-collector/tree/main/config/confighttp#server-configuration
"""


class Transport(Protocol):
    """Takes one request to the collector."""

    def send(self, payload: bytes, timeout_seconds: float) -> bytes:
        """Send a request once, and return the response, or raise as `Exporter.export` does."""

    def close(self) -> None:
        """Close connections."""


class OtlpExporter:
    """Exports batches over one connection, which is opened when the first is exported."""

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
        self._transport: Transport
        if connection.protocol == GRPC:
            from composite_logstore_otlp.over_grpc import GrpcTransport

            self._transport, self._max_bytes = GrpcTransport(connection), MAX_GRPC_REQUEST_BYTES
        else:
            from composite_logstore_otlp.over_http import HttpTransport

            self._transport, self._max_bytes = HttpTransport(connection), MAX_HTTP_REQUEST_BYTES
        # Give up a little before the delivery does: then the child is not taken for one that is stuck.
        seconds = config.export_timeout_millis / 1000
        self._timeout_seconds = max(seconds * 0.9, seconds - 0.5)

    def export(self, batch: Sequence[LogEvent]) -> int:
        """Send the batch as one request, once.

        Args:
            batch: The events.

        Returns:
            How many of the events had to be shortened.

        Raises:
            RetryableError: The collector cannot be reached, or asks to be tried again.
            RejectedError: The collector refused events.
            TooLargeError: The request is too large, or the collector says that it is.
            UnavailableError: Somebody must mend something.
        """
        deadline = time.monotonic() + self._timeout_seconds
        try:
            payload, shortened = encode_request(batch, self._resource, self._max_bytes)
        except UNENCODABLE as error:
            # Of an event that another program has written, in an archive say: text that is not Unicode, or a time
            # before 1970. No later try would change that.
            raise RejectedError(f"an event cannot be encoded ({type(error).__name__})") from error
        # Half of the time is for sending in any case, or an event that takes long to encode would block the child.
        remaining = max(deadline - time.monotonic(), self._timeout_seconds / 2)
        response = self._transport.send(payload, remaining)
        reason, count = _rejected(response)
        if count > 0:
            text = self._quote(reason) or "no reason given"
            raise RejectedError(f"the collector rejected events: {text}", min(count, len(batch)), shortened)
        return shortened

    def end_stream(self, stream: Stream) -> None:
        """Do nothing: OTLP knows no end of a stream."""

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()


def resource_attributes(config: OtlpChildConfig) -> dict[str, Any]:
    """Return the resource that all events come from: the settings, OpenTelemetry's variables, defaults."""
    settings: dict[str, Any] = dict(config.resource_attributes)
    if config.service_name:
        settings["service.name"] = config.service_name
    if config.service_version:
        settings["service.version"] = config.service_version
    defaults = {"service.name": "zenml", "service.version": zenml_version}
    variables = OTELResourceDetector().detect().attributes
    attributes = {**defaults, **variables, **settings}
    try:
        return dict(Resource.create(attributes).attributes)
    except RuntimeError:
        # It looks for more in threads, and a process that is at its end cannot start any. What is logged last
        # is worth more than that.
        return attributes


def _rejected(response: bytes) -> tuple[str, int]:
    """Return why and how many events the collector refused although it took the request.

    https://opentelemetry.io/docs/specs/otlp/#partial-success
    """
    try:
        partial_success = ExportLogsServiceResponse.FromString(response).partial_success
    except DecodeError:
        # Some backends answer with a text of their own; that they took the request is in the status.
        return "", 0
    return partial_success.error_message, partial_success.rejected_log_records
