"""What an HTTP status means, from a collector or from a proxy before it, which also answers gRPC with one."""

from __future__ import annotations

import re

from composite_logstore import RetryableError, TooLargeError, UnavailableError

LOGS_PATH = "/v1/logs"
"""The path at which a collector takes logs over HTTP."""

# Here the request as a whole, or its destination, is at fault, and not the events: mending it saves them. The
# specification only says that such a request must not be retried unchanged.
# https://opentelemetry.io/docs/specs/otlp/#failures-1
_TO_MEND = {
    401: "check the credentials in 'headers'",
    402: "check your account there",
    403: "check the credentials in 'headers', and what they permit",
    404: "check 'endpoint': its path does not exist",
    405: "check 'endpoint': there is no OTLP receiver at its path",
    406: "check 'endpoint' and 'protocol'",
    407: "a proxy wants credentials",
    410: "check 'endpoint': its path no longer exists",
    411: "check the proxy before the collector",
    414: "make 'endpoint' shorter",
    415: "check 'protocol' and 'compression': the collector does not take this kind of request",
    421: "check 'endpoint'",
    426: "check 'endpoint' and 'protocol'",
    431: "make 'headers' shorter",
    451: "check 'endpoint'",
    494: "make 'headers' shorter",  # nginx' own
    501: "check 'endpoint': there is no OTLP receiver at its path",
    505: "check 'endpoint': there is no OTLP receiver at its path",
    511: "the network wants you to log in",
}

# By the specification, 429, 502, 503 and 504 are retried, and all others are given up. But by their own definition,
# requests that timed out or arrived too early (408, 425) are to be repeated. And a collector that fails with another
# 5xx may be mended before the queue is full, whereas giving up would lose the events for certain.
_RETRYABLE = {408, 425, 429}

# The wordings of receivers and proxies: "grpc: received message larger than max" (Go), "gRPC message exceeds maximum
# size" (Java), "decoded message length too large" (Rust), "http: request body too large" (the collector, with status
# 400), "Payload Too Large" (Envoy to gRPC), "Maximum request body size 1048576 exceeded" (Jetty).
_TOO_LARGE = re.compile(
    r"(message|payload|body|entity|request|content)\b.*(larger than|too (large|big)|exceed.*\b(size|length|bytes)\b)"
    r"|(message|payload|body)( length)?( is)? too long"
    r"|(message|payload|body|entity|request|content)\b.*\b(size|length)\b.*exceed",
    re.IGNORECASE | re.DOTALL,
)
# These words are about more than one request.
_TOO_MANY = re.compile(r"\b(rate|quota|per (second|minute)|throttl\w*)\b|/s(ec)?\b", re.IGNORECASE)


def says_too_large(text: str) -> bool:
    """Return whether the text of an answer is about the size of the request."""
    return _TOO_LARGE.search(text) is not None and not _TOO_MANY.search(text)


def error_of(
    status: int, answer: str, retry_after_seconds: float | None, place: str
) -> RetryableError | TooLargeError | UnavailableError | None:
    """Return the error for a status other than success; None if the events themselves were rejected.

    Args:
        status: The status.
        answer: The answer in words, for the message.
        retry_after_seconds: When to retry, if the answer says so.
        place: Where the request was sent to.
    """
    if status == 413:
        return TooLargeError(answer)
    if status < 200:
        return UnavailableError(f"{answer}; check 'endpoint'{_expected(place)}")
    if status < 400:
        return UnavailableError(f"{answer} (a redirect of {place}); set 'endpoint' to where it leads")
    if status in _TO_MEND:
        hint = _TO_MEND[status]
        return UnavailableError(answer + "; " + hint + (_expected(place) if "'endpoint'" in hint else ""))
    if status in _RETRYABLE or status >= 500:
        # A proxy also answers like this if the request, or the collector's answer, took too long.
        return RetryableError(answer, retry_after_seconds, smaller_may_pass=True)
    return None


def _expected(place: str) -> str:
    """Return where a request went, and what was expected there."""
    usual = "" if place.endswith(LOGS_PATH) or "://" not in place else f", mostly with the path {LOGS_PATH}"
    return f" ({place}, where a receiver for OTLP is expected{usual})"
