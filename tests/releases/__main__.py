"""Releases of ZenML, each in an environment of its own: `make test-releases`.

Each runs the unit tests that need nothing newer, the contract of the backends, and `test_release.py`. What they find
is the table of docs/compatibility.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

from tests.releases.table import rewrite

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"

RELEASES = ("0.93.0", "0.94.6", "0.95.1", "0.96.4", "0.98.0", "0.96.4:0.98.0")
"""One of each group that differs in what a log store meets; `CLIENT:SERVER` is a client with a newer server."""

IN_TURN = tuple(release for release in RELEASES if release != "0.98.0")
"""What takes turns in CI: the other one has all the other tests."""

TEST_RELEASE = "tests/releases/test_release.py"
CONTRACT = "tests/integration/test_conformance.py"
UNIT = "tests/unit"

INSTALL_SECONDS = 900
TEST_SECONDS = 2400

# What an environment says of itself, for the table.
FACTS = """
import json
from importlib.metadata import metadata, version

facts = {"Python, as ZenML allows it": metadata("zenml")["Requires-Python"]}
for name in ("opentelemetry-sdk", "click", "pydantic"):
    facts[f"`{name}`"] = ".".join(version(name).split(".")[:2])
print(json.dumps(facts))
"""


class NotAvailableError(Exception):
    """An environment cannot be made on this machine, which is no fault of the package's."""


class BrokenError(Exception):
    """The package cannot be installed beside a release."""


@dataclass
class Outcome:
    """What became of a release.

    Attributes:
        release: Which.
        said: What there is to say about it, in a few words.
        has_failed: Whether a test failed, or the package cannot be installed.
        column: A row of the table → its cell, if all tests passed.
    """

    release: str
    said: str
    has_failed: bool = False
    column: dict[str, str] = field(default_factory=dict)


def todays() -> str:
    """Return the release whose turn it is today (UTC)."""
    return IN_TURN[datetime.now(timezone.utc).toordinal() % len(IN_TURN)]


def chosen(wishes: str) -> list[str]:
    """Return the releases that are asked for: by name, `turn` for today's, or all of them.

    Raises:
        SystemExit: There is no such release in the matrix.
    """
    releases = [todays() if wish == "turn" else wish for wish in wishes.split()] or list(RELEASES)
    if unknown := set(releases) - set(RELEASES):
        sys.exit(f"not in the matrix: {', '.join(sorted(unknown))}; there are: {', '.join(RELEASES)}")
    return releases


def uv_environment(pip_configuration: str, environment: dict[str, str]) -> dict[str, str]:
    """Return the environment of uv, which finds packages where pip finds them.

    Args:
        pip_configuration: What `pip config list` prints.
        environment: This process's.
    """
    settings = {}
    for line in pip_configuration.splitlines():
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = value.strip("'\"")
    found = dict(environment)
    for setting, variable in (("index-url", "UV_DEFAULT_INDEX"), ("cert", "SSL_CERT_FILE")):
        if settings.get(setting):
            found.setdefault(variable, settings[setting])
    return found


def uv(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run uv, and return what it has said."""
    here = Path(sys.executable).with_name("uv")
    if not here.exists():
        raise NotAvailableError("uv is not installed here")
    pip = [sys.executable, "-m", "pip", "config", "list"]
    configuration = subprocess.run(pip, stdout=subprocess.PIPE, text=True, timeout=60).stdout
    try:
        return subprocess.run(
            [here, "--no-config", "--no-progress", *arguments],
            cwd=ROOT,
            env=uv_environment(configuration, dict(os.environ)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=INSTALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise NotAvailableError(f"uv did not end within {INSTALL_SECONDS} s") from None


def make_environment(release: str) -> str:
    """Make the environment of a release, with this checkout in it, and return its interpreter.

    Raises:
        NotAvailableError: The release cannot be installed on this machine.
        BrokenError: It can, but this package cannot be installed beside it.
    """
    directory = ROOT / f".venv-zenml-{release}"
    python = str(directory / "bin" / "python")
    zenml = f"zenml[local,server]=={release}"
    if not Path(python).exists():
        made = uv("venv", "--quiet", "--clear", "--python", sys.executable, str(directory))
        if made.returncode:
            raise NotAvailableError(f"no environment can be made:\n{made.stdout}")
    install = ("pip", "install", "--quiet", "--python", python, zenml)
    alone = uv(*install)
    if alone.returncode:
        raise NotAvailableError(f"it cannot be installed here:\n{alone.stdout}")
    together = uv(*install, "--editable", ".[all,dev]")
    if together.returncode and "No solution found" in together.stdout:
        raise BrokenError(f"this package cannot be installed beside it:\n{together.stdout}")
    if together.returncode:
        raise NotAvailableError(f"what the tests need cannot be installed here:\n{together.stdout}")
    return python


def run(release: str, suite: Iterable[str], processes: str, arguments: Iterable[str]) -> Outcome:
    """Run tests on a release.

    Args:
        release: The release.
        suite: The files and folders of tests. A client with another server runs what asks a server.
        processes: How many processes share the tests.
        arguments: Further ones of pytest.
    """
    client, _, server = release.partition(":")
    begin = time.monotonic()
    try:
        python = make_environment(client)
        server_python = make_environment(server) if server else python
    except NotAvailableError as error:
        return Outcome(release, f"NOT RUN, since {error}".rstrip())
    except BrokenError as error:
        return Outcome(release, f"FAILED: {error}".rstrip(), has_failed=True)
    made = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="release-") as directory:
        features, results = Path(directory, "features.json"), Path(directory, "results.xml")
        tests = [TEST_RELEASE] if server else list(suite)
        # Of the contract and of what asks a server all tests, and of the unit tests those of `make test`.
        pytest = [python, "-m", "pytest", "-q", "-m", "not deep or e2e or integration", f"--junitxml={results}"]
        pytest += ["-n", "0" if server else processes, "--dist", "loadscope", "--no-loadscope-reorder"]
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment = {**kept, "RELEASE_FEATURES": str(features), "RELEASE_SERVER": server_python}
        try:
            code = subprocess.run(
                [*pytest, *tests, *arguments], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, timeout=TEST_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            return Outcome(release, f"FAILED: its tests did not end within {TEST_SECONDS} s", has_failed=True)
        seconds = f"{made - begin:.0f} s to install, {time.monotonic() - made:.0f} s to run"
        said = f"{'FAILED' if code else 'passed'}: {counts(results)}, {seconds}"
        if code:
            return Outcome(release, said, has_failed=True)
        facts = subprocess.run([python, "-c", FACTS], stdout=subprocess.PIPE, check=True, timeout=60).stdout
        found = json.loads(features.read_text()) if features.exists() else {}
        return Outcome(release, said, column={**json.loads(facts), **found} if found else {})


def counts(results: Path) -> str:
    """Return how many tests passed, failed and were skipped, of pytest's report in XML."""
    if not results.exists():
        return "pytest left no report"
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(results).iter("testsuite"):
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    failed = totals["failures"] + totals["errors"]
    passed = totals["tests"] - failed - totals["skipped"]
    return f"{passed} passed, {failed} failed, {totals['skipped']} skipped"


def main(wishes: str, processes: str, *arguments: str) -> None:
    # The unit tests take as long as all of the others, and CI has run them already.
    suite = [TEST_RELEASE, CONTRACT] if "turn" in wishes.split() else [TEST_RELEASE, CONTRACT, UNIT]
    outcomes = []
    for release in chosen(wishes):
        print(f"ZenML {release}", flush=True)
        outcomes.append(run(release, suite, processes, arguments))
        print(outcomes[-1].said, flush=True)
    columns = {outcome.release: outcome.column for outcome in outcomes if outcome.column}
    if columns and not arguments:
        text = PAGE.read_text()
        rewritten = rewrite(text, columns, RELEASES)
        if rewritten != text:
            PAGE.write_text(rewritten)
            print(f"{PAGE.relative_to(ROOT)} has changed", flush=True)
    for outcome in outcomes:
        print(f"ZenML {outcome.release}: {outcome.said.splitlines()[0]}", flush=True)
    sys.exit(any(outcome.has_failed for outcome in outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
