"""What is released, checked from the outside: `make release-check`.

Builds the source distribution, and the wheel from nothing but that. Then: both have the version that the changelog
describes, and complete metadata; each is installed into an empty environment of its own, with all extras; and the demo
runs against the wheel, on the oldest release of ZenML and on the newest one that is tested.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

from composite_logstore.zenml import NEWEST_TESTED, OLDEST_TESTED

ROOT = Path(__file__).resolve().parents[1]
STEP_SECONDS = 900
# What the servers of the demo need.
OF_THE_DEMO = ("psutil", "rotel")

# In isolation: with a checkout in sight, that would be imported.
LOADS = """
import composite_logstore, sys
from importlib.metadata import entry_points, version
assert "site-packages" in composite_logstore.__file__, composite_logstore.__file__
backends = [each.load() for each in entry_points(group="composite_logstore.backends")]
assert len(backends) > 4, backends
assert version("composite-logstore") == sys.argv[1], version("composite-logstore")
"""


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> None:
    """Run a command, and show what it says if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=STEP_SECONDS,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))} ended with {done.returncode}")


def uv(*arguments: str | Path) -> None:
    run(sys.executable, "-m", "uv", *arguments)


def say(text: str) -> None:
    print(text, flush=True)


def build(directory: Path) -> tuple[Path, Path]:
    """Build the source distribution, and the wheel from it, and return both."""
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", directory)
    (source,) = directory.glob("composite_logstore-*.tar.gz")
    with tarfile.open(source) as archive:
        if sys.version_info >= (3, 12):
            archive.extractall(directory, filter="data")
        else:
            archive.extractall(directory)
    unpacked = directory / source.name.removesuffix(".tar.gz")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory, cwd=unpacked)
    (wheel,) = directory.glob("composite_logstore-*.whl")
    return source, wheel


def check_changelog(version: str) -> None:
    """Exit unless the changelog has a dated section for a version, with something in it, and an empty one above."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    found = re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.+?)(?=^## |\Z)", changelog, re.M | re.S)
    if found is None or "\n- " not in found[1]:
        sys.exit(f"CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD' that says what is new")
    above = changelog[: found.start()].partition("## [Unreleased]")[2]
    if "\n- " in above:
        say(f"CHANGELOG.md still has entries above {version}: they are not part of it.")


def needed(name: str) -> str:
    """Return one of the requirements of the extra `dev`."""
    wishes = (Requirement(text) for text in requires("composite-logstore") or [])
    return next(f"{wish.name}{wish.specifier}" for wish in wishes if wish.name == name)


def install(python: Path, file: Path, *beside: str) -> None:
    """Make an environment with a distribution, all of its extras, and what else is named."""
    uv("venv", "--quiet", "--python", sys.executable, python.parents[1])
    uv("pip", "install", "--quiet", "--python", python, f"composite-logstore[all] @ {file.as_uri()}", *beside)
    uv("pip", "check", "--quiet", "--python", python)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="composite-logstore-release-") as name:
        directory = Path(name)
        source, wheel = build(directory)
        version = wheel.name.split("-")[1]
        say(f"built {source.name}, and {wheel.name} from it")
        check_changelog(version)
        say("the changelog has the version")
        tools = directory / "tools" / "bin" / "python"
        uv("venv", "--quiet", "--python", sys.executable, tools.parents[1])
        uv("pip", "install", "--quiet", "--python", tools, "twine>=6.1")
        run(tools, "-m", "twine", "check", "--strict", source, wheel)
        say("the metadata is complete")
        # The demo and its servers, without the package beside them.
        for folder in ("examples", "tests"):
            shutil.copytree(ROOT / folder, directory / "demo" / folder)
        for file, release in ((source, NEWEST_TESTED), (wheel, NEWEST_TESTED), (wheel, OLDEST_TESTED)):
            python = directory / f"{file.suffix} {release}" / "bin" / "python"
            install(python, file, f"zenml[local,server]=={release}", *map(needed, OF_THE_DEMO))
            run(python, "-I", "-c", LOADS, version)
            run(python.with_name("composite-logstore"), "--help", cwd=directory)
            say(f"{file.name} can be installed beside ZenML {release}")
            if file == wheel:
                run(python, "-m", "examples.demo", cwd=directory / "demo")
                say(f"{file.name} runs the demo on ZenML {release}")
        say(f"{version} can be released")


if __name__ == "__main__":
    main()
