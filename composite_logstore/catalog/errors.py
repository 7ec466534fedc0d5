"""The errors of the catalog and of operations; they know no command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from composite_logstore.catalog.reach import check_server, why_unreached
from composite_logstore.inert import InertError
from composite_logstore.names import did_you_mean


class OperationError(InertError):
    """An operation cannot do its work. The message says why; it may contain names and answers from anywhere."""


class ArgumentError(OperationError):
    """An argument of an operation is wrong. The message says what would be right.

    Attributes:
        argument: The name of the operation's parameter.
    """

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(message)
        self.argument = argument


class NoAnswerError(OperationError):
    """ZenML or a backend gives no answer, so that the result is unknown: neither good nor bad."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint to append to an error about an unknown name: the closest known name, or else all of them."""
    names = sorted(known)
    return did_you_mean(name, names) or f"; there are: {', '.join(names) or 'none'}"


@contextmanager
def asking_zenml() -> Iterator[None]:
    """Turn any failure to ask ZenML into a message for people; fail within seconds if its server does not answer.

    Raises:
        NoAnswerError: ZenML gave no answer.
    """
    from zenml.exceptions import AuthorizationException

    try:
        check_server()
        yield
    except OperationError:
        raise
    except AuthorizationException:
        raise NoAnswerError("ZenML refuses your login, or it has expired: log in with `zenml login`.") from None
    except Exception as error:
        raise NoAnswerError(f"ZenML cannot be reached ({why_unreached(error)}); `zenml status` says more.") from error
