"""gRPC as a guest in the user's process: it takes no part in their forks, and prints nothing on their terminal.

gRPC's C core registers handlers that run at every fork of the process, a `subprocess` with `preexec_fn` too. While
a call is under way they abort some of the forked processes (SIGABRT). This package needs no such handlers: a forked
process hands its events to its parent, and `check_process` keeps gRPC out of it. The C core also writes lines of its
own to stderr, about a refused connection, say, which the child's state and `last_error` tell as well.

Both are settings of the process, which the C core reads once, when it is first used. So they are in the environment
for just that moment, where processes that the user starts later do not inherit them. What the user has set stands,
and so does what was decided when the user's own code used gRPC before.
https://github.com/grpc/grpc/blob/master/doc/environment_variables.md
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from composite_logstore import UnavailableError

__all__ = ["check_process", "grpc"]

_SETTINGS = {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "NONE"}


@contextmanager
def _settings() -> Iterator[None]:
    added = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


with _settings():
    import grpc

    # The C core reads its settings with the first channel. This one connects to nothing.
    grpc.insecure_channel("127.0.0.1:9").close()

_process = os.getpid()
_has_fork_support = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "").lower() in ("1", "true", "yes")


def check_process() -> None:
    """Check that gRPC works in this process.

    Raises:
        UnavailableError: The process was forked from one that uses gRPC, whose threads are not here: a call would
            never return.
    """
    if os.getpid() != _process and not _has_fork_support:
        raise UnavailableError(
            "gRPC does not work in a forked process whose parent used it; another process delivers the events, or set "
            "'protocol' to 'http/protobuf'"
        )
