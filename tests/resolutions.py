"""The lowest and the newest dependencies that pyproject.toml admits: `make test-resolutions`.

Each has an environment of its own, which uv makes:

- `lowest`: the lower bounds, on the lowest Python found, with the unit tests and the properties
- `newest`: the newest of everything, on the highest Python found, with the same
- `messages`: the lower bounds of the extra `otlp` alone, with the tests of the child `otlp`. In `lowest`,
  OpenTelemetry's own exporter, which the encoder is compared with, brings newer messages along.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass

from tests import versions
from tests.versions import ROOT

ALL = ("-e", ".[all,dev]")
EVERYTHING = ("tests/properties", "tests/unit")
OF_OTLP = (
    "tests/unit/test_otlp_config.py",
    "tests/unit/test_otlp_exporter.py",
    "tests/unit/test_otlp_wrong_address.py",
    "tests/properties/test_otlp_encoding.py",
)


@dataclass(frozen=True)
class Resolution:
    """An environment, and what runs there.

    Attributes:
        name: Its name.
        lowest: Whether it has the lowest Python and the lowest dependencies, or the highest ones.
        requirements: What is resolved.
        beside: What is installed afterwards in its newest version, with what it needs.
        alone: What is installed afterwards without what it needs.
        tests: The tests.
    """

    name: str
    lowest: bool
    requirements: tuple[str, ...]
    tests: tuple[str, ...]
    beside: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()


RESOLUTIONS = (
    Resolution("lowest", True, ALL, EVERYTHING),
    Resolution("newest", False, ALL, EVERYTHING),
    Resolution(
        "messages",
        True,
        ("-e", ".[otlp]"),
        OF_OTLP,
        ("h2", "hypothesis", "packaging", "psutil", "pytest", "pytest-timeout", "pytest-xdist", "trustme"),
        ("opentelemetry-exporter-otlp-proto-common==1.38.0",),
    ),
)


def interpreters() -> list[tuple[str, str]]:
    """Return an interpreter of each Python that is supported and found, from the lowest: path and exact version."""
    own = (sys.executable, ".".join(map(str, sys.version_info[:3])))
    found = [own if version == versions.OWN else versions.find(version) for version in versions.supported()]
    return [each for each in found if each is not None]


def run(resolution: Resolution, python: str, processes: str, arguments: list[str]) -> bool:
    """Make the environment anew, run the tests there, and return whether all passed."""
    environment = f".venv-{resolution.name}"
    own = str(ROOT / environment / "bin" / "python")
    uv = [sys.executable, "-m", "uv"]
    install = [*uv, "pip", "install", "--quiet", "--python", own]
    how = "lowest-direct" if resolution.lowest else "highest"
    pytest = [own, "-m", "pytest", "-q", "-m", "not deep", "-n", processes, "--dist", "loadscope"]
    commands = [
        [*uv, "venv", "--quiet", "--clear", "--python", python, environment],
        [*install, "--resolution", how, *resolution.requirements],
        [*install, *resolution.beside] if resolution.beside else [],
        [*install, "--no-deps", *resolution.alone] if resolution.alone else [],
        [*pytest, "--no-loadscope-reorder", *arguments, *resolution.tests],
    ]
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return all(subprocess.run(command, cwd=ROOT, env=variables).returncode == 0 for command in commands if command)


def main(processes: str, *arguments: str) -> None:
    pythons = interpreters()
    said, has_failed = [], False
    for resolution in RESOLUTIONS:
        python, exactly = pythons[0 if resolution.lowest else -1]
        print(f"{resolution.name}, Python {exactly}", flush=True)
        begin = time.monotonic()
        has_passed = run(resolution, python, processes, list(arguments))
        has_failed |= not has_passed
        outcome = "passed" if has_passed else "FAILED"
        said.append(f"{resolution.name} on Python {exactly}: {outcome} in {time.monotonic() - begin:.0f} s")
    print("Dependencies: " + "; ".join(said), flush=True)
    sys.exit(has_failed)


if __name__ == "__main__":
    main(*sys.argv[1:])
