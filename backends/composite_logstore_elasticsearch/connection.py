"""The connection to a cluster: its headers, and what its answers and failures mean."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote as quote_url

import orjson
from requests.exceptions import InvalidHeader, InvalidProxyURL, InvalidURL, Timeout
from urllib3.exceptions import (
    ConnectTimeoutError,
    LocationValueError,
    NewConnectionError,
    ProxyError,
    ReadTimeoutError,
)

from composite_logstore import Bounds, HttpClient, RetryableError, UnavailableError, cause_of, quote

if TYPE_CHECKING:
    from composite_logstore import HttpResponse
    from composite_logstore_elasticsearch.config import ElasticsearchChildConfig

# Without a connection, the size of the request is not the cause.
_NOT_CONNECTED = (NewConnectionError, ConnectTimeoutError, ProxyError, LocationValueError)


class Refusal(NamedTuple):
    """The error in an answer, or in one of a bulk answer's items.

    Attributes:
        status: The HTTP status.
        type: Elasticsearch's name of the error, such as `index_not_found_exception`; empty if there is none.
        reason: Elasticsearch's words, empty if there are none. They may repeat parts of an event.
    """

    status: int
    type: str
    reason: str

    @staticmethod
    def of(status: int, error: Any) -> Refusal:
        """Return the error of any answer: an object with `type` and `reason`, a text, or something else."""
        if isinstance(error, Mapping):
            causes = error.get("root_cause")
            cause = causes[0] if isinstance(causes, list) and causes else None
            kind, reason = error.get("type"), error.get("reason")
            # "all shards failed" says less than its cause.
            if isinstance(cause, Mapping) and kind == "search_phase_execution_exception":
                kind, reason = cause.get("type"), cause.get("reason")
            return Refusal(status, kind if isinstance(kind, str) else "", reason if isinstance(reason, str) else "")
        return Refusal(status, "", error if isinstance(error, str) else "")


class Connection:
    """Sends requests to a cluster.

    Attributes:
        url: The cluster's base URL, which contains no secret.
    """

    def __init__(self, config: ElasticsearchChildConfig) -> None:
        """Prepare; connections are made later.

        Args:
            config: The child's settings, with secrets resolved.
        """
        self.url = config.url
        self._client = HttpClient(None, config.certificate_file, config.client_certificate)
        self._secrets = [config.api_key, config.password, config.authorization]
        self._headers = {"User-Agent": "composite-logstore", **config.authorization}

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        timeout_seconds: float,
        max_bytes: int,
        headers: Mapping[str, str] | None = None,
    ) -> HttpResponse:
        """Send a request once, and return the answer, whatever its status.

        Args:
            method: The method.
            path: What follows the base URL, encoded.
            body: The body, in JSON if no header says otherwise.
            timeout_seconds: How long it may take, in seconds.
            max_bytes: The most bytes of the answer's body.
            headers: Further headers.

        Raises:
            Exception: As `HttpClient.request` does.
        """
        return self._client.request(
            method,
            f"{self.url}/{path}",
            headers={"Content-Type": "application/json", **self._headers, **(headers or {})},
            body=body,
            timeout_seconds=timeout_seconds,
            max_bytes=max_bytes,
        )

    def quote(self, text: str, most: int = Bounds.TEXT_CHARACTERS) -> str:
        """Return a server's text in a form that can be shown, without keys that it repeats."""
        return quote(text, self._secrets, most)

    def refusal(self, response: HttpResponse) -> Refusal:
        """Return what an answer with another status than success says."""
        try:
            answer = orjson.loads(response.body)
        except ValueError:
            answer = None
        return Refusal.of(response.status, answer.get("error") if isinstance(answer, dict) else None)

    def say(self, refusal: Refusal) -> str:
        """Return a refusal in a few words."""
        words = self.quote(": ".join(filter(None, (refusal.type, refusal.reason))))
        return f"{self.url} answers {refusal.status}{f' ({words})' if words else ''}"

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def path_of(index: str) -> str:
    """Return an index's name as a part of a URL's path."""
    return quote_url(index, safe=",*-")


def failure(error: Exception, url: str, timeout_seconds: float) -> RetryableError | UnavailableError:
    """Return the error for a request without an answer. Libraries' own messages are not shown: they may repeat keys.

    Args:
        error: What was raised.
        url: The cluster's base URL.
        timeout_seconds: How long the request was allowed to take.
    """
    tls = cause_of(error, ssl.SSLError)
    if isinstance(tls, ssl.SSLCertVerificationError):
        why = getattr(tls, "verify_message", "") or "no reason given"
        return UnavailableError(
            f"the certificate of {url} cannot be trusted ({why}); name the authority that signed it in "
            "'certificate_file'"
        )
    if tls is not None and not isinstance(tls, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        why = getattr(tls, "reason", "") or "no reason given"
        return UnavailableError(f"TLS with {url} fails ({why}); check 'url' and the certificate files")
    if isinstance(error, InvalidURL | InvalidHeader | InvalidProxyURL):
        return UnavailableError("'url', the credentials or the proxy's URL cannot be used; check them")
    system = cause_of(error, OSError)
    if isinstance(system, FileNotFoundError | PermissionError | IsADirectoryError) or "certificate" in str(error)[:200]:
        return UnavailableError("a certificate file cannot be read; check 'certificate_file' and the client's files")
    smaller_may_pass = not any(cause_of(error, kind) for kind in _NOT_CONNECTED)
    if isinstance(error, Timeout | ReadTimeoutError) or cause_of(error, TimeoutError):
        return RetryableError(
            f"{url} did not answer within {timeout_seconds:.1f} seconds", smaller_may_pass=smaller_may_pass
        )
    words = system.strerror if system is not None else type(error).__name__
    return RetryableError(f"cannot reach {url}: {words}", smaller_may_pass=smaller_may_pass)
