"""The settings of an `elasticsearch` child, and of the reader of that name."""

from __future__ import annotations

import base64
import re
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from composite_logstore import ChildConfig, HttpReaderConfig, Secret, checked_url, has_reference

if TYPE_CHECKING:
    from composite_logstore import CollectorExporter, Exporter, Reader

DEFAULT_INDEX = "zenml-logs"
"""The index that ZenML's own Elasticsearch store uses."""

DEFAULT_STREAMS = "logs-*.otel-*"
"""The data streams to which the collector's exporter and Elasticsearch's own OTLP endpoint write logs."""

FILES = ("certificate_file", "client_key_file", "client_certificate_file")

# The Collector's exporter has no word for retries without an end.
_MOST_RETRIES = 1_000_000

Text = Annotated[str, Field(min_length=1)]

# https://www.elastic.co/docs/api/doc/elasticsearch/operation/operation-indices-create
_INDEX = re.compile(r"[^A-Z\\/*?\"<>|\s,#:_+\-.][^A-Z\\/*?\"<>|\s,#:]*")
_MOST_INDEX_BYTES = 255
# A colon follows the name of another cluster. A pattern of all indices would ask each of them.
_PATTERN = re.compile(r"[^A-Z\\/*?\"<>|\s,#:_+\-.%][^A-Z\\/?\"<>|\s,#%]*")
_MOST_PATTERN_CHARACTERS = 1_000


def check_secret(value: SecretStr | None) -> SecretStr | None:
    """Return a key or a password as it fits a header: HTTP libraries would repeat one that they refuse.

    Raises:
        ValueError: It cannot be sent.
    """
    if value is None or has_reference(value):
        return value
    text = value.get_secret_value().strip()
    if not text:
        raise ValueError("is empty; set it to the value itself, or to a reference '{{secret_name.key}}'")
    if not text.isprintable():
        raise ValueError("holds a line break or a control character; copy it again")
    return SecretStr(text)


def check_key(value: SecretStr | None) -> SecretStr | None:
    """Return an API key as Elasticsearch shows it, encoded.

    Raises:
        ValueError: It is none.
    """
    value = check_secret(value)
    if value is not None and not has_reference(value):
        key = value.get_secret_value()
        if not key.isascii() or " " in key:
            raise ValueError("holds characters that no key has; set it to the key's 'encoded' form alone")
    return value


class ElasticsearchChildConfig(ChildConfig):
    """Sends events to Elasticsearch or OpenSearch, and reads them with its search.

    Attributes:
        url: The cluster's base URL.
        index: The index or data stream, for writing and for reading.
        api_key: The API key in its encoded form.
        username: The user, if there is no `api_key`.
        password: The user's password.
        certificate_file: The certificate authorities to trust, as a PEM file. Default: those of the system.
        client_key_file: The client's private key for TLS, as a PEM file that is not encrypted.
        client_certificate_file: The client's certificate for TLS, as a PEM file.
    """

    # The answer names each event, so it grows with the batch.
    max_batch_size: ClassVar[int] = 5_000
    default_batch_size: ClassVar[int] = 1_000
    readable: ClassVar[bool] = True

    ansi: Literal["keep", "strip"] = "strip"
    url: str
    index: str = DEFAULT_INDEX
    api_key: Secret | None = None
    username: Text | None = None
    password: Secret | None = None
    certificate_file: Text | None = None
    client_key_file: Text | None = None
    client_certificate_file: Text | None = None

    @property
    def delay_seconds(self) -> float:
        """How long it usually takes until an event is found, in seconds: a refresh, and time for a busy cluster."""
        return 5.0

    @property
    def client_certificate(self) -> tuple[str, str] | str | None:
        """The client's certificate, and its key if it has its own file, in the form that `requests` takes."""
        certificate, key = self.client_certificate_file, self.client_key_file
        return (certificate, key) if certificate and key else certificate

    @property
    def authorization(self) -> dict[str, str]:
        """The header that authenticates a request, with secrets resolved; empty if the cluster needs none."""
        if self.api_key is not None:
            return {"Authorization": f"ApiKey {self.api_key.get_secret_value()}"}
        if self.username is None or self.password is None:
            return {}
        encoded = base64.b64encode(f"{self.username}:{self.password.get_secret_value()}".encode()).decode("ascii")
        return {"Authorization": f"Basic {encoded}"}

    @field_validator("url")
    @classmethod
    def _url_is_a_url(cls, value: str) -> str:
        return value if has_reference(value) else checked_url(value)

    @field_validator("index")
    @classmethod
    def _index_is_a_name(cls, value: str) -> str:
        if not has_reference(value) and (
            not _INDEX.fullmatch(value) or len(value.encode("utf-8", "replace")) > _MOST_INDEX_BYTES
        ):
            raise ValueError(
                f"must be the name of one index, such as '{DEFAULT_INDEX}'; use small letters, digits, '-' and '.', "
                "and begin it with a letter or a digit"
            )
        return value

    @field_validator("api_key")
    @classmethod
    def _key_fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        return check_key(value)

    @field_validator("password")
    @classmethod
    def _password_fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        return check_secret(value)

    @field_validator("username")
    @classmethod
    def _username_fits_a_header(cls, value: str | None) -> str | None:
        # https://www.rfc-editor.org/rfc/rfc7617#section-2
        if value is not None and (":" in value or not value.isprintable()):
            raise ValueError("holds a colon or a control character, which no user may have; correct it")
        return value

    @model_validator(mode="after")
    def _authentication_fits(self) -> ElasticsearchChildConfig:
        if (self.username is None) != (self.password is None):
            given, missing = ("username", "password") if self.password is None else ("password", "username")
            raise ValueError(f"'{given}' is of no use alone; set '{missing}' too")
        if self.api_key is not None and self.username is not None:
            raise ValueError("'api_key' and 'username' exclude each other; leave one of them out")
        if self.client_key_file and not self.client_certificate_file:
            raise ValueError("'client_key_file' is of no use alone; set 'client_certificate_file' too")
        if self.url.startswith("http://") and any(getattr(self, field) for field in FILES):
            raise ValueError("'url' begins with http://, where certificates have no use; begin it with https://")
        return self

    def create_exporter(self) -> Exporter:
        """Create the exporter."""
        from composite_logstore_elasticsearch.exporter import ElasticsearchExporter

        return ElasticsearchExporter(self)

    def create_reader(self) -> Reader:
        """Create the reader."""
        from composite_logstore_elasticsearch.reader import ElasticsearchReader

        return ElasticsearchReader(self)

    def collector_exporter(self) -> CollectorExporter:
        """Return the Collector's exporter for Elasticsearch, and the section `read` for what it writes."""
        from composite_logstore import CollectorExporter

        credentials = {"api_key": self.api_key, "user": self.username, "password": self.password}
        names = ("ca_file", "key_file", "cert_file")
        tls = {name: file for name, field in zip(names, FILES, strict=True) if (file := getattr(self, field))}
        settings: dict[str, Any] = {
            "endpoint": self.url,
            **{name: value for name, value in credentials.items() if value is not None},
            # An event that arrives twice is one document.
            "logs_dynamic_id": {"enabled": True},
            "retry": {
                "enabled": True,
                "max_retries": _MOST_RETRIES,
                "initial_interval": f"{self.retry_initial_interval_millis}ms",
                "max_interval": f"{self.retry_max_interval_millis}ms",
                "retry_on_status": [429, 500, 502, 503, 504],
            },
            **({"tls": tls} if tls else {}),
        }
        losses = [
            f"It writes documents of OpenTelemetry's mapping to the data stream logs-generic.otel-default, not to the "
            f"index '{self.index}'"
        ]
        if tls:
            losses.append("The Collector looks for the certificates in files of its own machine")
        read = {
            "type": "elasticsearch",
            "url": self.url,
            "username": self.username,
            "password": self.password,
            "api_key": self.api_key,
            "certificate_file": self.certificate_file,
        }
        can_read = self.client_certificate_file is None
        if not can_read:
            losses.append("No section 'read' can present a certificate")
        return CollectorExporter(
            "elasticsearch",
            settings,
            statements=['set(attributes["elasticsearch.document_id"], attributes["log.record.uid"])'],
            losses=losses,
            read={key: value for key, value in read.items() if value is not None} if can_read else None,
            retries=None,
        )

    def backend_time(self) -> datetime | None:
        """Ask for the time: proxies and hosted clusters tell it, a bare Elasticsearch does not."""
        from composite_logstore import HttpClient

        with closing(HttpClient(None, self.certificate_file, self.client_certificate)) as client:
            return client.time_at(self.url, self.export_timeout_millis / 1000)

    def check(self) -> None:
        """Check that the certificate files exist.

        Raises:
            ValueError: One of them is missing.
        """
        for field in FILES:
            file = getattr(self, field)
            if file and not has_reference(file) and not Path(file).is_file():
                raise ValueError(f"'{field}': the file does not exist here; create it, or name another")

    def unprepared(self) -> str | None:
        """Return whether the index template is missing."""
        from composite_logstore_elasticsearch.template import find_template

        return find_template(self)

    def prepare(self) -> str:
        """Make the index template."""
        from composite_logstore_elasticsearch.template import put_template

        return put_template(self)


class ElasticsearchReaderConfig(HttpReaderConfig):
    """Reads what a collector, or Elasticsearch's own OTLP endpoint, has written in OpenTelemetry's mapping.

    Attributes:
        index: The indices or data streams to read, with commas between them; `*` stands for any characters.
    """

    key_scheme: ClassVar[str] = "ApiKey"

    index: str = DEFAULT_STREAMS

    @field_validator("index")
    @classmethod
    def _index_is_a_pattern(cls, value: str) -> str:
        if not all(_PATTERN.fullmatch(part) for part in value.split(",")) or len(value) > _MOST_PATTERN_CHARACTERS:
            raise ValueError(
                f"must name indices or data streams, such as '{DEFAULT_STREAMS}'; begin each name with a letter or a "
                "digit, and use small letters, digits, '-', '.' and '*'"
            )
        return value

    def create_reader(self, service_name: str | None) -> Reader:
        """Create the reader."""
        from composite_logstore_elasticsearch.reader import OtelDocumentsReader

        return OtelDocumentsReader(self, service_name)
