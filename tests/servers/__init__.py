"""The servers that tests, the demo and the benchmarks start."""

from __future__ import annotations

import os


def unmeasured() -> dict[str, str]:
    """Return the environment of a server that has nothing of what coverage measures, and would be slowed by it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
