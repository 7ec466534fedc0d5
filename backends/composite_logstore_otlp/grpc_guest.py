"""Imports gRPC as a guest in the user's process: without fork handlers, and without output on the terminal.

gRPC's C core registers handlers that run at every fork of the process, even for a `subprocess` with `preexec_fn`. While
a call is under way, they abort some forked processes (SIGABRT). This package does not need these handlers: a forked
process passes its events to its parent, and `check_process` keeps gRPC out of it. The C core also writes to stderr, for
example about a refused connection, which the child's state and `last_error` tell as well.

Both are environment variables, which the C core reads once, on first use. This module sets them for just that moment,
so that processes that the user starts later do not inherit them. Variables that the user has set keep their values, and
if the user's own code has used gRPC before, its settings stay in effect.
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

    # The C core reads its variables with the first channel. This one does not connect.
    grpc.insecure_channel("127.0.0.1:9").close()

_process = os.getpid()
_has_fork_support = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "").lower() in ("1", "true", "yes")


def check_process() -> None:
    """Check that gRPC works in this process.

    Raises:
        UnavailableError: The process was forked from one that used gRPC. It has none of gRPC's threads, so a call would
            never return.
    """
    if os.getpid() != _process and not _has_fork_support:
        raise UnavailableError(
            "gRPC does not work in a forked process whose parent used it; another process delivers the events, or set "
            "'protocol' to 'http/protobuf'"
        )
