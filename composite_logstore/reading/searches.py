"""Searches of a backend over HTTP: what one page may still use, and the errors that all backends share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from math import ceil

from urllib3.exceptions import HTTPError
from zenml.logger import get_logger

from composite_logstore.bounded_http import AnswerTooLargeError
from composite_logstore.bounds import Bounds
from composite_logstore.http_client import HttpClient, HttpResponse, seconds_asked_for, shown_url
from composite_logstore.zenml import LogStoreError, LogStoreRateLimitError, LogStoreUnavailableError

logger = get_logger(__name__)

# Faults of an answer that may be complete next time.
_INCOMPLETE = {"too late": "came too late", "cut": "was cut off"}


class Allowance:
    """The time, bytes and searches that one page may still use."""

    def __init__(self) -> None:
        self._ends_at = time.monotonic() + Bounds.SEARCH_SECONDS
        self._searches, self._bytes = Bounds.SEARCHES, Bounds.SEARCH_BYTES

    @property
    def seconds(self) -> float:
        """How long the next search may take, in seconds."""
        return self._ends_at - time.monotonic()

    @property
    def max_bytes(self) -> int:
        """The most bytes of its answer."""
        return min(self._bytes, Bounds.PAGE_BYTES)

    @property
    def is_left(self) -> bool:
        """Whether another search is allowed."""
        return self.seconds > 0 and self._searches > 0 and self._bytes > 0

    def take(self, size: int) -> None:
        """Count a search whose answer had so many bytes."""
        self._searches -= 1
        self._bytes -= size


class HttpSearches:
    """Sends searches to one backend, each once, and raises the errors of the read port."""

    def __init__(
        self,
        backend: str,
        url: str,
        headers: Mapping[str, str],
        refusal: Callable[[HttpResponse], LogStoreError | None],
        certificate_file: str | None = None,
        url_setting: str = "read.url",
        client_certificate: tuple[str, str] | str | None = None,
    ) -> None:
        """Connect to nothing yet.

        Args:
            backend: The backend's name, at the beginning of a sentence.
            url: Its URL.
            headers: The headers of each request.
            refusal: Returns the error that an answer means in the backend's own way; None for the general rules:
                429 asks for a pause, 500 and above are trouble of the backend, all others but 200 are refusals.
            certificate_file: The certificate authorities to trust.
            url_setting: The setting that has the URL, for errors.
            client_certificate: The path of the client's certificate, with that of its key if it is another file.
        """
        self._backend = backend
        self._url = url
        self._headers = headers
        self._refusal = refusal
        self._setting = url_setting
        self._http = HttpClient(certificate_file=certificate_file, client_certificate=client_certificate)

    def ask(self, method: str, path: str, body: bytes | None, allowance: Allowance) -> HttpResponse:
        """Send one search, and return its complete answer, whose status is 200.

        Args:
            method: The method.
            path: What follows the backend's URL, with its query.
            body: The request's body.
            allowance: What the page may still use.

        Raises:
            AnswerTooLargeError: The answer is too large: ask for fewer records.
            LogStoreUnavailableError: The backend cannot be reached, or fails.
            LogStoreRateLimitError: The backend asks for a pause.
            LogStoreError: The backend refuses.
        """
        try:
            response = self._http.request(
                method,
                self._url + path,
                headers=self._headers,
                body=body,
                timeout_seconds=allowance.seconds,
                max_bytes=allowance.max_bytes,
            )
        except AnswerTooLargeError:
            # Before its body: fewer records would not help.
            raise LogStoreError(f"{self._backend} at {shown_url(self._url)} returned too many headers.") from None
        except (HTTPError, OSError) as error:
            # Not chained: the error may repeat a header, and with it a key.
            logger.debug("A search failed: %s", type(error).__name__)
            raise LogStoreUnavailableError(
                f"Could not reach {self._backend} at {shown_url(self._url)} ({type(error).__name__}). Check that it "
                f"runs, and '{self._setting}'."
            ) from None
        allowance.take(len(response.body))
        refusal = self._refusal(response) or self._general_refusal(response)
        if refusal is not None:
            raise refusal
        if response.fault == "too large":
            raise AnswerTooLargeError("the answer is too large")
        if response.fault in _INCOMPLETE:
            raise LogStoreUnavailableError(f"{self._backend}'s answer {_INCOMPLETE[response.fault]}. Try again later.")
        if response.fault is not None:
            raise LogStoreError(f"{self._backend} returned an answer that cannot be read.")
        return response

    def _general_refusal(self, response: HttpResponse) -> LogStoreError | None:
        status = response.status
        if status == 200:
            return None
        if status == 429:
            seconds = seconds_asked_for(response.headers)
            return LogStoreRateLimitError(
                f"{self._backend} rate limited the search. Try again later.",
                retry_after=None if seconds is None else ceil(seconds),
            )
        if status >= 500:
            return LogStoreUnavailableError(f"{self._backend} is temporarily unavailable. Try again later.")
        message = f"{self._backend} at {shown_url(self._url)} rejected the search with status {status}."
        if status in (401, 403):
            message += " Check 'read.username' and 'read.password' (or 'read.api_key'), and that they allow reading."
        elif status != 400:
            # Such a status is not about the question, but about its address.
            message += f" Check '{self._setting}'."
        return LogStoreError(message)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
