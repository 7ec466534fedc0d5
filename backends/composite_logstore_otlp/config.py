"""The settings of an `otlp` child."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, field_validator, model_validator

from composite_logstore import ChildConfig, ReadSection, Secret, UnavailableError, has_reference
from composite_logstore_otlp.checks import FILES, GRPC, HTTP, check_compression, check_endpoint, check_header

if TYPE_CHECKING:
    from composite_logstore import CollectorExporter, Exporter, Reader

EXTRA = "composite-logstore[otlp]"


Text = Annotated[str, Field(min_length=1)]

_INT64 = 1 << 63


class OtlpChildConfig(ChildConfig):
    """Sends events to an OpenTelemetry collector, or to any other receiver of OTLP.

    A setting that is left out comes from OpenTelemetry's environment variables where the exporter runs, from those for
    logs first (`OTEL_EXPORTER_OTLP_LOGS_ENDPOINT` before `OTEL_EXPORTER_OTLP_ENDPOINT`), or else from the defaults
    below.

    Attributes:
        endpoint: Where to send. For HTTP a URL, which gets `/v1/logs` if it has no path; for gRPC
            `host:port` or a URL. Default: port 4318 (HTTP) or 4317 (gRPC) of `localhost`, without TLS.
        protocol: `http/protobuf` (the default) or `grpc`.
        headers: Headers of every request, such as `authorization`.
        compression: `none` (the default), `gzip`, or `deflate` (only with HTTP).
        insecure: Whether gRPC uses no TLS, if `endpoint` is `host:port`. Default: false.
        certificate_file: The certificate authorities to trust, as a PEM file. Default: those of the system.
        client_key_file: The client's private key for TLS, as a PEM file that is not encrypted.
        client_certificate_file: The client's certificate for TLS, as a PEM file.
        service_name: The resource's `service.name`. Default: `zenml`.
        service_version: The resource's `service.version`. Default: ZenML's version.
        resource_attributes: Further attributes of the resource.
        read: Where the collector's events are read: a reader's `type`, and its settings.
    """

    # An event has about 1 KB, so a request has less than 1 MiB. Many proxies accept no more.
    default_batch_size: ClassVar[int] = 1_000
    requirements: ClassVar[frozenset[str]] = frozenset({EXTRA})

    ansi: Literal["keep", "strip"] = "strip"
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
    read: ReadSection | None = None

    @property
    def unreadable(self) -> str | None:
        """Why the child cannot be read: a collector does not show what it has received."""
        return None if self.read else "children of type 'otlp' cannot be read without a section 'read'"

    @property
    def known_losses(self) -> str | None:
        """Which events the backend that `read` names does not keep."""
        return self.read.known_losses if self.read else None

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

    @property
    def delay_seconds(self) -> float:
        """How long it usually takes until an event that the collector has accepted can be read, in seconds."""
        return self.read.delay_seconds if self.read else 0.0

    @property
    def absence(self) -> str:
        """What people can do if an event that the collector has accepted cannot be read."""
        return self.read.absence if self.read else super().absence

    def create_exporter(self) -> Exporter:
        """Create the exporter.

        Raises:
            UnavailableError: The extra is not installed, or a setting or a certificate cannot be used.
        """
        try:
            from composite_logstore_otlp.exporter import OtlpExporter

            return OtlpExporter(self)
        except ModuleNotFoundError as error:
            # Another ImportError need not mean that a package is missing: a library may fail to open for a moment.
            raise UnavailableError(f"cannot import '{error.name}'; install '{EXTRA}'") from None

    def create_reader(self) -> Reader:
        """Create the reader that `read` names. It needs no packages besides ZenML's.

        Raises:
            UnavailableError: The child has no section `read`, or the reader is missing something.
        """
        if self.read is None:
            raise UnavailableError(str(self.unreadable))
        return self.read.create_reader(self.service_name)

    def collector_exporter(self) -> CollectorExporter:
        """Return the Collector's exporter of OTLP.

        Raises:
            UnavailableError: The endpoint is not set, and OpenTelemetry's variables belong to another process.
        """
        from composite_logstore import CollectorExporter
        from composite_logstore_otlp.statuses import LOGS_PATH

        if self.endpoint is None:
            raise UnavailableError(
                "its 'endpoint' is not set, and the Collector does not look into OpenTelemetry's variables; set it"
            )
        url = urlsplit(
            self.endpoint if "://" in self.endpoint else f"{'http' if self.insecure else 'https'}://{self.endpoint}"
        )
        names = ("ca_file", "key_file", "cert_file")
        tls: dict[str, Any] = {
            name: file for name, field in zip(names, FILES, strict=True) if (file := getattr(self, field))
        }
        losses = ["The Collector looks for the certificates in files of its own machine"] if tls else []
        # Where nothing is set, the Collector compresses.
        settings: dict[str, Any] = {"compression": self.compression or "none"}
        if self.protocol == GRPC:
            settings["endpoint"] = url.netloc if url.port else f"{url.netloc}:443"
            if url.scheme == "http":
                tls["insecure"] = True
        else:
            path = LOGS_PATH if url.path in ("", "/") else url.path
            settings["logs_endpoint"] = urlunsplit((url.scheme, url.netloc, path, url.query, ""))
        if self.headers:
            settings["headers"] = self.headers
        if tls:
            settings["tls"] = tls
        return CollectorExporter(
            "otlp_grpc" if self.protocol == GRPC else "otlp_http",
            settings,
            resource_attributes={
                **self.resource_attributes,
                **({"service.name": self.service_name} if self.service_name else {}),
                **({"service.version": self.service_version} if self.service_version else {}),
            },
            losses=losses,
            read=None if self.read is None else self.read.model_dump(exclude_unset=True),
        )

    def check_registration(self) -> None:
        """Check the section `read`.

        Raises:
            ValueError: Something is wrong with it.
        """
        if self.read is not None:
            self.read.check_registration()

    def backend_time(self) -> datetime | None:
        """Ask the collector for its time. Over HTTP any answer contains it; over gRPC none does."""
        from composite_logstore_otlp.connection import Connection

        connection = Connection.of(self)
        if connection.protocol != HTTP:
            return None
        from composite_logstore import HttpClient

        with closing(HttpClient(None, connection.certificate_file, connection.client_certificate)) as client:
            return client.time_at(connection.endpoint, self.export_timeout_millis / 1000)

    def check(self) -> None:
        """Check that the extra is installed and that the certificate files exist.

        Raises:
            ValueError: One of them is missing.
        """
        # ZenML itself depends on the other packages that the exporter needs.
        for module in ("opentelemetry.proto", "grpc"):
            if find_spec(module) is None:
                raise ValueError(f"cannot find '{module}'; install '{EXTRA}'")
        for field in FILES:
            file = getattr(self, field)
            if file and not has_reference(file) and not Path(file).is_file():
                raise ValueError(f"'{field}': the file does not exist here; create it, or name another")
