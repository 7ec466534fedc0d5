"""Finds the installed distribution of an importable package, so that a remote step can install it."""

from __future__ import annotations

from importlib.metadata import distributions


def distributions_of(package: str) -> set[str]:
    """Return the names of the distributions that contain a top-level package or module. Several may share a namespace.

    `importlib.metadata.packages_distributions` finds only wheels with a `top_level.txt` before Python 3.11, and most
    tools no longer write that file.

    Args:
        package: The name of the package or module, without a dot.
    """
    return {
        each.metadata["Name"]
        for each in distributions()
        if package in (each.read_text("top_level.txt") or "").split()
        # A module may be one file: `six.py`, `_cffi_backend.cpython-312-x86_64-linux-gnu.so`.
        or any(file.parts[0].partition(".")[0] == package for file in each.files or ())
    }
