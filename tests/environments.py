"""Environments made of what is installed here already: in a second, without a package index."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def without_this_package(directory: Path) -> str:
    """Make an environment that has all that this one has, but for this package, and return its interpreter.

    Args:
        directory: Where; it must not exist yet.
    """
    python, site = _make(directory)
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        # A `.pth` file may lead to this checkout.
        if not package.name.startswith("composite_logstore") and package.suffix != ".pth":
            (site / package.name).symlink_to(package)
    return python


def with_only(directory: Path, wheel: Path, *requirements: str) -> str:
    """Make an environment that has this package and what the requirements bring along, and return its interpreter.

    Beside the interpreter are the commands of all of them.

    Args:
        directory: Where; it must not exist yet.
        wheel: This package's, which is installed by pip.
        requirements: What pip would be given. Whatever they bring along has to be installed here, in a version that
            they allow; it is not installed again.
    """
    python, site = _make(directory)
    pip(python, "install", "--no-index", "--no-deps", "--no-compile", str(wheel))
    for found in _closure(site, requirements):
        if Path(str(found.locate_file(""))) == site:
            continue
        # One by one: packages of several distributions share folders, such as `opentelemetry`.
        for file in found.files or []:
            source, target = Path(str(found.locate_file(file))), site / file
            if ".." not in file.parts and source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(source)
        for entry in found.entry_points.select(group="console_scripts"):
            script = Path(python).with_name(entry.name)
            lines = f"import sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
            script.write_text(f"#!{python}\n{lines}")
            script.chmod(0o755)
    return python


def pip(python: str, *arguments: str) -> None:
    """Run this environment's pip for another."""
    here = [sys.executable, "-m", "pip", "--python", python, "--quiet", "--no-input", "--disable-pip-version-check"]
    execute(*here, *arguments)


def build_wheel(directory: Path) -> Path:
    """Build this package's wheel, without a package index."""
    here = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check", "wheel"]
    execute(*here, "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory), str(ROOT))
    (wheel,) = directory.glob("composite_logstore-*.whl")
    return wheel


def execute(*command: str, environment: dict[str, str] | None = None) -> str:
    """Run a command, and return what it has said."""
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _make(directory: Path) -> tuple[str, Path]:
    execute(sys.executable, "-m", "venv", "--without-pip", str(directory))
    (site,) = directory.glob("lib/*/site-packages")
    return str(directory / "bin" / "python"), site


def _closure(site: Path, requirements: Iterable[str]) -> list[Distribution]:
    """Return what the requirements name, and all that it needs: from the site first, then from this environment."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    wanted = list(map(Requirement, requirements))
    while wanted:
        wish = wanted.pop()
        name = re.sub(r"[-_.]+", "-", wish.name).lower()
        if name not in found:
            found[name] = next(iter(distributions(name=wish.name, path=[str(site)])), None) or distribution(wish.name)
        assert wish.specifier.contains(found[name].version, prereleases=True), f"{wish}: {found[name].version} is here"
        for extra in {"", *wish.extras} - {extra for of, extra in seen if of == name}:
            seen.add((name, extra))
            needed = map(Requirement, found[name].requires or [])
            wanted += [each for each in needed if each.marker is None or each.marker.evaluate({"extra": extra})]
    return list(found.values())
