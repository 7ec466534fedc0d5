"""The settings of an `otlp` child."""

from __future__ import annotations

import re
from contextlib import closing
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from composite_logstore import ChildConfig, Secret, UnavailableError, has_reference

if TYPE_CHECKING:
    from composite_logstore import Exporter

EXTRA = "composite-logstore[otlp]"

HTTP: Literal["http/protobuf"] = "http/protobuf"
GRPC: Literal["grpc"] = "grpc"

FILES = ("certificate_file", "client_key_file", "client_certificate_file")

Text = Annotated[str, Field(min_length=1)]

# https://www.rfc-editor.org/rfc/rfc9110#name-tokens
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADERS_OF_THE_EXPORTER = {
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "te",
    "transfer-encoding",
}
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s/:@\[\]]+):[0-9]{1,5}")
_INT64 = 1 << 63


class OtlpChildConfig(ChildConfig):
    """Sends events to an OpenTelemetry collector, or to whatever else speaks OTLP.

    What is left out is taken from OpenTelemetry's environment variables where the exporter runs, those for
    logs first (`OTEL_EXPORTER_OTLP_LOGS_ENDPOINT` before `OTEL_EXPORTER_OTLP_ENDPOINT`), and last from the
    defaults below.

    Attributes:
        endpoint: Where to send. For HTTP a URL, which gets `/v1/logs` if it has no path; for gRPC
            `host:port` or a URL. Default: port 4318 (HTTP) or 4317 (gRPC) of `localhost`, without TLS.
        protocol: `http/protobuf` (the default) or `grpc`.
        headers: Headers of every request, such as `authorization`.
        compression: `none` (the default), `gzip`, or `deflate` (HTTP alone).
        insecure: Whether gRPC goes without TLS where `endpoint` is `host:port`. Default: false.
        certificate_file: The certificate authorities to trust, as a PEM file. Default: the usual ones.
        client_key_file: The client's private key for TLS, as a PEM file that is not encrypted.
        client_certificate_file: The client's certificate for TLS, as a PEM file.
        service_name: The resource's `service.name`. Default: `zenml`.
        service_version: The resource's `service.version`. Default: ZenML's version.
        resource_attributes: Further attributes of the resource.
    """

    # About 1 KB an event: below 1 MiB a request, which is also what many a proxy before a collector takes.
    default_batch_size: ClassVar[int] = 1_000
    requirements: ClassVar[frozenset[str]] = frozenset({EXTRA})

    endpoint: Text | None = None
    protocol: Literal["http/protobuf", "grpc"] | None = None
    headers: dict[str, Secret] | None = None
    compression: Literal["none", "gzip", "deflate"] | None = None
    insecure: bool | None = None
    certificate_file: Text | None = None
    client_key_file: Text | None = None
    client_certificate_file: Text | None = None
    service_name: Text | None = None
    service_version: Text | None = None
    resource_attributes: dict[str, str | bool | int | float] = Field(default_factory=dict)

    @field_validator("resource_attributes")
    @classmethod
    def _resource_attributes_fit(
        cls, value: dict[str, str | bool | int | float]
    ) -> dict[str, str | bool | int | float]:
        for name, item in value.items():
            if isinstance(item, int) and not -_INT64 <= item < _INT64:
                raise ValueError(f"'{name}' is beyond 64 bits; write it as a text")
        return value

    @model_validator(mode="after")
    def _connection_fits(self) -> OtlpChildConfig:
        protocol = self.protocol or HTTP
        if self.endpoint and not has_reference(self.endpoint):
            check_endpoint("'endpoint'", self.endpoint, protocol, self.insecure)
            if self.endpoint.startswith("http://") and any(getattr(self, field) for field in FILES):
                raise ValueError(
                    "'endpoint' begins with http://, where certificates have no use; begin it with https://"
                )
        for name, value in (self.headers or {}).items():
            text = value.get_secret_value()
            check_header(f"'headers.{name}'", name, "" if has_reference(text) else text, protocol)
        if self.protocol:
            check_compression("'compression'", self.compression, self.protocol)
        if self.client_key_file and not self.client_certificate_file:
            raise ValueError("'client_key_file' is of no use alone; set 'client_certificate_file' too")
        return self

    def create_exporter(self) -> Exporter:
        """Create the exporter.

        Raises:
            UnavailableError: The extra is not installed, or a setting or a certificate cannot be used.
        """
        try:
            from composite_logstore_otlp.exporter import OtlpExporter

            return OtlpExporter(self)
        except ModuleNotFoundError as error:
            # Another ImportError says nothing of what is installed: a library may not be openable just now.
            raise UnavailableError(f"cannot import '{error.name}'; install '{EXTRA}'") from None

    def backend_time(self) -> datetime | None:
        """Ask the collector what time it is. Over HTTP any answer says it; gRPC has nothing of the kind."""
        from composite_logstore_otlp.connection import Connection

        connection = Connection.of(self)
        if connection.protocol != HTTP:
            return None
        from composite_logstore import HttpClient

        with closing(HttpClient(None, connection.certificate_file, connection.client_certificate)) as client:
            return client.time_at(connection.endpoint, self.export_timeout_millis / 1000)

    def check(self) -> None:
        """Check that the extra is installed and that the certificates are there.

        Raises:
            ValueError: Something is missing.
        """
        # ZenML brings along the rest of what the exporter needs.
        for module in ("opentelemetry.proto", "grpc"):
            if find_spec(module) is None:
                raise ValueError(f"cannot find '{module}'; install '{EXTRA}'")
        for field in FILES:
            file = getattr(self, field)
            if file and not has_reference(file) and not Path(file).is_file():
                raise ValueError(f"'{field}': there is no such file here; put it there, or name another")


def check_endpoint(label: str, endpoint: str, protocol: str, insecure: bool | None) -> None:
    """Check what can be known of an endpoint without using it.

    Args:
        label: What to call it; its value may hold a key.
        endpoint: The endpoint.
        protocol: Which protocol it is meant for.
        insecure: The setting of that name.

    Raises:
        ValueError: It cannot be used.
    """
    if protocol == GRPC and "://" not in endpoint:
        if not _HOST_AND_PORT.fullmatch(endpoint):
            raise ValueError(f"{label} is not usable for gRPC; write it as host:port, or as a URL")
        return
    try:
        url = urlsplit(endpoint)
        host, port = url.hostname, url.port
    except ValueError:
        raise ValueError(f"{label} is not a URL that can be used; write it as http://host:port") from None
    if url.scheme not in ("http", "https"):
        other = f", or set 'protocol' to '{GRPC}'" if protocol == HTTP else ""
        raise ValueError(f"{label} must be a URL; begin it with http:// or https://{other}")
    if not host:
        raise ValueError(f"{label} has no host; write it as {url.scheme}://host:port")
    if url.username or url.password:
        raise ValueError(f"{label} holds a user or a password; put them into the header 'authorization'")
    if insecure is not None and insecure == (url.scheme == "https"):
        raise ValueError(f"'insecure' contradicts {label}, whose http:// or https:// decides; leave 'insecure' out")
    if protocol == GRPC:
        if url.path not in ("", "/") or url.query:
            raise ValueError(f"{label} has a path, and gRPC knows none; leave out what follows the port")
        if port is None and url.scheme == "http":
            raise ValueError(f"{label} has no port; add it (a collector's port for gRPC is 4317)")


def check_header(label: str, name: str, value: str, protocol: str) -> None:
    """Check that a header can be sent, since libraries repeat one that they refuse in their errors.

    Args:
        label: What to call it.
        name: The header's name.
        value: Its value.
        protocol: Which protocol it is meant for.

    Raises:
        ValueError: It cannot be sent.
    """
    if not _HEADER_NAME.fullmatch(name):
        raise ValueError(f"{label} is not a header's name; use letters, digits and -")
    if name.lower() in _HEADERS_OF_THE_EXPORTER:
        raise ValueError(f"{label} is set by the exporter; leave it out")
    if protocol == GRPC and name.lower().startswith("grpc-"):
        raise ValueError(f"{label} begins with 'grpc-', which gRPC keeps for itself; leave it out")
    if protocol == GRPC and name.lower().endswith("-bin"):
        raise ValueError(f"{label} ends in '-bin', which gRPC keeps for binary values; use another name")
    if not all(" " <= character <= "~" or character == "\t" for character in value.strip()):
        raise ValueError(f"{label} has a line break or a character beyond ASCII; copy it again")


def check_compression(label: str, compression: str | None, protocol: str) -> None:
    """Check that the protocol has the compression.

    Raises:
        ValueError: It has not.
    """
    if compression == "deflate" and protocol == GRPC:
        raise ValueError(f"{label} 'deflate' exists for '{HTTP}' alone; set 'gzip' or 'none'")
