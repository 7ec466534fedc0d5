"""Which installed distribution an importable package comes from, so that a remote step can install it."""

from __future__ import annotations

from importlib.metadata import distributions


def distributions_of(package: str) -> set[str]:
    """Return the names of the distributions that have a top-level package or module; a namespace belongs to many.

    `importlib.metadata.packages_distributions` would say it, but before Python 3.11 it knows only wheels with a
    `top_level.txt`, which most tools no longer write.

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
