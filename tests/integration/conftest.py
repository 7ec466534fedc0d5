"""What integration tests share that takes long to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crashing import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Starts processes that are to die."""
    with Nursery() as nursery:
        yield nursery
