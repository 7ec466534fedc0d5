"""The exporter: sends events to Datadog's log intake.

It uses the configuration, the transport and the authentication of Datadog's own client, but not its model
classes, which take 144 µs a record.
"""

from __future__ import annotations

import gzip
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import orjson
import urllib3
from datadog_api_client import ApiClient, Configuration
from opentelemetry.sdk.resources import OTELResourceDetector
from requests.utils import get_auth_from_url, get_environ_proxies, select_proxy

from composite_logstore import (
    UNENCODABLE,
    AnswerTooLargeError,
    Bounds,
    HttpClient,
    LogEvent,
    RejectedError,
    RetryableError,
    Stream,
    TooLargeError,
    UnavailableError,
    shorten,
)
from composite_logstore_datadog.config import OLDEST_SECONDS, seconds_asked_for

if TYPE_CHECKING:
    from composite_logstore_datadog.config import DatadogChildConfig

# https://docs.datadoghq.com/api/latest/logs/#send-logs
# Datadog does not say which megabyte it means; its own agent takes the smaller one.
MAX_REQUEST_BYTES = 5_000_000
MAX_REQUEST_ENTRIES = 1_000
MAX_ENTRY_BYTES = 1_000_000

# https://docs.datadoghq.com/logs/log_configuration/processors/log_date_remapper/
NEWEST_SECONDS = 2 * 3600

_KEPT_BYTES = 10_000
"""What the text of a too large entry keeps at least, before another one is shortened."""

# https://opentelemetry.io/docs/specs/otel/common/mapping-to-non-otlp/#dropped-attributes-count
_MARK = "otel.dropped_attributes_count"
_MARK_BYTES = len(_MARK) + 16

# What means something of its own at the top level of an entry. `@timestamp` and `host` are not written here,
# but Datadog would prefer them to `timestamp` and `hostname`.
# https://docs.datadoghq.com/logs/log_configuration/pipelines/#preprocessing
_RESERVED = frozenset(
    {
        "@timestamp",
        "ddsource",
        "ddtags",
        "host",
        "hostname",
        "message",
        "service",
        "source",
        "status",
        "timestamp",
        "version",
    }
)
# What an entry keeps, however large the rest of it is. All of it is short, once the message has been cut.
_INDISPENSABLE = _RESERVED | {
    "code.file.path",
    "code.function.name",
    "code.line.number",
    "dd.span_id",
    "dd.trace_id",
    "exception.message",
    "exception.stacktrace",
    "exception.type",
    "log.record.uid",
    "logger.name",
    "otel.severity_number",
    "otel.severity_text",
    "otel.span_id",
    "otel.timestamp",
    "otel.trace_id",
    "service.name",
    "service.version",
    "zenml.log.id",
    "zenml.log.sequence",
    "zenml.log.writer",
}

_STATUSES = {"DEBUG": "debug", "INFO": "info", "WARN": "warn", "ERROR": "error", "FATAL": "fatal"}


class DatadogExporter:
    """Sends each batch as one request, and says in Datadog's own terms what became of it."""

    def __init__(self, config: DatadogChildConfig, clock: Callable[[], float] = time.time) -> None:
        """Make the client. Nothing is sent yet.

        Args:
            config: The child's settings, with secrets resolved.
            clock: The time, in seconds since the epoch.

        Raises:
            UnavailableError: The proxy that the environment names cannot be used.
        """
        self._url = config.intake_url
        self._host = urlsplit(self._url).hostname
        self._clock = clock
        # Leaves time for encoding, so that the export is over when the delivery gives it up.
        self._timeout_seconds = 0.9 * config.export_timeout_millis / 1000
        configuration = _configuration(config)
        try:
            self._client = ApiClient(configuration)
        except urllib3.exceptions.ProxySchemeUnknown:
            raise UnavailableError(
                f"the proxy that the environment names for {self._host} is not an HTTP proxy; "
                "name one that is, or put the host into NO_PROXY"
            ) from None
        self._http = HttpClient(self._client.rest_client.pool_manager)
        authentication = configuration.auth_settings()["apiKeyAuth"]  # type: ignore[no-untyped-call]
        self._headers = {
            **self._client.default_headers,
            "Content-Type": "application/json",
            "Content-Encoding": "gzip",
            authentication["key"]: authentication["value"],
        }
        self._common = {
            # ZenML's own store, too, adds what OTEL_RESOURCE_ATTRIBUTES names.
            **_unreserved(OTELResourceDetector().detect().attributes),
            "service.name": config.service_name,
            "service.version": config.service_version,
            "service": config.service_name,
            "version": config.service_version,
            "source": "zenml",
            "ddsource": "zenml",
            "hostname": socket.gethostname(),
        }
        if config.tags:
            self._common["ddtags"] = ",".join(config.tags)

    def export(self, batch: Sequence[LogEvent]) -> int:
        """Send the batch.

        Returns:
            How many of the events had to be shortened.

        Raises:
            RetryableError: Datadog could not be reached, or asks to be tried again.
            RejectedError: Datadog refuses the batch, or some events are too old for it.
            TooLargeError: The batch is too large for one request.
            UnavailableError: Datadog refuses the key, or what answers is not Datadog.
        """
        now = int(self._clock() * 1e9)
        oldest = now - OLDEST_SECONDS * 1_000_000_000
        newest = now + NEWEST_SECONDS * 1_000_000_000
        encoders: dict[Stream, _Encoder] = {}
        entries: list[bytes] = []
        size = 1
        shortened = too_old = too_new = unencodable = 0
        for event in batch:
            try:
                if event.time_unix_nano < oldest:
                    too_old += 1
                    continue
                if event.time_unix_nano > newest:
                    too_new += 1
                    continue
                encoder = encoders.get(event.stream)
                if encoder is None:
                    encoder = encoders[event.stream] = _Encoder(event.stream, self._common)
                entry = encoder.encode(event)
                if len(entry) > MAX_ENTRY_BYTES:
                    entry = _shortened(encoder.entry(event))
                    shortened += 1
            except UNENCODABLE:
                # An event that another program has written, in an archive say. No later try would change that.
                unencodable += 1
                continue
            entries.append(entry)
            size += len(entry) + 1
            if size > MAX_REQUEST_BYTES or len(entries) > MAX_REQUEST_ENTRIES:
                raise TooLargeError(
                    f"Datadog takes {MAX_REQUEST_ENTRIES} entries and {MAX_REQUEST_BYTES} bytes a request"
                )
        if entries:
            self._send(entries)
        refused = {
            "older than 18 hours": too_old,
            "more than 2 hours ahead": too_new,
            "of something that JSON cannot say": unencodable,
        }
        if any(refused.values()):
            reasons = [reason for reason, number in refused.items() if number]
            raise RejectedError(" or ".join(reasons), count=sum(refused.values()), shortened=shortened)
        return shortened

    def end_stream(self, stream: Stream) -> None:
        """Do nothing: Datadog knows no streams."""

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self._client.close()

    def _send(self, entries: list[bytes]) -> None:
        entries[0] = b"[" + entries[0]
        entries[-1] += b"]"
        payload = b",".join(entries)
        try:
            # The client's own `request` would encode the body itself, and follow a redirection with the key. What the
            # body of an answer says is of no interest: the status says it all, whatever becomes of the rest.
            response = self._http.request(
                "POST",
                self._url,
                headers=self._headers,
                # gzip's own level, 6, saves a fifth more and takes three times as long.
                body=gzip.compress(payload, compresslevel=1, mtime=0),
                timeout_seconds=self._timeout_seconds,
                max_bytes=Bounds.EXPORT_BYTES,
            )
        except AnswerTooLargeError:
            raise UnavailableError(
                f"what {self._host} answers is too large to be Datadog's answer; check 'endpoint' and 'site'"
            ) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unreached(error) from None
        self._judge(response.status, response.headers)

    def _unreached(self, error: Exception) -> Exception:
        """Return what it means that no answer came."""
        if isinstance(error, urllib3.exceptions.SSLError) and error.args:
            reason = error.args[0]
            if isinstance(reason, ssl.SSLCertVerificationError):
                return UnavailableError(
                    f"the certificate of {self._host} cannot be trusted ({reason.verify_message}); "
                    "check 'endpoint' and 'site', or name the authority that signed it in REQUESTS_CA_BUNDLE"
                )
        # Before there is a connection, the size of the request does not matter.
        smaller_may_pass = not isinstance(
            error,
            urllib3.exceptions.ConnectTimeoutError
            | urllib3.exceptions.NewConnectionError
            | urllib3.exceptions.ProxyError,
        )
        causes = [error, error.__cause__, *error.args]
        # A connection that is refused, and a host without address, count as timeouts there.
        is_late = any(isinstance(cause, urllib3.exceptions.TimeoutError | TimeoutError) for cause in causes)
        if is_late and not isinstance(error, urllib3.exceptions.NewConnectionError):
            return RetryableError(f"{self._host} did not answer in time", smaller_may_pass=smaller_may_pass)
        system = (cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror)
        # Without the text of what is no HTTP, which repeats what came.
        kind = type(next((cause for cause in causes if isinstance(cause, HTTPException)), error)).__name__
        words = f"cannot reach {self._host}: {next(system, None) or kind}"
        return RetryableError(words, smaller_may_pass=smaller_may_pass)

    def _judge(self, status: int, headers: Any) -> None:
        """Raise what the answer means, if it is not the one hoped for.

        https://docs.datadoghq.com/api/latest/logs/#send-logs
        """
        if 200 <= status < 300:
            return
        if status == 400:
            raise RejectedError("Datadog refuses it as malformed (400)")
        if status in (401, 403):
            raise UnavailableError(
                f"Datadog refuses the 'api_key' ({status}); check it, and that 'site' is the one it belongs to"
            )
        if status == 413:
            raise TooLargeError("Datadog refuses the request as too large (413)")
        if status in (408, 429) or status >= 500:
            # A proxy answers so, too, when it has waited for too long for the request or for Datadog's answer.
            raise RetryableError(f"Datadog answers {status}", seconds_asked_for(headers), smaller_may_pass=True)
        raise UnavailableError(
            f"{self._host} answers {status}, as Datadog's log intake never does; check 'endpoint' and 'site'"
        )


class _Encoder:
    """Encodes the events of one stream as ZenML's own Datadog store writes them, and what that leaves out."""

    def __init__(self, stream: Stream, common: dict[str, Any]) -> None:
        self._stream = _unreserved(stream.attributes)
        self._common = common
        # The same for every event of the batch, and most of an entry, so it is encoded once.
        self._shared = {**self._stream, **common}
        self._encoded = b"," + orjson.dumps(self._shared)[1:]
        self._rest = self._encoded.decode()
        self._is_apart = _ORDINARY_NAMES.isdisjoint(self._shared)

    def encode(self, event: LogEvent) -> bytes:
        """Return the event's entry, encoded."""
        if self._is_apart and event.is_ordinary:
            place = _place(
                event.level, event.level_name, event.logger_name, event.file, event.line, event.function, event.writer
            )
            time_unix_nano = event.time_unix_nano
            return (
                f'{{"message":{orjson.dumps(event.message).decode()},"timestamp":{time_unix_nano // 1_000_000},'
                f'"otel.timestamp":"{time_unix_nano}","log.record.uid":"{event.uid}",'
                f'"zenml.log.sequence":{event.sequence},{place}{self._rest}'
            ).encode()
        own = {**_unreserved(event.details), **_fields(event)}
        if own.keys().isdisjoint(self._shared):
            return orjson.dumps(own)[:-1] + self._encoded
        return orjson.dumps(self.entry(event))

    def entry(self, event: LogEvent) -> dict[str, Any]:
        """Return the event's entry. Of attributes with the same name, the last one here wins, as in ZenML."""
        return {
            **_unreserved(event.details),
            **self._stream,
            **_unreserved(event.metadata),
            **self._common,
            **_fields(event),
        }


def _unreserved(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the attributes; those with a name that means something else to Datadog get another."""
    if _RESERVED.isdisjoint(attributes):
        return attributes
    return {f"extra.{key}" if key in _RESERVED else key: value for key, value in attributes.items()}


def _fields(event: LogEvent) -> dict[str, Any]:
    """Return what every entry has of its own."""
    severity, number = event.severity_text, event.severity_number
    fields: dict[str, Any] = {
        "message": event.message,
        "status": _STATUSES.get(severity) or _status(number),
        "timestamp": event.time_unix_nano // 1_000_000,
        "logger.name": event.logger_name,
        # What Datadog's own mapping of OpenTelemetry's logs adds, in its types.
        # https://github.com/DataDog/opentelemetry-mapping-go/blob/main/pkg/otlp/logs/transform.go
        "otel.timestamp": str(event.time_unix_nano),
        "otel.severity_text": severity,
        "otel.severity_number": str(number),
        **event.identity,
    }
    if trace := event.trace:
        fields["otel.trace_id"] = f"{trace.trace_id:032x}"
        fields["otel.span_id"] = f"{trace.span_id:016x}"
        # https://docs.datadoghq.com/tracing/other_telemetry/connect_logs_and_traces/opentelemetry/
        fields["dd.trace_id"] = str(trace.trace_id & 0xFFFF_FFFF_FFFF_FFFF)
        fields["dd.span_id"] = str(trace.span_id)
    return fields


def _status(severity_number: int) -> str:
    """Return the status of a level with a name of its own: Datadog would go by its first letter.

    https://docs.datadoghq.com/logs/log_configuration/processors/log_status_remapper/
    """
    return ("debug", "debug", "debug", "info", "warn", "error", "fatal")[(severity_number + 3) // 4]


_EVENT = LogEvent(Stream(UUID(int=0), {}), "", 0, 0, 0, 0, "", "", "", "", 0, "", None, None, {}, {}, False)
_OWN_NAMES = ("message", "timestamp", "otel.timestamp", "log.record.uid", "zenml.log.sequence")
_ORDINARY_NAMES = frozenset(_fields(_EVENT)) | set(_EVENT._replace(file="f", line=1, function="f").details)


@lru_cache(maxsize=10_000)
def _place(level: int, level_name: str, logger_name: str, file: str, line: int, function: str, writer: str) -> str:
    """Return what all entries of one place in the code have in common, encoded and without its braces."""
    event = _EVENT._replace(
        level=level,
        level_name=level_name,
        logger_name=logger_name,
        file=file,
        line=line,
        function=function,
        writer=writer,
    )
    entry = {**event.details, **_fields(event)}
    return orjson.dumps({name: value for name, value in entry.items() if name not in _OWN_NAMES})[1:-1].decode()


def _configuration(config: DatadogChildConfig) -> Configuration:
    """Return the settings of Datadog's client, with those of the environment that it does not look at."""
    # Making one sets the level of urllib3's logger, which belongs to the pipeline.
    logger = logging.getLogger("urllib3")
    level = logger.level
    url = urlsplit(config.intake_url)
    configuration = Configuration(  # type: ignore[no-untyped-call]
        host=f"{url.scheme}://{url.netloc}",
        api_key={"apiKeyAuth": config.api_key.get_secret_value()},
        enable_retry=False,
    )
    logger.setLevel(level)
    # As `requests` does it, for the reader: what the environment says holds for both.
    proxy = select_proxy(config.intake_url, get_environ_proxies(config.intake_url))
    if proxy:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        user, password = get_auth_from_url(parts.geturl())
        if user:
            configuration.proxy_headers = urllib3.make_headers(proxy_basic_auth=f"{user}:{password}")
        configuration.proxy = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    configuration.ssl_ca_cert = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    return configuration


def _shortened(entry: dict[str, Any]) -> bytes:
    """Return the entry, encoded, with as much of it as Datadog takes.

    Datadog itself would cut the JSON text where the megabyte ends.
    """
    names = {key: len(orjson.dumps(key)) + 2 for key in entry}
    sizes = {key: names[key] + len(orjson.dumps(value)) for key, value in entry.items()}
    excess = sum(sizes.values()) + 1 - MAX_ENTRY_BYTES
    by_size = sorted(sizes, key=lambda key: sizes[key], reverse=True)
    for key in ["message", "exception.stacktrace", *by_size]:
        size = sizes.get(key, 0)
        if excess > 0 and size > _KEPT_BYTES:
            entry[key] = _cut(entry[key], max(_KEPT_BYTES, size - excess) - names[key])
            sizes[key] = names[key] + len(orjson.dumps(entry[key]))
            excess -= size - sizes[key]
    if excess > 0:
        # Still too large: there are very many attributes, or endless names.
        count = len(entry)
        excess += _MARK_BYTES
        for key in by_size:
            if excess > 0 and key not in _INDISPENSABLE:
                del entry[key]
                excess -= sizes[key]
        entry[_MARK] = count - len(entry)
    return orjson.dumps(entry)


def _cut(value: Any, max_bytes: int) -> str:
    """Return the value as a text that takes at most that many bytes in JSON, but no less than 2."""
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    most = room = max(0, max_bytes - 2)
    cut = shorten(text, room)
    while (size := len(orjson.dumps(cut)) - 2) > most:
        # A character takes up to six times as much in JSON, so what fits can only be tried.
        room = room * most // size
        cut = shorten(text, room)
    return cut
