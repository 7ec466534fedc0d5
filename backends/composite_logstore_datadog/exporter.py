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
from collections.abc import Callable, Sequence
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

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
)
from composite_logstore_datadog.config import OLDEST_SECONDS, seconds_asked_for
from composite_logstore_datadog.encoding import MAX_ENTRY_BYTES, StreamEncoder, shorten_entry, unreserved

if TYPE_CHECKING:
    from composite_logstore_datadog.config import DatadogChildConfig

# https://docs.datadoghq.com/api/latest/logs/#send-logs
# Datadog does not say which megabyte it means; its own agent takes the smaller one.
MAX_REQUEST_BYTES = 5_000_000
MAX_REQUEST_ENTRIES = 1_000

# https://docs.datadoghq.com/logs/log_configuration/processors/log_date_remapper/
NEWEST_SECONDS = 2 * 3600


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
            **unreserved(OTELResourceDetector().detect().attributes),
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
        encoders: dict[Stream, StreamEncoder] = {}
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
                    encoder = encoders[event.stream] = StreamEncoder(event.stream, self._common)
                entry = encoder.encode(event)
                if len(entry) > MAX_ENTRY_BYTES:
                    entry = shorten_entry(encoder.entry(event))
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
