"""Whether ZenML's server answers. ZenML's own client repeats a question for most of a minute, and names no URL."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import requests

ANSWER_SECONDS = 5.0
"""How long ZenML's server may take to answer, in seconds, before an operation gives up."""

_BELIEVED_SECONDS = 30.0
# ZenML's client repeats a question after these answers, up to ten times.
_OUT_OF_SERVICE = (502, 503, 504)
_NOT_FOUND = 404
# A proxy may not pass the first one on.
_PATHS = ("/health", "/api/v1/info")

# A server's URL → when it last answered, in seconds of the monotonic clock.
_answered: dict[str, float] = {}


class UnreachedError(Exception):
    """ZenML's server cannot be reached. The message says why."""


def check_server() -> None:
    """Find out whether ZenML's server answers. An answer is believed for half a minute; a database needs no server.

    Raises:
        UnreachedError: It does not answer within `ANSWER_SECONDS`.
    """
    # Imported here rather than in the thread: importing takes none of the answer's time.
    import requests
    import urllib3
    from zenml.config.global_config import GlobalConfiguration
    from zenml.enums import StoreType

    store = GlobalConfiguration().store_configuration
    if store.type != StoreType.REST or time.monotonic() - _answered.get(store.url, -_BELIEVED_SECONDS) < (
        _BELIEVED_SECONDS
    ):
        return
    _answered.pop(store.url, None)
    verify = getattr(store, "verify_ssl", True)
    if verify is False:
        # As ZenML's client does: the user has chosen it.
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    # Through the same proxies as ZenML's client. Nobody waits for an answer later than `ANSWER_SECONDS`.
    get = partial(requests.get, timeout=2 * ANSWER_SECONDS, verify=verify, allow_redirects=False, stream=True)
    trouble = [f"no answer within {ANSWER_SECONDS:g} s"]

    def ask() -> None:
        trouble[0] = _trouble_at(store.url, get)

    # Nothing else bounds the lookup of a host, or the tries of all its addresses.
    asking = threading.Thread(target=ask, name="composite-logstore reach", daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    if trouble[0]:
        raise UnreachedError(trouble[0])
    _answered[store.url] = time.monotonic()


def _trouble_at(url: str, get: Callable[[str], requests.Response]) -> str:
    """Return why a server does not answer, empty if it does."""
    for path in _PATHS:
        try:
            answer = get(url + path)
        except Exception as error:
            return _words(error)
        answer.close()
        if answer.status_code in _OUT_OF_SERVICE:
            return f"it answers {answer.status_code}"
        if answer.status_code != _NOT_FOUND:
            return ""
    return f"it answers {_NOT_FOUND}, also at {_PATHS[-1]}, where a ZenML server answers"


def _words(error: BaseException) -> str:
    """Return what the operating system says, or the error's class: its text repeats the URL, which may hold a key."""
    from composite_logstore.http_client import cause_of

    cause = cause_of(error, OSError)
    return str(cause.strerror) if cause else type(error).__name__


def why_unreached(error: BaseException) -> str:
    """Return why ZenML cannot be reached: its server's URL, if there is one, and the error in few words."""
    from zenml.config.global_config import GlobalConfiguration
    from zenml.enums import StoreType

    from composite_logstore.http_client import shown_url

    if isinstance(error, ImportError):
        return "a package that it needs is not installed: for a local database, `pip install 'zenml[local]'`"
    # Only the class of any other error: its message may contain a URL with a secret.
    words = str(error) if isinstance(error, UnreachedError) else type(error).__name__
    try:
        store = GlobalConfiguration().store_configuration
    except Exception:
        return words
    return f"{shown_url(store.url)}: {words}" if store.type == StoreType.REST else words
