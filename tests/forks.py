"""Processes that a test forks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def in_fork(run: Callable[[], object]) -> int:
    """Run something in a forked process, and return the id of that process once it has ended."""
    if (process := os.fork()) == 0:
        try:
            run()
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    return process


@contextmanager
def idle_fork() -> Iterator[None]:
    """Have a forked process that does nothing until the end of the context.

    It has been forked for good before the context begins: what happens in it after a fork has happened.
    """
    began, begin = os.pipe()
    read, write = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.close(write)
            os.write(begin, b".")
            os.read(read, 1)
        finally:
            os._exit(0)
    try:
        os.read(began, 1)
        yield
    finally:
        os.close(write)
        os.waitpid(process, 0)
        for end in (began, begin, read):
            os.close(end)
