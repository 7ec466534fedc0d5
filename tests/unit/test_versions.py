"""Which Pythons `make test-versions` finds."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from tests import versions


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has no Python yet but for what is put into `bin` and `pyenv`."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return tmp_path


def install(interpreter: Path, says: str, code: int = 0) -> str:
    interpreter.parent.mkdir(parents=True, exist_ok=True)
    interpreter.write_text(f"#!/bin/sh\necho {says}\nexit {code}\n")
    interpreter.chmod(0o755)
    return str(interpreter)


def test_the_versions_are_those_that_the_package_claims() -> None:
    assert versions.supported() == ["3.10", "3.11", "3.12", "3.13", "3.14"]


def test_one_on_the_path_comes_first(machine: Path) -> None:
    expected = install(machine / "bin" / "python3.12", "3.12.3")
    install(machine / "pyenv/versions/3.12.9/bin/python3.12", "3.12.9")
    assert versions.find("3.12") == (expected, "3.12.3")


@pytest.mark.parametrize(("says", "code"), [("3.12.3", 1), ("3.11.3", 0), ("command not found", 127)])
def test_one_that_does_not_work_is_passed_over(machine: Path, says: str, code: int) -> None:
    install(machine / "bin" / "python3.12", says, code)
    assert versions.find("3.12") is None
    expected = install(machine / "pyenv/versions/3.12.1/bin/python3.12", "3.12.1")
    assert versions.find("3.12") == (expected, "3.12.1")


def test_of_pyenv_s_the_latest_is_taken(machine: Path) -> None:
    for patch in (9, 10, 2):
        install(machine / f"pyenv/versions/3.12.{patch}/bin/python3.12", f"3.12.{patch}")
    install(machine / "pyenv/versions/3.13.0/bin/python3.13", "3.13.0")
    found = versions.find("3.12")
    assert found is not None
    assert found[1] == "3.12.10"


def test_what_is_not_there_is_said_and_is_no_error(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(version: str, *_: object) -> bool:
        ran.append(version)
        return version != "3.13"

    monkeypatch.setattr(versions, "run", run)
    monkeypatch.setattr(versions, "OWN", "3.11")
    for code, installed in ((0, ["3.10"]), (1, ["3.10", "3.13"])):
        for version in installed:
            install(machine / f"bin/python{version}", f"{version}.1")
        ran.clear()
        with pytest.raises(SystemExit) as ended:
            versions.main("", "2")
        assert ended.value.code == code
        assert ran == installed
        last = capsys.readouterr().out.splitlines()[-1]
        assert "3.10.1: passed" in last
        assert "3.12: not found" in last
        assert ("3.13.1: FAILED" if code else "3.13: not found") in last


def test_each_takes_its_turn(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(version: str, *_: object) -> bool:
        ran.append(version)
        return True

    monkeypatch.setattr(versions, "run", run)
    monkeypatch.setattr(versions, "OWN", "3.11")
    there = ["3.10", "3.12", "3.13"]
    for version in [*there, "3.11"]:
        install(machine / f"bin/python{version}", f"{version}.1")
    for days in range(2 * len(there)):

        class Clock:
            now = staticmethod(lambda _, days=days: datetime(2026, 12, 31, tzinfo=timezone.utc) + timedelta(days=days))

        monkeypatch.setattr(versions, "datetime", Clock)
        with pytest.raises(SystemExit):
            versions.main("turn", "2")
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.count("passed") == 1
        assert "3.14: not found" in last
    assert ran[: len(there)] == ran[len(there) :]
    assert sorted(ran) == sorted(there * 2)
