"""What a status of HTTP means, from a collector or from a proxy before it: such a one says it to gRPC as well."""

from __future__ import annotations

import re

from composite_logstore import RetryableError, TooLargeError, UnavailableError

# Their fault is in the request as a whole or in where it went, not in the events: mending it saves them.
# The specification only says that such a request must not be repeated as it is.
# https://opentelemetry.io/docs/specs/otlp/#failures-1
_TO_MEND = {
    401: "check the credentials in 'headers'",
    402: "check your account there",
    403: "check the credentials in 'headers', and what they permit",
    404: "check 'endpoint': there is nothing at its path",
    405: "check 'endpoint': there is no OTLP receiver at its path",
    406: "check 'endpoint' and 'protocol'",
    407: "a proxy wants credentials",
    410: "check 'endpoint': there is nothing at its path any more",
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

# 429, 502, 503 and 504 by the specification, which has all others given up. But a request that timed out
# or came too early (408, 425) is by their own definition to be repeated, and a collector that fails with any
# other 5xx may be mended before the queue is full: giving up would lose the events for certain.
_RETRYABLE = {408, 425, 429}

# How receivers and proxies say it: "grpc: received message larger than max" (Go), "gRPC message exceeds maximum size"
# (Java), "decoded message length too large" (Rust), "http: request body too large" (the collector, with status 400),
# "Payload Too Large" (Envoy to gRPC), "Maximum request body size 1048576 exceeded" (Jetty).
_TOO_LARGE = re.compile(
    r"(message|payload|body|entity|request|content)\b.*(larger than|too (large|big)|exceed.*\b(size|length|bytes)\b)"
    r"|(message|payload|body)( length)?( is)? too long"
    r"|(message|payload|body|entity|request|content)\b.*\b(size|length)\b.*exceed",
    re.IGNORECASE | re.DOTALL,
)
# That is about more than one request.
_TOO_MANY = re.compile(r"\b(rate|quota|per (second|minute)|throttl\w*)\b|/s(ec)?\b", re.IGNORECASE)


def says_too_large(text: str) -> bool:
    """Say whether the words of an answer are about the size of the request."""
    return _TOO_LARGE.search(text) is not None and not _TOO_MANY.search(text)


def error_of(
    status: int, answer: str, retry_after_seconds: float | None
) -> RetryableError | TooLargeError | UnavailableError | None:
    """Return what a status means that is none of success, or None if the request as such was refused.

    Args:
        status: The status.
        answer: It in words.
        retry_after_seconds: When to try again, if the answer says so.
    """
    if status == 413:
        return TooLargeError(answer)
    if status < 200:
        return UnavailableError(f"{answer}; check 'endpoint'")
    if status < 400:
        return UnavailableError(f"{answer} (a redirect); set 'endpoint' to where it leads")
    if status in _TO_MEND:
        return UnavailableError(f"{answer}; {_TO_MEND[status]}")
    if status in _RETRYABLE or status >= 500:
        # A proxy answers so, too, when it has waited for too long for the request or for the collector's answer.
        return RetryableError(answer, retry_after_seconds, smaller_may_pass=True)
    return None
