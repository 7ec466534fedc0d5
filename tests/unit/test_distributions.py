"""Which distribution a package comes from, the same on every version of Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from composite_logstore import distributions_of


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(site: Path, name: str, files: list[str], top_level: str | None = None) -> None:
    metadata = site / f"{name.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    if top_level is not None:
        (metadata / "top_level.txt").write_text(top_level)
    (metadata / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).touch()


@pytest.mark.parametrize(
    "files",
    [
        ["own_package/__init__.py"],
        ["own_package/deeper/module.py", "own_package/py.typed"],
        ["own_package.py"],
        ["own_package.cpython-312-x86_64-linux-gnu.so"],
        ["own_package.abi3.so"],
    ],
)
def test_it_is_found_by_its_files(site: Path, files: list[str]) -> None:
    install(site, "own-distribution", files)
    install(site, "own-package", ["another/__init__.py", "another/own_package.py"])
    assert distributions_of("own_package") == {"own-distribution"}


def test_it_is_found_by_what_the_distribution_says(site: Path) -> None:
    # As an editable one, whose files lie elsewhere.
    install(site, "own-distribution", ["own_distribution.pth"], top_level="own_package\nown_other\n")
    assert distributions_of("own_package") == {"own-distribution"}
    assert distributions_of("own_other") == {"own-distribution"}


def test_a_namespace_belongs_to_many(site: Path) -> None:
    install(site, "first", ["own_package/first/__init__.py"])
    install(site, "second", ["own_package/second/__init__.py"])
    assert distributions_of("own_package") == {"first", "second"}


def test_what_is_not_installed_has_none(site: Path) -> None:
    install(site, "own-distribution", ["own_package/__init__.py"])
    assert distributions_of("own") == set()
    assert distributions_of("own_package-1") == set()
