"""Every Python that the package supports and this machine has runs the tests that depend on it: `make test-versions`.

Those are the unit tests, the properties, and what is marked `process`: how processes fork and end. Each version has an
environment of its own, `.venv-3.12` say, which `make install` makes. The version that runs this has `make test`.
With `VERSIONS=turn`, as in CI, only one of them runs, another one each day, without the deep tests of processes;
`make test-deep` runs all.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from datetime import datetime, timezone
from importlib.metadata import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

OWN = "{}.{}".format(*sys.version_info)
"""The version that `make test` has."""

# What an environment is made of, besides the interpreter: a Python that was built without one of these is of no use.
_PROBE = "import ctypes, ensurepip, platform, sqlite3, ssl, venv; print(platform.python_version())"


def supported() -> list[str]:
    """Return the versions that the package claims, as `3.12`."""
    claims = metadata("composite-logstore").get_all("Classifier") or []
    return [claim[1] for each in claims if (claim := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", each))]


def candidates(version: str) -> Iterator[str]:
    """Yield interpreters that may be of a version: on the `PATH`, then pyenv's, the latest first."""
    if found := shutil.which(f"python{version}"):
        yield found
    root = os.environ.get("PYENV_ROOT")
    if not root and (pyenv := shutil.which("pyenv")):
        root = subprocess.run([pyenv, "root"], stdout=subprocess.PIPE, text=True, timeout=60).stdout.strip()
    folders = Path(root or "~/.pyenv").expanduser().glob(f"versions/{version}.*/bin/python{version}")
    yield from (str(path) for path in sorted(folders, key=_patch, reverse=True))


def _patch(interpreter: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", interpreter.parents[1].name)]


def find(version: str) -> tuple[str, str] | None:
    """Return an interpreter of a version, and which one it is exactly; None if the machine has none that works."""
    for interpreter in candidates(version):
        try:
            # One of pyenv's stands on the `PATH` for versions that are not switched on, and fails.
            probe = subprocess.run([interpreter, "-c", _PROBE], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            continue
        exactly = probe.stdout.strip()
        if probe.returncode == 0 and exactly.startswith(f"{version}."):
            return interpreter, exactly
    return None


def run(version: str, interpreter: str, processes: str, arguments: list[str], about_processes: str) -> bool:
    """Run the tests on a version, and return whether all of them passed.

    Args:
        version: The version.
        interpreter: Its interpreter.
        processes: How many processes share the tests.
        arguments: Further ones of pytest.
        about_processes: Pytest's expression for the tests of how processes fork and end.
    """
    environment = f".venv-{version}"
    make = ["make", "--no-print-directory", f"VENV={environment}", f"PYTHON={interpreter}", "install"]
    if subprocess.run(make, cwd=ROOT).returncode:
        return False
    pytest = [f"{environment}/bin/python", "-m", "pytest", "-q", "-n", processes, "--dist", "loadscope"]
    pytest += ["--no-loadscope-reorder", *arguments]
    suites = (["tests/properties", "tests/unit", "-m", "not deep"], ["tests/integration", "-m", about_processes])
    codes = [subprocess.run([*pytest, *tests], cwd=ROOT).returncode for tests in suites]
    return not any(codes)


def todays(versions: Collection[str]) -> str:
    """Return the version whose turn it is today (UTC)."""
    return sorted(versions)[datetime.now(timezone.utc).toordinal() % len(versions)]


def main(wish: str, processes: str, *arguments: str) -> None:
    said = []
    has_failed = False
    about_processes = "process and not deep" if wish == "turn" else "process"
    found = {version: one for version in supported() if version != OWN and (one := find(version))}
    for version in supported():
        if version == OWN:
            said.append(f"{version}: left to `make test`")
            continue
        if version not in found:
            said.append(f"{version}: not found on this machine")
            continue
        interpreter, exactly = found[version]
        if wish == "turn" and version != todays(found):
            said.append(f"{exactly}: another day's turn")
            continue
        print(f"Python {exactly}", flush=True)
        begin = time.monotonic()
        has_passed = run(version, interpreter, processes, list(arguments), about_processes)
        has_failed |= not has_passed
        said.append(f"{exactly}: {'passed' if has_passed else 'FAILED'} in {time.monotonic() - begin:.0f} s")
    print("Python " + "; ".join(said), flush=True)
    sys.exit(has_failed)


if __name__ == "__main__":
    main(*sys.argv[1:])
