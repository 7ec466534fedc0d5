"""The settings of a connection: those of the child, completed from OpenTelemetry's environment variables."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from composite_logstore import UnavailableError, quote
from composite_logstore_otlp.checks import FILES, GRPC, HTTP, check_compression, check_endpoint, check_header
from composite_logstore_otlp.config import OtlpChildConfig
from composite_logstore_otlp.statuses import LOGS_PATH


@dataclass(frozen=True)
class Connection:
    """The settings that a request needs besides its payload.

    Attributes:
        protocol: `http/protobuf` or `grpc`.
        endpoint: For HTTP the whole URL, for gRPC `host:port`.
        secure: Whether TLS is used.
        headers: The headers of every request, with names in lower case.
        compression: `none`, `gzip` or `deflate`.
        certificate_file: The certificate authorities to trust.
        client_key_file: The client's private key.
        client_certificate_file: The client's certificate.
    """

    protocol: str
    endpoint: str = field(repr=False)
    secure: bool
    headers: dict[str, str] = field(repr=False)
    compression: str
    certificate_file: str | None
    client_key_file: str | None
    client_certificate_file: str | None

    @staticmethod
    def of(config: OtlpChildConfig) -> Connection:
        """Complete the settings, and check them again: a secret or a variable may contain anything.

        Raises:
            UnavailableError: A value cannot be used. The message names the setting or the variable.
        """
        try:
            return _connection(config)
        except ValueError as error:
            raise UnavailableError(str(error)) from None

    @property
    def place(self) -> str:
        """The endpoint as it may be shown: without a query, which may contain a key."""
        return self.endpoint.partition("?")[0]

    @property
    def client_certificate(self) -> tuple[str, str] | str | None:
        """The client's certificate, and its key if it has its own file, in the form that `requests` takes."""
        certificate, key = self.client_certificate_file, self.client_key_file
        return (certificate, key) if certificate and key else certificate

    def quote(self, text: str) -> str:
        """Return a server's text in a form that can be shown, without keys that it repeats."""
        return quote(text, self.headers)


def _connection(config: OtlpChildConfig) -> Connection:
    protocol, source = _setting("protocol", config.protocol)
    protocol = protocol or HTTP
    if protocol not in (HTTP, GRPC):
        raise ValueError(f"{source} names a protocol that is not supported; set it to '{HTTP}' or '{GRPC}'")
    compression, source = _setting("compression", config.compression)
    if compression not in (None, "none", "gzip", "deflate"):
        raise ValueError(f"{source} names a compression that is not supported; set it to 'gzip' or 'none'")
    check_compression(source, compression, protocol)
    endpoint, secure = _endpoint(config, protocol)
    connection = Connection(
        protocol,
        endpoint,
        secure,
        _headers(config, protocol),
        compression or "none",
        *(_setting(name, getattr(config, name))[0] for name in FILES),
    )
    if secure:
        _check_certificates(config)
    return connection


def _setting(name: str, value: str | None) -> tuple[str | None, str]:
    """Return a setting, or else its variable's value, and its name in an error."""
    if value is not None:
        return value, f"'{name}'"
    for variable in (f"OTEL_EXPORTER_OTLP_LOGS_{_variable(name)}", f"OTEL_EXPORTER_OTLP_{_variable(name)}"):
        # An empty variable counts as one that is not set.
        # https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/#parsing-empty-value
        if found := os.environ.get(variable, "").strip():
            return found, variable
    return None, f"'{name}'"


def _variable(name: str) -> str:
    return name.removesuffix("_file").upper()


def _endpoint(config: OtlpChildConfig, protocol: str) -> tuple[str, bool]:
    endpoint, source = _setting("endpoint", config.endpoint)
    insecure = config.insecure
    if insecure is None:
        # "This option only applies to OTLP/gRPC when an endpoint is provided without the http or https
        # scheme": unlike the setting, the variable contradicts nothing.
        # https://opentelemetry.io/docs/specs/otel/protocol/exporter/#configuration-options
        variable, _ = _setting("insecure", None)
        use_tls = (variable or "").lower() != "true"
    else:
        use_tls = not insecure
    if endpoint is None:
        endpoint = "http://localhost:4317" if protocol == GRPC else "http://localhost:4318"
    check_endpoint(source, endpoint, protocol, insecure if config.endpoint else None)
    if protocol == GRPC and "://" not in endpoint:
        return endpoint, use_tls
    url = urlsplit(endpoint)
    secure = url.scheme == "https"
    if protocol == GRPC:
        return url.netloc if url.port else f"{url.netloc}:443", secure
    path = url.path
    if source == "OTEL_EXPORTER_OTLP_ENDPOINT":
        # This variable has a base URL. The variable for logs "MUST be used as-is".
        # https://opentelemetry.io/docs/specs/otel/protocol/exporter/#endpoint-urls-for-otlphttp
        path = path.rstrip("/") + LOGS_PATH
    elif path in ("", "/") and source == "'endpoint'":
        path = LOGS_PATH
    return urlunsplit((url.scheme, url.netloc, path, url.query, "")), secure


def _headers(config: OtlpChildConfig, protocol: str) -> dict[str, str]:
    headers = {}
    if config.headers is not None:
        given = {name: value.get_secret_value() for name, value in config.headers.items()}
        source = "'headers'"
    else:
        text, source = _setting("headers", None)
        given = _parse_headers(text or "", source)
    for name, value in given.items():
        check_header(f"{source}: '{name}'", name, value, protocol)
        headers[name.lower()] = value.strip()
    return headers


def _parse_headers(text: str, source: str) -> dict[str, str]:
    """Parse the variable: `key1=value1,key2=value2`, percent-encoded.

    OpenTelemetry's own parser would log a header that it cannot parse, with the key in it.
    https://opentelemetry.io/docs/specs/otel/protocol/exporter/#specifying-headers-via-environment-variables
    """
    headers = {}
    for number, item in enumerate(text.split(","), start=1):
        name, equals, value = item.partition("=")
        if equals:
            headers[unquote(name.strip())] = unquote(value.strip())
        elif item.strip():
            raise ValueError(f"{source}: header number {number} is not of the form name=value; mend it")
    return headers


def _check_certificates(config: OtlpChildConfig) -> None:
    """Load the certificates as a test. Libraries load them later, with poorer errors, or ask for a password."""
    files = {}
    sources = {}
    for name in FILES:
        files[name], sources[name] = _setting(name, getattr(config, name))
        if file := files[name]:
            try:
                Path(file).read_bytes()
            except OSError as error:
                raise ValueError(f"{sources[name]}: the file cannot be read ({error.strerror})") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if file := files["certificate_file"]:
        try:
            context.load_verify_locations(file)
        except ssl.SSLError:
            raise ValueError(f"{sources['certificate_file']}: the file holds no PEM certificate") from None
    if file := files["client_certificate_file"]:
        try:
            context.load_cert_chain(file, files["client_key_file"], password=lambda: "")
        except ssl.SSLError:
            raise ValueError(
                f"{sources['client_certificate_file']}: the file and its key do not belong together, are not "
                "PEM, or the key is encrypted; give both as PEM, the key without a password"
            ) from None
    elif files["client_key_file"]:
        raise ValueError(f"{sources['client_key_file']} is of no use alone; set 'client_certificate_file' too")
