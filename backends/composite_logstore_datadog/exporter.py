"""The exporter: sends events to Datadog's log intake.

It uses the configuration, the transport and the authentication of Datadog's own client. The client's model classes are
not used: they take 144 µs for each record.
"""

from __future__ import annotations

import gzip
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from http.client import HTTPException
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import urllib3
from datadog_api_client import ApiClient, Configuration
from requests.utils import get_auth_from_url, get_environ_proxies, select_proxy

from composite_logstore import (
    UNENCODABLE,
    AnswerTooLargeError,
    Bounds,
    HttpClient,
    HttpResponse,
    LogEvent,
    RejectedError,
    RetryableError,
    Stream,
    TooLargeError,
    UnavailableError,
    environment_attributes,
    seconds_asked_for,
    shown_url,
)
from composite_logstore_datadog.config import OLDEST_SECONDS
from composite_logstore_datadog.encoding import MAX_ENTRY_BYTES, StreamEncoder, shorten_entry, unreserved

if TYPE_CHECKING:
    from composite_logstore_datadog.config import DatadogChildConfig

# https://docs.datadoghq.com/api/latest/logs/#send-logs
# Datadog does not say whether a megabyte is 10^6 or 2^20 bytes; its own agent assumes the smaller one.
MAX_REQUEST_BYTES = 5_000_000
MAX_REQUEST_ENTRIES = 1_000

# https://docs.datadoghq.com/logs/log_configuration/processors/log_date_remapper/
NEWEST_SECONDS = 2 * 3600


class DatadogExporter:
    """Sends each batch as one request."""

    def __init__(self, config: DatadogChildConfig, clock: Callable[[], float] = time.time) -> None:
        """Create the client. Nothing is sent yet.

        Args:
            config: The child's settings, with secrets resolved.
            clock: Returns the time in seconds since the epoch.

        Raises:
            UnavailableError: The proxy that the environment names cannot be used.
        """
        self._url = config.intake_url
        self._host = urlsplit(self._url).hostname
        self._clock = clock
        # Leave time for encoding, so that the export ends before it counts as overdue.
        self._timeout_seconds = 0.9 * config.export_timeout_millis / 1000
        try:
            configuration = _configuration(config)
            self._client = ApiClient(configuration)
        except (urllib3.exceptions.HTTPError, ValueError):
            # The error's text may have the proxy's password.
            raise UnavailableError(
                f"the proxy that the environment names for {self._host} is not an HTTP proxy, or its password is not "
                "percent-encoded; name one that is, or put the host into NO_PROXY"
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
            # Like ZenML's own store, add the attributes of OTEL_RESOURCE_ATTRIBUTES.
            **unreserved(environment_attributes()),
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
            RetryableError: Datadog could not be reached, or asks for a retry.
            RejectedError: Datadog rejects the batch, or some events are too old for it.
            TooLargeError: The batch is too large for one request.
            UnavailableError: Datadog refuses the key, or another service answers.
        """
        now = int(self._clock() * 1e9)
        oldest = now - OLDEST_SECONDS * 1_000_000_000
        newest = now + NEWEST_SECONDS * 1_000_000_000
        encoders: dict[Stream, StreamEncoder] = {}
        entries: list[bytes] = []
        size = 1
        shortened = 0
        too_old: list[LogEvent] = []
        too_new: list[LogEvent] = []
        unencodable: list[LogEvent] = []
        for event in batch:
            try:
                if event.time_unix_nano < oldest:
                    too_old.append(event)
                    continue
                if event.time_unix_nano > newest:
                    too_new.append(event)
                    continue
                encoder = encoders.get(event.stream)
                if encoder is None:
                    encoder = encoders[event.stream] = StreamEncoder(event.stream, self._common)
                entry = encoder.encode(event)
                if len(entry) > MAX_ENTRY_BYTES:
                    entry = shorten_entry(encoder.entry(event))
                    shortened += 1
            except UNENCODABLE:
                # An event of another program, from an archive, may not be encodable. A retry would fail too.
                unencodable.append(event)
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
            reasons = [reason for reason, events in refused.items() if events]
            raise RejectedError(" or ".join(reasons), shortened=shortened, events=[*too_old, *too_new, *unencodable])
        return shortened

    def end_stream(self, stream: Stream) -> None:
        """Do nothing: Datadog has no streams."""

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self._client.close()

    def _send(self, entries: list[bytes]) -> None:
        entries[0] = b"[" + entries[0]
        entries[-1] += b"]"
        payload = b",".join(entries)
        try:
            # The client's own `request` would encode the body, and would follow a redirect with the key. The status of
            # the answer is enough, even if its body is incomplete.
            response = self._http.request(
                "POST",
                self._url,
                headers=self._headers,
                # gzip's default level, 6, would save a fifth more, and take three times as long.
                body=gzip.compress(payload, compresslevel=1, mtime=0),
                timeout_seconds=self._timeout_seconds,
                max_bytes=Bounds.EXPORT_BYTES,
            )
        except AnswerTooLargeError:
            raise UnavailableError(
                f"the answer of {self._host} is too large to be Datadog's; check 'endpoint' and 'site'"
            ) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unreached(error) from None
        self._judge(response)

    def _unreached(self, error: Exception) -> Exception:
        """Return the error for a request without an answer."""
        if isinstance(error, urllib3.exceptions.SSLError) and error.args:
            reason = error.args[0]
            if isinstance(reason, ssl.SSLCertVerificationError):
                return UnavailableError(
                    f"the certificate of {self._host} cannot be trusted ({reason.verify_message}); "
                    "check 'endpoint' and 'site', or name the authority that signed it in REQUESTS_CA_BUNDLE"
                )
        # Without a connection, the size of the request is not the cause.
        smaller_may_pass = not isinstance(
            error,
            urllib3.exceptions.ConnectTimeoutError
            | urllib3.exceptions.NewConnectionError
            | urllib3.exceptions.ProxyError,
        )
        causes = [error, error.__cause__, *error.args]
        # urllib3 counts a refused connection, and a host without an address, among timeouts.
        is_late = any(isinstance(cause, urllib3.exceptions.TimeoutError | TimeoutError) for cause in causes)
        if is_late and not isinstance(error, urllib3.exceptions.NewConnectionError):
            return RetryableError(f"{self._host} did not answer in time", smaller_may_pass=smaller_may_pass)
        system = (cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror)
        # The text of an HTTPException is left out, since it repeats what was received.
        kind = type(next((cause for cause in causes if isinstance(cause, HTTPException)), error)).__name__
        words = f"cannot reach {self._host}: {next(system, None) or kind}"
        return RetryableError(words, smaller_may_pass=smaller_may_pass)

    def _judge(self, response: HttpResponse) -> None:
        """Raise the error of an answer, unless it is a success.

        https://docs.datadoghq.com/api/latest/logs/#send-logs
        """
        status = response.status
        if 200 <= status < 300 and not response.is_web_page:
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
            # A proxy also answers like this if the request, or Datadog's answer, took too long.
            raise RetryableError(
                f"Datadog answers {status}", seconds_asked_for(response.headers), smaller_may_pass=True
            )
        how = "with a web page" if response.is_web_page else status
        raise UnavailableError(
            f"{self._host} answers {how}, as Datadog's log intake never does; check 'endpoint' and 'site' "
            f"({shown_url(self._url)}, where Datadog's log intake is expected, mostly with the path /api/v2/logs)"
        )


def _configuration(config: DatadogChildConfig) -> Configuration:
    """Return the settings of Datadog's client, with variables of the environment that it does not read itself."""
    # The constructor sets the level of urllib3's logger, which belongs to the pipeline.
    logger = logging.getLogger("urllib3")
    level = logger.level
    url = urlsplit(config.intake_url)
    configuration = Configuration(  # type: ignore[no-untyped-call]
        host=f"{url.scheme}://{url.netloc}",
        api_key={"apiKeyAuth": config.api_key.get_secret_value()},
        enable_retry=False,
    )
    logger.setLevel(level)
    # Find the proxy as `requests` does for the reader, so that both use the same.
    proxy = select_proxy(config.intake_url, get_environ_proxies(config.intake_url))
    if proxy:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        user, password = get_auth_from_url(parts.geturl())
        if user:
            configuration.proxy_headers = urllib3.make_headers(proxy_basic_auth=f"{user}:{password}")
        configuration.proxy = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    configuration.ssl_ca_cert = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    return configuration
